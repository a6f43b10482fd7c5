"""UDP sockets that send and are read in trains, where the kernel can do that."""

import contextlib
import errno
import fcntl
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay.core.addresses import Family, SocketAddress
from relay.core.trains import Arrival, cut

ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}

RECEIVE_BUFFER = 4 * 1024 * 1024
"""Bytes asked of the kernel for each socket. With 64 KiB a bursty stream of 2 Mbit/s lost 9 % of its packets, with 4 MiB
none; memory is used only while datagrams wait. Under overload it is less for a while: see `relay.net.backlog`."""

SEND_BUFFER = 1024 * 1024
"""Bytes asked of the kernel for each socket: some ten full trains that wait for the network card."""

LARGEST_DATAGRAM = 65507
"""Bytes that fit a UDP datagram over IPv4, and so a message that is sent as a train."""

MOST_SEGMENTS = 64
"""Datagrams in a train that is sent: more are EINVAL before Linux 6.9 (UDP_MAX_SEGMENTS)."""

_MOST_WAITING = 65536
"""Datagrams that fit a receive buffer, at the least: the kernel counts some 700 bytes for the smallest."""

_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_SIOCGSTAMPNS = 0x8907
"""Numbers of Linux (linux/udp.h, asm-generic/socket.h, asm-generic/sockios.h) that the socket module has no names for."""

_CONTROL_SPACE = 64
"""Bytes for what the kernel says beside a datagram: its traffic class and, of a train, its segment length (48 in all)."""

_SHORT = struct.Struct("=H")
_INT = struct.Struct("=i")
_MEMINFO = struct.Struct("=9I")
_TIMESPEC = struct.Struct("@ll")
_DROPS = 8

_BROKEN = frozenset((errno.EBADF, errno.ENOTSOCK, errno.EPIPE))

# What says that this path takes no trains at all (no checksum offload, or an old kernel); and what says that this train does
# not go, since its segments with their headers are longer than the path's MTU.
_NO_TRAINS = frozenset((errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT))
_NOT_THIS_TRAIN = frozenset((errno.EINVAL, errno.EMSGSIZE))


@dataclass(slots=True)
class UdpCounters:
    """What all sockets did; plain integers that anyone may read at any time, written by one thread at a time each."""

    trains_sent: int = 0
    """Messages that left as trains."""
    trains_cut: Counter[str] = field(default_factory=Counter)
    """Trains that had to be sent datagram by datagram, by the name of the error."""
    send_errors: Counter[str] = field(default_factory=Counter)
    """Datagrams that the kernel refused to send, by the name of the error."""
    receive_errors: Counter[str] = field(default_factory=Counter)
    """Reads that failed, by the name of the error; nothing is known to be lost with them."""
    no_coalescing: int = 0
    """Sockets for which the kernel has no UDP_GRO: all arrives one by one."""
    kernel_drops: int = 0
    """Datagrams that found the buffer of a socket full, of sockets that are closed; `UdpSocket.drops` tells of those in
    `open`."""
    open: "set[UdpSocket]" = field(default_factory=set, compare=False, repr=False)
    """Sockets that count here."""
    dropped_stale: int = 0
    """Datagrams and trains that were read and thrown away, since they had waited too long in a socket."""
    buffers_cut: int = 0
    """How often a receive buffer was made small for an overload."""


