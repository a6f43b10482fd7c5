"""Frames of every size, of every answer that there can be."""

import copy
import string
from typing import Any, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.status.model import Status
from relay.top.figures import bit_rate, printable, short, shortened, size, span
from relay.top.history import History, Rates
from relay.top.keys import keys_in, press
from relay.top.reading import UnreadableError, read
from relay.top.view import Scene, Size, Wishes, frame, rows_in
from tests.status.conftest import Kernel, Watched

HOSTILE = "\x1b]0;title\x07\x1b[2J\r\n\u202e\x9b31m"


def values_of(model: Any, texts: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:  # noqa: ANN401 - any type that JSON can be
    """Give values that are what a model says, however odd."""
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
    }[model]


odd_texts = st.text(max_size=30) | st.sampled_from([HOSTILE, "+5", "+x", " ", "a:", "joined", "established", "desc", "rate"])
odd_statuses = values_of(Status, odd_texts)


def scene_of(*statuses: Status, **wishes: Any) -> Scene:  # noqa: ANN401 - the fields of Wishes
    scene = Scene("127.0.0.1:9999", Wishes(**wishes))
    for status in statuses:
        scene.history.add(status)
    return scene


@pytest.fixture
def status() -> Status:
    watched = Watched()
    for _ in range(30):
        client = watched.client()
        client.allocate()
        client.bind_channel()
    return watched.status()


def lines_of(scene: Scene, size_: Size) -> list[str]:
    return [line.plain for line in frame(scene, size_)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    status=odd_statuses,
    width=st.integers(20, 250),
    height=st.integers(4, 60),
    is_unicode=st.booleans(),
    helps=st.booleans(),
)
def test_a_frame_fits_and_has_nothing_in_it_that_a_terminal_obeys(
    status: Status, width: int, height: int, *, is_unicode: bool, helps: bool
) -> None:
    scene = scene_of(read(Status, status), later(status, 2.0, to_peer=10), help=helps)
    scene.problem, scene.silent_for = HOSTILE, 3.0
    lines = frame(scene, Size(width, height, is_unicode))
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width
    assert all(line.plain.isprintable() for line in lines)


def one_client() -> Status:
    watched = Watched()
    watched.client().allocate()
    return watched.status()


ONE_CLIENT = one_client()


@given(st.integers(20, 250), st.integers(4, 60))
def test_there_is_room_for_as_many_rows_as_are_asked_for(width: int, height: int) -> None:
    status = copy.deepcopy(ONE_CLIENT)
    (row,) = status["allocations"]
    size_ = Size(width, height)
    status["allocations"] = [row] * rows_in(size_, scene_of(status))
    shown = [line for line in lines_of(scene_of(status), size_) if line.startswith(row["client"][:4])]
    assert len(shown) == len(status["allocations"])


def test_columns_come_in_by_importance_as_there_is_room(status: Status) -> None:
    titles = {}
    for width in (40, 60, 80, 120, 200):
        lines = lines_of(scene_of(status), Size(width, 24))
        (titles[width],) = (line.split() for line in lines if line.startswith("CLIENT"))
    assert titles[40] == ["CLIENT", "TO", "PEER", "TO", "CLIENT"]
    assert titles[60] == ["CLIENT", "PORT", "TO", "PEER", "TO", "CLIENT", "TOTAL", "LEFT"]
    assert titles[80] == ["CLIENT", "PORT", "CH", "TO", "PEER", "TO", "CLIENT", "TOTAL", "AGE", "LEFT"]
    assert titles[120] == [*titles[80], "LOGIN", "PEERS"]
    assert titles[200] == [*titles[80], "LOGIN", "RELAYED", "PEERS"]


def test_what_the_kernel_relays_has_a_column_where_it_relays_at_all() -> None:
    status = Watched(kernel=Kernel()).status()
    assert "relayed by sockets and XDP on eth0 (driver), eth1 (not attached), 1 channels" in "\n".join(
        lines_of(scene_of(status), Size(120, 24))
    )
    watched = Watched(kernel=Kernel())
    watched.client().allocate()
    assert any("XDP" in line and "CLIENT" in line for line in lines_of(scene_of(watched.status()), Size(120, 24)))


