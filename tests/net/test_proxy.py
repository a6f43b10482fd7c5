"""Proxies from the environment, and a tunnel or an error for any response of the proxy."""

import base64
import socket
import ssl
import threading
from collections.abc import Callable

import pytest

from relay.net.dial import Dialer
from relay.net.proxy import Proxy, ProxyCredentials
from tests.support.connect_proxy import ConnectProxy
from tests.support.raw_server import Peer, RawServer, Recital
from tests.support.requirements import needs_ipv6
from tests.support.scripted_portal import Authority

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
    """Return the proxy for a host from an environment."""

    def proxy_for(host: str, *, is_tls: bool = True, **environment: str) -> Proxy | None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Proxy.from_environment(host, is_tls=is_tls)

    return proxy_for


Choose = Callable[..., Proxy | None]

SECURE, PLAIN = Proxy("secure.example", 3128), Proxy("plain.example", 8080)
BOTH = {"HTTPS_PROXY": "http://secure.example:3128", "HTTP_PROXY": "http://plain.example:8080"}


def test_without_an_environment_variable_no_proxy_is_used(proxy_for: Choose) -> None:
    assert proxy_for("portal.example", is_tls=True) is None
    assert proxy_for("portal.example", is_tls=False) is None


@pytest.mark.parametrize("spell", [str.upper, str.lower])
@pytest.mark.parametrize(("is_tls", "chosen"), [(True, SECURE), (False, PLAIN)])
def test_http_and_https_have_separate_variables(
    proxy_for: Choose, spell: Callable[[str], str], *, is_tls: bool, chosen: Proxy
) -> None:
    environment = {spell(name): value for name, value in BOTH.items()}
    assert proxy_for("portal.example", is_tls=is_tls, **environment) == chosen


@pytest.mark.parametrize(("is_tls", "name"), [(True, "HTTP_PROXY"), (False, "HTTPS_PROXY")])
def test_the_variable_of_the_other_scheme_is_ignored(proxy_for: Choose, name: str, *, is_tls: bool) -> None:
    assert proxy_for("portal.example", is_tls=is_tls, **{name: "http://proxy.example:3128"}) is None


def test_lower_case_variables_take_precedence(proxy_for: Choose) -> None:
    environment = {"HTTPS_PROXY": "http://upper.example", "https_proxy": "http://lower.example"}
    assert proxy_for("portal.example", **environment) == Proxy("lower.example", 80)


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
def test_an_empty_variable_means_no_proxy(proxy_for: Choose, name: str) -> None:
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
def test_no_proxy_excludes_hosts(proxy_for: Choose, spelling: str, no_proxy: str, host: str, *, goes_direct: bool) -> None:
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
def test_a_proxy_url_is_parsed(proxy_for: Choose, url: str, proxy: Proxy) -> None:
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
def test_credentials_are_parsed_into_the_authorization_header(proxy_for: Choose, scheme: str, login: str, pair: str) -> None:
    proxy = proxy_for("portal.example", HTTPS_PROXY=f"{scheme}{login}@proxy.example:3128")
    assert proxy is not None
    assert (proxy.host, proxy.port) == ("proxy.example", 3128)
    assert proxy.credentials is not None
    assert proxy.credentials.expose() == "Basic " + base64.b64encode(pair.encode()).decode()


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
def test_an_invalid_proxy_is_an_error_with_the_variable_and_no_password(
    proxy_for: Choose, url: str, variable: str, *, is_tls: bool
) -> None:
    with pytest.raises(ValueError, match=f"^{variable} ") as caught:
        proxy_for("portal.example", is_tls=is_tls, **{variable: url.format("user:hunter2")})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("password", ["[hunter2]", "hunter2[", "hunter2]", "hunter2℀", "#hunter2", "/hunter2", "?hunter2"])
def test_a_password_with_unescaped_characters_is_not_shown(proxy_for: Choose, password: str) -> None:
    """The error message may be logged."""
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
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_any_2xx_opens_the_tunnel_and_later_bytes_are_of_the_host(answer: bytes) -> None:
    with RawServer(after_request(answer + b"\r\n\r\nhello")) as server, dial(proxy_at(server)) as tunnel:
        assert tunnel.recv(4) == b"\r\n\r\n"
        assert tunnel.recv(100) == b"hello"


