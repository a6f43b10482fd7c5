"""The portal's URL, token and upgrade request."""

import dataclasses
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import Family
from relay.core.portal.commands import Connect
from relay.core.portal.endpoint import PortalToken, PortalUrl
from tests.support.portal_channel import CONFIG, HOUR, SECRET, TOKEN, Driver, driver_with, the, well


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (
            "wss://api.firezone.dev",
            PortalUrl("wss://api.firezone.dev/relay/websocket", "api.firezone.dev", 443, is_tls=True),
        ),
        (
            "wss://api.firezone.dev/",
            PortalUrl("wss://api.firezone.dev/relay/websocket", "api.firezone.dev", 443, is_tls=True),
        ),
        ("https://portal.example", PortalUrl("wss://portal.example/relay/websocket", "portal.example", 443, is_tls=True)),
        ("ws://portal.example", PortalUrl("ws://portal.example/relay/websocket", "portal.example", 80, is_tls=False)),
        ("http://portal.example", PortalUrl("ws://portal.example/relay/websocket", "portal.example", 80, is_tls=False)),
        ("ws://10.0.0.1:8081", PortalUrl("ws://10.0.0.1:8081/relay/websocket", "10.0.0.1", 8081, is_tls=False)),
        ("wss://[2001:db8::1]", PortalUrl("wss://[2001:db8::1]/relay/websocket", "2001:db8::1", 443, is_tls=True)),
        (
            "wss://[2001:db8::1]:8443/",
            PortalUrl("wss://[2001:db8::1]:8443/relay/websocket", "2001:db8::1", 8443, is_tls=True),
        ),
        (
            "wss://portal.example/a/b",
            PortalUrl("wss://portal.example/a/b/relay/websocket", "portal.example", 443, is_tls=True),
        ),
        (
            "wss://portal.example/a//",
            PortalUrl("wss://portal.example/a/relay/websocket", "portal.example", 443, is_tls=True),
        ),
        (" \twss://portal.example\n", PortalUrl("wss://portal.example/relay/websocket", "portal.example", 443, is_tls=True)),
        ("WSS://portal.example", PortalUrl("wss://portal.example/relay/websocket", "portal.example", 443, is_tls=True)),
        ("wss://portal.example?", PortalUrl("wss://portal.example/relay/websocket", "portal.example", 443, is_tls=True)),
        (
            "wss://portal.example:65535",
            PortalUrl("wss://portal.example:65535/relay/websocket", "portal.example", 65535, is_tls=True),
        ),
    ],
)
def test_the_websocket_path_for_relays_is_appended_to_the_url(text: str, url: PortalUrl) -> None:
    assert PortalUrl.parse(text) == url


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "begin with wss://"),
        ("api.firezone.dev", "begin with wss://"),
        ("api.firezone.dev:443", "begin with wss://"),
        ("ftp://api.firezone.dev", "begin with wss://"),
        ("//api.firezone.dev", "begin with wss://"),
        ("wss:/api.firezone.dev", "names no host"),
        ("wss://", "names no host"),
        ("wss://:443", "names no host"),
        ("wss:///relay", "names no host"),
        ("wss://user@portal.example", "user or a password"),
        ("wss://user:password@portal.example", "user or a password"),
        ("wss://:@portal.example", "user or a password"),
        ("wss://portal.example?token=x", "query or a fragment"),
        ("wss://portal.example/#x", "query or a fragment"),
    ],
)
def test_an_invalid_portal_url_is_rejected_with_a_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PortalUrl.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "wss://portal example",
        "wss://portal.example/a b",
        "wss://portal.example/\x00",
        "wss://portal.example/ä",
        "wss://portal.example:x",
        "wss://portal.example:65536",
        "wss://portal.example:-1",
        "wss://[2001:db8::1",
        "wss://[portal.example]",
    ],
)
def test_a_url_unusable_in_a_request_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        PortalUrl.parse(text)


def test_port_zero_is_rejected() -> None:
    with pytest.raises(ValueError, match="port"):
        PortalUrl.parse("wss://portal.example:0")


