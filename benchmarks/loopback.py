"""The suite on loopback: packets and allocations through the relay, coturn and the plain relay."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.allocations import measure_all_ports, measure_allocations
from benchmarks.cases import BATCH, FLOWS, OVERLOAD, Case, Kind, Plan
from benchmarks.generator import Generator, Load
from benchmarks.measure import MeasurementError
from benchmarks.pinning import Places, busy
from benchmarks.results import Metrics
from benchmarks.servers import COTURN, DIRECT, PLAIN, RELAY, Server, coturn_server, loopback, plain_server, relay_server
from benchmarks.sessions import Session
from benchmarks.suite import QUANTILES, Suite

_CALIBRATION_MS = 300


class LoopbackSuite(Suite[Session]):
    """The cases without offload."""

    def __init__(self, cases: Sequence[Case], plan: Plan, places: Places, generator: Generator, programs: Path) -> None:
        # All clients have one source address, so the limit of unauthenticated responses is off.
        servers = (
            Server(DIRECT, loopback(DIRECT)),
            relay_server(programs, loopback(RELAY), "--unauthenticated-rate", "0"),
            coturn_server(programs, loopback(COTURN), "--allow-loopback-peers"),
            plain_server(programs, loopback(PLAIN), programs / "plain"),
        )
        super().__init__(cases, servers, plan, places, generator)

    def new_session(self, server: Server) -> Session:
        """Start a server."""
        return Session(server, self.places.server)

    def measure(self, case: Case, server: Server) -> Metrics:
        """Measure a case with a server."""
        if case.kind is Kind.ALLOCATIONS:
            self.close_sessions()
            return measure_allocations(server, self.places.server, self.plan)
        if case.kind is Kind.ALL_PORTS:
            self.close_sessions()
            return measure_all_ports(server, self.places.server, self.generator, self.plan)
        session = self.session(server)
        session.check()
        try:
            return self._packets(case, session)
        except MeasurementError:
            # If the server has ended, this is the reason.
            session.check()
            raise

    def calibrate(self) -> Metrics:
        """Measure the generator without a server."""
        session = Session(Server(DIRECT, loopback(DIRECT)), ())
        try:
            flows, peer = session.flows(FLOWS), session.peer.fileno()
            single = Load("up", 172, _CALIBRATION_MS, window=48)
            batches = Load("up", 1200, _CALIBRATION_MS, window=BATCH, segments=BATCH)
            return {
                "packets_per_second": round(self.generator.run(single, flows, peer).rate),
                "in_batches_per_second": round(self.generator.run(batches, flows, peer).rate),
            }
        finally:
            session.close()

    def _packets(self, case: Case, session: Session) -> Metrics:
        if case.kind is Kind.BUSY:
            with busy(self.places.server):
                self._send(session, case, _load(case, self.plan.busy_seconds))
                return self._send(session, case, _load(case, self.plan.busy_seconds))
        seconds = self.plan.paced_seconds if case.has_delays else self.plan.seconds
        self.generator.run(_load(case, self.plan.warm_up_seconds), session.flows(case.flows), session.peer.fileno())
        if case.kind is not Kind.OVERLOAD:
            return self._send(session, case, _load(case, seconds))
        best = self._send(session, case, _load(case, seconds / 2))["rate"]
        load = Load(case.direction, case.size, round(1000 * seconds), rate=round(OVERLOAD * best))
        metrics = self._send(session, case, load)
        return {
            "goodput": 100 * metrics["rate"] / best,
            "offered_times": metrics["offered"] / best,
            "p99_ms": metrics["p99"] / 1000,
        }

    def _send(self, session: Session, case: Case, load: Load) -> Metrics:
        """Run a load. CPU time counts from before the first packet until the last has arrived."""
        flows = session.flows(case.flows)
        before = session.cpu_ns()
        traffic = self.generator.run(load, flows, session.peer.fileno())
        used_ns = session.cpu_ns() - before
        traffic.check_arrivals()
        metrics = {
            "cpu_us": used_ns / 1000 / traffic.arrived,
            "rate": traffic.rate,
            "offered": traffic.sent / traffic.seconds,
            "loss": traffic.loss,
            "load_running": traffic.running,
            **{name: getattr(traffic, name) for name in QUANTILES},
        }
        if load.rate:
            return metrics | {"in_time": 1 - traffic.late * load.segments / max(traffic.sent, 1)}
        busy = used_ns / 1e9 / max(traffic.seconds, traffic.last_ms / 1000)
        return metrics | {"server_busy": busy, "load_idle": traffic.idle}


def _load(case: Case, seconds: float) -> Load:
    window, segments = 0 if case.rate else case.window, BATCH if case.kind is Kind.BATCHES else 1
    return Load(case.direction, case.size, round(1000 * seconds), window=window, rate=case.rate, segments=segments)
