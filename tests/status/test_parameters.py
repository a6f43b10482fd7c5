"""Valid and invalid parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.status.parameters import parse
from relay.status.scan import SORTS

NO_FILTER = {"client": None, "peer": None, "port": None}
ALL = "limit, offset, sort, order, channels, client, peer, port"


def test_the_default_order_is_by_traffic() -> None:
    assert parse({}) == {"limit": 100, "offset": 0, "sort": "traffic", "order": "desc", "channels": 16} | NO_FILTER


def test_all_parameters_are_parsed() -> None:
    query = {"limit": "500", "offset": "20", "sort": "client", "order": "desc", "channels": "0"}
    assert parse(query) == {"limit": 500, "offset": 20, "sort": "client", "order": "desc", "channels": 0} | NO_FILTER
    query = {"client": "203.0.113.5", "peer": "2001:db8:9::7/48", "port": "50000"}
    asked = parse(query)
    assert (asked["client"], asked["peer"], asked["port"]) == ("203.0.113.5/32", "2001:db8:9::/48", 50000)


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("traffic", "desc"),
        ("rate", "desc"),
        ("age", "desc"),
        ("channels", "desc"),
        ("expiry", "asc"),
        ("client", "asc"),
        ("port", "asc"),
    ],
)
def test_each_sort_key_has_a_default_order(sort: str, order: str) -> None:
    assert parse({"sort": sort})["order"] == order
    assert {parse({"sort": sort, "order": each})["order"] for each in ("asc", "desc")} == {"asc", "desc"}


def test_the_sort_keys_are_fixed() -> None:
    assert list(SORTS) == ["traffic", "rate", "age", "expiry", "client", "port", "channels"]


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ({"limit": "501"}, "limit is a number from 0 to 500, not '501'"),
        ({"limit": "-1"}, "limit is a number from 0 to 500, not '-1'"),
        ({"limit": ""}, "limit is a number from 0 to 500, not ''"),
        ({"limit": "٣"}, "limit is a number from 0 to 500, not '\\u0663'"),
        ({"offset": "1e3"}, "offset is a number from 0 to 999999999, not '1e3'"),
        ({"offset": "9" * 5000}, f"offset is a number from 0 to 999999999, not '{'9' * 40}'..."),
        ({"channels": "2001"}, "channels is a number from 0 to 2000, not '2001'"),
        ({"port": "65536"}, "port is a number from 0 to 65535, not '65536'"),
        ({"client": "x"}, "client is an address or a network such as 192.0.2.0/24, not 'x'"),
        ({"peer": "203.0.113.5:1"}, "peer is an address or a network such as 192.0.2.0/24, not '203.0.113.5:1'"),
        ({"sort": "bytes"}, "sort is one of traffic, rate, age, expiry, client, port, channels, not 'bytes'"),
        ({"order": "DESC"}, "order is one of asc, desc, not 'DESC'"),
        (
            {"Limit": "1"},
            f"there is no parameter 'Limit': {ALL} are all there is",
        ),
        (
            {"a\r\nb\x1b[31m": ""},
            rf"there is no parameter 'a\r\nb\x1b[31m': {ALL} are all there is",
        ),
    ],
)
def test_an_invalid_parameter_is_rejected_in_one_line(query: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=r"^") as caught:
        parse(query)
    assert str(caught.value) == line


@given(st.dictionaries(st.sampled_from(["limit", "offset", "sort", "order", "channels", "x"]) | st.text(), st.text()))
def test_any_query_is_accepted_or_rejected_in_one_line(query: dict[str, str]) -> None:
    refusal = ""
    try:
        asked = parse(query)
    except ValueError as error:
        refusal = str(error)
    else:
        assert asked["limit"] <= 500
        assert asked["channels"] <= 2000
    assert refusal.isprintable()
