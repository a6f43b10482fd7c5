"""The way through a proxy: which one the environment names, and a tunnel or an error whatever it answers."""

import base64
import socket
import ssl
import threading
from collections.abc import Callable

import pytest

from relay.net.dial import Dialer
from relay.net.proxy import Proxy, ProxyCredentials
from tests.conftest import needs_ipv6
from tests.connect_proxy import ConnectProxy
from tests.raw_server import Peer, RawServer, Recital
from tests.scripted_portal import Authority

LONG = 30.0
USER, PASSWORD = "user", "correct horse"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

Environment = dict[str, str]


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "request_method"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def proxy_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Proxy | None]:
    """Give the proxy that an environment has for a host."""

    def proxy_for(host: str, *, is_tls: bool = True, **environment: str) -> Proxy | None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Proxy.from_environment(host, is_tls=is_tls)

    return proxy_for


Choose = Callable[..., Proxy | None]

SECURE, PLAIN = Proxy("secure.example", 3128), Proxy("plain.example", 8080)
BOTH = {"HTTPS_PROXY": "http://secure.example:3128", "HTTP_PROXY": "http://plain.example:8080"}


def test_without_one_in_the_environment_there_is_none(proxy_for: Choose) -> None:
    assert proxy_for("portal.example", is_tls=True) is None
    assert proxy_for("portal.example", is_tls=False) is None


@pytest.mark.parametrize("spell", [str.upper, str.lower])
@pytest.mark.parametrize(("is_tls", "chosen"), [(True, SECURE), (False, PLAIN)])
def test_each_kind_of_connection_has_its_own(
    proxy_for: Choose, spell: Callable[[str], str], *, is_tls: bool, chosen: Proxy
) -> None:
    environment = {spell(name): value for name, value in BOTH.items()}
    assert proxy_for("portal.example", is_tls=is_tls, **environment) == chosen


@pytest.mark.parametrize(("is_tls", "name"), [(True, "HTTP_PROXY"), (False, "HTTPS_PROXY")])
def test_the_other_kinds_is_not_taken(proxy_for: Choose, name: str, *, is_tls: bool) -> None:
    assert proxy_for("portal.example", is_tls=is_tls, **{name: "http://proxy.example:3128"}) is None


def test_lower_case_is_stronger_as_everywhere_else(proxy_for: Choose) -> None:
    environment = {"HTTPS_PROXY": "http://upper.example", "https_proxy": "http://lower.example"}
    assert proxy_for("portal.example", **environment) == Proxy("lower.example", 80)


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
def test_an_empty_one_is_none(proxy_for: Choose, name: str) -> None:
    assert proxy_for("portal.example", **{name: ""}) is None


@pytest.mark.parametrize("spelling", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize(
    ("no_proxy", "host", "goes_direct"),
    [
        ("portal.example", "portal.example", True),
        ("portal.example", "PORTAL.example", True),
        ("other.example, portal.example", "portal.example", True),
        ("example", "portal.example", True),
        (".example", "portal.example", True),
        ("*", "portal.example", True),
        ("127.0.0.1", "127.0.0.1", True),
        ("other.example", "portal.example", False),
        ("portal.example", "not-portal.example", False),
        ("portal.example", "portal.example.org", False),
        ("", "portal.example", False),
    ],
)
def test_hosts_can_be_left_out(proxy_for: Choose, spelling: str, no_proxy: str, host: str, *, goes_direct: bool) -> None:
    for is_tls in (True, False):
        assert (proxy_for(host, is_tls=is_tls, **{**BOTH, spelling: no_proxy}) is None) == goes_direct


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://proxy.example:3128", Proxy("proxy.example", 3128)),
        ("http://proxy.example:3128/", Proxy("proxy.example", 3128)),
        ("http://proxy.example", Proxy("proxy.example", 80)),
        ("HTTP://proxy.example", Proxy("proxy.example", 80)),
        ("proxy.example:3128", Proxy("proxy.example", 3128)),
        ("proxy.example", Proxy("proxy.example", 80)),
        ("192.0.2.1:3128", Proxy("192.0.2.1", 3128)),
        ("http://[2001:db8::1]:3128", Proxy("2001:db8::1", 3128)),
    ],
)
def test_a_proxy_is_read(proxy_for: Choose, url: str, proxy: Proxy) -> None:
    assert proxy_for("portal.example", HTTPS_PROXY=url) == proxy


@pytest.mark.parametrize(
    ("login", "pair"),
    [
        (f"{USER}:correct%20horse", f"{USER}:{PASSWORD}"),
        ("user:p%40ss%3Aw%2Frd", "user:p@ss:w/rd"),
        ("user:pass:word", "user:pass:word"),
        ("us%C3%A9r:p%E2%82%AC", "usér:p€"),
        ("user", "user:"),
        ("user:", "user:"),
        (":password", ":password"),
    ],
)
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_credentials_are_read_and_kept_as_they_are_sent(proxy_for: Choose, scheme: str, login: str, pair: str) -> None:
    proxy = proxy_for("portal.example", HTTPS_PROXY=f"{scheme}{login}@proxy.example:3128")
    assert proxy is not None
    assert (proxy.host, proxy.port) == ("proxy.example", 3128)
    assert proxy.credentials is not None
    assert proxy.credentials.reveal() == "Basic " + base64.b64encode(pair.encode()).decode()


