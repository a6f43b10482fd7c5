"""A frame: what is shown at one moment, line by line, for a terminal of any size."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.text import Text

from relay.status.model import Portal, Status, Xdp
from relay.top import columns
from relay.top.chart import BLOCKS, PLAIN, chart
from relay.top.figures import bit_rate, printable, short, size, span
from relay.top.history import History

_EXPECTED_ERRORS = {"401", "438"}
"""Every client is challenged first."""

_TALL, _TALLER = 32, 44
"""Lines from which on there is room for charts of two lines, and of the most."""
_TALLEST = 4

_LEAST_ROWS = 3
"""Allocations, for which less important lines make room."""

_BESIDE_ROWS = 2
"""Lines: the titles of the columns, and what keys do."""

_LABEL = 41
"""Characters left of a chart."""

HELP = (
    ("r t a e", "sort by rate, traffic, age, expiry (time left)"),
    ("c p n", "sort by client, port, number of channels"),
    ("i", "invert the order"),
    ("↑ ↓ PgUp PgDn", "scroll; so do k and j"),
    ("Home End", "to the first, to the last"),
    ("space", "pause, and go on"),
    ("h ?", "this help"),
    ("q Ctrl-C", "quit"),
    ("", ""),
    ("TO PEER", "what the client sends, on the way to its peers; bits a second"),
    ("TO CLIENT", "what its peers send"),
    ("TOTAL", "bytes both ways since the allocation was made"),
    ("CH", "channels; LEFT: time until it expires; LOGIN: until its credential does"),
    ("XDP", "packets that the kernel relayed by itself"),
)

_KEYS = (
    "q quit",
    "h help",
    "r rate",
    "t traffic",
    "i invert",
    "a age",
    "e expiry",
    "c client",
    "p port",
    "n channels",
    "␣ pause",
)


@dataclass(slots=True)
class Wishes:
    """What whoever looks at it wants to see."""

    sort: str = "rate"
    inverted: bool = False
    offset: int = 0
    paused: bool = False
    help: bool = False

    @property
    def listed(self) -> tuple[str, bool, int]:
        """Give what decides which allocations are listed."""
        return self.sort, self.inverted, self.offset


@dataclass(slots=True)
class Scene:
    """All that a frame is made of."""

    address: str
    wishes: Wishes = field(default_factory=Wishes)
    history: History = field(default_factory=History)
    problem: str | None = None
    """Why there is no answer; None if there is."""
    silent_for: float = 0.0
    """Seconds since the last answer."""


@dataclass(frozen=True, slots=True)
class Size:
    """A terminal's."""

    width: int
    height: int
    is_unicode: bool = True


def rows_in(size_: Size, scene: Scene) -> int:
    """Give how many allocations there is room for."""
    return max(0, size_.height - len(_top(scene, size_)) - _BESIDE_ROWS)


def frame(scene: Scene, size_: Size) -> list[Text]:
    """Draw a frame, in as many lines as the terminal has."""
    lines = _top(scene, size_)
    room = max(0, size_.height - len(lines) - 1)
    if scene.wishes.help:
        lines += _help()[:room]
    elif scene.history.latest is not None:
        lines += _table(scene, scene.history.latest, size_)[:room]
    lines = lines[: size_.height - 1]
    lines += [Text()] * (size_.height - 1 - len(lines)) + [_keys(scene, size_)]
    for line in lines:
        line.truncate(size_.width)
    return lines[: size_.height]


def _top(scene: Scene, size_: Size) -> list[Text]:
    """Draw what is above the table: less of it, the lower the terminal is."""
    status = scene.history.latest
    if status is None:
        return [_title(scene, size_), Text(f"asking {scene.address} ...")]
    taller = _TALLEST if size_.height >= _TALLER else 2 if size_.height >= _TALL else 1
    charts = _charts(scene, status, size_, taller)
    room = size_.height - _BESIDE_ROWS - _LEAST_ROWS
    # In the order in which they give way.
    for lines in (
        [_title(scene, size_), _places(status), *charts, _counts(scene, status), Text()],
        [_title(scene, size_), _places(status), *charts, _counts(scene, status)],
        [_title(scene, size_), *charts, _counts(scene, status)],
        [_title(scene, size_), *charts],
    ):
        if len(lines) <= room:
            return lines
    return [_title(scene, size_)]


