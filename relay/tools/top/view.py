"""Frames: the lines on the screen at a moment, for a terminal of any size."""

import itertools
import os

from rich.text import Text

from relay.status.model import PortalStatus, Status, XdpStatus
from relay.tools.figures import bit_rate, drain_words, printable, short, size, span, sparkline
from relay.tools.top import columns
from relay.tools.top.scene import SORTS, Scene

_ROUTINE_ERRORS = {"401", "438"}
"""Every client gets a challenge first."""

_MIN_ROWS = 3
"""Allocations for which less important lines are omitted."""

_OTHER_LINES = 2
"""The titles of the columns, and the line of keys."""

_LABEL_WIDTH = 41
"""Characters left of a sparkline."""

HELP = (
    ("r t a e", "sort by rate, traffic, age, expiry (time left)"),
    ("c p n", "sort by client, port, number of channels"),
    ("arrows PgUp PgDn", "scroll; so do k and j"),
    ("Home End", "go to the first or last allocation"),
    ("space", "pause or resume"),
    ("h ?", "show or hide this help"),
    ("q Ctrl-C", "quit"),
    ("", ""),
    ("TO PEER", "bits per second from the client to its peers"),
    ("TO CLIENT", "bits per second from its peers"),
    ("TOTAL", "bytes in both directions since the allocation was made"),
    ("CH", "channels; LEFT: time until the allocation expires"),
    ("XDP", "share of packets relayed by the kernel"),
    ("ID", "number of the allocation, for firezone-relay kick"),
    ("DROPS USER", "dropped datagrams; fingerprint of the username"),
)

_KEYS = {"q": "quit", "h": "help", **SORTS, "space": "pause"}


def rows_in(size_: os.terminal_size, scene: Scene) -> int:
    """Return the number of allocations that fit on the screen."""
    return max(0, size_.lines - len(_top(scene, size_)) - _OTHER_LINES)


def frame(scene: Scene, size_: os.terminal_size) -> list[Text]:
    """Return a frame, which has as many lines as the terminal."""
    lines = _top(scene, size_) + (_help() if scene.help else _table(scene, size_))
    lines = lines[: size_.lines - 1]
    lines += [Text()] * (size_.lines - 1 - len(lines)) + [_keys(scene, size_.columns)]
    for line in lines:
        line.truncate(size_.columns)
    return lines


def _top(scene: Scene, size_: os.terminal_size) -> list[Text]:
    """Return the lines above the table: on a low terminal, fewer lines."""
    room = size_.lines - _OTHER_LINES - _MIN_ROWS
    lines = headlines(scene, size_.columns)
    title, _, *rates, counts = lines
    choices = ([*lines, Text()], lines, [title, *rates, counts], [title, *rates])
    return next((each for each in choices if len(each) <= room), [title])


def headlines(scene: Scene, width: int = 0) -> list[Text]:
    """Return the lines above the table. Without a width, as for `--once`, they have no sparklines."""
    return [_title(scene, width), _data_paths(scene.latest), *_rates(scene, width), _counts(scene)]


def _title(scene: Scene, width: int) -> Text:
    status = scene.latest
    name = status["config"].get("name")
    line = Text(f"firezone-relay {printable(status['version'])}", style="bold")
    line.append(f"  {printable(str(name))}" if name else "", style="bold cyan")
    handovers = f", {status['handovers']} handovers" if status["handovers"] else ""
    line.append(f"  up {span(status['uptime'])}{handovers}  ")
    drain = status["drain"]
    if status["ready"]:
        line.append("ready", style="green")
    elif drain is not None:
        line.append(drain_words(drain), style="yellow")
    else:
        line.append(f"not ready: {printable(', '.join(status['not_ready']))}", style="red")
    if scene.paused:
        line.append("  paused", style="bold yellow")
    if scene.problem is not None:
        line.append(f"  no answer for {span(scene.silent_for)}: {printable(scene.problem)}", style="bold red")
    left = width - line.cell_len - len(scene.address)
    if left > 1:
        line.append(" " * left + scene.address, style="dim")
    return line


def _data_paths(status: Status) -> Text:
    portal = _portal(status["portal"], is_configured=status["config"].get("portal_url") is not None)
    xdp = status["data_paths"]["xdp"]
    line = Text.assemble(portal, "   relayed by sockets")
    return line if xdp is None else Text.assemble(line, " and ", _xdp(xdp))


