"""The control address serves programs and people, and rejects requests of web sites in a browser."""

from collections.abc import Iterator
from http import HTTPStatus

import pytest

from relay.ops.http.endpoint import HttpEndpoint, Page
from relay.system.pages import health_pages
from tests.support.http_client import ask, say, serving


class Done:
    """Performed actions."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, _: object) -> Page:
        self.times += 1
        return Page(HTTPStatus.OK, {"times": self.times})


@pytest.fixture
def done() -> Done:
    return Done()


@pytest.fixture
def control(done: Done) -> Iterator[HttpEndpoint]:
    """An address with the host check of the control address."""
    with serving(health_pages(tuple, lambda _: True), {"/do": done}, ("Relay-1.example",)) as endpoint:
        yield endpoint


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost:9999", "localhost.", "127.0.0.1", "127.0.0.1:9999", "192.0.2.7:1", "[::1]", "[::1]:9999"),
        *("[2001:DB8::7]", "relay-1.example", "RELAY-1.example:80"),
    ],
)
def test_addresses_and_known_names_are_accepted(control: HttpEndpoint, host: str) -> None:
    assert ask(control, "GET", "/healthz", host=host).status == HTTPStatus.OK
    assert ask(control, "POST", "/do", host=host).status == HTTPStatus.OK


@pytest.mark.parametrize(
    "host",
    [
        *("attacker.example", "attacker.example:9999", "localhost.attacker.example", "127.0.0.1.attacker.example", "local"),
        *("127.1", "2130706433", "0x7f.1", "[relay-1.example]", "relay-1.example.attacker.example", "xn--localhost"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/healthz"), ("POST", "/do"), ("GET", "/nowhere"), ("PUT", "/do")])
def test_unknown_names_are_rejected(control: HttpEndpoint, done: Done, host: str, method: str, path: str) -> None:
    answer = ask(control, method, path, host=host)
    assert answer.status in {HTTPStatus.MISDIRECTED_REQUEST, HTTPStatus.BAD_REQUEST}
    assert "host" in answer.error.lower()
    assert not done.times


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "a:b",
        "[::1",
        "::1",
        "localhost:123456",
        "localhost:9999:1",
        "a b",
        "@",
        "user@127.0.0.1",
        "[:::1]",
        "[1.2]:80",
    ],
)
def test_a_missing_or_invalid_host_is_rejected(control: HttpEndpoint, host: str | None) -> None:
    assert ask(control, "GET", "/healthz", host=host).status in {HTTPStatus.BAD_REQUEST, HTTPStatus.MISDIRECTED_REQUEST}


def test_http_1_0_without_host_is_rejected(control: HttpEndpoint) -> None:
    said = say(control, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert said is not None
    assert said.status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize("host", ["localhost", "attacker.example"])
def test_a_target_with_a_host_is_rejected(control: HttpEndpoint, host: str) -> None:
    for named in ("localhost", "attacker.example"):
        assert ask(control, "GET", f"http://{named}/healthz", host=host).status in {400, 421}


@pytest.mark.parametrize(
    "headers",
    [
        ("Origin: https://attacker.example",),
        ("Origin: https://attacker.example", "Content-Type: application/x-www-form-urlencoded", "Content-Length: 0"),
        ("Origin: null",),
        ("Origin:",),
        ("Origin: http://127.0.0.1:8000",),
        ("Origin: http://127.0.0.1:9999.attacker.example",),
        ("Origin: http://127.0.0.1:9999", "Origin: https://attacker.example"),
        ("Origin: https://127.0.0.1:9999",),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site",),
        ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"),
        ("Origin: http://127.0.0.1:9999", "Sec-Fetch-Site: cross-site"),
    ],
)
def test_a_page_of_another_site_changes_nothing(control: HttpEndpoint, done: Done, headers: tuple[str, ...]) -> None:
    answer = ask(control, "POST", "/do", *headers, host="127.0.0.1:9999")
    assert answer.status == HTTPStatus.FORBIDDEN
    assert "another site" in answer.error
    assert not done.times


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Content-Type: application/x-www-form-urlencoded", "Content-Length: 0"),
        ("Origin: http://127.0.0.1:9999",),
        ("Origin: http://127.0.0.1:9999", "Sec-Fetch-Site: same-origin"),
        ("Sec-Fetch-Site: none",),
    ],
)
def test_curl_and_pages_of_the_address_are_accepted(control: HttpEndpoint, done: Done, headers: tuple[str, ...]) -> None:
    assert ask(control, "POST", "/do", *headers, host="127.0.0.1:9999").status == HTTPStatus.OK
    assert done.times == 1


def test_pages_of_other_sites_cannot_read_responses(control: HttpEndpoint) -> None:
    answer = ask(control, "GET", "/healthz", "Origin: https://attacker.example")
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
    # The preflight request of a browser.
    assert ask(control, "OPTIONS", "/do", "Access-Control-Request-Method: POST").status == HTTPStatus.METHOD_NOT_ALLOWED
