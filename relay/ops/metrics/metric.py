"""Definition of a metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from relay.ops.totals import RelayTotals


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

Readings: TypeAlias = Value | Mapping[Any, Value]
"""The value of a metric without labels, or the values by label, or by a tuple of all labels."""

Point: TypeAlias = tuple[tuple[LabelValue, ...], Value]
"""The values of the labels, in their order, and the value."""


@dataclass(frozen=True, slots=True)
class Metric:
    """Definition of a metric.

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
    read: Callable[[RelayTotals], Readings]
    labels: Mapping[str, tuple[LabelValue, ...]] = field(default_factory=dict)
    """All values of each label. Empty for a value that is fixed at the start of a relay."""
    bounds: tuple[int, ...] = ()
    """Histogram only: the largest size of each count but the last."""
    prometheus: str = ""
    """The usual name in Prometheus, without ``_total``, if it does not follow from the name."""

    def points(self, totals: RelayTotals) -> list[Point]:
        """Read the values."""
        found = self.read(totals)
        if not isinstance(found, Mapping):
            return [((), found)]
        return [(labels if isinstance(labels, tuple) else (labels,), value) for labels, value in found.items()]