@given(st.text() | st.text(alphabet="wsh:t/@?#[].0a%\\ ").map(lambda rest: f"wss://{rest}"))
def test_any_text_is_parsed_or_rejected_with_a_reason(text: str) -> None:
    try:
        url = PortalUrl.parse(text)
    except ValueError as raised:
        error = raised
    else:
        assert url.text.startswith("wss://" if url.is_tls else "ws://")
        assert url.text.endswith("/relay/websocket")
        assert all(0x21 <= ord(character) < 0x7F for character in url.text)
        assert url.host
        assert PortalUrl.parse(url.text.removesuffix("/relay/websocket")) == url
        return
    assert str(error)


@pytest.mark.parametrize("text", [TOKEN, f" {TOKEN}", f"{TOKEN}\r\n", f"\t{TOKEN}\v\n\n", f"{TOKEN[:9]}\r\n {TOKEN[9:]}"])
def test_white_space_around_and_inside_a_token_is_removed(text: str) -> None:
    assert PortalToken.parse(text).expose() == TOKEN


def test_a_token_may_contain_any_printable_character() -> None:
    printable = "".join(map(chr, range(0x21, 0x7F)))
    assert PortalToken.parse(printable).expose() == printable


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_token_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        PortalToken.parse(text)


@pytest.mark.parametrize("between", ["\r\n\x00", "\x00", "\x7f", "ä", "\u200b", "\ud800"])
def test_a_token_invalid_in_a_header_is_rejected_and_not_shown(between: str) -> None:
    with pytest.raises(ValueError, match="no token has") as raised:
        PortalToken.parse(f"abc{between}def")
    assert "abc" not in str(raised.value)
    assert "def" not in str(raised.value)


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(CONFIG)
    assert SECRET not in repr(CONFIG)
    assert TOKEN not in f"{CONFIG.token} {CONFIG.token!r}"


QUERY = [("name", "relay under test"), ("ipv4", "192.0.2.1"), ("ipv6", "2001:db8::1"), ("port", "3478")]


def test_the_query_has_the_name_and_addresses_of_the_relay() -> None:
    url = urlsplit(CONFIG.request_url)
    assert f"{url.scheme}://{url.netloc}{url.path}" == CONFIG.url.text
    assert parse_qsl(url.query, strict_parsing=True) == QUERY


@pytest.mark.parametrize(
    ("name", "families"),
    [
        (None, [Family.IPV4, Family.IPV6]),
        ("relay under test", [Family.IPV4]),
        ("relay under test", [Family.IPV6]),
        (None, [Family.IPV6]),
    ],
)
def test_unset_settings_are_not_in_the_query(name: str | None, families: list[Family]) -> None:
    config = dataclasses.replace(CONFIG, name=name, public_hosts={each: CONFIG.public_hosts[each] for each in families})
    expected = [
        pair for pair in QUERY if pair[0] == "port" or pair[0] in {f"ip{str(each)[2:].lower()}" for each in families}
    ]
    if name is not None:
        expected.insert(0, QUERY[0])
    assert parse_qsl(urlsplit(config.request_url).query) == expected


@pytest.mark.parametrize("name", ["a&b=c", "#?%", "Zürich 1", "a+b", "\r\n", "東京", "/"])
def test_any_name_is_url_encoded(name: str) -> None:
    url = dataclasses.replace(CONFIG, name=name).request_url
    assert url.isascii()
    assert url.isprintable()
    assert " " not in url
    assert dict(parse_qsl(urlsplit(url).query))["name"] == name


def test_the_headers_contain_the_token_and_the_version() -> None:
    assert dict(CONFIG.request_headers) == {"X-Authorization": f"Bearer {TOKEN}", "User-Agent": "relay/test"}


def test_every_attempt_uses_the_same_url_and_hidden_headers() -> None:
    driver = Driver()
    driver.start()
    for _ in range(5):
        connect = the(Connect, [driver.log[-1][1]])
        assert (connect.url, connect.headers) == (CONFIG.request_url, CONFIG.request_headers)
        assert TOKEN not in repr(connect)
        assert TOKEN not in connect.url
        assert SECRET not in connect.url
        driver.report_lost()
        driver.pass_time(1)


def test_no_command_shows_the_token_or_the_secret() -> None:
    driver = driver_with(well, name="relay")
    driver.start()
    driver.pass_time(HOUR)
    driver.report_lost()
    driver.pass_time(HOUR)
    driver.leave()
    shown = repr(driver.log)
    assert TOKEN not in shown
    assert SECRET not in shown