@pytest.mark.parametrize(
    ("host", "authority"),
    [("portal.example", "portal.example:8443"), ("192.0.2.1", "192.0.2.1:8443"), ("2001:db8::1", "[2001:db8::1]:8443")],
)
def test_the_connect_request_contains_only_the_host_and_port(host: str, authority: str) -> None:
    with RawServer(after_request(b"HTTP/1.1 200 OK\r\n\r\n")) as server:
        dial(proxy_at(server), host, 8443).close()
        request = server.wait_for_peer().request.decode()
    assert request.split("\r\n") == [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]


@pytest.mark.parametrize("status", [300, 302, 400, 403, 407, 502, 999])
def test_any_other_status_is_an_error_with_the_status(status: int) -> None:
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
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\xff\xfe 200 \r\n\r\n",
    ],
)
def test_an_invalid_response_is_an_error_with_a_reason(garbage: bytes) -> None:
    with RawServer(after_request(garbage)) as server, pytest.raises(ConnectionError, match="the proxy's answer is no HTTP"):
        dial(proxy_at(server))


@pytest.mark.parametrize(
    "refrain", [b"X-Padding: " + b"x" * 89 + b"\r\n", b"x", b" \r\n"], ids=["headers", "a line", "lines of blanks"]
)
def test_an_endless_response_is_read_up_to_the_limit(refrain: bytes) -> None:
    endless = Recital("endless", b"HTTP/1.1 200 OK\r\n", refrain * 50)
    with RawServer(endless) as server:
        with pytest.raises(ConnectionError, match="the proxy sent more than 16384 bytes"):
            dial(proxy_at(server))
        assert server.peer_closed.wait(LONG)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\n\r"])
def test_a_close_by_the_proxy_is_an_error_with_a_reason(said: bytes) -> None:
    def answer_and_close(peer: Peer) -> None:
        peer.read_head()
        peer.send(said)

    with RawServer(answer_and_close) as server, pytest.raises(ConnectionError, match="the proxy closed the connection"):
        dial(proxy_at(server))


def test_an_unreachable_proxy_is_a_regular_error() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            dial(Proxy(*bound.getsockname()))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def answer_once(peer: Peer) -> None:
    """Echo the received bytes in upper case."""
    peer.send(peer.socket.recv(100).upper())
    peer.wait()


@pytest.mark.parametrize("wants_credentials", [False, True])
@pytest.mark.parametrize("is_tls", [False, True])
def test_a_tunnel_reaches_the_host_and_tls_is_end_to_end(
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
def test_a_tunnel_reaches_an_ipv6_host(authority: Authority) -> None:
    tls = ssl.create_default_context(cafile=authority.ca_file)
    with (
        RawServer(answer_once, host="::1", tls=authority.server_context()) as server,
        ConnectProxy() as stands_between,
        dial(proxy_at(stands_between), "::1", server.port, tls) as tunnel,
    ):
        tunnel.sendall(b"hello")
        assert tunnel.recv(100) == b"HELLO"


def test_bytes_of_the_host_before_a_request_are_received() -> None:
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
def test_a_rejection_by_the_proxy_is_an_error_without_traffic_to_the_host(
    credentials: ProxyCredentials | None, status: int
) -> None:
    with RawServer(answer_once) as server, ConnectProxy((USER, PASSWORD)) as stands_between:
        stands_between.refuses = True
        with pytest.raises(ConnectionError, match=f"the proxy answered {status}") as caught:
            dial(proxy_at(stands_between, credentials), "127.0.0.1", server.port)
        assert "d3Jv" not in str(caught.value)
        assert (stands_between.tunnels, server.peers) == (0, [])


def test_a_certificate_of_the_proxy_is_not_accepted_for_the_host(authority: Authority) -> None:
    """A proxy that intercepts TLS is an attacker."""
    tls = ssl.create_default_context(cafile=authority.ca_file)
    context = authority.server_context()

    def intercept(peer: Peer) -> None:
        peer.read_head()
        peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        peer.secure(context)

    with RawServer(intercept) as server, pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        dial(proxy_at(server), "portal.example", 443, tls)


def test_the_connect_request_does_not_wait_for_bytes_of_the_proxy() -> None:
    """The client sends first."""
    heard = threading.Event()

    def listen(peer: Peer) -> None:
        peer.read_head()
        heard.set()
        peer.send(b"HTTP/1.1 503 Later\r\n\r\n")
        peer.wait()

    with RawServer(listen) as server, pytest.raises(ConnectionError, match="the proxy answered 503"):
        dial(proxy_at(server))
    assert heard.is_set()
