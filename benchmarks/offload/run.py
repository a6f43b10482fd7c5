"""A run: rounds, and in each round every case with every subject in turn, so that what disturbs one disturbs all alike."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from benchmarks.failure import FailedError
from benchmarks.generator import Generator, Load
from benchmarks.offload.bindings import measure_bindings
from benchmarks.offload.cases import DELAY_RATE, Case, Kind, Plan, expected_seconds
from benchmarks.offload.live import Live
from benchmarks.offload.network import Network
from benchmarks.offload.program import measure_program
from benchmarks.offload.saturated import Floor, measure_floor, measure_saturated
from benchmarks.offload.sessions import Session
from benchmarks.offload.subjects import Subject
from benchmarks.packets import Metrics, added_delays
from benchmarks.pinning import Places
from benchmarks.progress import Said
from benchmarks.results import Outcome, Results
from benchmarks.servers import DIRECT

_OVERTIME: Final = 3
_LEAST_OVERTIME_SECONDS: Final = 120
"""A run ends after some times what was expected, whatever the subjects do; what is not measured by then has failed."""


@dataclass(frozen=True)
class Bench:
    """What a run needs."""

    plan: Plan
    cases: Sequence[Case]
    subjects: dict[str, Subject]
    places: Places
    generator: Generator
    live: Live
    network: Network

    def seconds(self) -> float:
        """Guess how long a run takes."""
        each = sum(expected_seconds(case, self.plan) for case in self.cases)
        return self.plan.rounds * (each + 2 * len(self.subjects))


class Run:
    """One run of the suite."""

    def __init__(self, bench: Bench, results: Results, said: Said) -> None:
        self._bench = bench
        self._results = results
        self._said = said
        self._deadline = time.monotonic() + max(_LEAST_OVERTIME_SECONDS, _OVERTIME * bench.seconds())
        self._sessions: dict[str, Session] = {}

    def run(self) -> None:
        """Measure everything."""
        for number in range(self._bench.plan.rounds):
            with contextlib.ExitStack() as stack:
                stack.callback(self._close)
                for case in self._bench.cases:
                    self._measure(case, number)
                    self._said.end(expected_seconds(case, self._bench.plan))

    def _close(self) -> None:
        for name in tuple(self._sessions):
            self._sessions.pop(name).close()

    def _measure(self, case: Case, number: int) -> None:
        before: Floor | Outcome | None = None
        if case.kind is Kind.SATURATED:
            session = self._session(DIRECT)
            before = measure_floor(self._bench.live, self._bench.network, case, session, self._bench.plan)
        for name in case.subjects:
            if name not in self._bench.subjects:
                continue
            outcome = self._attempt(case, number, name, partial(self._one, case, name, before))
            if name == DIRECT:
                before = outcome

    def _one(self, case: Case, name: str, before: Floor | Outcome | None) -> Metrics:
        bench = self._bench
        if case.kind is Kind.BINDINGS:
            return measure_bindings(case, bench.plan.bindings)
        session = self._session(name)
        if case.kind is Kind.PROGRAM:
            return measure_program(bench.live, bench.network, case, session, bench.plan)
        if isinstance(before, Floor):
            return measure_saturated(bench.live, bench.network, case, session, bench.plan, before)
        metrics = self._delays(case, session)
        if isinstance(before, str):
            raise FailedError(f"there is nothing to compare its delays with: {before}")
        return metrics if before is None else metrics | added_delays(metrics, before)

    def _delays(self, case: Case, session: Session) -> Metrics:
        load = Load(case.direction, case.size, self._bench.plan.delay_seconds, rate=DELAY_RATE)
        flows = session.flows(case.flows)
        with session.relaying(case.direction):
            traffic = self._bench.generator.run(load, flows, session.peer)
        if not traffic.arrived:
            raise FailedError(f"none of {traffic.sent:,} packets arrived")
        return {"p50": traffic.p50, "p99": traffic.p99, "p999": traffic.p999, "loss": traffic.loss}

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise FailedError("no time was left")

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = Session(self._bench.subjects[name], self._bench.network, self._bench.places.server)
        return self._sessions[name]

    def _attempt(self, case: Case, number: int, name: str, measured: Callable[[], Metrics]) -> Outcome:
        """Measure, and keep what comes of it: a subject that fails leaves a reason, and the suite goes on."""
        self._said.begin(f"round {number + 1} of {self._bench.plan.rounds}  {case.name}: {name}")
        outcome: Outcome
        try:
            self._check_time()
            outcome = measured()
        except (FailedError, OSError) as error:
            outcome = str(error)
            self._said.say(f"{case.name}, {name}: failed: {outcome}")
            session = self._sessions.pop(name, None)
            if session is not None:
                # Whatever state it is in, the next case begins with a new one.
                session.close()
        self._results.keep(case.name, number, name, outcome)
        return outcome
