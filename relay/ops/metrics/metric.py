"""What a metric is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

from relay.ops.metrics.sources import Look


class Kind(Enum):
    """How a metric's values behave."""

    COUNTER = "counter"
    """Only ever grows, from 0 at the start of the process."""
    GAUGE = "gauge"
    """Goes up and down."""
    HISTOGRAM = "histogram"
    """Counts by size, each of which only ever grows."""


class Histogram(NamedTuple):
    """How many there were of each size."""

    counts: Sequence[int]
    """Between each bound and the one before, and above the last one."""
    total: int
    """The sum of all that was counted."""


LabelValue: TypeAlias = str | int
"""A number stays one where that can be told."""

Point: TypeAlias = tuple[tuple[LabelValue, ...], float | Histogram]
"""A value, with those of the labels in their order."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One definition.

    It names the values that each label can have, and has a point for each of their combinations that can be, at any time:
    so what a client, a peer or the portal sends can never make there be more of them.
    """

    name: str
    """With dots between the words, as OpenTelemetry has it."""
    unit: str
    """As UCUM has it: ``s``, ``By``, or a word in braces for what is counted."""
    kind: Kind
    description: str
    """One sentence."""
    read: Callable[[Look], Iterable[Point]]
    """Gives its points."""
    labels: Mapping[str, tuple[LabelValue, ...]] = field(default_factory=dict)
    """The values that each can have."""
    bounds: tuple[int, ...] = ()
    """Of a histogram: the largest size that each count but the last is for."""
