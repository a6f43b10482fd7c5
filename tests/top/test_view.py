"""Frames of any size, for any valid response."""

import copy
import string
from os import terminal_size
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.status.model import Status
from relay.tools.control import read
from relay.tools.figures import bit_rate, printable, short, shortened, size, span
from relay.tools.top.scene import Scene, keys_in, press
from relay.tools.top.view import frame, rows_in
from tests.support.status import Kernel, Watched

HOSTILE = "\x1b]0;title\x07\x1b[2J\r\n\u202e\x9b31m"


def values_of(model: Any, texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:  # noqa: ANN401 - any type that JSON can be
    """Return a strategy for arbitrary values of a model."""
    if is_typeddict(model):
        return st.fixed_dictionaries({name: values_of(each, texts) for name, each in get_type_hints(model).items()})
    origin, arguments = get_origin(model), get_args(model)
    if origin is list:
        return st.lists(values_of(arguments[0], texts), max_size=3)
    if origin is dict:
        return st.dictionaries(texts, values_of(arguments[1], texts), max_size=3)
    if arguments:
        return st.none() | values_of(arguments[0], texts)
    numbers = st.integers(-(10**17), 10**17)
    return {
        bool: st.booleans(),
        int: numbers,
        float: numbers | st.floats(-1e17, 1e17),
        str: texts,
        object: st.none() | st.booleans() | numbers | texts | st.lists(texts, max_size=3),
    }[model]


odd_texts = st.text(max_size=30) | st.sampled_from([HOSTILE, "+5", "+x", " ", "a:", "joined", "established", "desc", "rate"])
odd_statuses = values_of(Status, odd_texts)


def scene_of(first: Status, *later: Status, **fields: Any) -> Scene:  # noqa: ANN401 - the fields of Scene
    scene = Scene("127.0.0.1:9999", first, **fields)
    for status in later:
        scene.add(status)
    return scene


@pytest.fixture
def status() -> Status:
    watched = Watched()
    for _ in range(30):
        client = watched.client()
        client.allocate()
        client.bind_channel()
    return watched.status()


def lines_of(scene: Scene, size_: terminal_size) -> list[str]:
    return [line.plain for line in frame(scene, size_)]


@given(
    status=odd_statuses,
    width=st.integers(20, 250),
    height=st.integers(4, 60),
    helps=st.booleans(),
)
def test_a_frame_fits_and_contains_no_control_characters(status: Status, width: int, height: int, *, helps: bool) -> None:
    scene = scene_of(read(Status, status), later(status, 2.0, to_peer=10), help=helps)
    scene.problem, scene.silent_for = HOSTILE, 3.0
    lines = frame(scene, terminal_size((width, height)))
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width
    assert all(line.plain.isprintable() for line in lines)


def one_client() -> Status:
    watched = Watched()
    watched.client().allocate()
    return watched.status()


ONE_CLIENT = one_client()


def of_100() -> Scene:
    """Return a scene of a relay with 100 allocations."""
    status = copy.deepcopy(ONE_CLIENT)
    status["matching"] = 100
    return scene_of(status)


@given(st.integers(20, 250), st.integers(4, 60))
def test_the_frame_has_room_for_the_requested_rows(width: int, height: int) -> None:
    status = copy.deepcopy(ONE_CLIENT)
    (row,) = status["allocations"]
    size_ = terminal_size((width, height))
    status["allocations"] = [row] * rows_in(size_, scene_of(status))
    shown = [line for line in lines_of(scene_of(status), size_) if line.startswith(row["client"][:4])]
    assert len(shown) == len(status["allocations"])


def test_columns_appear_by_importance_with_the_width(status: Status) -> None:
    titles = {}
    for width in (40, 60, 80, 120, 200):
        lines = lines_of(scene_of(status), terminal_size((width, 24)))
        (titles[width],) = (line.split() for line in lines if line.startswith("CLIENT"))
    assert titles[40] == ["CLIENT", "TO", "PEER", "TO", "CLIENT"]
    assert titles[60] == ["CLIENT", "PORT", "TO", "PEER", "TO", "CLIENT", "TOTAL", "LEFT"]
    assert titles[80] == ["CLIENT", "PORT", "CH", "TO", "PEER", "TO", "CLIENT", "TOTAL", "AGE", "LEFT", "ID"]
    assert titles[120] == [*titles[80], "DROPS", "PEERS"]
    assert titles[200] == [*titles[120], "USER"]


def test_kernel_traffic_has_a_column_only_with_the_offload() -> None:
    status = Watched(kernel=Kernel()).status()
    assert "relayed by sockets and XDP on eth0 (driver), eth1 (not attached), 1 channels" in "\n".join(
        lines_of(scene_of(status), terminal_size((120, 24)))
    )
    watched = Watched(kernel=Kernel())
    watched.client().allocate()
    assert any("XDP" in line and "CLIENT" in line for line in lines_of(scene_of(watched.status()), terminal_size((120, 24))))


def test_the_first_peer_is_shown_and_further_peers_are_counted(status: Status) -> None:
    row = status["allocations"][0]
    channel = row["channels"][0]
    row["channels"], row["channel_count"] = [channel] * 4, 7
    status["allocations"] = [row]
    narrow = lines_of(scene_of(status), terminal_size((120, 24)))
    assert any(line.rstrip().endswith("198.51.100.9:5000 +6") for line in narrow)


@pytest.mark.parametrize(
    ("portal", "line"),
    [
        (
            {"state": "joined", "has_begun": True, "state_age": 90.0, "joins": 1, "last_failure": None},
            "portal joined for 1m30s ",
        ),
        (
            {"state": "joined", "has_begun": True, "state_age": 1.0, "joins": 3, "last_failure": "x"},
            "portal joined for 1s, 3 joins ",
        ),
        ({"state": "joined", "has_begun": False, "state_age": 1.0, "joins": 1, "last_failure": None}, "has not sent init"),
        (
            {"state": "waiting", "has_begun": True, "state_age": 12.0, "joins": 1, "last_failure": "no\x1b route"},
            "portal waiting for 12s: no? route",
        ),
        (None, "portal not joined yet"),
    ],
)
def test_the_state_of_the_portal_is_shown(status: Status, portal: Any, line: str) -> None:  # noqa: ANN401 - as JSON has it
    status["portal"] = portal
    status["config"]["portal_url"] = "wss://api.firezone.dev"
    assert line in "\n".join(lines_of(scene_of(status), terminal_size((120, 24))))


def test_a_relay_that_is_not_ready_has_a_reason(status: Status) -> None:
    assert " ready" in lines_of(scene_of(status), terminal_size((120, 24)))[0]
    status.update({"ready": False, "not_ready": ["portal", "no_ipv6_route"]})
    assert "not ready: portal, no_ipv6_route" in lines_of(scene_of(status), terminal_size((120, 24)))[0]


def test_errors_are_counted_without_initial_challenges(status: Status) -> None:
    status["totals"]["responses"]["errors"] = {"allocate": {"401": 900, "508": 2}, "channel_bind": {"438": 9, "403": 1}}
    status["totals"]["send_errors"] = {"EPERM": 4}
    text = "\n".join(lines_of(scene_of(status), terminal_size((120, 24))))
    assert "errors 3 (403x1 508x2)   unsent 4 (EPERM)" in text


def later(status: Status, seconds: float, *, to_peer: int = 0, drops: int = 0) -> Status:
    """Return a later response, after some bytes were sent to peers."""
    changed = copy.deepcopy(status)
    changed["uptime"] += seconds
    changed["totals"]["to_peer"]["bytes"] += to_peer
    changed["totals"]["to_peer_rate"] = {"packets": 0.0, "bytes": to_peer / seconds}
    changed["totals"]["to_client_rate"] = {"packets": 0.0, "bytes": 0.0}
    changed["totals"]["drops"]["kernel"] = changed["totals"]["drops"].get("kernel", 0) + drops
    return changed


def test_a_sparkline_has_the_relays_rates_at_an_interval_and_gaps(status: Status) -> None:
    history = scene_of(status, interval=1.0)
    assert not history.rates, "the first response has no rates"
    history.add(later(status, 2.0, to_peer=500, drops=4))
    assert (list(history.rates), history.is_dropping) == ([(250.0, 0.0)], True)
    history.add(later(status, 2.5, to_peer=500, drops=4))
    assert (list(history.rates), history.is_dropping) == ([(250.0, 0.0)], False)
    history.miss("gone")
    history.add(later(status, 4.0, to_peer=400))
    assert list(history.rates) == [(250.0, 0.0), None, (100.0, 0.0)]
    restarted = later(status, 1.0, to_peer=7)
    history.add(restarted)
    assert list(history.rates) == [(250.0, 0.0), None, (100.0, 0.0), (7.0, 0.0)]


def test_both_sparklines_share_a_scale_with_the_newest_on_the_right(status: Status) -> None:
    statuses = [status]
    for bytes_ in (0, 1000, 2000, 4000):
        statuses.append(later(statuses[-1], 1.0, to_peer=bytes_))
    lines = lines_of(scene_of(*statuses), terminal_size((80, 24)))
    assert lines[2].endswith(" ▁▃▅█")
    assert lines[3].endswith(" ▁▁▁▁")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (short(0), "0"),
        (short(999.4), "999"),
        (short(999.6), "1.00k"),
        (short(12345), "12.3k"),
        (short(99_960), "100k"),
        (short(1e18), "1.00E"),
        (short(-5), "0"),
        (size(1_500_000), "1.50MB"),
        (bit_rate(125), "1.00kb/s"),
        (bit_rate(None), "-"),
        (span(59.9), "59s"),
        (span(245), "4m05s"),
        (span(10920), "3h02m"),
        (span(1_051_200), "12d4h"),
        (span(-1), "0s"),
        (printable(HOSTILE), "?]0;title??[2J????31m"),
        (shortened("[2001:db8::1]:40000", 11), "[2001~40000"),
    ],
)
def test_figures_are_short(written: str, text: str) -> None:
    assert written == text


