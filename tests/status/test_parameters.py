"""What may be asked for, and what is said to who asks for something else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.status.parameters import Parameters, parse
from relay.status.ranking import SORTS


def test_without_parameters_the_busiest_come_first() -> None:
    assert parse({}) == Parameters(limit=100, offset=0, sort="traffic", descending=True, channels=16)


def test_everything_can_be_asked_for() -> None:
    asked = parse({"limit": "500", "offset": "20", "sort": "client", "order": "desc", "channels": "0"})
    assert asked == Parameters(limit=500, offset=20, sort="client", descending=True, channels=0)


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
def test_each_sort_has_an_order_of_its_own(sort: str, order: str) -> None:
    assert parse({"sort": sort}).order == order
    assert {parse({"sort": sort, "order": each}).order for each in ("asc", "desc")} == {"asc", "desc"}


def test_the_sorts_are_these() -> None:
    assert list(SORTS) == ["traffic", "rate", "age", "expiry", "client", "port", "channels"]


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ({"limit": "501"}, "limit is a number from 0 to 500, not '501'"),
        ({"limit": "-1"}, "limit is a number from 0 to 500, not '-1'"),
        ({"limit": ""}, "limit is a number from 0 to 500, not ''"),
        ({"limit": "٣"}, "limit is a number from 0 to 500, not '٣'"),
        ({"offset": "1e3"}, "offset is a number from 0 to 999999999, not '1e3'"),
        ({"offset": "9" * 5000}, f"offset is a number from 0 to 999999999, not '{'9' * 40}...'"),
        ({"channels": "2001"}, "channels is a number from 0 to 2000, not '2001'"),
        ({"sort": "bytes"}, "sort is one of traffic, rate, age, expiry, client, port, channels, not 'bytes'"),
        ({"order": "DESC"}, "order is one of asc, desc, not 'DESC'"),
        ({"Limit": "1"}, "there is no parameter 'Limit': limit, offset, sort, order, channels are all there is"),
        ({"a\r\nb\x1b[31m": ""}, "there is no parameter 'a??b?[31m': limit, offset, sort, order, channels are all there is"),
    ],
)
def test_anything_else_is_refused_in_one_line(query: dict[str, str], line: str) -> None:
    with pytest.raises(ValueError, match=r"^") as caught:
        parse(query)
    assert str(caught.value) == line


@given(st.dictionaries(st.sampled_from(["limit", "offset", "sort", "order", "channels", "x"]) | st.text(), st.text()))
def test_whatever_is_asked_is_taken_or_refused_in_one_line(query: dict[str, str]) -> None:
    refusal = ""
    try:
        asked = parse(query)
    except ValueError as error:
        refusal = str(error)
    else:
        assert asked.limit <= 500
        assert asked.channels <= 2000
    assert refusal.isprintable()
