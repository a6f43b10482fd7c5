"""A run: rounds, and in each round every case with every server in turn, so that what disturbs one disturbs all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from benchmarks.allocations import crowd_size, measure_allocations, measure_crowd
from benchmarks.cases import FLOWS, TRAIN, Case, Kind, Plan, expected_seconds
from benchmarks.failure import FailedError
from benchmarks.generator import Generator, Load
from benchmarks.packets import Metrics, Session, added_delays, measure
from benchmarks.pinning import Places
from benchmarks.progress import Said
from benchmarks.results import Outcome, Results
from benchmarks.servers import DIRECT, Server

_CALIBRATION_SECONDS = 0.3
_OVERTIME = 3
_LEAST_OVERTIME_SECONDS = 120
"""A run ends after some times what was expected, whatever servers do; what is not measured by then has failed."""


@dataclass(frozen=True)
class Bench:
    """What a run needs."""

    plan: Plan
    cases: Sequence[Case]
    servers: dict[str, Server]
    places: Places
    generator: Generator
    descriptors: int

    def rounds_of(self, case: Case) -> int:
        """Tell how often a case is measured."""
        return min(self.plan.rounds, self.plan.crowd_rounds) if case.kind is Kind.CROWD else self.plan.rounds

    def seconds(self) -> float:
        """Guess how long a run takes."""
        return sum(self.rounds_of(case) * expected_seconds(case, self.plan) for case in self.cases)


class Sessions:
    """The servers that run, while packets are sent through one of them; the others wait. Use it as a context."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._open: dict[str, Session] = {}
        self._hopeless: dict[str, str] = {}
        """Servers that could not be started. To wait for them again in each case would take too long."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for name in tuple(self._open):
            self.drop(name)

    def of(self, name: str) -> Session:
        """Give the session of a server; it is started if it does not run.

        Raises:
            FailedError: it can't be started.
        """
        if name in self._hopeless:
            raise FailedError(self._hopeless[name])
        if name in self._open and self._open[name].is_too_old:
            self.drop(name)
        if name not in self._open:
            try:
                self._open[name] = Session(self._bench.servers[name], self._bench.places.server)
            except FailedError as error:
                self._hopeless[name] = str(error)
                raise
        return self._open[name]

    def drop(self, name: str) -> None:
        """End the session of a server, if there is one."""
        session = self._open.pop(name, None)
        if session is not None:
            session.close()


def calibrate(bench: Bench) -> Metrics:
    """Measure what the load generator does by itself: sending and receiving, without a server."""
    session = Session(bench.servers[DIRECT], ())
    try:
        flows, peer = session.flows.first(FLOWS), session.flows.peer.fileno()
        single = Load("up", 172, _CALIBRATION_SECONDS, window=48)
        trains = Load("up", 1200, _CALIBRATION_SECONDS, window=TRAIN, segments=TRAIN)
        return {
            "packets_per_second": bench.generator.run(single, flows, peer).rate,
            "in_trains_per_second": bench.generator.run(trains, flows, peer).rate,
        }
    finally:
        session.close()


class Run:
    """One run of the suite."""

    def __init__(self, bench: Bench, results: Results, said: Said) -> None:
        self._bench = bench
        self._results = results
        self._said = said
        self._deadline = time.monotonic() + max(_LEAST_OVERTIME_SECONDS, _OVERTIME * bench.seconds())

    def run(self) -> None:
        """Measure everything."""
        for number in range(self._bench.plan.rounds):
            with Sessions(self._bench) as sessions:
                for case in self._bench.cases:
                    if case.has_packets:
                        self._measure_packets(case, number, sessions)
            for case in self._bench.cases:
                if not case.has_packets and number < self._bench.rounds_of(case):
                    self._measure_apart(case, number)

    def _measure_packets(self, case: Case, number: int, sessions: Sessions) -> None:
        """Measure a case while all servers run, those idle that are not measured, so that they alternate quickly."""
        direct: Outcome | None = None
        for name in self._servers_of(case):
            outcome = self._attempt(case, number, name, partial(self._packets, case, sessions, name, direct))
            if isinstance(outcome, str):
                # Whatever state it is in, the next case begins with a new one.
                sessions.drop(name)
            if name == DIRECT:
                direct = outcome
        self._said.end(expected_seconds(case, self._bench.plan))

    def _packets(self, case: Case, sessions: Sessions, name: str, direct: Outcome | None) -> Metrics:
        metrics = measure(sessions.of(name), case, self._bench.plan, self._bench.generator)
        if isinstance(direct, str):
            raise FailedError(f"there is nothing to compare its delays with: {direct}")
        return metrics if direct is None else metrics | added_delays(metrics, direct)

    def _measure_apart(self, case: Case, number: int) -> None:
        """Measure a case for which each server is started anew."""
        for name in self._servers_of(case):
            self._attempt(case, number, name, partial(self._allocations, case, self._bench.servers[name]))
        self._said.end(expected_seconds(case, self._bench.plan))

    def _allocations(self, case: Case, server: Server) -> Metrics:
        bench = self._bench
        if case.kind is Kind.CROWD:
            count = crowd_size(bench.plan, bench.descriptors)
            return measure_crowd(server, bench.places.server, bench.generator, count)
        return measure_allocations(server, bench.places.server, bench.plan)

    def _servers_of(self, case: Case) -> list[str]:
        return [name for name in case.servers if name in self._bench.servers]

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise FailedError("no time was left")

    def _attempt(self, case: Case, number: int, server: str, measured: Callable[[], Metrics]) -> Outcome:
        """Measure, and keep what comes of it: a server that fails leaves a reason, and the suite goes on."""
        self._said.begin(f"round {number + 1} of {self._bench.rounds_of(case)}  {case.name}: {server}")
        outcome: Outcome
        try:
            self._check_time()
            outcome = measured()
        except (FailedError, OSError) as error:
            outcome = str(error)
            self._said.say(f"{case.name}, {server}: failed: {outcome}")
        self._results.keep(case.name, number, server, outcome)
        return outcome
