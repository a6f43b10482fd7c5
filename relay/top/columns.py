"""The table of allocations: which columns there are, and which of them fit."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.text import Text

from relay.status.model import Allocation, Status
from relay.top.figures import bit_rate, printable, shortened, size, span

_MORE = re.compile(r"\+[0-9]{1,9}")

GAP = 2
"""Spaces between columns."""


class Column(NamedTuple):
    """One column."""

    title: str
    importance: int
    """The lowest stay longest."""
    least: int
    """Characters without which it is of no use."""
    most: int
    """Characters that it never has more of."""
    cell: Callable[[Allocation, Status], str]
    is_right: bool = False
    """Whether it is put to the right, as figures are."""
    sort: str = ""
    """What allocations are sorted by for it to be in order."""
    style: str = ""
    is_list: bool = False
    """Whether it has several things, of which only whole ones are shown."""


class Fitted(NamedTuple):
    """A column and the characters that it gets."""

    column: Column
    width: int


def _left(row: Allocation, _: Status) -> str:
    return span(row["time_left"]) if row["state"] == "established" else printable(row["state"])


def _peers(row: Allocation, _: Status) -> str:
    listed = [printable(channel["peer"]) for channel in row["channels"]]
    hidden = row["channel_count"] - len(listed)
    return " ".join([*listed, f"+{hidden}"] if hidden > 0 else listed)


def _by_kernel(row: Allocation, _: Status) -> str:
    flows = (row["to_peer"], row["to_client"])
    relayed = sum(flow["packets"] for flow in flows)
    return f"{100 * sum(flow['xdp_packets'] for flow in flows) / relayed:.0f}%" if relayed else "-"


def _credential(row: Allocation, status: Status) -> str:
    expires_at = row["credential_expires_at"]
    return "-" if expires_at is None else span(expires_at - status["time"])


COLUMNS = (
    Column("CLIENT", 0, 15, 47, lambda row, _: printable(row["client"]), sort="client"),
    Column("PORT", 3, 5, 5, lambda row, _: _port(row), is_right=True, sort="port"),
    Column("CH", 5, 2, 5, lambda row, _: str(row["channel_count"]), is_right=True, sort="channels"),
    Column("TO PEER", 1, 8, 8, lambda row, _: bit_rate(row["to_peer_rate"]), is_right=True, sort="rate", style="cyan"),
    Column("TO CLIENT", 1, 9, 9, lambda row, _: bit_rate(row["to_client_rate"]), is_right=True, sort="rate", style="green"),
    Column(
        "TOTAL",
        4,
        6,
        6,
        lambda row, _: size(row["to_peer"]["bytes"] + row["to_client"]["bytes"]),
        is_right=True,
        sort="traffic",
    ),
    Column("XDP", 7, 4, 4, _by_kernel, is_right=True),
    Column("AGE", 6, 6, 6, lambda row, _: span(row["age"]), is_right=True, sort="age"),
    Column("LEFT", 2, 6, 7, _left, is_right=True, sort="expiry"),
    Column("LOGIN", 9, 6, 6, _credential, is_right=True),
    Column("RELAYED", 10, 32, 60, lambda row, _: " ".join(map(printable, row["relayed"])), is_list=True),
    Column("PEERS", 8, 21, 300, _peers, is_list=True),
)


def fit(rows: Sequence[Allocation], status: Status, width: int | None, columns: Sequence[Column] = COLUMNS) -> list[Fitted]:
    """Choose columns and how wide they are.

    Args:
        rows: what is to be shown.
        status: what they are part of.
        width: characters; None for as many as it takes.
        columns: all there are, in order.
    """
    wanted = {
        column.title: max([len(column.title), column.least, *(len(column.cell(row, status)) for row in rows)])
        for column in columns
    }
    if width is None:
        return [Fitted(column, wanted[column.title]) for column in columns]
    chosen: list[Column] = []
    left = width + GAP
    for column in sorted(columns, key=lambda column: column.importance):
        # A less important one is not let in where a more important one was not: rows would be different as they move.
        if column.least + GAP > left:
            break
        chosen.append(column)
        left -= column.least + GAP
    widths = {column.title: column.least for column in chosen}
    for column in sorted(chosen, key=lambda column: column.importance):
        more = max(0, min(left, min(wanted[column.title], column.most) - column.least))
        widths[column.title] += more
        left -= more
    return [Fitted(column, widths[column.title]) for column in columns if column in chosen]


def header(fitted: Sequence[Fitted], sort: str) -> Text:
    """Write the titles; that of the column that is in order stands out."""
    line = Text(style="bold")
    for at, (column, width) in enumerate(fitted):
        line.append(" " * GAP if at else "")
        line.append(_placed(column.title, column, width), style="reverse" if column.sort == sort else "")
    return line


def line(row: Allocation, status: Status, fitted: Sequence[Fitted], ellipsis: str) -> Text:
    """Write an allocation."""
    written = Text()
    for at, (column, width) in enumerate(fitted):
        written.append(" " * GAP if at else "")
        cell = column.cell(row, status)
        if column.is_list:
            cell = _whole(cell, width)
        text = _placed(shortened(cell, width, ellipsis), column, width)
        written.append(text, style="dim" if text.strip() in {"-", "0b/s"} else column.style)
    return written


def _whole(listed: str, width: int) -> str:
    """Leave out what does not fit of a list, and say how much that is."""
    words = listed.split(" ")
    hidden = int(words.pop()) if _MORE.fullmatch(words[-1]) else 0
    while len(words) > 1 and len(" ".join([*words, f"+{hidden}"] if hidden else words)) > width:
        words.pop()
        hidden += 1
    return " ".join([*words, f"+{hidden}"] if hidden else words)


def _placed(text: str, column: Column, width: int) -> str:
    return f"{text:>{width}}" if column.is_right else f"{text:<{width}}"


def _port(row: Allocation) -> str:
    # All relayed addresses of an allocation have one port.
    return printable(row["relayed"][0].rpartition(":")[2]) if row["relayed"] else "-"
