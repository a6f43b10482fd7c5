"""All metrics. `relay.ops.metrics.prometheus` and `relay.ops.metrics.otlp` export this table."""

import platform
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from relay import __version__
from relay.core.counters import SIZE_SHIFT, SIZE_STEPS, DropReason, FreeReason, NonceOutcome, histogram
from relay.core.errors import ErrorCode, Reason
from relay.core.events import Limit
from relay.core.portal.channel import PortalChannel, State
from relay.core.stun import Method
from relay.offload.layout import DIRECTIONS, PassReason
from relay.ops.metrics.metric import Histogram, LabelValue, Metric, MetricKind, Point, Readings
from relay.ops.totals import Limits, NotReady, RelayState, RelayTotals
from relay.ops.yielder import Yielder

if TYPE_CHECKING:
    # Imported only by relays with offload.
    from relay.offload.datapath import Datapath

USERSPACE: Final = "userspace"
XDP: Final = "xdp"
DATAPATH: Final = {"relay.datapath": (USERSPACE, XDP)}
"""Whether the sockets relayed a packet, or the kernel."""

DIRECTION: Final = {"relay.direction": DIRECTIONS}

SIZE_BOUNDS: Final = tuple((step << SIZE_SHIFT) - 1 for step in range(1, SIZE_STEPS))
"""Bytes: 127, 255 and so on. Both data paths count in these steps."""

OTHER: Final = "other"
"""Errors without a label value."""