def test_credentials_are_never_shown(proxy_for: Choose) -> None:
    proxy = proxy_for("portal.example", HTTPS_PROXY=f"http://{USER}:correct%20horse@proxy.example:3128")
    for shown in (repr(proxy), str(proxy), f"{proxy}", repr([proxy]), f"{proxy!r:}"):
        assert "proxy.example" in shown
        for secret in (USER, "correct", "horse", BASIC, BASIC.removeprefix("Basic ")):
            assert secret not in shown


@pytest.mark.parametrize(
    "url",
    [
        "https://{}@proxy.example:3128",
        "socks5://{}@proxy.example:1080",
        "http://{}@:3128",
        "http://{}@",
        "http://{}@proxy.example:port",
        "http://{}@proxy.example:65536",
        "http://{}@proxy.example:-1",
        "http://{}@[::1",
        "http://{}@[proxy]:3128",
    ],
)
@pytest.mark.parametrize(("is_tls", "variable"), [(True, "HTTPS_PROXY"), (False, "HTTP_PROXY")])
def test_what_is_no_http_proxy_is_an_error_that_names_the_variable_and_no_password(
    proxy_for: Choose, url: str, variable: str, *, is_tls: bool
) -> None:
    with pytest.raises(ValueError, match=f"^{variable} ") as caught:
        proxy_for("portal.example", is_tls=is_tls, **{variable: url.format("user:hunter2")})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("password", ["[hunter2]", "hunter2[", "hunter2]", "hunter2℀", "#hunter2", "/hunter2", "?hunter2"])
def test_a_password_with_characters_that_it_should_not_have_is_not_shown_either(proxy_for: Choose, password: str) -> None:
    """Whoever forgot to escape them finds the message in a log, and so may others."""
    try:
        shown = repr(proxy_for("portal.example", HTTPS_PROXY=f"http://user:{password}@proxy.example:3128"))
    except ValueError as error:
        shown = str(error)
    assert "hunter2" not in shown


def dial(proxy: Proxy, host: str = "portal.example", port: int = 443, tls: ssl.SSLContext | None = None) -> socket.socket:
    return Dialer(host, port, tls, proxy).dial(LONG, lambda _: None)


def proxy_at(server: RawServer, credentials: ProxyCredentials | None = None) -> Proxy:
    return Proxy("127.0.0.1", server.port, credentials)


def after_request(answer: bytes) -> Recital:
    return Recital("proxy", answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nProxy-Agent: a proxy\r\nVia: another\r\n\r\n",
        b"HTTP/1.1 200\r\n\r\n",
        b"HTTP/1.1 200 \r\n\r\n",
        b"HTTP/1.1 299 Well\r\n\r\n",
    ],
)
def test_any_success_opens_the_tunnel_and_what_follows_is_not_the_proxys(answer: bytes) -> None:
    with RawServer(after_request(answer + b"\r\n\r\nhello")) as server, dial(proxy_at(server)) as tunnel:
        assert tunnel.recv(4) == b"\r\n\r\n"
        assert tunnel.recv(100) == b"hello"


@pytest.mark.parametrize(
    ("host", "authority"),
    [("portal.example", "portal.example:8443"), ("192.0.2.1", "192.0.2.1:8443"), ("2001:db8::1", "[2001:db8::1]:8443")],
)
def test_the_request_is_for_the_host_and_its_port_and_has_no_more_than_it_needs(host: str, authority: str) -> None:
    with RawServer(after_request(b"HTTP/1.1 200 OK\r\n\r\n")) as server:
        dial(proxy_at(server), host, 8443).close()
        request = server.wait_for_peer().request.decode()
    assert request.split("\r\n") == [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]


@pytest.mark.parametrize("status", [100, 101, 199, 300, 302, 400, 403, 407, 502, 999])
def test_any_other_answer_is_an_error_that_has_its_number(status: int) -> None:
    answer = f"HTTP/1.1 {status} Whatever\r\nContent-Length: 5\r\n\r\nwords".encode()
    with (
        RawServer(after_request(answer)) as server,
        pytest.raises(ConnectionError, match=rf"^the proxy answered {status}$"),
    ):
        dial(proxy_at(server))


@pytest.mark.parametrize(
    "garbage",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
        b"220 mail.example ESMTP\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 -20 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\xff\xfe 200 \r\n\r\n",
    ],
)
def test_garbage_is_an_error_that_says_so(garbage: bytes) -> None:
    with RawServer(after_request(garbage)) as server, pytest.raises(ConnectionError, match="the proxy's answer is no HTTP"):
        dial(proxy_at(server))


