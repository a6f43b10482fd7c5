"""The harness of both suites: rounds, and in each round each case with each server in turn.

A disturbance of the machine then affects all servers alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from benchmarks.cases import Case, Plan
from benchmarks.generator import Generator
from benchmarks.measure import MeasurementError
from benchmarks.pinning import Places
from benchmarks.results import Metrics, Outcome, Results
from benchmarks.servers import DIRECT, Server
from benchmarks.sessions import Session

S = TypeVar("S", bound=Session)
QUANTILES = ("p50", "p90", "p99")


class Suite(ABC, Generic[S]):
    """Cases, servers and running sessions. During a case the other servers are idle."""

    def __init__(
        self, cases: Sequence[Case], servers: Sequence[Server | None], plan: Plan, places: Places, generator: Generator
    ) -> None:
        self.cases = cases
        self.plan = plan
        self.places = places
        self.generator = generator
        self._servers = {server.name: server for server in servers if server is not None}
        self._sessions: dict[str, S] = {}
        self._broken: dict[str, str] = {}
        """Reasons for servers that failed to start: another attempt in each case would take too long."""

    @abstractmethod
    def measure(self, case: Case, server: Server) -> Metrics:
        """Measure a case with a server."""

    def begin_case(self, case: Case) -> None:
        """Prepare a case, before its first server in each round."""

    def run(self, results: Results, report: Callable[[str], None]) -> None:
        """Measure all cases, and report progress and failures, one line each."""
        for number in range(self.plan.rounds):
            try:
                for at, case in enumerate(self.cases, 1):
                    report(f"round {number + 1} of {self.plan.rounds}, case {at} of {len(self.cases)}: {case.name}")
                    for server, outcome in self._outcomes(case):
                        results.add(case.name, number, server, outcome)
                        if isinstance(outcome, str):
                            report(f"failed: {case.name}, {server}: {outcome}")
            finally:
                self.close_sessions()

    def session(self, server: Server) -> S:
        """Return the session of a server, and start the server if necessary."""
        name = server.name
        if name in self._broken:
            raise MeasurementError(self._broken[name])
        if name in self._sessions and self._sessions[name].is_too_old:
            self._sessions.pop(name).close()
        if name not in self._sessions:
            try:
                self._sessions[name] = self.new_session(server)
            except MeasurementError as error:
                self._broken[name] = str(error)
                raise
        return self._sessions[name]

    @abstractmethod
    def new_session(self, server: Server) -> S:
        """Start a server."""

    def close_sessions(self) -> None:
        """Stop all servers."""
        for name in tuple(self._sessions):
            self._sessions.pop(name).close()

    def _outcomes(self, case: Case) -> Iterator[tuple[str, Outcome]]:
        broken: str | None = None
        try:
            self.begin_case(case)
        except (MeasurementError, OSError) as error:
            broken = str(error)
        direct: Outcome | None = None
        for name in case.servers:
            if name in self._servers:
                outcome = broken or self._attempt(case, self._servers[name], direct)
                direct = outcome if name == DIRECT else direct
                yield name, outcome

    def _attempt(self, case: Case, server: Server, direct: Outcome | None) -> Outcome:
        if isinstance(direct, str):
            return f"no baseline for delays: {direct}"
        try:
            metrics, baseline = self.measure(case, server), direct or {}
            return metrics | {f"added_{name}": max(0.0, metrics[name] - baseline[name]) for name in QUANTILES if baseline}
        except (MeasurementError, OSError) as error:
            # The state of the server is unknown, so the next case begins with a new process.
            if server.name in self._sessions:
                self._sessions.pop(server.name).close()
            return str(error)
