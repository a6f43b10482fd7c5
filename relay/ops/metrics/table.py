"""All metrics. `relay.ops.metrics.prometheus` and `relay.ops.metrics.otlp` export this table."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from relay import __version__
from relay.core.counters import SIZE_SHIFT, SIZE_STEPS, histogram
from relay.core.errors import ErrorCode, Reason
from relay.core.events import Limit
from relay.core.portal.channel import State
from relay.core.stun import Method
from relay.offload.layout import DIRECTIONS
from relay.ops.metrics.metric import Histogram, LabelValue, Metric, MetricKind
from relay.ops.totals import NotReady, RelayState, RelayTotals
from relay.ops.yielder import Yielder

DATAPATH: Final = "relay.datapath"
"""Whether the sockets relayed a packet, or the kernel."""
USERSPACE: Final = "userspace"
XDP: Final = "xdp"

DIRECTION: Final = "relay.direction"

SIZE_BOUNDS: Final = tuple((step << SIZE_SHIFT) - 1 for step in range(1, SIZE_STEPS))
"""Bytes: 127, 255 and so on. Both data paths count in these steps."""

SEND_ERRORS: Final = (
    *("EACCES", "EADDRNOTAVAIL", "EAGAIN", "ECONNREFUSED", "EHOSTUNREACH", "EINVAL", "EIO", "EMSGSIZE", "ENETDOWN"),
    *("ENETUNREACH", "ENOBUFS", "ENOMEM", "EPERM", "EPIPE"),
)
BIND_ERRORS: Final = (
    *("EACCES", "EADDRINUSE", "EADDRNOTAVAIL", "EAFNOSUPPORT", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EPERM"),
    "RuntimeError",
)
"""`RuntimeError` means that no thread could be started."""

MESSAGE_TYPES: Final = {
    Method.BINDING: "binding",
    Method.ALLOCATE: "allocate",
    Method.REFRESH: "refresh",
    Method.CREATE_PERMISSION: "createpermission",
    Method.CHANNEL_BIND: "channelbind",
}
"""Spelled as existing dashboards expect."""

NO_ERROR: Final = ""

UNAUTHENTICATED_CODES: Final = (None, 400, 401, 420, 438)
"""Codes of responses to unauthenticated requests; None is a success."""

REFUSALS: Final = (*(limit.value for limit in Limit), Reason.RESERVATION.value)

STANDALONE: Final = "standalone"

_counter = partial(Metric, MetricKind.COUNTER)
_gauge = partial(Metric, MetricKind.GAUGE)


def relaying(totals: RelayTotals) -> Iterator[Metric]:
    """Yield the metrics of allocations, channels and relayed packets."""
    state, counters = totals.state, totals.state.counters
    ports = len(state.config.ports)
    by_datapath = {USERSPACE: totals.by_sockets, XDP: totals.by_kernel}

    def by_direction(part: slice) -> dict[tuple[LabelValue, ...], int]:
        """Return some fields of `TrafficCounts`: the packets or the bytes of both directions."""
        return {
            (direction, datapath): count
            for datapath, counts in by_datapath.items()
            for direction, count in zip(DIRECTIONS, tuple(counts)[part], strict=True)
        }

    yield _gauge(
        "relay.active_allocations",
        "{allocation}",
        "Current allocations, also while they wait for their sockets.",
        totals.allocations,
    )
    yield _gauge("relay.channels", "{channel}", "Bound channels that relay packets.", totals.channels)
    yield _gauge(
        "relay.capacity.used",
        "{resource}",
        "Used part of each limit. Includes channels in their grace period.",
        {
            "allocations": totals.allocations,
            "ports": ports - state.free_ports(),
            "channels": state.tables.channels,
            "descriptors": totals.process.descriptors,
        },
        ("resource",),
    )
    yield _gauge(
        "relay.capacity.limit",
        "{resource}",
        "Limits: `MAX_ALLOCATIONS`, ports for allocations, `MAX_CHANNELS`, file descriptors.",
        {
            "allocations": state.config.capacity,
            "ports": ports,
            "channels": state.config.max_channels_in_all,
            "descriptors": totals.process.max_descriptors,
        },
        ("resource",),
    )
    yield _counter(
        "relay.relayed.packets",
        "{packet}",
        "Relayed packets.",
        by_direction(slice(0, None, 2)),
        (DIRECTION, DATAPATH),
    )
    yield _counter(
        "relay.relayed.bytes",
        "By",
        "Payload of relayed packets.",
        by_direction(slice(1, None, 2)),
        (DIRECTION, DATAPATH),
    )
    sizes = {
        USERSPACE: (histogram(counters.to_peer_sizes), histogram(counters.to_client_sizes)),
        XDP: tuple(totals.xdp.sizes[direction] for direction in DIRECTIONS),
    }
    yield Metric(
        MetricKind.HISTOGRAM,
        "relay.packet.size",
        "By",
        "Payload size of relayed packets.",
        {
            datapath: Histogram([*map(sum, zip(*sizes[datapath], strict=True))], each.to_peer_bytes + each.to_client_bytes)
            for datapath, each in by_datapath.items()
        },
        (DATAPATH,),
        SIZE_BOUNDS,
    )
    yield _counter(
        "relay.early_packets",
        "{packet}",
        "Packets that arrived before the ChannelBind of their channel: held, and later relayed.",
        {"held": counters.early_held, "relayed": counters.early_relayed},
        ("state",),
    )


def requests(totals: RelayTotals) -> Iterator[Metric]:
    """Yield the metrics of requests and responses."""
    counters = totals.state.counters
    yield _counter(
        "relay.responses",
        "{response}",
        "Responses to requests of clients.",
        _responses(counters.successes.copy(), counters.errors.copy()),
        ("response_class", "message_type", "error_code"),
    )
    withheld = counters.withheld.copy()
    yield _counter(
        "relay.responses.withheld",
        "{response}",
        "Responses suppressed by the rate limit for unauthenticated addresses.",
        {
            (message_type, NO_ERROR if code is None else code): withheld.get((method, code), 0)
            for method, message_type in MESSAGE_TYPES.items()
            for code in UNAUTHENTICATED_CODES
        },
        ("message_type", "error_code"),
    )
    yield _counter(
        "relay.binding_indications",
        "{indication}",
        "Keepalives (Binding indications), which get no response.",
        counters.binding_indications,
    )
    yield _counter("relay.nonces", "{nonce}", "Nonces in requests.", counters.nonces, ("outcome",))
    yield _counter("relay.allocations.made", "{allocation}", "Established allocations.", counters.allocations_made)
    yield _counter(
        "relay.refusals",
        "{request}",
        "Valid requests rejected with 486 or 508.",
        dict.fromkeys(REFUSALS, 0) | counters.refusals.copy(),
        ("reason",),
    )
    yield _counter("relay.allocations.freed", "{allocation}", "Ended allocations.", counters.allocations_freed, ("reason",))


def losses(totals: RelayTotals) -> Iterator[Metric]:
    """Yield the metrics of lost packets and failed system calls."""
    carried_out = totals.state.carried_out
    udp = carried_out.udp
    yield _counter(
        "relay.drops",
        "{packet}",
        "Received datagrams that were neither relayed nor answered.",
        totals.drops | {"late": totals.dropped_late, "allocation_gone": carried_out.late_sends},
        ("reason",),
    )
    yield _counter(
        "relay.receive_buffer.drops",
        "{packet}",
        "Datagrams dropped by the kernel because a socket's receive buffer was full.",
        totals.kernel_drops,
    )
    yield _counter(
        "relay.receive_buffer.cuts",
        "{cut}",
        "Times that a receive buffer was shrunk during overload, to limit delay.",
        udp.buffers_cut,
    )
    yield _counter(
        "relay.send_failures",
        "{packet}",
        "Datagrams that the kernel refused to send.",
        _by_name(udp.send_errors, SEND_ERRORS),
        ("error.type",),
    )
    yield _counter(
        "relay.receive_failures",
        "{read}",
        "Failed socket reads, which lose no packets.",
        _by_name(udp.receive_errors, SEND_ERRORS),
        ("error.type",),
    )
    yield _counter(
        "relay.bind_failures",
        "{bind}",
        "Failures to open a socket or start a thread for an allocation.",
        _by_name(carried_out.bind_errors, BIND_ERRORS),
        ("error.type",),
    )
    yield _counter(
        "relay.trains",
        "{train}",
        "GSO batches that the kernel sent, or rejected so that the relay split them.",
        {"sent": udp.trains_sent, "cut": sum(udp.trains_cut.copy().values())},
        ("outcome",),
    )


def in_the_kernel(totals: RelayTotals) -> Iterator[Metric]:
    """Yield the metrics of the kernel's data path, which are 0 without offload."""
    channels = refused = failures = stalls = attached = failed = 0
    datapath = totals.state.datapath
    if datapath is not None:
        channels, refused, failures = len(datapath.channels.installed), datapath.channels.refused, datapath.channels.failures
        stalls, failed = datapath.devices.stalls, len(datapath.devices.failures)
        attached = sum(mode is not None for mode in datapath.devices.modes.values())
    yield _counter(
        "relay.xdp.passed",
        "{packet}",
        "Datagrams that the XDP program left to the sockets.",
        {reason.name.lower(): count for reason, count in totals.xdp.passed.items()},
        ("reason",),
    )
    yield _gauge("relay.xdp.channels", "{channel}", "Channels that the kernel relays.", channels)
    yield _counter(
        "relay.xdp.channels.refused",
        "{channel}",
        "Channels for which the kernel's tables had no room. The sockets relay them.",
        refused,
    )
    yield _counter(
        "relay.xdp.table_failures",
        "{failure}",
        "Changes of channels that the kernel rejected. The first detaches the program.",
        failures,
    )
    yield _counter(
        "relay.xdp.stalls",
        "{stall}",
        "Times that an interface received packets but its XDP program received none.",
        stalls,
    )
    yield _gauge(
        "relay.xdp.interfaces",
        "{interface}",
        "Interfaces configured for offload.",
        {"attached": attached, "failed": failed},
        ("state",),
    )


