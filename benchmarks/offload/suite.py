"""The suite between three namespaces: the relay with offload in two modes and without, coturn, and the plain relay.

All run in one namespace, each at an address of its own. During a measurement the others are idle.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.cases import GENERIC, NATIVE, OFFLOAD_WINDOW, SOCKETS, Case, Kind, Plan
from benchmarks.generator import Generator, Load
from benchmarks.measure import MeasurementError
from benchmarks.offload import statistics
from benchmarks.offload.channels import measure_channels
from benchmarks.offload.live import Live
from benchmarks.offload.network import CLIENT_HOST, FAR_END, PEER_HOST, RELAY_ENDS, RELAY_HOSTS, Network
from benchmarks.offload.saturated import Floor, measure_floor, measure_saturated
from benchmarks.offload.sessions import MODES, OffloadSession, Way
from benchmarks.pinning import Places, on
from benchmarks.results import Metrics
from benchmarks.servers import COTURN, DIRECT, PLAIN, Endpoints, Server, coturn_server, plain_server, relay_server
from benchmarks.suite import QUANTILES, Suite
from relay.offload import capabilities, elf

_NAMES: Final = (DIRECT, NATIVE, GENERIC, SOCKETS, COTURN, PLAIN)
_TOOLS: Final = {"ip": "iproute2", "ethtool": "ethtool", "sysctl": "procps"}
"""Programs, with their Debian packages."""


class OffloadSuite(Suite[OffloadSession]):
    """The cases with offload."""

    network: Network
    live: Live
    _floor: Floor

    def new_session(self, server: Server) -> OffloadSession:
        """Start a server."""
        return OffloadSession(server, self.network, self.places.server)

    def begin_case(self, case: Case) -> None:
        """Measure the cost of sending."""
        if case.kind is Kind.OFFLOAD:
            session = self.session(Server(DIRECT, _endpoints(DIRECT)))
            self._floor = measure_floor(self.live, Way(self.network, case.direction), case, session, self.plan)

    def measure(self, case: Case, server: Server) -> Metrics:
        """Measure a case with a server."""
        if case.kind is Kind.OFFLOAD_CHANNELS:
            return measure_channels(self.plan.channels)
        session, way = self.session(server), Way(self.network, case.direction)
        if case.kind is Kind.OFFLOAD_PROGRAM:
            return self._program(case, session, way)
        if case.kind is Kind.OFFLOAD_DELAY:
            return self._delays(case, session)
        return measure_saturated(self.live, way, case, session, self.plan, self._floor)

    def _delays(self, case: Case, session: OffloadSession) -> Metrics:
        load = Load(case.direction, case.size, round(1000 * self.plan.paced_seconds), rate=case.rate)
        flows = session.flows(case.flows)
        with session.relaying(case.direction):
            traffic = self.generator.run(load, flows, session.peer.fileno())
        traffic.check_arrivals()
        return {name: getattr(traffic, name) for name in QUANTILES}

    def _program(self, case: Case, session: OffloadSession, way: Way) -> Metrics:
        """Measure the run time of the XDP program."""
        sent = session.frames(way, case.flows, bytes(case.size))
        pid = session.pid or 0
        with session.relaying(case.direction), statistics.enabled():
            with self.live.sink(way.sink, FAR_END):
                self.live.prepare(sent, way.source_interface.ifindex, window=OFFLOAD_WINDOW, growth=way.growth)
                self.live.send(way.source, self.plan.warm_up_seconds / 4)
                before = statistics.runs_of(pid)
                self.live.send(way.source, self.plan.offload_seconds)
                after = statistics.runs_of(pid)
            clock_ns = statistics.clock_ns()
        count = after[1] - before[1]
        if not count:
            raise MeasurementError("the XDP program did not run")
        measured_ns = (after[0] - before[0]) / count
        return {"measured_ns": measured_ns, "program_ns": measured_ns - clock_ns}


@contextlib.contextmanager
def offload_suite(
    cases: Sequence[Case], plan: Plan, places: Places, generator: Generator, programs: Path
) -> Iterator[OffloadSuite]:
    """Prepare namespaces, programs and servers."""
    _check_requirements()
    with contextlib.ExitStack() as stack:
        stack.enter_context(on({min(places.load)}))
        suite = OffloadSuite(cases, tuple(_servers(programs)), plan, places, generator)
        suite.network = stack.enter_context(contextlib.closing(Network()))
        suite.live = stack.enter_context(contextlib.closing(Live(programs)))
        yield suite


def _check_requirements() -> None:
    if lacking := capabilities.missing():
        raise MeasurementError(f"network namespaces and BPF programs require root, with {' and '.join(lacking)}")
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise MeasurementError(f"{tool} is not installed (Debian: apt-get install {package})")
    try:
        elf.packaged()
    except elf.NotBuiltError as error:
        raise MeasurementError(f"{error}: python hatch_build.py builds it") from error


def _endpoints(name: str) -> Endpoints:
    number = _NAMES.index(name)
    return Endpoints(RELAY_HOSTS[number], (PEER_HOST, 5001 + number), CLIENT_HOST)


def _servers(directory: Path) -> Iterator[Server | None]:
    yield Server(DIRECT, _endpoints(DIRECT))
    for number, name in enumerate((NATIVE, GENERIC, SOCKETS)):
        # All clients have one source address, so the limit of unauthenticated responses is off.
        options = ["--unauthenticated-rate", "0"]
        if name in MODES:
            options += ["--ebpf-offloading", ",".join(RELAY_ENDS), "--ebpf-attach-mode", MODES[name]]
        yield relay_server(directory, _endpoints(name), *options, name=name, control_port=9001 + number)
    yield coturn_server(directory, _endpoints(COTURN))
    yield plain_server(directory, _endpoints(PLAIN), directory / "plain")