def test_peers_that_do_not_fit_are_counted(status: Status) -> None:
    row = status["allocations"][0]
    channel = row["channels"][0]
    row["channels"], row["channel_count"] = [channel] * 4, 7
    status["allocations"] = [row]
    wide = lines_of(scene_of(status), Size(230, 24))
    assert any(line.endswith(" ".join(["198.51.100.9:5000"] * 4) + " +3") for line in wide)
    narrow = lines_of(scene_of(status), Size(120, 24))
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
        ({"state": "joined", "has_begun": False, "state_age": 1.0, "joins": 1, "last_failure": None}, "has not said init"),
        (
            {"state": "waiting", "has_begun": True, "state_age": 12.0, "joins": 1, "last_failure": "no\x1b route"},
            "portal waiting for 12s: no? route",
        ),
        (None, "portal not joined yet"),
    ],
)
def test_the_portal_is_shown_as_it_is(status: Status, portal: Any, line: str) -> None:  # noqa: ANN401 - as JSON has it
    status["portal"] = portal
    status["config"]["portal_url"] = "wss://api.firezone.dev"
    assert line in "\n".join(lines_of(scene_of(status), Size(120, 24)))


def test_what_goes_wrong_is_counted_but_not_what_every_client_is_told_first(status: Status) -> None:
    status["totals"]["responses"]["errors"] = {"allocate": {"401": 900, "508": 2}, "channel_bind": {"438": 9, "403": 1}}
    status["totals"]["send_errors"] = {"EPERM": 4}
    text = "\n".join(lines_of(scene_of(status), Size(120, 24)))
    assert "errors 3 (403×1 508×2)   unsent 4 (EPERM)" in text


def later(status: Status, seconds: float, *, to_peer: int = 0, drops: int = 0) -> Status:
    """Give the answer of a later moment."""
    changed = copy.deepcopy(status)
    changed["uptime"] += seconds
    changed["totals"]["to_peer"]["bytes"] += to_peer
    changed["totals"]["drops"]["kernel"] = changed["totals"]["drops"].get("kernel", 0) + drops
    return changed


def test_rates_are_of_the_relays_time_between_answers(status: Status) -> None:
    history = History(interval=1.0)

    def rates_after(answer: Status) -> Rates | None:
        history.add(answer)
        return history.rates

    assert rates_after(status) is None
    assert rates_after(later(status, 0.5, to_peer=100)) is None, "it is too soon for a rate"
    assert rates_after(later(status, 2.0, to_peer=500, drops=4)) == Rates(250.0, 0.0, 0.0, 0.0, 2.0)
    assert list(history.to_peer) == [250.0]
    history.miss()
    assert rates_after(later(status, 4.0, to_peer=500)) is None
    assert list(history.to_peer) == [250.0, None]
    assert rates_after(later(status, 6.0, to_peer=700)) is not None
    assert list(history.to_peer) == [250.0, None, 100.0]
    assert rates_after(later(status, -1.0)) is None, "it is another run of the relay"


def test_both_charts_have_one_scale_and_the_newest_is_at_the_right(status: Status) -> None:
    statuses = [status]
    for bytes_ in (0, 1000, 2000, 4000):
        statuses.append(later(statuses[-1], 1.0, to_peer=bytes_))
    lines = lines_of(scene_of(*statuses), Size(80, 24))
    assert lines[2].endswith(" ▁▂▄█")
    assert lines[3].endswith(" ▁▁▁▁")
    tall = lines_of(scene_of(*statuses), Size(80, 40))
    assert [line[-4:] for line in tall[2:4]] == ["   █", "▁▄██"]
    assert tall[3].startswith("full      32.0kb/s")


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
        (shortened("[2001:db8::1]:40000", 11, "…"), "[2001…40000"),
    ],
)
def test_figures_are_short(written: str, text: str) -> None:
    assert written == text


@given(st.floats(0, 1e18))
def test_no_figure_is_longer_than_its_place(number: float) -> None:
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
    wishes = Wishes()
    for key in keys_in(keys.encode()):
        press(key, wishes, rows, total=100)
    assert wishes.offset == offset


@given(st.binary())
def test_whatever_is_typed_is_taken(data: bytes) -> None:
    wishes = Wishes()
    for key in keys_in(data):
        press(key, wishes, 10, 100)
    assert 0 <= wishes.offset <= 90


def test_another_order_begins_at_its_beginning_and_as_is_usual_for_it() -> None:
    wishes = Wishes()
    for key in keys_in(b"iGc"):
        press(key, wishes, 10, 100)
    assert wishes == Wishes(sort="client", inverted=False, offset=0)


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
def test_what_is_no_status_is_not_taken_for_one(value: object, reason: str) -> None:
    with pytest.raises(UnreadableError, match=f"^{reason}$"):
        read(Small, value)


def test_more_fields_than_are_known_are_fine() -> None:
    assert read(Small, {"count": 1, "names": ["a"], "rate": 1, "more": string.digits})["count"] == 1