class UdpSocket(socket.socket):
    """One bound socket. One thread reads it; whoever sends does so one at a time."""

    __slots__ = ("_family", "_sends_trains", "_tells_class", "counters")

    def __init__(
        self, family: Family, host: str, port: int, counters: UdpCounters | None = None, *, shares_port: bool = False
    ) -> None:
        """Open and bind it.

        Args:
            family: an IPv6 socket takes no IPv4 packets.
            host: address of this machine, or the unspecified one, as text.
            port: 1–65535, or 0 for any.
            counters: what it counts in.
            shares_port: other sockets of this user that say so too can be bound to the same port.

        Raises:
            OSError: it can't be opened or bound; nothing is left open.
        """
        super().__init__(ADDRESS_FAMILIES[family], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._family = family
        self._sends_trains = True
        self.counters = UdpCounters() if counters is None else counters
        try:
            if family is Family.IPV6:
                self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if shares_port:
                self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self.set_receive_buffer(RECEIVE_BUFFER)
            self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            self._ask_for_trains()
            self.bind((host, port))
            self.counters.open.add(self)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Close it; what it dropped stays counted."""
        if self in self.counters.open:
            self.counters.open.discard(self)
            dropped = self.drops()
            self.counters.kernel_drops += dropped
        super().close()

    def set_receive_buffer(self, size: int) -> None:
        """Ask for room for datagrams that wait, in bytes; the kernel counts its own part of each, too.

        Whoever has CAP_NET_ADMIN may have more than ``net.core.rmem_max``.
        """
        try:
            self.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except PermissionError:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    @property
    def receive_buffer(self) -> int:
        """Bytes that the kernel gave, of those it was asked for (``net.core.rmem_max`` is its limit)."""
        # The kernel reports twice what it grants, for its own bookkeeping (socket(7)).
        return self.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def drops(self) -> int:
        """Give how many datagrams the kernel has dropped since there was no room for them; 0 if it does not tell."""
        with contextlib.suppress(OSError):
            told = self.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
            if len(told) == _MEMINFO.size:
                return int(_MEMINFO.unpack(told)[_DROPS])
        return 0

    def waited(self) -> float:
        """Give for how many seconds what was read last had waited, by the wall clock.

        The kernel notes when datagrams arrive from shortly after the first call on: it is 0 for earlier ones, and if it does
        not tell. To note it costs some 50 ns for each, to ask 1 µs.
        """
        try:
            seconds, nanoseconds = _TIMESPEC.unpack(fcntl.ioctl(self, _SIOCGSTAMPNS, bytes(_TIMESPEC.size)))
        except OSError:
            return 0.0
        at: float = seconds + nanoseconds / 1e9
        return max(0.0, time.time() - at)

    def wait(self) -> None:
        """Wait until there is something to read, or the socket is shut down.

        Raises:
            OSError: the socket had an error to tell, which `receive` does not tell again.
        """
        self.recv(1, socket.MSG_PEEK)

    def receive(self, flags: int = 0) -> Arrival | None:
        """Read a datagram or a train, waiting for it unless ``flags`` say otherwise; None once it is shut down.

        Raises:
            OSError: as recvmsg(2) does; BlockingIOError with MSG_DONTWAIT if there is nothing.
        """
        data, control, _, source = self.recvmsg(LARGEST_DATAGRAM + 28, _CONTROL_SPACE, flags)
        if source is None:
            # Not an empty datagram: that has an address.
            return None
        if not control or control == _PLAIN[self._family]:
            return data, source, 0, 0
        segment = traffic_class = 0
        for level, kind, value in control:
            if level == _SOL_UDP and kind == _UDP_GRO:
                segment = _INT.unpack_from(value)[0]
            elif kind in _CLASS_KINDS:
                # One byte for IPv4, an int for IPv6.
                traffic_class = value[0] if len(value) == 1 else _INT.unpack_from(value)[0]
        return data, source, segment if 0 < segment < len(data) else 0, traffic_class

    def transmit(self, data: bytes, address: SocketAddress, segment: int = 0, traffic_class: int = 0) -> OSError | None:
        """Send a datagram or a train without ever waiting; give the last error if any of it was lost.

        A full send buffer loses the datagram, as a full queue in any router would: to wait would hold up everybody.

        Args:
            data: a datagram, or datagrams one after another.
            address: where to.
            segment: the length of each datagram in ``data`` but the last; 0 if it is a single one.
            traffic_class: DSCP and ECN.
        """
        if segment == 0 or segment >= len(data):
            if traffic_class:
                return self._send_one(data, address, traffic_class)
            try:
                self.sendto(data, socket.MSG_DONTWAIT, address)
            except OSError as error:
                self.counters.send_errors[name_of(error)] += 1
                return error
            return None
        most = min(MOST_SEGMENTS, LARGEST_DATAGRAM // segment) * segment
        if most <= segment or not self._sends_trains:
            return self._send_each(data, address, segment, traffic_class)
        if len(data) <= most:
            return self._send_train(data, address, segment, traffic_class)
        lost = None
        for train in cut(data, most):
            lost = self.transmit(train, address, segment, traffic_class) or lost
        return lost

    def _send_one(self, data: bytes, address: SocketAddress, traffic_class: int) -> OSError | None:
        try:
            if traffic_class:
                self.sendmsg((data,), (self._class_control(traffic_class),), socket.MSG_DONTWAIT, address)
            else:
                self.sendto(data, socket.MSG_DONTWAIT, address)
        except OSError as error:
            self.counters.send_errors[name_of(error)] += 1
            return error
        return None

    def _send_train(self, data: bytes, address: SocketAddress, segment: int, traffic_class: int) -> OSError | None:
        control = [(_SOL_UDP, _UDP_SEGMENT, _SHORT.pack(segment))]
        if traffic_class:
            control.append(self._class_control(traffic_class))
        try:
            self.sendmsg((data,), control, socket.MSG_DONTWAIT, address)
        except OSError as error:
            if error.errno in _NO_TRAINS:
                self._sends_trains = False
            elif error.errno not in _NOT_THIS_TRAIN:
                self.counters.send_errors[name_of(error)] += -(-len(data) // segment)
                return error
            self.counters.trains_cut[name_of(error)] += 1
            return self._send_each(data, address, segment, traffic_class)
        self.counters.trains_sent += 1
        return None

    def _send_each(self, data: bytes, address: SocketAddress, segment: int, traffic_class: int) -> OSError | None:
        lost = None
        for datagram in cut(data, segment):
            lost = self._send_one(datagram, address, traffic_class) or lost
        return lost

    def _class_control(self, traffic_class: int) -> tuple[int, int, bytes]:
        level, kind = _CLASS_OPTIONS[self._family]
        return level, kind, _INT.pack(traffic_class)

    def _ask_for_trains(self) -> None:
        """Have the kernel hand over trains whole, and tell the traffic class of what arrives."""
        try:
            self.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        except OSError:
            # Linux before 5.0, or a sandbox: all arrives one by one, which works as well.
            self.counters.no_coalescing += 1
        level, option = _TELL_CLASS[self._family]
        with contextlib.suppress(OSError):
            self.setsockopt(level, option, 1)


_CLASS_OPTIONS = {
    Family.IPV4: (socket.IPPROTO_IP, socket.IP_TOS),
    Family.IPV6: (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
}
_TELL_CLASS = {
    Family.IPV4: (socket.IPPROTO_IP, socket.IP_RECVTOS),
    Family.IPV6: (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS),
}
_CLASS_KINDS = frozenset((socket.IP_TOS, socket.IPV6_TCLASS))

# What the kernel says beside most datagrams: a traffic class of 0. To compare costs a fifth of looking closer.
_PLAIN = {
    Family.IPV4: [(*_CLASS_OPTIONS[Family.IPV4], b"\0")],
    Family.IPV6: [(*_CLASS_OPTIONS[Family.IPV6], bytes(4))],
}


def discard_waiting(sockets: Sequence[UdpSocket]) -> int:
    """Throw away what waits to be read; give how many reads it took. What goes on arriving may be left over."""
    discarded = 0
    for each in sockets:
        with contextlib.suppress(OSError):
            for _ in range(_MOST_WAITING):
                if each.recvfrom(1, socket.MSG_DONTWAIT)[1] is None:
                    # It is shut down.
                    break
                discarded += 1
    return discarded


def is_broken(error: OSError) -> bool:
    """Tell whether a socket can't be used any more, rather than having lost one datagram."""
    return error.errno in _BROKEN


def name_of(error: OSError) -> str:
    """Give the name of an error for counting: one of errno's few."""
    return errno.errorcode.get(error.errno or 0, "unknown")
