"""A metric, for all exporters."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeAlias


class MetricKind(Enum):
    """How the values of a metric change."""

    COUNTER = "counter"
    """Increases only, from 0 at the start of the process."""
    GAUGE = "gauge"
    """Increases and decreases."""
    HISTOGRAM = "histogram"
    """Counts by size. Each count increases only."""


class Histogram(NamedTuple):
    """Counts by size."""

    counts: Sequence[int]
    """Between each bound and the previous bound, and above the last bound."""
    total: int
    """Sum of all sizes."""


LabelValue: TypeAlias = str | int
"""A number stays a number where the format has numbers."""

Value: TypeAlias = float | Histogram

Point: TypeAlias = tuple[tuple[LabelValue, ...], Value]
"""The values of the labels, in their order, and the value."""


class Metric(NamedTuple):
    """A metric and its values.

    A metric has a fixed set of points: a point for each possible combination of label values. So no input of a client, a
    peer or the portal can add points.
    """

    kind: MetricKind
    name: str
    """Words separated by dots, as in OpenTelemetry."""
    unit: str
    """In UCUM: ``s``, ``By``, or a word in braces for a count."""
    description: str
    """One sentence."""
    values: Value | Mapping[Any, Value]
    """The value of a metric without labels, or the values by label, or by a tuple of all labels."""
    labels: tuple[str, ...] = ()
    bounds: tuple[int, ...] = ()
    """Histogram only: the largest size of each count but the last."""

    @property
    def points(self) -> list[Point]:
        """The values with the values of their labels."""
        if not isinstance(self.values, Mapping):
            return [((), self.values)]
        return [(labels if isinstance(labels, tuple) else (labels,), value) for labels, value in self.values.items()]
