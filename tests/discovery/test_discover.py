"""Missing public addresses come from the cloud's metadata service, or one line gives the reason."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest

from relay.config import DiscoveryMethod, UsageError
from relay.discovery import MAX_RESPONSE, PublicAddresses, discover
from relay.net.endpoint import Endpoint
from tests.support.clouds import Asked, Cloud, Said, aws, azure, gce, standing_in

GCE, AWS, AZURE = DiscoveryMethod
CLOUDS: list[tuple[DiscoveryMethod, Callable[[], Cloud], PublicAddresses]] = [
    (GCE, gce, PublicAddresses(IPv4Address("34.76.12.9"), IPv6Address("2600:1900:4010:9c::1"))),
    (AWS, aws, PublicAddresses(IPv4Address("54.93.12.9"), IPv6Address("2a05:d014:9c::1"))),
    (AZURE, azure, PublicAddresses(IPv4Address("20.50.12.9"), IPv6Address("2603:1020:9c::1"))),
]
GIVEN = PublicAddresses(IPv4Address("198.51.100.7"), IPv6Address("2001:db8::7"))


def found(
    method: DiscoveryMethod,
    at: tuple[str, int],
    *,
    ip4: bool = False,
    ip6: bool = False,
    has_ip6: bool = True,
    **patience: Any,  # noqa: ANN401 - of any type
) -> PublicAddresses:
    """Return the addresses found with a server, with some addresses given, and constants of the module by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ({"AT": Endpoint(*at), "SECONDS": 20, "has_ip6": lambda: has_ip6} | patience).items():
            patch.setattr(f"relay.discovery.{name}", value)
        return discover(method, GIVEN.public_ip4 if ip4 else None, GIVEN.public_ip6 if ip6 else None)


def refusal(method: DiscoveryMethod, at: tuple[str, int], **patience: Any) -> str:  # noqa: ANN401 - of any type
    """Return the one-line error of a failed discovery."""
    with pytest.raises(UsageError) as caught:
        found(method, at, **patience)
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(f"no public address by {method.value}: ")
    assert line.endswith("Else give --public-ip4-addr or --public-ip6-addr")
    assert len(line) < 300
    return line


@contextlib.contextmanager
def saying(*pieces: bytes, every: float = 0) -> Iterator[tuple[str, int]]:
    """Serve fixed bytes to each connection; with a pause, repeat the last piece endlessly."""
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
def test_both_addresses_are_found(method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: PublicAddresses) -> None:
    with standing_in(cloud()) as server:
        assert found(method, server.at) == addresses


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
def test_configured_addresses_are_kept(
    method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: PublicAddresses
) -> None:
    with standing_in(cloud()) as server:
        assert found(method, server.at, ip4=True) == (GIVEN.public_ip4, addresses.public_ip6)
        assert found(method, server.at, ip6=True) == (addresses.public_ip4, GIVEN.public_ip6)


@pytest.mark.parametrize("method", DiscoveryMethod)
def test_no_request_is_sent_for_configured_addresses(method: DiscoveryMethod) -> None:
    with standing_in(gce()) as server:
        assert found(method, server.at, ip4=True, ip6=True) == GIVEN
        assert server.asked == []


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
def test_a_machine_without_ipv6_gets_no_ipv6_address(
    method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: PublicAddresses
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
def test_a_single_address_suffices_and_internal_addresses_are_ignored(
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
def test_a_machine_without_a_public_address_is_an_error(method: DiscoveryMethod, cloud: Cloud) -> None:
    with standing_in(cloud) as server:
        assert "this machine has none there: assign it one" in refusal(method, server.at)


@pytest.mark.parametrize(
    ("method", "cloud"), [(asked, cloud()) for asked in DiscoveryMethod for is_, cloud, _ in CLOUDS if asked is not is_]
)
def test_the_metadata_service_of_another_cloud_is_an_error(method: DiscoveryMethod, cloud: Cloud) -> None:
    with standing_in(cloud) as server:
        assert "is this machine there?" in refusal(method, server.at)


@pytest.mark.parametrize(
    ("method", "cloud", "shown"),
    [
        (GCE, gce(ip4="relay.example"), "'relay.example' is not an address"),
        (GCE, gce(ip4="\x1b[31m" + "x" * 99), "\\x1b[31m"),
        (AWS, aws(ip4="<html>"), "'<html>' is not an address"),
        (AWS, aws(token="a token of two\nlines"), "is not a token"),
        (AWS, aws(token=""), "'' is not a token"),
        (AZURE, azure(basic=("nothing",)), "'nothing' is not an address"),
    ],
)
def test_an_invalid_address_is_shown_in_the_error(method: DiscoveryMethod, cloud: Cloud, shown: str) -> None:
    with standing_in(cloud) as server:
        assert shown in refusal(method, server.at)


@pytest.mark.parametrize("method", DiscoveryMethod)
@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (Said(302, "", (("Location", "http://127.0.0.1:1/"), ("Metadata-Flavor", "Google"))), "answers 302"),
        (Said(403, "off", (("Metadata-Flavor", "Google"),)), "answers 403"),
        (Said(200, "[" * 10000, (("Metadata-Flavor", "Google"),)), "is not"),
        (Said(200, "{", (("Metadata-Flavor", "Google"),)), "is not"),
    ],
)
def test_redirects_and_invalid_responses_are_errors(method: DiscoveryMethod, said: Said, shown: str) -> None:
    with standing_in(lambda _: said) as server:
        assert shown in refusal(method, server.at)
        assert {asked.target for asked in server.asked} <= {server.asked[0].target, "/latest/meta-data/public-ipv4"}


