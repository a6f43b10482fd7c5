"""Outcomes by case, round and server, with medians, spreads and ratios."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

Metrics: TypeAlias = dict[str, float]
Outcome: TypeAlias = Metrics | str
"""Outcome of a case with a server in a round. Text is the reason of a failure."""


class Figure(NamedTuple):
    """Values of a metric over all rounds."""

    median: float
    least: float
    most: float


class Results:
    """The outcomes of a run, and a description of the run."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about
        self._rounds: dict[str, list[dict[str, Outcome]]] = {}

    def add(self, case: str, number: int, server: str, outcome: Outcome) -> None:
        """Add the outcome of a round; rounds count from 0."""
        rounds = self._rounds.setdefault(case, [])
        rounds += [{} for _ in range(number + 1 - len(rounds))]
        rounds[number][server] = outcome

    def has(self, case: str, server: str | None = None) -> bool:
        """Return whether a case was measured, at all or with a server, successfully or not."""
        return any(server is None or server in outcomes for outcomes in self._rounds.get(case, ()))

    def figure(self, case: str, server: str, metric: str) -> Figure | None:
        """Return the figure of a metric; None if all rounds failed."""
        values = (_value(outcomes.get(server), metric) for outcomes in self._rounds.get(case, ()))
        return _figure([value for value in values if value is not None])

    def ratio(self, case: str, metric: str, servers: tuple[str, str]) -> Figure | None:
        """Return the ratio of two servers' values. Each ratio is of two measurements in the same round."""
        pairs = [[_value(outcomes.get(name), metric) for name in servers] for outcomes in self._rounds.get(case, ())]
        return _figure([mine / other for mine, other in pairs if mine is not None and other])

    def failures(self) -> Iterator[str]:
        """Return a line for each failure, without repetitions."""
        lines = (
            f"{case}, {server}: {outcome}"
            for case, rounds in self._rounds.items()
            for outcomes in rounds
            for server, outcome in outcomes.items()
            if isinstance(outcome, str)
        )
        return iter(dict.fromkeys(lines))

    def medians(self, metric: str) -> Iterator[tuple[str, str, float]]:
        """Return case, server and median for each case with the metric."""
        for case, rounds in self._rounds.items():
            for server in dict.fromkeys(name for outcomes in rounds for name in outcomes):
                figure = self.figure(case, server, metric)
                if figure is not None:
                    yield case, server, figure.median

    def write(self, path: Path, metrics: set[str]) -> None:
        """Write some metrics as JSON, rounded to six digits, with a line for each case."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"{json.dumps(case)}: {json.dumps([_shortened(outcomes, metrics) for outcomes in rounds], ensure_ascii=False)}"
            for case, rounds in self._rounds.items()
        ]
        about = json.dumps(self.about, ensure_ascii=False)
        path.write_text(f'{{"about": {about}, "cases": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of `write`."""
        document = json.loads(path.read_text(encoding="utf-8"))
        results = cls(document["about"])
        results._rounds = document["cases"]
        return results


def _shortened(outcomes: dict[str, Outcome], metrics: set[str]) -> dict[str, Outcome]:
    return {
        server: outcome
        if isinstance(outcome, str)
        else {name: float(f"{value:.6g}") for name, value in outcome.items() if name in metrics}
        for server, outcome in outcomes.items()
    }


def _value(outcome: Outcome | None, metric: str) -> float | None:
    return None if outcome is None or isinstance(outcome, str) else outcome.get(metric)


def _figure(values: list[float]) -> Figure | None:
    return Figure(statistics.median(values), min(values), max(values)) if values else None
