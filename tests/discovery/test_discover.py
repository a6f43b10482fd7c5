"""Public addresses that were not given come from the cloud that the machine runs in, or one line says why not."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from relay.config import BadUseError, DiscoveryMethod
from relay.discovery import metadata
from relay.discovery.discover import Addresses, discover
from relay.discovery.metadata import LONGEST, Metadata
from tests.discovery.stand_in import Asked, Cloud, Said, aws, azure, gce, standing_in

GCE, AWS, AZURE = DiscoveryMethod
CLOUDS: list[tuple[DiscoveryMethod, Callable[[], Cloud], Addresses]] = [
    (GCE, gce, Addresses(IPv4Address("34.76.12.9"), IPv6Address("2600:1900:4010:9c::1"))),
    (AWS, aws, Addresses(IPv4Address("54.93.12.9"), IPv6Address("2a05:d014:9c::1"))),
    (AZURE, azure, Addresses(IPv4Address("20.50.12.9"), IPv6Address("2603:1020:9c::1"))),
]
GIVEN = Addresses(IPv4Address("198.51.100.7"), IPv6Address("2001:db8::7"))


def found(
    method: DiscoveryMethod,
    at: tuple[str, int],
    *,
    ip4: bool = False,
    ip6: bool = False,
    has_ip6: bool = True,
    seconds: float = 20,
) -> Addresses:
    """Give what is found by asking somewhere, with some addresses given."""
    metadata = Metadata(method.value, at, seconds)
    given = (GIVEN.public_ip4 if ip4 else None, GIVEN.public_ip6 if ip6 else None)
    return discover(method, *given, metadata=metadata, has_ip6=lambda: has_ip6)


def refusal(method: DiscoveryMethod, at: tuple[str, int], seconds: float = 20) -> str:
    """Give the one line that says why nothing is found."""
    with pytest.raises(BadUseError) as caught:
        found(method, at, seconds=seconds)
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(f"no public address by {method.value}: ")
    assert line.endswith("Else give --public-ip4-addr or --public-ip6-addr")
    assert len(line) < 300
    return line


@contextlib.contextmanager
def saying(*pieces: bytes, every: float = 0) -> Iterator[tuple[str, int]]:
    """Say something to whoever connects, whatever they ask; the last of it again and again if there is a pause."""
    stop = threading.Event()

    def serve(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(4096)
                    for piece in pieces:
                        connection.sendall(piece)
                    while every and not stop.wait(every):
                        connection.sendall(pieces[-1])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield listening.getsockname()
        finally:
            stop.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
def test_both_addresses_are_found(method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: Addresses) -> None:
    with standing_in(cloud()) as server:
        assert found(method, server.at) == addresses


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
def test_what_was_given_stays(method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: Addresses) -> None:
    with standing_in(cloud()) as server:
        assert found(method, server.at, ip4=True) == (GIVEN.public_ip4, addresses.public_ip6)
        assert found(method, server.at, ip6=True) == (addresses.public_ip4, GIVEN.public_ip6)


@pytest.mark.parametrize("method", DiscoveryMethod)
def test_nobody_is_asked_for_what_is_given(method: DiscoveryMethod) -> None:
    with standing_in(gce()) as server:
        assert found(method, server.at, ip4=True, ip6=True) == GIVEN
        assert server.asked == []


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
def test_a_machine_without_ipv6_gets_no_such_address(
    method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: Addresses
) -> None:
    with standing_in(cloud()) as server:
        assert found(method, server.at, has_ip6=False) == (addresses.public_ip4, None)


@pytest.mark.parametrize(
    ("method", "cloud", "ip4", "ip6"),
    [
        (GCE, gce(ip6=None), "34.76.12.9", None),
        (GCE, gce(ip6=""), "34.76.12.9", None),
        (GCE, gce(ip6="fd20:1:2::3\n2600:1900:4010:9c::1"), "34.76.12.9", "2600:1900:4010:9c::1"),
        (GCE, gce(ip4="34.76.12.9\n"), "34.76.12.9", "2600:1900:4010:9c::1"),
        (GCE, gce(ip4=None), None, "2600:1900:4010:9c::1"),
        (GCE, gce(ip4=""), None, "2600:1900:4010:9c::1"),
        (AWS, aws(ip6=None), "54.93.12.9", None),
        (AWS, aws(ip4=None), None, "2a05:d014:9c::1"),
        (AZURE, azure(basic=("52.1.2.3",), standard=()), "52.1.2.3", None),
        (AZURE, azure(basic=("52.1.2.3", "2603:1020:9c::9"), standard=()), "52.1.2.3", "2603:1020:9c::9"),
        (AZURE, azure(standard=("20.50.12.9",)), "20.50.12.9", None),
        (AZURE, azure(standard=("10.0.0.9", "20.50.12.9")), "20.50.12.9", None),
    ],
)
def test_one_address_is_enough_and_internal_ones_are_none(
    method: DiscoveryMethod, cloud: Cloud, ip4: str | None, ip6: str | None
) -> None:
    with standing_in(cloud) as server:
        addresses = found(method, server.at)
    assert addresses == (ip4 and IPv4Address(ip4), ip6 and IPv6Address(ip6))


@pytest.mark.parametrize(
    ("method", "cloud"),
    [
        (GCE, gce(ip4=None, ip6=None)),
        (GCE, gce(ip4="", ip6="fd20:1:2::3")),
        (AWS, aws(ip4=None, ip6=None)),
        (AZURE, azure(standard=())),
        (AZURE, azure(standard=("10.0.0.9",))),
    ],
)
def test_a_machine_without_a_public_address_is_told_so(method: DiscoveryMethod, cloud: Cloud) -> None:
    with standing_in(cloud) as server:
        assert "this machine has none there: assign it one" in refusal(method, server.at)


@pytest.mark.parametrize(
    ("method", "cloud"), [(asked, cloud()) for asked in DiscoveryMethod for is_, cloud, _ in CLOUDS if asked is not is_]
)
def test_another_cloud_is_none_of_this_kind(method: DiscoveryMethod, cloud: Cloud) -> None:
    with standing_in(cloud) as server:
        assert "is this machine there?" in refusal(method, server.at)


@pytest.mark.parametrize(
    ("method", "cloud", "shown"),
    [
        (GCE, gce(ip4="relay.example"), "'relay.example' is no address"),
        (GCE, gce(ip4="2600:1900::1"), "'2600:1900::1' is no address"),
        (GCE, gce(ip4="\x1b[31m" + "x" * 99), "\\x1b[31m"),
        (GCE, gce(ip6="34.76.12.9"), "'34.76.12.9' is no address"),
        (AWS, aws(ip4="<html>"), "'<html>' is no address"),
        (AWS, aws(token="a token of two\nlines"), "is no token"),
        (AWS, aws(token=""), "'' is no token"),
        (AZURE, azure(basic=("nothing",)), "'nothing' is no address"),
    ],
)
def test_an_answer_that_is_no_address_is_shown(method: DiscoveryMethod, cloud: Cloud, shown: str) -> None:
    with standing_in(cloud) as server:
        assert shown in refusal(method, server.at)


@pytest.mark.parametrize("method", DiscoveryMethod)
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (Said(302, "", (("Location", "http://127.0.0.1:1/"), ("Metadata-Flavor", "Google"))), "answers 302"),
        (Said(403, "off", (("Metadata-Flavor", "Google"),)), "answers 403"),
        (Said(200, "[" * 10000, (("Metadata-Flavor", "Google"),)), "is no"),
        (Said(200, "{", (("Metadata-Flavor", "Google"),)), "is no"),
    ],
)
def test_what_is_no_answer_is_not_followed(method: DiscoveryMethod, said: Said, shown: str) -> None:
    with standing_in(lambda _: said) as server:
        assert shown in refusal(method, server.at)
        assert {asked.target for asked in server.asked} <= {server.asked[0].target, "/latest/meta-data/public-ipv4"}


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
@pytest.mark.parametrize("status", [410, 429, 500, 503])
def test_what_passes_is_asked_again(
    method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: Addresses, status: int
) -> None:
    well, answers = cloud(), itertools.count()

    def first_ill(asked: Asked) -> Said:
        return well(asked) if next(answers) else Said(status)

    with standing_in(first_ill) as server:
        assert found(method, server.at) == addresses
        assert server.asked[0] == server.asked[1]


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> float:
    """Give seconds in which there is time to ask a second time, also on a machine that has other work, and not a third."""
    monkeypatch.setattr(metadata, "_FIRST_PAUSE", 0.5)
    return 1.4


@pytest.mark.parametrize("method", DiscoveryMethod)
def test_what_does_not_pass_is_said_once_time_is_up(method: DiscoveryMethod, twice: float) -> None:
    with standing_in(lambda _: Said(503)) as server:
        line = refusal(method, server.at, seconds=twice)
        assert f"no answer within {twice} s (503 Service Unavailable)" in line or "gave no token" in line
        assert len(server.asked) == 2


@pytest.mark.parametrize("method", DiscoveryMethod)
def test_nobody_there_is_said(method: DiscoveryMethod, twice: float) -> None:
    with socket.socket() as taken:
        # Bound, and not listened at: nobody else gets it, and whoever connects is refused.
        taken.bind(("127.0.0.1", 0))
        line = refusal(method, taken.getsockname(), seconds=twice)
    why = f"127.0.0.1 gave no answer within {twice} s (Connection refused): is this machine there?"
    assert why in line or "hop limit" in line


OK = b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n"


@pytest.mark.parametrize("method", [GCE])
@pytest.mark.parametrize(
    ("pieces", "every"),
    [
        ([b""], 0),
        ([b"SSH-2.0-OpenSSH_9.2p1\r\n"], 0),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"], 0),
        ([b"\0" * 1000], 0),
        ([OK + b"X: " + b"y" * 2 * LONGEST + b"\r\n\r\n"], 0),
        ([OK + b"\r\n" + b"1" * 4 * LONGEST], 0),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], 0.01),
        ([OK + b"X: ", b"y"], 0.01),
        ([OK + b"\r\n", b"1"], 0.01),
        ([b"", b""], 0.01),
    ],
)
def test_who_says_nonsense_or_too_much_or_trickles_is_left(
    method: DiscoveryMethod, pieces: list[bytes], every: float
) -> None:
    with saying(*pieces, every=every) as at:
        line = refusal(method, at, seconds=0.5)
    assert "no answer within 0.5 s" in line or "gave no token" in line


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with standing_in(gce()) as server:
        assert found(GCE, server.at).public_ip4 == IPv4Address("34.76.12.9")