def headlines(scene: Scene, status: Status, *, is_unicode: bool) -> list[Text]:
    """Give what is above the table where it is shown once: without charts."""
    flows = [Text(way.figures) for way in _ways(scene.history, status)]
    return [_title(scene, Size(0, 0, is_unicode)), _places(status), *flows, _counts(scene, status)]


def _title(scene: Scene, size_: Size) -> Text:
    status, dot = scene.history.latest, "●" if size_.is_unicode else "*"
    line = Text("firezone-relay", style="bold")
    if status is not None:
        line.append(f" {printable(status['version'])}", style="bold")
        name = status["config"]["name"]
        line.append(f"  {printable(name)}" if name else "", style="bold cyan")
        line.append(f"  up {span(status['uptime'])}  ", style="")
        line.append(f"{dot} ready" if status["ready"] else f"{dot} not ready", style="green" if status["ready"] else "red")
    if scene.wishes.paused:
        line.append("  paused", style="bold yellow")
    if scene.problem is not None:
        line.append(f"  no answer for {span(scene.silent_for)}: {printable(scene.problem)}", style="bold red")
    left = size_.width - line.cell_len - len(scene.address)
    if left > 1:
        line.append(" " * left + scene.address, style="dim")
    return line


def _places(status: Status) -> Text:
    """Say how it is with the portal, and what relays."""
    line = _portal(status["portal"], has_one=status["config"]["portal_url"] is not None)
    xdp = status["data_paths"]["xdp"]
    line.append("   relayed by sockets")
    if xdp is not None:
        line.append(" and ")
        line.append_text(_xdp(xdp))
    return line


def _portal(portal: Portal | None, *, has_one: bool) -> Text:
    if portal is None:
        return (
            Text("portal not joined yet", style="yellow") if has_one else Text("standalone, without a portal", style="dim")
        )
    state, since = printable(portal["state"]), portal["state_age"]
    is_well = state == "joined" and portal["has_begun"]
    line = Text("portal ")
    line.append(state, style="green" if is_well else "red")
    line.append("" if since is None else f" for {span(since)}")
    if portal["joins"] > 1:
        line.append(f", {portal['joins']} joins")
    if state == "joined" and not portal["has_begun"]:
        line.append(", has not said init", style="red")
    elif not is_well and portal["last_failure"]:
        line.append(f": {printable(portal['last_failure'])}", style="red")
    return line


def _xdp(xdp: Xdp) -> Text:
    line = Text("XDP on ")
    for at, (name, mode) in enumerate(xdp["interfaces"].items()):
        line.append(", " if at else "")
        line.append(
            f"{printable(name)} ({printable(mode)})" if mode else f"{printable(name)} (not attached)", "" if mode else "red"
        )
    line.append(f", {xdp['channels']} channels")
    if xdp["channels_refused"]:
        line.append(f", {xdp['channels_refused']} refused", style="yellow")
    return line


class _Way(NamedTuple):
    """What goes one way."""

    figures: str
    style: str
    values: list[float | None]
    """Bytes a second, oldest first."""


def _ways(history: History, status: Status) -> list[_Way]:
    rates, totals = history.rates, status["totals"]
    return [
        _Way(
            f"{label:<9}{bit_rate(bytes_):>9} {'-' if packets is None else short(packets):>6} pkt/s {size(total):>8}",
            style,
            list(values),
        )
        for label, style, values, bytes_, packets, total in (
            ("to peer", "cyan", history.to_peer, rates and rates[0], rates and rates[1], totals["to_peer"]["bytes"]),
            ("to client", "green", history.to_client, rates and rates[2], rates and rates[3], totals["to_client"]["bytes"]),
        )
    ]


