"""The plot of CPU time a packet, as SVG: one part for each direction, with a group of bars for each case without offload."""

import re
from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.results import Figure, Results
from benchmarks.tables import number, tables

TITLE = "CPU time a packet, µs (shorter is better)"
PARTS = ("CPU a packet, client→peer, ", "CPU a packet, peer→client, ")
"""Beginnings of the titles of rows."""
_ABBREVIATED = re.compile(r", saturated|GSO batches of | over 20 flows|, µs$")

_WIDTH, _GAP, _LABELS, _VALUES = 980, 30, 150, 90
_COLUMN = (_WIDTH - 3 * _GAP) / 2
_BAR, _GROUP_GAP, _TOP, _LEGEND = 11, 9, 30, 56

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; }
.value { font-size: 10px; fill: #57606a; }
.axis { stroke: #8c959f; }
.spread { stroke: #24292f; stroke-width: 1; }
.s0 { fill: #2f6fdb; } .s1 { fill: #e07b39; } .s2 { fill: #9aa4af; }
@media (prefers-color-scheme: dark) {
  text { fill: #d0d7de; } .value { fill: #9198a1; } .spread { stroke: #f0f6fc; }
}
"""

Groups = list[tuple[str, list[Figure | None]]]
"""Labels, each with the figures of all servers."""


def svg(results: Results) -> str:
    """Draw the plot, with whiskers from the least to the most of all rounds."""
    table = tables()[0]
    parts: list[Groups] = [[], []]
    for part, beginning in zip(parts, PARTS, strict=True):
        for row in table.measured(results):
            if row.title.startswith(beginning):
                label = _ABBREVIATED.sub("", row.title.removeprefix(beginning))
                part.append((label, [table.figure(row, results, name) for name in table.columns]))
    lines, left = [_text(_GAP, 24, TITLE, "title")], float(_GAP)
    for index, name in enumerate(table.columns.values()):
        lines += [_rectangle(index, left, 34, _BAR), _text(left + _BAR + 5, 44, name)]
        left += 45 + 7 * len(name)
    step = len(table.columns) * _BAR + _GROUP_GAP
    for column, (part, beginning) in enumerate(zip(parts, PARTS, strict=True)):
        lines += _part(beginning.strip(" ,"), part, step, _GAP + column * (_COLUMN + _GAP))
    height = _LEGEND + _TOP + max(map(len, parts)) * step + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
    return "\n".join([head, f"<title>{escape(TITLE)}</title>", f"<style>{_STYLE}</style>", *lines, "</svg>", ""])


def _part(title: str, groups: Groups, step: int, left: float) -> Iterator[str]:
    yield _text(left, _LEGEND + 18, title, "title")
    longest = max((each.most for _, figures in groups for each in figures if each), default=1.0)
    zero, first, scale = left + _LABELS, _LEGEND + _TOP, (_COLUMN - _LABELS - _VALUES / 2) / longest
    yield _line("axis", (zero, zero), (first, first + len(groups) * step - _GROUP_GAP))
    for index, (label, figures) in enumerate(groups):
        at = first + index * step
        yield _text(zero - 8, at + (step - _GROUP_GAP) / 2 + 4, label, anchor="end")
        for bar, figure in enumerate(figures):
            if figure is None:
                continue
            end, least, most = (zero + scale * value for value in figure)
            y = at + bar * _BAR
            yield _rectangle(bar, zero, y, end - zero)
            if most - least > 1:
                yield _line("spread", (least, most), (y + (_BAR - 1) / 2,) * 2)
            yield _text(max(end, most) + 4, y + _BAR - 2, number(figure.median), "value")


def _rectangle(series: int, x: float, y: float, width: float) -> str:
    return f'<rect class="s{series}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR - 1}"/>'


def _line(style: str, x: Sequence[float], y: Sequence[float]) -> str:
    return f'<line class="{style}" x1="{x[0]:.1f}" x2="{x[1]:.1f}" y1="{y[0]:.1f}" y2="{y[1]:.1f}"/>'


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