@pytest.mark.parametrize(
    "refrain", [b"X-Padding: " + b"x" * 89 + b"\r\n", b"x", b" \r\n"], ids=["headers", "a line", "lines of blanks"]
)
def test_an_answer_without_end_is_read_as_far_as_is_reasonable(refrain: bytes) -> None:
    endless = Recital("endless", b"HTTP/1.1 200 OK\r\n", refrain * 50)
    with RawServer(endless) as server:
        with pytest.raises(ConnectionError, match="the proxy's answer does not end"):
            dial(proxy_at(server))
        assert server.peer_closed.wait(LONG)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r"])
def test_a_proxy_that_closes_is_an_error_that_says_so(said: bytes) -> None:
    def answer_and_close(peer: Peer) -> None:
        peer.read_head()
        peer.send(said)

    with RawServer(answer_and_close) as server, pytest.raises(ConnectionError, match="the proxy closed the connection"):
        dial(proxy_at(server))


def test_no_proxy_is_an_error_like_any_other() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            dial(Proxy(*bound.getsockname()))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def answer_once(peer: Peer) -> None:
    """Say back what was said, in capitals."""
    peer.send(peer.socket.recv(100).upper())
    peer.wait()


@pytest.mark.parametrize("wants_credentials", [False, True])
@pytest.mark.parametrize("is_tls", [False, True])
def test_a_tunnel_leads_to_the_host_and_tls_is_with_the_host(
    proxy_for: Choose, authority: Authority, *, is_tls: bool, wants_credentials: bool
) -> None:
    server_tls = authority.server_context() if is_tls else None
    tls = ssl.create_default_context(cafile=authority.ca_file) if is_tls else None
    with (
        RawServer(answer_once, tls=server_tls) as server,
        ConnectProxy((USER, PASSWORD) if wants_credentials else None) as stands_between,
    ):
        url = stands_between.url.replace(" ", "%20")
        proxy = proxy_for("localhost", is_tls=is_tls, **{"HTTPS_PROXY" if is_tls else "HTTP_PROXY": url})
        assert proxy is not None
        with dial(proxy, "localhost", server.port, tls) as tunnel:
            tunnel.sendall(b"hello")
            assert tunnel.recv(100) == b"HELLO"
        (request,) = stands_between.requests
        assert request.line == f"CONNECT localhost:{server.port} HTTP/1.1"
        assert request.authorization == (BASIC if wants_credentials else None)
        assert server.peer_closed.wait(LONG)


@needs_ipv6
def test_a_tunnel_leads_to_a_host_of_ipv6(authority: Authority) -> None:
    tls = ssl.create_default_context(cafile=authority.ca_file)
    with (
        RawServer(answer_once, host="::1", tls=authority.server_context()) as server,
        ConnectProxy() as stands_between,
        dial(proxy_at(stands_between), "::1", server.port, tls) as tunnel,
    ):
        tunnel.sendall(b"hello")
        assert tunnel.recv(100) == b"HELLO"


def test_a_host_that_speaks_first_is_heard() -> None:
    def greet(peer: Peer) -> None:
        peer.send(b"hello")
        peer.wait()

    with (
        RawServer(greet) as server,
        ConnectProxy() as stands_between,
        dial(proxy_at(stands_between), "127.0.0.1", server.port) as tunnel,
    ):
        assert tunnel.recv(100) == b"hello"


@pytest.mark.parametrize(
    ("credentials", "status"),
    [(None, 407), (ProxyCredentials("Basic d3Jvbmc6d3Jvbmc="), 407), (ProxyCredentials(BASIC), 403)],
    ids=["no credentials", "wrong credentials", "forbidden"],
)
def test_a_proxy_that_lets_nobody_through_is_an_error_and_the_host_hears_nothing(
    credentials: ProxyCredentials | None, status: int
) -> None:
    with RawServer(answer_once) as server, ConnectProxy((USER, PASSWORD)) as stands_between:
        stands_between.refuses = True
        with pytest.raises(ConnectionError, match=f"the proxy answered {status}") as caught:
            dial(proxy_at(stands_between, credentials), "127.0.0.1", server.port)
        assert "d3Jv" not in str(caught.value)
        assert (stands_between.tunnels, server.peers) == (0, [])


def test_a_certificate_of_the_proxy_is_none_of_the_host(authority: Authority) -> None:
    """A proxy that looks into the tunnel is no proxy but an attacker."""
    tls = ssl.create_default_context(cafile=authority.ca_file)
    context = authority.server_context()

    def intercept(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        peer.secure(context)

    with RawServer(intercept) as server, pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        dial(proxy_at(server), "portal.example", 443, tls)


def test_a_request_goes_out_while_the_proxy_says_nothing() -> None:
    """It is not waited for before it is asked."""
    heard = threading.Event()

    def listen(peer: Peer) -> None:
        peer.read_head()
        heard.set()
        peer.send(b"HTTP/1.1 503 Later\r\n\r\n")
        peer.wait()

    with RawServer(listen) as server, pytest.raises(ConnectionError, match="the proxy answered 503"):
        dial(proxy_at(server))
    assert heard.is_set()