def _portal(portal: PortalStatus | None, *, is_configured: bool) -> Text:
    if portal is None:
        if is_configured:
            return Text("portal not joined yet", style="yellow")
        return Text("standalone, without a portal", style="dim")
    state, since = printable(portal["state"]), portal["state_age"]
    is_well = state == "joined" and portal["has_begun"]
    line = Text("portal ")
    line.append(state, style="green" if is_well else "red")
    line.append("" if since is None else f" for {span(since)}")
    if portal["joins"] > 1:
        line.append(f", {portal['joins']} joins")
    if state == "joined" and not portal["has_begun"]:
        line.append(", has not sent init", style="red")
    elif not is_well and portal["last_failure"]:
        line.append(f": {printable(portal['last_failure'])}", style="red")
    return line


def _xdp(xdp: XdpStatus) -> Text:
    interfaces = [
        Text(f"{printable(name)} ({printable(mode or 'not attached')})", "" if mode else "red")
        for name, mode in xdp["interfaces"].items()
    ]
    line = Text.assemble("XDP on ", Text(", ").join(interfaces), f", {xdp['channels']} channels")
    if xdp["channels_refused"]:
        line.append(f", {xdp['channels_refused']} refused", style="yellow")
    return line


def _rates(scene: Scene, width: int) -> list[Text]:
    """Return a line with figures and a sparkline for each direction, both in the same scale."""
    totals, lines = scene.latest["totals"], []
    width = max(0, width - _LABEL_WIDTH)
    shown = list(scene.rates)[-width:] if width else []
    peak = max(itertools.chain.from_iterable(filter(None, shown)), default=0.0)
    for way, label, style, rate, flow in (
        (0, "to peer", "cyan", totals["to_peer_rate"], totals["to_peer"]),
        (1, "to client", "green", totals["to_client_rate"], totals["to_client"]),
    ):
        bits, packets = ("-", "-") if rate is None else (bit_rate(rate["bytes"]), short(rate["packets"]))
        figures = f"{label:<9}{bits:>9} {packets:>6} pkt/s {size(flow['bytes']):>8}"
        bars = sparkline([rates and rates[way] for rates in shown], width, peak)
        lines.append(Text.assemble(f"{figures:<{_LABEL_WIDTH}}", (bars, style)))
    return lines


def _counts(scene: Scene) -> Text:
    status = scene.latest
    totals = status["totals"]
    most = printable(str(status["config"].get("max_allocations")))
    line = Text(f"allocations {totals['allocations']} of {most}   channels {totals['channels']}")
    drops = sum(totals["drops"].values())
    line.append(f"   drops {short(drops)}", style="yellow" if scene.is_dropping else "")
    errors: dict[str, int] = {}
    for by_code in totals["responses"]["errors"].values():
        for code in by_code.keys() - _ROUTINE_ERRORS:
            errors[code] = errors.get(code, 0) + by_code[code]
    by_error = totals["send_errors"]
    for title, count, detail in (
        ("errors", sum(errors.values()), " ".join(f"{printable(code)}x{short(errors[code])}" for code in sorted(errors))),
        ("unsent", sum(by_error.values()), " ".join(map(printable, by_error))),
    ):
        if count:
            line.append(f"   {title} {short(count)} ({detail})", style="yellow")
    return line


def _table(scene: Scene, size_: os.terminal_size) -> list[Text]:
    lines = table(scene.latest, size_.columns)
    for line in lines[1:]:
        line.stylize("dim" if scene.problem is not None else "")
    return lines


def table(status: Status, width: int | None) -> list[Text]:
    """Return the table of allocations, with a line of titles; ``width`` is None for no limit."""
    if not status["matching"]:
        return [Text("no allocations", style="dim")]
    rows = status["allocations"]
    fitted = columns.fit(rows, status, width)
    return [columns.header(fitted, status["page"]["sort"]), *(columns.line(row, fitted) for row in rows)]


def _help() -> list[Text]:
    return [Text.assemble((f"  {keys:<17}", "bold"), text) for keys, text in HELP]


def _keys(scene: Scene, width: int) -> Text:
    """Return the last line: the position in the list, and the keys."""
    status = scene.latest
    page, total = status["page"], status["matching"]
    last = page["offset"] + len(status["allocations"])
    largest = {"desc": "largest first", "asc": "smallest first"}.get(page["order"], "")
    position = f" {min(page['offset'] + 1, last)}-{last} of {total} by {printable(page['sort'])}, {largest} "
    line = Text(position, style="reverse")
    for key, text in _KEYS.items():
        if line.cell_len + len(f"| {key} {text} ") > width:
            break
        line.append("| ").append(key, style="bold").append(f" {text} ")
    line.append(" " * max(0, width - line.cell_len))
    return line
