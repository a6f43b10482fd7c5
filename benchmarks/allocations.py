"""The cases about allocations: the cost of one allocation, and of as many as there are ports."""

import contextlib
import resource
import time
from collections.abc import Iterable

from benchmarks.cases import Plan
from benchmarks.clients import CONCURRENT, Client, allocate, bind_channels, refresh, udp_socket
from benchmarks.generator import Generator, Load
from benchmarks.measure import MeasurementError, cpu_ns, memory
from benchmarks.results import Metrics
from benchmarks.servers import Server, started
from benchmarks.sessions import turn_flows_of

_WARM_UP = 20
_SETTLE_SECONDS = 0.3
"""Wait after the last allocation: its thread and sockets may still be under construction."""

_OTHER_DESCRIPTORS = 300
"""Upper bound for open descriptors in this process or a server, without the sockets of allocations."""


def raise_descriptor_limit() -> int:
    """Raise the descriptor limit of this process and its children to the hard limit; return the limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def measure_allocations(server: Server, cpus: Iterable[int], plan: Plan) -> Metrics:
    """Measure the cost of an allocation, the rates of one client after another, and start and stop."""
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(started(server, cpus))
        clients = open_clients(stack, server, _WARM_UP + plan.allocations)
        allocate(clients[:_WARM_UP])
        metrics = _measure_making(running.pid, clients[_WARM_UP:], concurrent=1)
        before = cpu_ns(running.pid)
        seconds = refresh(clients[0], plan.allocations)
        return metrics | {
            "start_ms": running.start_ms,
            "per_second": plan.allocations / metrics["make_s"],
            "refreshes_per_second": plan.allocations / seconds,
            "refresh_cpu_us": (cpu_ns(running.pid) - before) / 1000 / plan.allocations,
            "stop_ms": running.stop(),
        }


def measure_all_ports(server: Server, cpus: Iterable[int], generator: Generator, plan: Plan) -> Metrics:
    """Measure many allocations: setup, one packet to each at full speed, and a stop of the server with all allocations."""
    # Each allocation has a socket in the server and a socket in its client.
    count = min(plan.all_ports, raise_descriptor_limit() - _OTHER_DESCRIPTORS)
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(started(server, cpus))
        peer = stack.enter_context(udp_socket(*server.endpoints.peer))
        clients = open_clients(stack, server, count)
        metrics = _measure_making(running.pid, clients, CONCURRENT)
        bind_channels(clients, peer.getsockname())
        before = cpu_ns(running.pid)
        traffic = generator.run(Load("down", 172, once=1, quiet=3000), turn_flows_of(clients), peer.fileno())
        used = cpu_ns(running.pid) - before
        metrics |= {"count": count, "burst_loss": traffic.loss}
        if traffic.arrived:
            metrics |= {"burst_cpu_us": used / 1000 / traffic.arrived}
        return metrics | {"stop_s": running.stop() / 1000}


def open_clients(stack: contextlib.ExitStack, server: Server, count: int) -> list[Client]:
    """Open the sockets of clients, before the first reading of memory: the server's memory must not include them."""
    return [stack.enter_context(contextlib.closing(Client(server, number))) for number in range(count)]


def _measure_making(pid: int, clients: list[Client], concurrent: int) -> Metrics:
    """Allocate for all clients, and measure the cost of an allocation."""
    time.sleep(_SETTLE_SECONDS)
    cpu, before = cpu_ns(pid), memory(pid)
    seconds = allocate(clients, concurrent)
    time.sleep(_SETTLE_SECONDS)
    used, after, count = cpu_ns(pid) - cpu, memory(pid), len(clients)
    taken = after.total - before.total
    if taken <= 0:
        raise MeasurementError("the machine freed memory during the measurement: stop other programs")
    return {
        "cpu_us": used / 1000 / count,
        "memory_kb": taken / count,
        "resident_kb": (after.resident - before.resident) / count,
        "make_s": seconds,
    }
