"""Bar charts as SVG: a few panels, each with groups of bars, one for each server."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from benchmarks.results import Figure
from benchmarks.rows import number

_WIDTH = 980
_GAP = 30
_PANEL = (_WIDTH - 3 * _GAP) / 2
_LABELS = 150
"""Width of the labels to the left of the bars; as much again, nearly, is left for values to their right."""

_VALUES = 90
_BAR = 11
_GROUP_GAP = 9
_TITLE = 30
_LEGEND = 56

_STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; }
.value { font-size: 10px; fill: #57606a; }
.axis { stroke: #8c959f; }
.spread { stroke: #24292f; stroke-width: 1; }
.s0 { fill: #2f6fdb; } .s1 { fill: #e07b39; } .s2 { fill: #9aa4af; } .s3 { fill: #3aa67a; } .s4 { fill: #8a63d2; }
@media (prefers-color-scheme: dark) {
  text { fill: #d0d7de; } .value { fill: #9198a1; } .spread { stroke: #f0f6fc; }
}
"""


class Group(NamedTuple):
    """Bars of one thing; None for a server of which there is nothing."""

    label: str
    figures: Sequence[Figure | None]


class Panel(NamedTuple):
    """Groups on one scale."""

    title: str
    groups: Sequence[Group]
    logarithmic: bool = False


def svg(title: str, names: Sequence[str], panels: Sequence[Panel]) -> str:
    """Draw panels, two side by side, with whiskers from the least to the most of all rounds."""
    shown = [panel for panel in panels if any(_known(panel))]
    parts = [_text(_GAP, 24, title, "title"), *_legend(names)]
    top = float(_LEGEND)
    for left, right in zip(shown[::2], [*shown[1::2], None], strict=False):
        row = [panel for panel in (left, right) if panel is not None]
        for column, panel in enumerate(row):
            parts += _panel(panel, len(names), _GAP + column * (_PANEL + _GAP), top)
        top += max(_height(panel, len(names)) for panel in row)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top:.0f}" width="{_WIDTH}" height="{top:.0f}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", *parts, "</svg>", ""])


def _known(panel: Panel) -> Iterator[Figure]:
    return (figure for group in panel.groups for figure in group.figures if figure is not None)


def _legend(names: Sequence[str]) -> Iterator[str]:
    left = float(_GAP)
    for index, name in enumerate(names):
        yield f'<rect class="s{index}" x="{left:.0f}" y="34" width="{_BAR}" height="{_BAR}"/>'
        yield _text(left + _BAR + 5, 44, name)
        left += 45 + 7 * len(name)


def _height(panel: Panel, bars: int) -> float:
    return _TITLE + len(panel.groups) * (bars * _BAR + _GROUP_GAP) + 14


def _panel(panel: Panel, bars: int, left: float, top: float) -> Iterator[str]:
    yield _text(left, top + 18, panel.title, "title")
    scale = _Scale(panel)
    zero = left + _LABELS
    bottom = top + _TITLE + len(panel.groups) * (bars * _BAR + _GROUP_GAP) - _GROUP_GAP
    yield f'<line class="axis" x1="{zero:.1f}" x2="{zero:.1f}" y1="{top + _TITLE:.1f}" y2="{bottom:.1f}"/>'
    for index, group in enumerate(panel.groups):
        first = top + _TITLE + index * (bars * _BAR + _GROUP_GAP)
        yield _text(zero - 8, first + bars * _BAR / 2 + 4, group.label, anchor="end")
        for bar, figure in enumerate(group.figures):
            if figure is not None:
                yield from _bar(scale, figure, bar, zero, first + bar * _BAR)


def _bar(scale: "_Scale", figure: Figure, series: int, left: float, top: float) -> Iterator[str]:
    end, least, most = (left + scale.width(value) for value in (figure.median, figure.least, figure.most))
    yield f'<rect class="s{series}" x="{left:.1f}" y="{top:.1f}" width="{end - left:.1f}" height="{_BAR - 1}"/>'
    middle = top + (_BAR - 1) / 2
    if most - least > 1:
        yield f'<line class="spread" x1="{least:.1f}" x2="{most:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
    yield _text(max(end, most) + 4, top + _BAR - 2, number(figure.median), "value")


class _Scale:
    """From values to lengths."""

    def __init__(self, panel: Panel) -> None:
        values = [value for figure in _known(panel) for value in figure]
        self._logarithmic = panel.logarithmic
        self._most = max(values) or 1.0
        self._least = max(min(values), self._most / 1e5) / 2
        self._room = _PANEL - _LABELS - _VALUES / 2

    def width(self, value: float) -> float:
        """Give the length of a bar."""
        if not self._logarithmic:
            return max(0.0, value) / self._most * self._room
        span = math.log(self._most / self._least)
        return max(0.0, math.log(max(value, self._least) / self._least)) / span * self._room


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
