"""The pages: methods, statuses and headers."""

import http.client
import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import NamedTuple

import pytest

from relay.net.endpoint import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Page, Query
from relay.ops.totals import NotReady
from relay.system.pages import health_pages, offload_pages

HOST = "127.0.0.1"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: dict[str, object]


class Switch:
    """An offload switch, which may fail."""

    def __init__(self) -> None:
        self.attached = True
        self.works = True

    def __call__(self, attached: bool) -> bool:  # noqa: FBT001 - as it is called
        if self.works:
            self.attached = attached
        return self.works


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def endpoint(switch: Switch) -> Iterator[HttpEndpoint]:
    """An address with all pages."""
    pages, actions, _ = offload_pages(
        lambda: {"xdp_attached": switch.attached}, lambda: {"clients": {"198.51.100.7:40001": {}}}, switch
    )
    opened = HttpEndpoint("control", Endpoint(HOST, 0), health_pages(tuple, lambda _: True) | pages, actions)
    yield opened
    opened.stop()


def ask(endpoint: HttpEndpoint, method: str, path: str, body: bytes | None = None) -> Answer:
    connection = http.client.HTTPConnection(HOST, endpoint.port, timeout=30)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        text = answer.read()
        return Answer(answer.status, dict(answer.getheaders()), json.loads(text) if text else {})
    finally:
        connection.close()


def test_get_returns_the_offload_state(endpoint: HttpEndpoint) -> None:
    assert ask(endpoint, "GET", "/offload")[::2] == (HTTPStatus.OK, {"xdp_attached": True})
    assert ask(endpoint, "GET", "/offload/channels").body == {"clients": {"198.51.100.7:40001": {}}}


@pytest.mark.parametrize("body", [None, b"", b"anything"])
def test_post_switches_the_offload_and_returns_the_new_state(
    endpoint: HttpEndpoint, switch: Switch, body: bytes | None
) -> None:
    assert ask(endpoint, "POST", "/offload/detach", body)[::2] == (HTTPStatus.OK, {"xdp_attached": False})
    assert not switch.attached
    assert ask(endpoint, "POST", "/offload/attach", body)[::2] == (HTTPStatus.OK, {"xdp_attached": True})
    assert switch.attached


def test_a_failed_switch_is_503_with_the_state(endpoint: HttpEndpoint, switch: Switch) -> None:
    switch.works = False
    assert ask(endpoint, "POST", "/offload/detach")[::2] == (HTTPStatus.SERVICE_UNAVAILABLE, {"xdp_attached": True})


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/offload", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/offload/channels", "GET, HEAD"),
        ("PUT", "/offload/attach", "POST"),
        ("GET", "/offload/attach", "POST"),
        ("GET", "/offload/detach", "POST"),
        ("HEAD", "/offload/detach", "POST"),
    ],
)
def test_an_unsupported_method_is_405_with_allow(
    endpoint: HttpEndpoint, switch: Switch, method: str, path: str, allowed: str
) -> None:
    answer = ask(endpoint, method, path)
    assert (answer.status, answer.headers["Allow"]) == (HTTPStatus.METHOD_NOT_ALLOWED, allowed)
    assert switch.attached


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("POST", "/"), ("GET", "/offload/"), ("POST", "/offload/stop")])
def test_an_unknown_page_is_404_with_the_existing_pages(endpoint: HttpEndpoint, method: str, path: str) -> None:
    answer = ask(endpoint, method, path)
    assert answer.status == HTTPStatus.NOT_FOUND
    assert answer.body["pages"] == [
        *("/healthz", "/livez", "/offload", "/offload/attach", "/offload/channels", "/offload/detach", "/readyz")
    ]
    assert "Allow" not in answer.headers


def test_head_is_get_without_a_body(endpoint: HttpEndpoint) -> None:
    answer, whole = ask(endpoint, "HEAD", "/offload"), ask(endpoint, "GET", "/offload")
    assert answer.body == {}
    assert answer.headers["Content-Length"] == whole.headers["Content-Length"]


def test_responses_are_not_cached(endpoint: HttpEndpoint) -> None:
    answer = ask(endpoint, "GET", "/offload")
    assert (answer.headers["Cache-Control"], answer.headers["Content-Type"]) == ("no-store", "application/json")


def test_an_address_without_actions_rejects_post() -> None:
    endpoint = HttpEndpoint("health", Endpoint(HOST, 0), health_pages(lambda: (NotReady.NO_IPV6_ROUTE,), lambda _: True))
    try:
        assert ask(endpoint, "POST", "/healthz").headers["Allow"] == "GET, HEAD"
        assert ask(endpoint, "POST", "/offload/detach").status == HTTPStatus.NOT_FOUND
        not_ready = ask(endpoint, "GET", "/readyz")
        assert (not_ready.status, not_ready.body["reasons"]) == (HTTPStatus.SERVICE_UNAVAILABLE, ["no_ipv6_route"])
    finally:
        endpoint.stop()


def echo(query: Query) -> Page:
    return Page(HTTPStatus.OK, dict(query))


@pytest.fixture
def echoing() -> Iterator[HttpEndpoint]:
    """An address with a page for the query and a plain-text page."""
    text = Page(HTTPStatus.OK, "# HELP ü\n", "text/plain; version=0.0.4; charset=utf-8")
    opened = HttpEndpoint("control", Endpoint(HOST, 0), {"/echo": echo, "/text": lambda _: text}, {"/do": echo})
    yield opened
    opened.stop()


@pytest.mark.parametrize(
    ("query", "seen"),
    [
        ("", {}),
        ("?", {}),
        ("?a=1&b=2", {"a": "1", "b": "2"}),
        ("?a=1&a=2", {"a": "1"}),
        ("?a=&b", {"a": "", "b": ""}),
        ("?directives=info,relay.core%3Ddebug", {"directives": "info,relay.core=debug"}),
        ("?a=x+y%20z", {"a": "x y z"}),
        ("?a=%C3%BC", {"a": "ü"}),
        ("?a=1;b=2", {"a": "1;b=2"}),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/echo"), ("POST", "/do")])
def test_a_page_gets_the_first_value_of_each_parameter(
    echoing: HttpEndpoint, query: str, seen: dict[str, str], method: str, path: str
) -> None:
    assert ask(echoing, method, path + query)[::2] == (HTTPStatus.OK, seen)


@pytest.mark.parametrize("query", ["&".join(f"a{number}=" for number in range(17)), "a=%FF", "%80=1"])
def test_a_query_too_long_or_not_utf_8_is_400(echoing: HttpEndpoint, query: str) -> None:
    answer = ask(echoing, "GET", f"/echo?{query}")
    assert answer.status == HTTPStatus.BAD_REQUEST
    assert "16 parameters" in str(answer.body["error"])


def test_a_page_may_set_its_content_type(echoing: HttpEndpoint) -> None:
    connection = http.client.HTTPConnection(HOST, echoing.port, timeout=30)
    connection.request("GET", "/text")
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.read().decode() == "# HELP ü\n"
    connection.close()