def health(totals: RelayTotals) -> Iterator[Metric]:
    """Yield the metrics that show whether the relay works."""
    state, drain, not_ready = totals.state, totals.drain, totals.state.not_ready()
    inbox, portal = state.inbox(), state.portal()
    portal_state = STANDALONE if portal is None else portal.state.value
    yield _gauge("relay.ready", "{relay}", "1 if the relay is ready for new clients (/readyz), else 0.", int(not not_ready))
    yield _gauge(
        "relay.not_ready",
        "{relay}",
        "1 for each reason not to be ready, else 0.",
        {reason.value: int(reason in not_ready) for reason in NotReady},
        ("reason",),
    )
    yield _gauge(
        "relay.drain.end_time",
        "s",
        "Unix time at which a drain ends at the latest; 0 unless the relay drains.",
        0 if drain is None else drain.until,
    )
    yield _gauge(
        "relay.inbox.depth",
        "{message}",
        "Messages (not packets) queued for the server actor.",
        0 if inbox is None else len(inbox),
    )
    yield _gauge(
        "relay.inbox.age",
        "s",
        "Age of the oldest message that the server actor has not finished.",
        0 if inbox is None else inbox.age(totals.now),
    )
    yield _counter(
        "relay.faults",
        "{fault}",
        "Internal errors that the relay survived: please report each.",
        {"datagram": state.carried_out.faults, "portal": 0 if portal is None else portal.faults},
        ("input",),
    )
    yield _gauge(
        "relay.portal.state",
        "{portal}",
        "1 for the current state of the portal connection, else 0.",
        {each: int(each == portal_state) for each in (STANDALONE, *(state.value for state in State))},
        ("state",),
    )
    yield _counter(
        "relay.portal.joins",
        "{join}",
        "Joins accepted by the portal. Each join after the first is a reconnect.",
        0 if portal is None else portal.joins,
    )
    yield _counter(
        "relay.portal.oddities",
        "{frame}",
        "Invalid or unexpected frames from the portal.",
        0 if portal is None else portal.protocol_errors,
    )


