"""Definitions: what is relayed, by whom, and what is lost."""

from collections.abc import Iterator, Mapping
from typing import Final

from relay.core.counters import SIZE_SHIFT, SIZE_STEPS, DropReason, histogram
from relay.offload.layout import DIRECTIONS, PassReason
from relay.ops.metrics.metric import Histogram, Kind, Metric, Point
from relay.ops.metrics.sources import Look

USERSPACE: Final = "userspace"
XDP: Final = "xdp"

DATAPATH: Final = {"relay.datapath": (USERSPACE, XDP)}
"""Who relayed: Python, or the kernel by itself."""

DIRECTION: Final = {"relay.direction": DIRECTIONS}

SIZE_BOUNDS: Final = tuple((step << SIZE_SHIFT) - 1 for step in range(1, SIZE_STEPS))
"""Bytes: 127, 255 and so on. Both data paths count in these steps."""

OTHER: Final = "other"
"""An error that has no name of its own here."""

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
"""The one without a number is that of a thread which could not be had."""

LATE: Final = "late"
ALLOCATION_GONE: Final = "allocation_gone"
DROPS: Final = (*(reason.value for reason in DropReason), LATE, ALLOCATION_GONE)


def _active(look: Look) -> Iterator[Point]:
    yield (), len(look.sources.tables.by_id)


def _channels(look: Look) -> Iterator[Point]:
    yield (), len(look.sources.tables.live_channels)


def _packets(look: Look) -> Iterator[Point]:
    counters = look.sources.counters
    yield ("to_peer", USERSPACE), counters.to_peer_packets
    yield ("to_client", USERSPACE), counters.to_client_packets
    for direction in DIRECTIONS:
        yield (direction, XDP), look.xdp.packets[direction]


def _bytes(look: Look) -> Iterator[Point]:
    counters = look.sources.counters
    yield ("to_peer", USERSPACE), counters.to_peer_bytes
    yield ("to_client", USERSPACE), counters.to_client_bytes
    for direction in DIRECTIONS:
        yield (direction, XDP), look.xdp.bytes[direction]


def _sizes(look: Look) -> Iterator[Point]:
    counters = look.sources.counters
    ours = (histogram(counters.to_peer_sizes), histogram(counters.to_client_sizes))
    yield (USERSPACE,), Histogram([*map(sum, zip(*ours, strict=True))], counters.to_peer_bytes + counters.to_client_bytes)
    theirs = (look.xdp.sizes[direction] for direction in DIRECTIONS)
    yield (XDP,), Histogram([*map(sum, zip(*theirs, strict=True))], sum(look.xdp.bytes.values()))


def _drops(look: Look) -> Iterator[Point]:
    sources = look.sources
    for reason, count in sources.counters.drops.copy().items():
        yield (reason.value,), count
    yield (LATE,), sources.dropped_late()
    yield (ALLOCATION_GONE,), sources.carried_out.late_sends


def _buffer_drops(look: Look) -> Iterator[Point]:
    yield (), look.sources.kernel_drops()


def _buffers_cut(look: Look) -> Iterator[Point]:
    yield (), look.sources.carried_out.udp.buffers_cut


def _send_failures(look: Look) -> Iterator[Point]:
    return named(look.sources.carried_out.udp.send_errors, SEND_ERRORS)


def _receive_failures(look: Look) -> Iterator[Point]:
    return named(look.sources.carried_out.udp.receive_errors, SEND_ERRORS)


def _bind_failures(look: Look) -> Iterator[Point]:
    return named(look.sources.carried_out.bind_errors, BIND_ERRORS)


def _trains(look: Look) -> Iterator[Point]:
    udp = look.sources.carried_out.udp
    yield ("sent",), udp.trains_sent
    yield ("cut",), sum(udp.trains_cut.copy().values())


def _passed(look: Look) -> Iterator[Point]:
    for reason, count in look.xdp.passed.items():
        yield (reason.name.lower(),), count


def _installed(look: Look) -> Iterator[Point]:
    datapath = look.sources.datapath
    yield (), 0 if datapath is None else len(datapath.channels.installed)


def _no_room(look: Look) -> Iterator[Point]:
    datapath = look.sources.datapath
    yield (), 0 if datapath is None else datapath.channels.refused


