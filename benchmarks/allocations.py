"""The cases that are about allocations: what one costs, and what as many as there are ports cost."""

import contextlib
import resource
import time
from collections.abc import Iterable

from benchmarks.cases import Plan
from benchmarks.failure import FailedError
from benchmarks.flows import Flow, turn_flows_of
from benchmarks.generator import Generator, Load
from benchmarks.handshake import AT_ONCE, Client, allocate, bind_channels, refresh, udp_socket
from benchmarks.measure import cpu_ns, memory
from benchmarks.packets import Metrics
from benchmarks.servers import Server, started

_WARM_UP = 20
_SETTLE_SECONDS = 0.3
"""After the last allocation: threads and sockets may still be set up when it is answered."""

_OTHER_DESCRIPTORS = 300
"""That this process, or a server, has open besides a socket for each allocation, at the most."""

_BURST_QUIET_MS = 3000
_BURST_SIZE = 172


def raise_descriptor_limit() -> int:
    """Raise this process's limit, and that of all it starts, as far as allowed; give it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def crowd_size(plan: Plan, descriptors: int) -> int:
    """Tell how many allocations there can be at once: each has a socket in the server, and one in its client."""
    return min(plan.crowd, descriptors - _OTHER_DESCRIPTORS)


def measure_allocations(server: Server, cpus: Iterable[int], plan: Plan) -> Metrics:
    """Measure what an allocation costs, how fast one client after another gets one, and a start and a stop.

    Raises:
        FailedError: the server refused, did not answer, or ended.
    """
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(started(server, cpus))
        clients = _opened(stack, server, _WARM_UP + plan.allocations)
        allocate(clients[:_WARM_UP], AT_ONCE)
        metrics, seconds = _measure_making(running.pid, clients[_WARM_UP:], at_once=1)
        before = cpu_ns(running.pid)
        refreshing = refresh(clients[0], plan.refreshes)
        return metrics | {
            "start_ms": running.start_ms,
            "per_second": plan.allocations / seconds,
            "refreshes_per_second": plan.refreshes / refreshing,
            "refresh_cpu_us": (cpu_ns(running.pid) - before) / 1000 / plan.refreshes,
            "stop_ms": running.stop(),
        }


def measure_crowd(server: Server, cpus: Iterable[int], generator: Generator, count: int) -> Metrics:
    """Measure many allocations: making them, one packet to each at once, and a stop of the server with all of them.

    Raises:
        FailedError: the server refused, did not answer, or ended.
    """
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(started(server, cpus))
        peer = stack.enter_context(udp_socket(*server.peer))
        clients = _opened(stack, server, count)
        metrics, seconds = _measure_making(running.pid, clients, AT_ONCE)
        bind_channels(clients, peer.getsockname())
        metrics |= _burst(running.pid, generator, turn_flows_of(clients), peer.fileno())
        return metrics | {"count": count, "make_s": seconds, "stop_s": running.stop() / 1000}


def _burst(pid: int, generator: Generator, flows: list[Flow], peer: int) -> Metrics:
    """Send one packet to each allocation at once. If none arrives, all there is to say is that all were lost."""
    before = cpu_ns(pid)
    traffic = generator.run(Load("down", _BURST_SIZE, once=True, quiet_ms=_BURST_QUIET_MS), flows, peer)
    used = cpu_ns(pid) - before
    metrics = {"burst_loss": traffic.loss}
    if traffic.arrived:
        metrics |= {"burst_cpu_us": used / 1000 / traffic.arrived, "burst_last_ms": traffic.last_ms}
    return metrics


def _opened(stack: contextlib.ExitStack, server: Server, count: int) -> list[Client]:
    """Open the sockets of clients. They are there before memory is looked at: theirs must not be taken for the server's."""
    clients = []
    for number in range(count):
        clients.append(Client(server, number))
        stack.callback(clients[-1].close)
    return clients


def _measure_making(pid: int, clients: list[Client], at_once: int) -> tuple[Metrics, float]:
    """Measure what an allocation costs; give the seconds that all took, too."""
    time.sleep(_SETTLE_SECONDS)
    cpu, before = cpu_ns(pid), memory(pid)
    seconds = allocate(clients, at_once)
    time.sleep(_SETTLE_SECONDS)
    used, taken = cpu_ns(pid) - cpu, memory(pid) - before
    if taken.total <= 0:
        raise FailedError("memory of this machine was freed meanwhile: something else is running")
    count = len(clients)
    metrics = {
        "cpu_us": used / 1000 / count,
        "memory_kb": taken.total / count,
        "resident_kb": taken.resident / count,
        "kernel_kb": taken.kernel / count,
    }
    return metrics, seconds