@given(st.floats(0, 1e18))
def test_figures_fit_their_columns(number: float) -> None:
    assert len(short(number)) <= 5
    assert len(span(number)) <= 9


@pytest.mark.parametrize(
    ("keys", "rows", "offset"),
    [
        ("j", 10, 1),
        ("jjk", 10, 1),
        ("k", 10, 0),
        ("\x1b[6~", 10, 9),
        ("G", 10, 90),
        ("\x1bOFj", 10, 90),
        ("G\x1b[5~", 10, 81),
    ],
)
def test_keys_move_within_the_list(keys: str, rows: int, offset: int) -> None:
    scene = of_100()
    for key in keys_in(keys.encode()):
        press(key, scene, rows)
    assert scene.offset == offset


@given(st.binary())
def test_any_key_is_accepted(data: bytes) -> None:
    scene = of_100()
    for key in keys_in(data):
        press(key, scene, 10)
    assert 0 <= scene.offset <= 90


def test_a_new_sort_order_scrolls_to_the_top() -> None:
    scene = of_100()
    for key in keys_in(b"Gc"):
        press(key, scene, 10)
    assert (scene.sort, scene.offset) == ("client", 0)


class Small(TypedDict):
    count: int
    names: list[str]
    rate: float | None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "answer is no dict"),
        ({"count": 1, "names": []}, "answer has no rate"),
        ({"count": "1", "names": [], "rate": None}, "count is no int"),
        ({"count": True, "names": [], "rate": None}, "count is no int"),
        ({"count": 10**30, "names": [], "rate": None}, "count is out of range"),
        ({"count": 1, "names": [1], "rate": None}, "names is no str"),
        ({"count": 1, "names": {}, "rate": None}, "names is no list"),
        ({"count": 1, "names": [], "rate": float("nan")}, "rate is out of range"),
    ],
)
def test_an_invalid_status_is_rejected(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read(Small, value)


def test_unknown_fields_are_ignored() -> None:
    assert read(Small, {"count": 1, "names": ["a"], "rate": 1, "more": string.digits})["count"] == 1