SEND_ERRORS: Final = (
    *("EACCES", "EADDRNOTAVAIL", "EAGAIN", "ECONNREFUSED", "EHOSTUNREACH", "EINVAL", "EIO", "EMSGSIZE", "ENETDOWN"),
    *("ENETUNREACH", "ENOBUFS", "ENOMEM", "EPERM", "EPIPE"),
    OTHER,
)
BIND_ERRORS: Final = (
    *("EACCES", "EADDRINUSE", "EADDRNOTAVAIL", "EAFNOSUPPORT", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM"),
    "RuntimeError",
    OTHER,
)
"""`RuntimeError` means that no thread could be started."""

LATE: Final = "late"
ALLOCATION_GONE: Final = "allocation_gone"
DROPS: Final = (*(reason.value for reason in DropReason), LATE, ALLOCATION_GONE)

PASS_REASONS: Final = {reason: reason.name.lower() for reason in PassReason}

MESSAGE_TYPES: Final = {
    Method.BINDING: "binding",
    Method.ALLOCATE: "allocate",
    Method.REFRESH: "refresh",
    Method.CREATE_PERMISSION: "createpermission",
    Method.CHANNEL_BIND: "channelbind",
}
"""Spelled as existing dashboards expect."""

NO_ERROR: Final = ""
CODES: Final = tuple(int(code) for code in ErrorCode)

REFUSALS: Final = (*(limit.value for limit in Limit), Reason.RESERVATION.value)

DESCRIPTORS: Final = "descriptors"
RESOURCES: Final = {"resource": (*Limits._fields, DESCRIPTORS)}

UNAUTHENTICATED_CODES: Final = (None, 400, 401, 420, 438)
"""Codes of responses to unauthenticated requests; None is a success."""

Reader: TypeAlias = Callable[[RelayTotals], Readings]

STANDALONE: Final = "standalone"
STATES: Final = (STANDALONE, *(state.value for state in State))


def of_kernel(read: "Callable[[Datapath], int]") -> Reader:
    """Return a reader of the kernel's data path: 0 without offload."""
    return lambda totals: 0 if totals.state.datapath is None else read(totals.state.datapath)


def of_portal(read: Callable[[PortalChannel], int]) -> Reader:
    """Return a reader of the portal connection: 0 without a portal."""

    def value(totals: RelayTotals) -> int:
        portal = totals.state.portal()
        return 0 if portal is None else read(portal)

    return value


def by_name(counts: Callable[[RelayTotals], Mapping[str, int]], names: tuple[str, ...]) -> Reader:
    """Return a reader of counts by name. Counts whose name is not in the list are added up as `OTHER`."""

    def values(totals: RelayTotals) -> dict[str, int]:
        left = dict(counts(totals))
        listed = {name: left.pop(name, 0) for name in names if name != OTHER}
        return {**listed, OTHER: sum(left.values())}

    return values


def _traffic(part: slice) -> Reader:
    """Return a reader of some fields of `TrafficCounts`: the packets or the bytes of both directions."""
    return lambda totals: {
        (direction, datapath): count
        for datapath, counts in ((USERSPACE, totals.by_sockets), (XDP, totals.by_kernel))
        for direction, count in zip(DIRECTIONS, tuple(counts)[part], strict=True)
    }


def _sizes(totals: RelayTotals) -> dict[str, Histogram]:
    counters = totals.state.counters
    by_sockets = (histogram(counters.to_peer_sizes), histogram(counters.to_client_sizes))
    by_kernel = (totals.xdp.sizes[direction] for direction in DIRECTIONS)
    return {
        datapath: Histogram([*map(sum, zip(*sizes, strict=True))], counts.to_peer_bytes + counts.to_client_bytes)
        for datapath, sizes, counts in ((USERSPACE, by_sockets, totals.by_sockets), (XDP, by_kernel, totals.by_kernel))
    }


def _responses(totals: RelayTotals) -> dict[tuple[LabelValue, ...], int]:
    successes, errors = totals.state.counters.successes.copy(), totals.state.counters.errors.copy()
    values: dict[tuple[LabelValue, ...], int] = {}
    for method, message_type in MESSAGE_TYPES.items():
        values["success", message_type, NO_ERROR] = successes.get(method, 0)
        values |= {("error", message_type, code): errors.get((method, code), 0) for code in CODES}
    return values


def _withheld(totals: RelayTotals) -> dict[tuple[LabelValue, ...], int]:
    counts = totals.state.counters.withheld.copy()
    return {
        (message_type, NO_ERROR if code is None else code): counts.get((method, code), 0)
        for method, message_type in MESSAGE_TYPES.items()
        for code in UNAUTHENTICATED_CODES
    }


def _used(totals: RelayTotals) -> dict[str, int]:
    state = totals.state
    used = Limits(totals.allocations, state.limits.ports - state.free_ports(), state.tables.channels)
    return {**used._asdict(), DESCRIPTORS: totals.process.descriptors}


def _drops(totals: RelayTotals) -> dict[str, int]:
    return totals.drops | {LATE: totals.dropped_late, ALLOCATION_GONE: totals.state.carried_out.late_sends}


def _interfaces(totals: RelayTotals) -> dict[str, int]:
    datapath = totals.state.datapath
    if datapath is None:
        return {"attached": 0, "failed": 0}
    attached = sum(mode is not None for mode in datapath.devices.modes.values())
    return {"attached": attached, "failed": len(datapath.devices.failures)}


def _inbox_depth(totals: RelayTotals) -> int:
    inbox = totals.state.inbox()
    return 0 if inbox is None else len(inbox)


def _inbox_age(totals: RelayTotals) -> float:
    inbox = totals.state.inbox()
    return 0.0 if inbox is None else inbox.age(totals.now)


def _faults(totals: RelayTotals) -> dict[str, int]:
    portal = totals.state.portal()
    return {"datagram": totals.state.carried_out.faults, "portal": 0 if portal is None else portal.faults}


def _not_ready(totals: RelayTotals) -> dict[str, int]:
    reasons = totals.state.not_ready()
    return {reason.value: int(reason in reasons) for reason in NotReady}


def _portal_state(totals: RelayTotals) -> dict[str, int]:
    portal = totals.state.portal()
    current = STANDALONE if portal is None else portal.state.value
    return {state: int(state == current) for state in STATES}


_counter = partial(Metric, MetricKind.COUNTER)
_gauge = partial(Metric, MetricKind.GAUGE)

RELAYING: Final = (
    _gauge(
        "relay.active_allocations",
        "{allocation}",
        "Current allocations, including allocations that wait for their sockets.",
        lambda totals: totals.allocations,
    ),
    _gauge("relay.channels", "{channel}", "Bound channels that relay packets.", lambda totals: totals.channels),
    _gauge(
        "relay.capacity.used",
        "{resource}",
        "Used part of each limit. Channels include channels in their grace period.",
        _used,
        RESOURCES,
    ),
    _gauge(
        "relay.capacity.limit",
        "{resource}",
        "Limits: `MAX_ALLOCATIONS`, ports for allocations, `MAX_CHANNELS`, file descriptors.",
        lambda totals: {**totals.state.limits._asdict(), DESCRIPTORS: totals.process.max_descriptors},
        RESOURCES,
    ),
    _counter(
        "relay.relayed.packets",
        "{packet}",
        "Relayed packets, by direction and data path.",
        _traffic(slice(0, None, 2)),
        DIRECTION | DATAPATH,
    ),
    _counter(
        "relay.relayed.bytes",
        "By",
        "Payload of relayed packets, without headers.",
        _traffic(slice(1, None, 2)),
        DIRECTION | DATAPATH,
    ),
    Metric(
        MetricKind.HISTOGRAM,
        "relay.packet.size",
        "By",
        "Payload size of relayed packets, without headers.",
        _sizes,
        DATAPATH,
        SIZE_BOUNDS,
    ),
    _counter(
        "relay.early_packets",
        "{packet}",
        "Packets that arrived before the ChannelBind of their channel: held, and relayed when it succeeded.",
        lambda totals: {
            "held": totals.state.counters.early_held,
            "relayed": totals.state.counters.early_relayed,
        },
        {"state": ("held", "relayed")},
    ),
)

REQUESTS: Final = (
    _counter(
        "relay.responses",
        "{response}",
        "Responses to requests of clients.",
        _responses,
        {
            "response_class": ("success", "error"),
            "message_type": tuple(MESSAGE_TYPES.values()),
            "error_code": (NO_ERROR, *CODES),
        },
    ),
    _counter(
        "relay.responses.withheld",
        "{response}",
        "Responses suppressed by the rate limit for unauthenticated addresses.",
        _withheld,
        {"message_type": tuple(MESSAGE_TYPES.values()), "error_code": (NO_ERROR, *UNAUTHENTICATED_CODES[1:])},
    ),
    _counter(
        "relay.binding_indications",
        "{indication}",
        "Keepalives (Binding indications), which get no response.",
        lambda totals: totals.state.counters.binding_indications,
    ),
    _counter(
        "relay.nonces",
        "{nonce}",
        "Nonces in requests, by validity.",
        lambda totals: totals.state.counters.nonces,
        {"outcome": tuple(outcome.value for outcome in NonceOutcome)},
    ),
    _counter(
        "relay.allocations.made",
        "{allocation}",
        "Allocations established.",
        lambda totals: totals.state.counters.allocations_made,
    ),
    _counter(
        "relay.refusals",
        "{request}",
        "Valid requests rejected with 486 or 508, by the limit or the reason.",
        lambda totals: dict.fromkeys(REFUSALS, 0) | totals.state.counters.refusals.copy(),
        {"reason": REFUSALS},
    ),
    _counter(
        "relay.allocations.freed",
        "{allocation}",
        "Allocations ended, by reason.",
        lambda totals: totals.state.counters.allocations_freed,
        {"reason": tuple(reason.value for reason in FreeReason)},
    ),
)

LOSSES: Final = (
    _counter(
        "relay.drops", "{packet}", "Received datagrams that were neither relayed nor answered.", _drops, {"reason": DROPS}
    ),
    _counter(
        "relay.receive_buffer.drops",
        "{packet}",
        "Datagrams dropped by the kernel because a socket's receive buffer was full.",
        lambda totals: totals.kernel_drops,
    ),
    _counter(
        "relay.receive_buffer.cuts",
        "{cut}",
        "Times that a receive buffer was shrunk during overload, to limit delay.",
        lambda totals: totals.state.carried_out.udp.buffers_cut,
    ),
    _counter(
        "relay.send_failures",
        "{packet}",
        "Datagrams that the kernel refused to send.",
        by_name(lambda totals: totals.state.carried_out.udp.send_errors, SEND_ERRORS),
        {"error.type": SEND_ERRORS},
    ),
    _counter(
        "relay.receive_failures",
        "{read}",
        "Failed socket reads, which lose no packets.",
        by_name(lambda totals: totals.state.carried_out.udp.receive_errors, SEND_ERRORS),
        {"error.type": SEND_ERRORS},
    ),
    _counter(
        "relay.bind_failures",
        "{bind}",
        "Failures to open a socket or start a thread for an allocation.",
        by_name(lambda totals: totals.state.carried_out.bind_errors, BIND_ERRORS),
        {"error.type": BIND_ERRORS},
    ),
    _counter(
        "relay.trains",
        "{train}",
        "GSO batches that the kernel sent, or rejected so that they were split into datagrams.",
        lambda totals: {
            "sent": totals.state.carried_out.udp.trains_sent,
            "cut": sum(totals.state.carried_out.udp.trains_cut.copy().values()),
        },
        {"outcome": ("sent", "cut")},
    ),
)

IN_THE_KERNEL: Final = (
    _counter(
        "relay.xdp.passed",
        "{packet}",
        "Datagrams that the XDP program left to the sockets.",
        lambda totals: {PASS_REASONS[reason]: count for reason, count in totals.xdp.passed.items()},
        {"reason": tuple(PASS_REASONS.values())},
    ),
    _gauge(
        "relay.xdp.channels",
        "{channel}",
        "Channels that the kernel relays.",
        of_kernel(lambda datapath: len(datapath.channels.installed)),
    ),
    _counter(
        "relay.xdp.channels.refused",
        "{channel}",
        "Channels for which the kernel's tables had no room. The sockets relay them.",
        of_kernel(lambda datapath: datapath.channels.refused),
    ),
    _counter(
        "relay.xdp.table_failures",
        "{failure}",
        "Changes of channels that the kernel rejected. The first detaches the program.",
        of_kernel(lambda datapath: datapath.channels.failures),
    ),
    _counter(
        "relay.xdp.stalls",
        "{stall}",
        "Times that an interface received packets and the attached XDP program received none.",
        of_kernel(lambda datapath: datapath.devices.stalls),
    ),
    _gauge(
        "relay.xdp.interfaces",
        "{interface}",
        "Interfaces configured for offload, by state of the XDP program.",
        _interfaces,
        {"state": ("attached", "failed")},
    ),
)

HEALTH: Final = (
    _gauge(
        "relay.ready",
        "{relay}",
        "1 if new clients should be sent to this relay (see /readyz), else 0.",
        lambda totals: int(not totals.state.not_ready()),
    ),
    _gauge(
        "relay.not_ready",
        "{relay}",
        "1 for each reason why the relay is not ready, else 0.",
        _not_ready,
        {"reason": tuple(each.value for each in NotReady)},
    ),
    _gauge(
        "relay.drain.end_time",
        "s",
        "Unix time at which a drain ends at the latest; 0 unless the relay drains. `relay.active_allocations` are left.",
        lambda totals: 0 if totals.drain is None else totals.drain.until,
    ),
    _gauge("relay.inbox.depth", "{message}", "Messages (not packets) queued for the server actor.", _inbox_depth),
    _gauge("relay.inbox.age", "s", "Age of the oldest message that the server actor has not finished.", _inbox_age),
    _counter(
        "relay.faults",
        "{fault}",
        "Internal errors that the relay survived. Each is a bug: please report it.",
        _faults,
        {"input": ("datagram", "portal")},
    ),
    _gauge(
        "relay.portal.state",
        "{portal}",
        "1 for the current state of the portal connection, 0 for all other states.",
        _portal_state,
        {"state": STATES},
    ),
    _counter(
        "relay.portal.joins",
        "{join}",
        "Joins accepted by the portal. Each join after the first is a reconnect.",
        of_portal(lambda portal: portal.joins),
    ),
    _counter(
        "relay.portal.oddities",
        "{frame}",
        "Invalid or unexpected frames from the portal.",
        of_portal(lambda portal: portal.protocol_errors),
    ),
)

PROCESS: Final = (
    _counter(
        "relay.log.lost",
        "{line}",
        "Log lines and dumps lost: not read in time, or not writable.",
        lambda totals: totals.state.lines_lost(),
    ),
    _gauge(
        "relay.wall_clock.moved",
        "s",
        "Seconds by which the wall clock was set since startup. Credentials expire by this clock.",
        lambda totals: totals.wall_clock_moved,
    ),
    _counter(
        "process.cpu.time",
        "s",
        "CPU time of the process, in user mode and in the kernel.",
        lambda totals: totals.process.cpu_seconds,
        prometheus="process_cpu_seconds",
    ),
    _gauge(
        "process.memory.usage",
        "By",
        "Resident memory (RSS).",
        lambda totals: totals.process.resident,
        prometheus="process_resident_memory_bytes",
    ),
    _gauge(
        "process.memory.virtual",
        "By",
        "Virtual memory (address space).",
        lambda totals: totals.process.virtual,
        prometheus="process_virtual_memory_bytes",
    ),
    _gauge(
        "process.thread.count",
        "{thread}",
        "Threads.",
        lambda totals: totals.process.threads,
        prometheus="process_threads",
    ),
    _gauge(
        "process.unix.file_descriptor.count",
        "{file_descriptor}",
        "Open file descriptors.",
        lambda totals: totals.process.descriptors,
        prometheus="process_open_fds",
    ),
    _gauge(
        "process.unix.file_descriptor.limit",
        "{file_descriptor}",
        "Maximum number of open file descriptors.",
        lambda totals: totals.process.max_descriptors,
        prometheus="process_max_fds",
    ),
    _gauge(
        "process.start_time",
        "s",
        "Start time of the process, in Unix seconds.",
        lambda totals: totals.process.started_at,
    ),
    _counter(
        "relay.handovers",
        "{handover}",
        "Times that a new process took over this relay.",
        lambda totals: totals.state.handovers().number,
    ),
    _gauge(
        "relay.handover.wait",
        "s",
        "Time for which requests waited in the last handover.",
        lambda totals: totals.state.handovers().requests_waited,
    ),
    _gauge(
        "relay.info",
        "{relay}",
        "Always 1. The labels are the versions of the relay and Python, `FIREZONE_NAME` and the public addresses.",
        lambda totals: {(__version__, platform.python_version(), *totals.state.identity): 1},
        {"version": (__version__,), "python": (platform.python_version(),), "name": (), "public_ip4": (), "public_ip6": ()},
    ),
)

TABLE: Final[tuple[Metric, ...]] = (*RELAYING, *REQUESTS, *LOSSES, *IN_THE_KERNEL, *HEALTH, *PROCESS)


def read_table(state: RelayState) -> Iterator[tuple[Metric, list[Point]]]:
    """Read all metrics, and let other threads run in between."""
    totals, yield_if_due = RelayTotals(state), Yielder()
    for metric in TABLE:
        yield metric, metric.points(totals)
        yield_if_due()