def _table_failures(look: Look) -> Iterator[Point]:
    datapath = look.sources.datapath
    yield (), 0 if datapath is None else datapath.channels.failures


def _interfaces(look: Look) -> Iterator[Point]:
    datapath = look.sources.datapath
    modes = () if datapath is None else datapath.devices.modes.values()
    yield ("attached",), sum(mode is not None for mode in modes)
    yield ("failed",), 0 if datapath is None else len(datapath.devices.failures)


def named(counts: Mapping[str, int], names: tuple[str, ...]) -> Iterator[Point]:
    """Give counts by name, with those that are not named added up."""
    left = dict(counts)
    for name in names:
        if name != OTHER:
            yield (name,), left.pop(name, 0)
    yield (OTHER,), sum(left.values())


RELAYING: Final = (
    Metric(
        "relay.active_allocations",
        "{allocation}",
        Kind.GAUGE,
        "Allocations there are; those that wait for their sockets are among them.",
        _active,
    ),
    Metric("relay.channels", "{channel}", Kind.GAUGE, "Channels that are bound, and relay.", _channels),
    Metric(
        "relay.relayed.packets",
        "{packet}",
        Kind.COUNTER,
        "Packets that were relayed, by where to and by whom.",
        _packets,
        DIRECTION | DATAPATH,
    ),
    Metric(
        "relay.relayed.bytes",
        "By",
        Kind.COUNTER,
        "Their payload, without headers.",
        _bytes,
        DIRECTION | DATAPATH,
    ),
    Metric(
        "relay.packet.size",
        "By",
        Kind.HISTOGRAM,
        "Payload of the packets that were relayed, without headers.",
        _sizes,
        DATAPATH,
        SIZE_BOUNDS,
    ),
)

LOSSES: Final = (
    Metric(
        "relay.drops",
        "{packet}",
        Kind.COUNTER,
        "What arrived, and was neither relayed nor answered.",
        _drops,
        {"reason": DROPS},
    ),
    Metric(
        "relay.receive_buffer.drops",
        "{packet}",
        Kind.COUNTER,
        "Datagrams that the kernel dropped because a socket's buffer was full.",
        _buffer_drops,
    ),
    Metric(
        "relay.receive_buffer.cuts",
        "{cut}",
        Kind.COUNTER,
        "How often a buffer was made small for a while, so that packets don't wait for long under overload.",
        _buffers_cut,
    ),
    Metric(
        "relay.send_failures",
        "{packet}",
        Kind.COUNTER,
        "Datagrams that the kernel refused to send.",
        _send_failures,
        {"error.type": SEND_ERRORS},
    ),
    Metric(
        "relay.receive_failures",
        "{read}",
        Kind.COUNTER,
        "Reads of sockets that failed; packets are not lost with them.",
        _receive_failures,
        {"error.type": SEND_ERRORS},
    ),
    Metric(
        "relay.bind_failures",
        "{bind}",
        Kind.COUNTER,
        "Sockets, or threads for them, that an allocation could not have.",
        _bind_failures,
        {"error.type": BIND_ERRORS},
    ),
    Metric(
        "relay.trains",
        "{train}",
        Kind.COUNTER,
        "Runs of packets handed to the kernel as one, and those that it would not take so.",
        _trains,
        {"outcome": ("sent", "cut")},
    ),
)

IN_THE_KERNEL: Final = (
    Metric(
        "relay.xdp.passed",
        "{packet}",
        Kind.COUNTER,
        "Datagrams that the kernel's program left to the sockets.",
        _passed,
        {"reason": tuple(reason.name.lower() for reason in PassReason)},
    ),
    Metric("relay.xdp.channels", "{channel}", Kind.GAUGE, "Channels that the kernel relays.", _installed),
    Metric(
        "relay.xdp.channels.refused",
        "{channel}",
        Kind.COUNTER,
        "Channels that there was no room for in the kernel's tables: the sockets relay them.",
        _no_room,
    ),
    Metric(
        "relay.xdp.table_failures",
        "{failure}",
        Kind.COUNTER,
        "How often the kernel did not let counters of channels begin anew.",
        _table_failures,
    ),
    Metric(
        "relay.xdp.interfaces",
        "{interface}",
        Kind.GAUGE,
        "Interfaces that were asked for, and have the program or can't.",
        _interfaces,
        {"state": ("attached", "failed")},
    ),
)