def process(totals: RelayTotals) -> Iterator[Metric]:
    """Yield the metrics of the process."""
    state, figures = totals.state, totals.process
    config = state.config
    identity = (str(each or "") for each in (config.name, config.public_ip4, config.public_ip6))
    yield _counter(
        "relay.log.lost", "{line}", "Log lines and dumps lost: not read in time, or not writable.", state.lines_lost()
    )
    yield _gauge(
        "relay.wall_clock.moved",
        "s",
        "Seconds by which the wall clock was set since startup. Credentials expire by this clock.",
        totals.wall_clock_moved,
    )
    yield _counter("process.cpu.time", "s", "CPU time, in user mode and in the kernel.", figures.cpu_seconds)
    yield _gauge("process.memory.usage", "By", "Resident memory (RSS).", figures.resident)
    yield _gauge("process.memory.virtual", "By", "Virtual memory (address space).", figures.virtual)
    yield _gauge("process.thread.count", "{thread}", "Threads.", figures.threads)
    yield _gauge("process.unix.file_descriptor.count", "{file_descriptor}", "Open file descriptors.", figures.descriptors)
    yield _gauge(
        "process.unix.file_descriptor.limit",
        "{file_descriptor}",
        "Maximum number of open file descriptors.",
        figures.max_descriptors,
    )
    yield _gauge("process.start_time", "s", "Start time in Unix seconds.", figures.started_at)
    yield _counter("relay.handovers", "{handover}", "Takeovers of this relay by a new process.", state.handovers().number)
    yield _gauge(
        "relay.handover.wait", "s", "Time for which requests waited in the last handover.", state.handovers().requests_waited
    )
    yield _gauge(
        "relay.info",
        "{relay}",
        "Always 1, with labels for versions, `FIREZONE_NAME` and public addresses.",
        {(__version__, platform.python_version(), *identity): 1},
        ("version", "python", "name", "public_ip4", "public_ip6"),
    )


def read_table(state: RelayState) -> Iterator[Metric]:
    """Read all metrics, and let other threads run in between."""
    totals, yield_if_due = RelayTotals(state), Yielder()
    for group in (relaying, requests, losses, in_the_kernel, health, process):
        for metric in group(totals):
            yield metric
            yield_if_due()


def _responses(
    successes: Mapping[Method, int], errors: Mapping[tuple[Method, int], int]
) -> dict[tuple[LabelValue, ...], int]:
    values: dict[tuple[LabelValue, ...], int] = {}
    for method, message_type in MESSAGE_TYPES.items():
        values["success", message_type, NO_ERROR] = successes.get(method, 0)
        values |= {("error", message_type, int(code)): errors.get((method, code), 0) for code in ErrorCode}
    return values


def _by_name(counts: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Return the counts of some names. Counts of all other names are added up as ``other``."""
    left = dict(counts)
    return {**{name: left.pop(name, 0) for name in names}, "other": sum(left.values())}