@pytest.mark.parametrize(("method", "cloud", "addresses"), CLOUDS)
@pytest.mark.parametrize("status", [410, 429, 500, 503])
def test_transient_errors_are_retried(
    method: DiscoveryMethod, cloud: Callable[[], Cloud], addresses: PublicAddresses, status: int
) -> None:
    well, answers = cloud(), itertools.count()

    def first_ill(asked: Asked) -> Said:
        return well(asked) if next(answers) else Said(status)

    with standing_in(first_ill) as server:
        assert found(method, server.at, FIRST_PAUSE=0.01) == addresses
        assert server.asked[0] == server.asked[1]


class Sleeper:
    """A fake sleep, with a time limit for two attempts."""

    seconds = 15
    first_pause = 10

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def refusal(self, method: DiscoveryMethod, at: tuple[str, int]) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.sleep", self.pauses.append)
            return refusal(method, at, SECONDS=self.seconds, FIRST_PAUSE=self.first_pause)


@pytest.mark.parametrize("method", DiscoveryMethod)
def test_lasting_errors_are_reported_after_the_time_limit(method: DiscoveryMethod) -> None:
    sleeper = Sleeper()
    with standing_in(lambda _: Said(503)) as server:
        line = sleeper.refusal(method, server.at)
        assert "no answer within 15 s (503 Service Unavailable)" in line or "gave no token" in line
        assert len(server.asked) == 2
    assert sleeper.pauses == [10]


@pytest.mark.parametrize("method", DiscoveryMethod)
def test_a_refused_connection_is_reported(method: DiscoveryMethod) -> None:
    sleeper = Sleeper()
    with socket.socket() as taken:
        # Bound without a listener: connections are refused.
        taken.bind(("127.0.0.1", 0))
        line = sleeper.refusal(method, taken.getsockname())
    why = "127.0.0.1 gave no answer within 15 s (Connection refused): is this machine there?"
    assert why in line or "hop limit" in line
    assert sleeper.pauses == [10]


OK = b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n"


@pytest.mark.parametrize("method", [GCE])
@pytest.mark.parametrize(
    ("pieces", "every"),
    [
        ([b""], 0),
        ([b"SSH-2.0-OpenSSH_9.2p1\r\n"], 0),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"], 0),
        ([b"\0" * 1000], 0),
        ([OK + b"X: " + b"y" * 2 * MAX_RESPONSE + b"\r\n\r\n"], 0),
        ([OK + b"\r\n" + b"1" * 4 * MAX_RESPONSE], 0),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], 0.01),
        ([OK + b"X: ", b"y"], 0.01),
        ([OK + b"\r\n", b"1"], 0.01),
        ([b"", b""], 0.01),
    ],
)
def test_garbage_long_and_slow_responses_are_bounded(method: DiscoveryMethod, pieces: list[bytes], every: float) -> None:
    with saying(*pieces, every=every) as at:
        line = refusal(method, at, SECONDS=0.1)
    assert "no answer within 0.1 s" in line or "gave no token" in line


def test_no_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with standing_in(gce()) as server:
        assert found(GCE, server.at).public_ip4 == IPv4Address("34.76.12.9")
