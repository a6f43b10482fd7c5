"""What was measured, round by round, and what is said about it: medians, spreads and ratios."""

import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

from benchmarks.packets import Metrics
from benchmarks.servers import COTURN, RELAY

Outcome: TypeAlias = Metrics | str
"""Of one case with one server in one round; text is why there is none."""


class Figure(NamedTuple):
    """The values of one metric over all rounds."""

    median: float
    least: float
    most: float


class Results:
    """The outcomes of a run, and what they were measured on."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self._rounds: dict[str, list[dict[str, Outcome]]] = {}

    def keep(self, case: str, number: int, server: str, outcome: Outcome) -> None:
        """Keep the outcome of a round; rounds are counted from 0."""
        rounds = self._rounds.setdefault(case, [])
        rounds += [{} for _ in range(number + 1 - len(rounds))]
        rounds[number][server] = outcome

    def servers(self) -> set[str]:
        """Name all servers of which there is an outcome."""
        return {server for rounds in self._rounds.values() for outcomes in rounds for server in outcomes}

    def has(self, case: str) -> bool:
        """Tell whether a case was run at all."""
        return case in self._rounds

    def values(self, case: str, server: str, metric: str) -> list[float]:
        """Give what was measured, without the rounds that failed."""
        values = (_value(outcome, metric) for outcome in self._outcomes(case, server))
        return [value for value in values if value is not None]

    def figure(self, case: str, server: str, metric: str) -> Figure | None:
        """Sum up what was measured; None if nothing was."""
        return _figure(self.values(case, server, metric))

    def ratio(self, case: str, metric: str, one: str = RELAY, other: str = COTURN) -> Figure | None:
        """Give one server's figure to another's; each ratio is of two measurements of the same round."""
        pairs = ((_value(each.get(one), metric), _value(each.get(other), metric)) for each in self._rounds.get(case, ()))
        return _figure([ours / theirs for ours, theirs in pairs if ours is not None and theirs])

    def was_tried(self, case: str, server: str) -> bool:
        """Tell whether a case was measured with a server, whatever came of it."""
        return bool(self._outcomes(case, server))

    def failures(self, case: str, server: str) -> list[str]:
        """Give the reasons of all rounds that failed."""
        return [outcome for outcome in self._outcomes(case, server) if isinstance(outcome, str)]

    def all_values(self, metric: str, cases: Collection[str]) -> list[tuple[str, str, float]]:
        """Give the medians of a metric in some cases, with case and server."""
        found = []
        for case in (name for name in self._rounds if name in cases):
            servers = sorted({server for outcomes in self._rounds[case] for server in outcomes})
            figures = ((server, self.figure(case, server, metric)) for server in servers)
            found += [(case, server, figure.median) for server, figure in figures if figure is not None]
        return found

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"about": self.about, "cases": self._rounds}
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote."""
        document = json.loads(path.read_text(encoding="utf-8"))
        results = cls(document["about"])
        results._rounds = document["cases"]
        return results

    def _outcomes(self, case: str, server: str) -> list[Outcome]:
        return [outcomes[server] for outcomes in self._rounds.get(case, ()) if server in outcomes]


def _value(outcome: Outcome | None, metric: str) -> float | None:
    return None if outcome is None or isinstance(outcome, str) else outcome.get(metric)


def _figure(values: list[float]) -> Figure | None:
    return Figure(statistics.median(values), min(values), max(values)) if values else None
