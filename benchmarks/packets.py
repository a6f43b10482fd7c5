"""The cases that are about packets: a session of one server, and how each case is measured in it."""

import contextlib
import time
from collections.abc import Iterable
from typing import TypeAlias

from benchmarks.cases import OVERLOAD, Case, Kind, Plan
from benchmarks.failure import FailedError
from benchmarks.flows import Flows
from benchmarks.generator import Generator, Load, Traffic
from benchmarks.measure import cpu_ns
from benchmarks.servers import DIRECT, Running, Server, started

Metrics: TypeAlias = dict[str, float]

_LONGEST_AGE = 240.0
"""Seconds after which a server is started anew: nobody refreshes, and coturn lets nothing through after 300."""

_QUANTILES = ("p50", "p99", "p999")


class Session:
    """A server that runs, and the flows through it. Close it to end both."""

    def __init__(self, server: Server, cpus: Iterable[int]) -> None:
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()
        self.flows = Flows(server)
        self._stack.callback(self.flows.close)
        self._running: Running | None = None
        try:
            if server.name != DIRECT:
                self._running = self._stack.enter_context(started(server, cpus))
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """End the server, and close all sockets."""
        self._stack.close()

    @property
    def is_too_old(self) -> bool:
        """Tell whether its channels may expire soon."""
        return time.monotonic() - self._began > _LONGEST_AGE

    def check(self) -> None:
        """Make sure that the server is still there.

        Raises:
            FailedError: it has ended.
        """
        if self._running is not None:
            self._running.check()

    def cpu_ns(self) -> int:
        """Give the CPU time of the server so far."""
        return 0 if self._running is None else cpu_ns(self._running.pid)


def measure(session: Session, case: Case, plan: Plan, generator: Generator) -> Metrics:
    """Measure one case.

    Raises:
        FailedError: nothing can be said, for the reason in the message.
    """
    session.check()
    try:
        if case.kind is Kind.OVERLOAD:
            return _overload(session, case, plan, generator)
        _warm_up(session, case, plan, generator)
        return _send(session, case, _load_of(case, plan.paced_seconds if case.is_delay else plan.seconds), generator)
    except FailedError:
        # That it has ended explains all else.
        session.check()
        raise


def added_delays(metrics: Metrics, direct: Metrics) -> Metrics:
    """Give what a server adds to the delays of the path without it, quantile by quantile."""
    return {f"added_{name}": max(0.0, metrics[name] - direct[name]) for name in _QUANTILES}


def _load_of(case: Case, seconds: float) -> Load:
    if case.is_delay:
        return Load(case.direction, case.size, seconds, rate=case.rate)
    return Load(case.direction, case.size, seconds, window=case.window, segments=case.segments)


def _warm_up(session: Session, case: Case, plan: Plan, generator: Generator) -> None:
    """Have the server do what it will be measured doing; what comes of it is of no interest."""
    load = _load_of(case, plan.warm_up_seconds)
    generator.run(load, session.flows.first(case.flows), session.flows.peer.fileno())


def _send(session: Session, case: Case, load: Load, generator: Generator) -> Metrics:
    """Run a load; CPU time is all that the server uses from before the first packet until the last has arrived."""
    flows = session.flows.first(case.flows)
    before = session.cpu_ns()
    traffic = generator.run(load, flows, session.flows.peer.fileno())
    used = session.cpu_ns() - before
    if not traffic.arrived:
        raise FailedError(f"none of {traffic.sent:,} packets arrived")
    return _metrics(load, traffic, used)


def _metrics(load: Load, traffic: Traffic, used_ns: int) -> Metrics:
    return {
        "cpu_us": used_ns / 1000 / traffic.relayed,
        "rate": traffic.rate,
        "offered": traffic.sent / traffic.seconds,
        "loss": traffic.loss,
        "server_busy": used_ns / 1e9 / max(traffic.seconds, traffic.last_ms / 1000),
        "load_idle": traffic.idle,
        "load_running": traffic.running,
        "in_time": 1 - traffic.late * load.segments / max(traffic.sent, 1),
        "stalls": traffic.stalls,
        "refused": traffic.refused,
        **{name: getattr(traffic, name) for name in _QUANTILES},
    }


def _overload(session: Session, case: Case, plan: Plan, generator: Generator) -> Metrics:
    """Find the best that a server does, then offer it more than that, whether it keeps up or not."""
    _warm_up(session, case, plan, generator)
    best = _send(session, case, _load_of(case, plan.seconds / 2), generator)["rate"]
    load = Load(case.direction, case.size, plan.seconds, rate=round(OVERLOAD * best))
    metrics = _send(session, case, load, generator)
    return metrics | {
        "best": best,
        "goodput": 100 * metrics["rate"] / best,
        "offered_times": metrics["offered"] / best,
        "p99_ms": metrics["p99"] / 1000,
    }
