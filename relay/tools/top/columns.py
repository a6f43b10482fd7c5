"""Columns of the table of allocations, and their widths."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from rich.text import Text

from relay.status.model import AllocationStatus, Status
from relay.tools.figures import bit_rate, printable, short, shortened, size, span

GAP = 2
"""Spaces between columns."""


class Column(NamedTuple):
    """A column."""

    title: str
    rank: int
    """Columns of a high rank are omitted first on a narrow terminal."""
    min_width: int
    max_width: int
    cell: Callable[[AllocationStatus], str]
    is_right: bool = False
    """Whether cells are right-aligned."""
    sort: str = ""
    """The sort key for which the title is highlighted."""
    style: str = ""


Fitted: TypeAlias = list[tuple[Column, int]]
"""Columns with their widths."""


def _port(row: AllocationStatus) -> str:
    # All relayed addresses of an allocation have the same port.
    return printable(row["relayed"][0].rpartition(":")[2]) if row["relayed"] else "-"


def _left(row: AllocationStatus) -> str:
    return span(row["time_left"]) if row["state"] == "established" else printable(row["state"])


def _peers(row: AllocationStatus) -> str:
    """Return the first peer and the number of other peers."""
    first = " ".join(printable(channel["peer"]) for channel in row["channels"][:1])
    hidden = row["channel_count"] - len(row["channels"][:1])
    return f"{first} +{hidden}".strip() if hidden > 0 else first


def _by_kernel(row: AllocationStatus) -> str:
    flows = (row["to_peer"], row["to_client"])
    relayed = sum(flow["packets"] for flow in flows)
    return f"{100 * sum(flow['xdp_packets'] for flow in flows) / relayed:.0f}%" if relayed else "-"


def _total(row: AllocationStatus) -> str:
    return size(row["to_peer"]["bytes"] + row["to_client"]["bytes"])


COLUMNS = (
    Column("CLIENT", 0, 15, 47, lambda row: printable(row["client"]), sort="client"),
    Column("PORT", 3, 5, 5, _port, is_right=True, sort="port"),
    Column("CH", 5, 2, 5, lambda row: str(row["channel_count"]), is_right=True, sort="channels"),
    Column("TO PEER", 1, 8, 8, lambda row: bit_rate(row["to_peer_rate"]), is_right=True, sort="rate", style="cyan"),
    Column("TO CLIENT", 1, 9, 9, lambda row: bit_rate(row["to_client_rate"]), is_right=True, sort="rate", style="green"),
    Column("TOTAL", 4, 6, 6, _total, is_right=True, sort="traffic"),
    Column("XDP", 7, 4, 4, _by_kernel, is_right=True),
    Column("AGE", 6, 6, 6, lambda row: span(row["age"]), is_right=True, sort="age"),
    Column("LEFT", 2, 6, 7, _left, is_right=True, sort="expiry"),
    Column("ID", 8, 4, 8, lambda row: str(row["id"]), is_right=True),
    Column("DROPS", 9, 5, 5, lambda row: short(sum(row["drops"].values())), is_right=True),
    Column("PEERS", 10, 21, 60, _peers),
    Column("USER", 11, 12, 12, lambda row: printable(row["username_sha256"])),
)


def fit(rows: Sequence[AllocationStatus], status: Status, width: int | None) -> Fitted:
    """Select columns for a width in characters; None is no limit. Without offload there is no column XDP."""
    columns = [each for each in COLUMNS if each.title != "XDP" or status["data_paths"]["xdp"] is not None]
    widths = [max(len(each.title), each.min_width, *(len(each.cell(row)) for row in rows)) for each in columns]
    if width is None:
        return list(zip(columns, widths, strict=True))
    by_rank = sorted(zip(columns, widths, strict=True), key=lambda each: each[0].rank)
    # The minimum widths decide, otherwise columns would change with the rows.
    while (left := width + GAP - sum(column.min_width + GAP for column, _ in by_rank)) < 0:
        by_rank.pop()
    fitted: dict[Column, int] = {}
    for column, wanted in by_rank:
        fitted[column] = max(column.min_width, min(wanted, column.max_width, column.min_width + left))
        left -= fitted[column] - column.min_width
    return [(column, fitted[column]) for column in columns if column in fitted]


def header(fitted: Fitted, sort: str) -> Text:
    """Return the line of titles. The title of the sort key is highlighted."""
    cells = [(_aligned(column.title, column, width), "reverse" * (column.sort == sort)) for column, width in fitted]
    return Text(" " * GAP, style="bold").join(Text(*cell) for cell in cells)


def line(row: AllocationStatus, fitted: Fitted) -> Text:
    """Return the line of an allocation."""
    cells = [(_aligned(shortened(column.cell(row), width), column, width), column.style) for column, width in fitted]
    return Text(" " * GAP).join(Text(text, "dim" if text.strip() in {"-", "0b/s"} else style) for text, style in cells)


def _aligned(text: str, column: Column, width: int) -> str:
    return f"{text:>{width}}" if column.is_right else f"{text:<{width}}"