def _charts(scene: Scene, status: Status, size_: Size, height: int) -> list[Text]:
    """Draw what goes each way, both at one scale."""
    width = max(1, size_.width - _LABEL)
    ways = _ways(scene.history, status)
    peak = max((value for way in ways for value in way.values[-width:] if value is not None), default=0.0)
    lines: list[Text] = []
    for way in ways:
        drawn = chart(way.values, width, height, peak, BLOCKS if size_.is_unicode else PLAIN)
        if lines and height == _TALLEST:
            lines.append(Text())
        for at, part in enumerate(drawn):
            line = Text(f"{way.figures:<{_LABEL}}" if at == 0 else "")
            if at == 1 and len(lines) == 1:
                line.append(f"{'full':<9}{bit_rate(peak):>9}", style="dim")
            line.append(" " * (_LABEL - line.cell_len))
            line.append(part, style=way.style)
            lines.append(line)
    return lines


def _counts(scene: Scene, status: Status) -> Text:
    totals, rates = status["totals"], scene.history.rates
    line = Text(
        f"allocations {totals['allocations']} of {status['config']['max_allocations']}   channels {totals['channels']}"
    )
    drops = sum(totals["drops"].values())
    line.append(f"   drops {short(drops)}", style="yellow" if rates and rates.drops else "")
    if rates and rates.drops:
        line.append(f" ({short(rates.drops)}/s)", style="yellow")
    errors = {
        code: sum(by_code.get(code, 0) for by_code in totals["responses"]["errors"].values())
        for by_code in totals["responses"]["errors"].values()
        for code in by_code
        if code not in _EXPECTED_ERRORS
    }
    for title, count, detail in (
        ("errors", sum(errors.values()), " ".join(f"{printable(code)}×{short(errors[code])}" for code in sorted(errors))),
        ("unsent", sum(totals["send_errors"].values()), " ".join(map(printable, totals["send_errors"]))),
    ):
        if count:
            line.append(f"   {title} {short(count)} ({detail})", style="yellow")
    return line


def _table(scene: Scene, status: Status, size_: Size) -> list[Text]:
    rows = status["allocations"]
    if not rows:
        return [] if status["totals"]["allocations"] else [Text("no allocations", style="dim")]
    fitted = columns.fit(rows, status, size_.width, shown_columns(status))
    lines = [columns.header(fitted, status["page"]["sort"])]
    ellipsis = "…" if size_.is_unicode else "~"
    dim = "dim" if scene.problem is not None else ""
    for row in rows:
        line = columns.line(row, status, fitted, ellipsis)
        line.stylize(dim)
        lines.append(line)
    return lines


def shown_columns(status: Status) -> Sequence[columns.Column]:
    """Give the columns that say something of a relay."""
    return [each for each in columns.COLUMNS if each.title != "XDP" or status["data_paths"]["xdp"] is not None]


def _help() -> list[Text]:
    lines = []
    for keys, what in HELP:
        line = Text(f"  {keys:<15}", style="bold")
        line.append(what, style="not bold")
        lines.append(line)
    return lines


def _keys(scene: Scene, size_: Size) -> Text:
    """Draw the last line: where in the list one is, and what keys do."""
    line = Text(style="reverse")
    status = scene.history.latest
    if status is not None:
        page, total = status["page"], status["totals"]["allocations"]
        last = page["offset"] + len(status["allocations"])
        largest = {"desc": "largest first", "asc": "smallest first"}.get(page["order"], "")
        line.append(f" {min(page['offset'] + 1, last)}-{last} of {total} by {printable(page['sort'])}, {largest} ")
    for key in _KEYS:
        shown = key if size_.is_unicode else key.replace("␣", "space")
        if line.cell_len + len(shown) + 3 > size_.width:
            break
        line.append("│ " if size_.is_unicode else "| ")
        name, _, what = shown.partition(" ")
        line.append(name, style="bold")
        line.append(f" {what} ")
    line.append(" " * max(0, size_.width - line.cell_len))
    return line
