"""UDP sockets that use the kernel's GSO and GRO where available. A train is a GSO or GRO batch."""

import contextlib
import errno
import fcntl
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.core.addresses import Family, SocketAddress
from relay.core.commands import cut
from relay.core.data import Datagram
from relay.net.asked import IP_PKTINFO, AskedAddresses, ControlMessage
from relay.net.threads import yield_cpu

ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}

RECEIVE_BUFFER = 4 * 1024 * 1024
"""Bytes requested for each socket. With 64 KiB a bursty stream of 2 Mbit/s lost 9 % of its packets, with 4 MiB none. Memory
is used only while datagrams wait. `relay.net.backlog` shrinks the buffer in an overload."""

SEND_BUFFER = 1024 * 1024
"""Bytes requested for each socket: ten full trains that wait for the network card."""

LARGEST_DATAGRAM = 65507
"""Bytes of the largest UDP datagram over IPv4, which limits a train too."""

MOST_SEGMENTS = 64
"""Datagrams in a train to send: more are EINVAL before Linux 6.9 (UDP_MAX_SEGMENTS)."""

_MOST_WAITING = 65536
"""More datagrams than a receive buffer holds: the kernel counts about 700 bytes for the smallest."""

_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_SIOCGSTAMPNS = 0x8907
"""Numbers of Linux (linux/udp.h, linux/in.h, asm-generic/socket.h, asm-generic/sockios.h) without a name in the socket
module."""

_CONTROL_SPACE = 96
"""Bytes for control messages: the traffic class, the segment size of a train, and the destination (88 in total)."""

_SHORT = struct.Struct("=H")
_INT = struct.Struct("=i")
_MEMINFO = struct.Struct("=9I")
_TIMESPEC = struct.Struct("@ll")
_DROPS = 8

_BROKEN = frozenset((errno.EBADF, errno.ENOTSOCK, errno.EPIPE))

# Errors of a path without GSO (no checksum offload, or an old kernel), and of a train whose segments with their headers are
# longer than the path's MTU.
_NO_TRAINS = frozenset((errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT))
_NOT_THIS_TRAIN = frozenset((errno.EINVAL, errno.EMSGSIZE))


_SOCKETS_PER_SLICE = 256
"""Sockets asked for drops before other threads get the CPU. All 32,768 take 40 ms, too long for waiting packets."""


@dataclass(slots=True)
class UdpCounters:
    """Counters of all sockets: plain integers. Any thread may read them; one thread at a time writes."""

    trains_sent: int = 0
    """Trains sent."""
    trains_cut: Counter[str] = field(default_factory=Counter)
    """Trains that were sent datagram by datagram, by the name of the error."""
    send_errors: Counter[str] = field(default_factory=Counter)
    """Datagrams that the kernel refused to send, by the name of the error."""
    receive_errors: Counter[str] = field(default_factory=Counter)
    """Failed reads, by the name of the error; a failed read does not imply a loss."""
    no_coalescing: int = 0
    """Sockets without UDP_GRO: all datagrams arrive one by one."""
    kernel_drops: int = 0
    """Datagrams that the kernel dropped because a buffer was full, of closed sockets; `UdpSocket.drops` has the number of an
    open socket."""
    open: "set[UdpSocket]" = field(default_factory=set, compare=False, repr=False)
    """The open sockets with these counters."""
    dropped_stale: int = 0
    """Datagrams and trains that were dropped because they had waited too long in a socket."""
    buffers_cut: int = 0
    """How often a receive buffer was shrunk in an overload."""
    _most_drops: int = field(default=0, compare=False, repr=False)

    def all_kernel_drops(self) -> int:
        """Return the datagrams that the kernel dropped because a buffer was full. The number never decreases."""
        drops = self.kernel_drops
        for number, opened in enumerate(tuple(self.open), 1):
            drops += opened.drops()
            if not number % _SOCKETS_PER_SLICE:
                yield_cpu()
        # A socket closed during the loop is missing in both numbers.
        self._most_drops = max(self._most_drops, drops)
        return self._most_drops


_NOBODY = AskedAddresses()


class _Options(NamedTuple):
    """The socket options of a family."""

    level: int
    traffic_class: int
    tell_class: int
    tell_destination: int
    plain: list[ControlMessage]
    """The control messages of most datagrams: a traffic class of 0. Comparing them costs a fifth of parsing them."""


_OPTIONS = {
    Family.IPV4: _Options(
        socket.IPPROTO_IP,
        socket.IP_TOS,
        socket.IP_RECVTOS,
        IP_PKTINFO,
        [(socket.IPPROTO_IP, socket.IP_TOS, b"\0")],
    ),
    Family.IPV6: _Options(
        socket.IPPROTO_IPV6,
        socket.IPV6_TCLASS,
        socket.IPV6_RECVTCLASS,
        socket.IPV6_RECVPKTINFO,
        [(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, bytes(4))],
    ),
}
_CLASS_KINDS = frozenset((socket.IP_TOS, socket.IPV6_TCLASS))
_PKTINFO_KINDS = frozenset((IP_PKTINFO, socket.IPV6_PKTINFO))


class UdpSocket(socket.socket):
    """One bound socket. One thread reads, and one thread at a time sends."""

    __slots__ = ("_dropped_before", "_options", "_plain", "_sends_trains", "asked", "counters")

    def __init__(
        self,
        family: Family,
        host: str,
        port: int,
        counters: UdpCounters | None = None,
        *,
        shares_port: bool = False,
        descriptor: int | None = None,
    ) -> None:
        """Open and bind the socket.

        Args:
            family: an IPv6 socket receives no IPv4 packets.
            host: an address of this machine, or the unspecified address, as text.
            port: 1–65535, or 0 for any.
            counters: the counters of the socket.
            shares_port: whether other sockets of this user with this option may have the same port.
            descriptor: such a socket of another process, which is bound already.

        Raises:
            OSError: the socket can't be opened or bound; nothing is left open.
        """
        super().__init__(ADDRESS_FAMILIES[family], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0, descriptor)
        self._options = _OPTIONS[family]
        self._plain = self._options.plain
        self._sends_trains = True
        self._dropped_before = 0
        self.asked = _NOBODY
        """The addresses asked by clients, if the socket is bound to all addresses."""
        self.counters = UdpCounters() if counters is None else counters
        try:
            # The other process may have shrunk it.
            self.set_receive_buffer(RECEIVE_BUFFER)
            if descriptor is not None:
                self._dropped_before = self.drops()
            else:
                if family is Family.IPV6:
                    self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if shares_port:
                    self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                self._ask_for_trains()
                self.bind((host, port))
            self.counters.open.add(self)
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Close the socket and keep the count of its drops."""
        if self in self.counters.open:
            self.counters.open.discard(self)
            dropped = self.drops()
            self.counters.kernel_drops += dropped
        super().close()

    def set_receive_buffer(self, size: int) -> None:
        """Set the size of the receive buffer in bytes, which includes the kernel's own part of each datagram.

        With CAP_NET_ADMIN it may exceed ``net.core.rmem_max``.
        """
        try:
            self.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
        except PermissionError:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)

    @property
    def receive_buffer(self) -> int:
        """Bytes that the kernel granted; the limit is ``net.core.rmem_max``."""
        # The kernel reports twice the size, for its own bookkeeping (socket(7)).
        return self.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2

    def drops(self) -> int:
        """Return the number of datagrams that the kernel dropped because the buffer was full; 0 if unknown."""
        with contextlib.suppress(OSError):
            told = self.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
            if len(told) == _MEMINFO.size:
                return int(_MEMINFO.unpack(told)[_DROPS]) - self._dropped_before
        return 0

    def waited(self) -> float:
        """Return the seconds for which the last datagram waited, by the wall clock; 0 if unknown.

        The kernel notes arrival times from shortly after the first call. That costs 50 ns a datagram, and this call 1 µs.
        """
        try:
            seconds, nanoseconds = _TIMESPEC.unpack(fcntl.ioctl(self, _SIOCGSTAMPNS, bytes(_TIMESPEC.size)))
        except OSError:
            return 0.0
        at: float = seconds + nanoseconds / 1e9
        return max(0.0, time.time() - at)

    def wait(self) -> None:
        """Wait until a datagram can be read, or the socket is shut down.

        Raises:
            OSError: the socket had a pending error, which `receive` does not raise again.
        """
        self.recv(1, socket.MSG_PEEK)

    def receive(self, flags: int = 0) -> Datagram | None:
        """Read a datagram or a train; return None after a shutdown. Wait for a datagram unless ``flags`` forbid it.

        Raises:
            OSError: recvmsg(2) failed; BlockingIOError with MSG_DONTWAIT and an empty queue.
        """
        data, control, _, source = self.recvmsg(LARGEST_DATAGRAM + 28, _CONTROL_SPACE, flags)
        if source is None:
            # An empty datagram has an address.
            return None
        if not control or control == self._plain:
            return data, source, 0, 0
        segment_size = traffic_class = 0
        for level, kind, value in control:
            if level == _SOL_UDP and kind == _UDP_GRO:
                segment_size = _INT.unpack_from(value)[0]
            elif kind in _CLASS_KINDS:
                # One byte for IPv4, an int for IPv6.
                traffic_class = value[0] if len(value) == 1 else _INT.unpack_from(value)[0]
            elif kind in _PKTINFO_KINDS:
                self.asked.note(source, kind, value)
        return data, source, segment_size if 0 < segment_size < len(data) else 0, traffic_class

    def transmit(self, data: bytes, address: SocketAddress, segment_size: int = 0, traffic_class: int = 0) -> OSError | None:
        """Send a datagram or a train without blocking; return the last error if any datagram was lost.

        A full send buffer loses the datagram, as a full queue of a router does: blocking would delay all clients.

        Args:
            data: a datagram, or the datagrams of a train.
            address: the destination.
            segment_size: the length of each datagram in a train, of which the last may be shorter; 0 for a single datagram.
            traffic_class: DSCP and ECN.
        """
        if segment_size == 0 or segment_size >= len(data):
            if traffic_class or (self.asked and address in self.asked):
                return self._send_with_control(data, address, traffic_class)
            try:
                self.sendto(data, socket.MSG_DONTWAIT, address)
            except OSError as error:
                self.counters.send_errors[name_of(error)] += 1
                return error
            return None
        most = min(MOST_SEGMENTS, LARGEST_DATAGRAM // segment_size) * segment_size
        if most <= segment_size or not self._sends_trains:
            return self._send_each(data, address, segment_size, traffic_class)
        if len(data) <= most:
            return self._send_train(data, address, segment_size, traffic_class)
        lost = None
        for train in cut(data, most):
            lost = self.transmit(train, address, segment_size, traffic_class) or lost
        return lost

    def _send_with_control(self, data: bytes, address: SocketAddress, traffic_class: int) -> OSError | None:
        try:
            self.sendmsg((data,), self._control(address, traffic_class), socket.MSG_DONTWAIT, address)
        except OSError as error:
            self.counters.send_errors[name_of(error)] += 1
            return error
        return None

    def _send_train(self, data: bytes, address: SocketAddress, segment_size: int, traffic_class: int) -> OSError | None:
        control = [(_SOL_UDP, _UDP_SEGMENT, _SHORT.pack(segment_size)), *self._control(address, traffic_class)]
        try:
            self.sendmsg((data,), control, socket.MSG_DONTWAIT, address)
        except OSError as error:
            if error.errno in _NO_TRAINS:
                self._sends_trains = False
            elif error.errno not in _NOT_THIS_TRAIN:
                self.counters.send_errors[name_of(error)] += -(-len(data) // segment_size)
                return error
            self.counters.trains_cut[name_of(error)] += 1
            return self._send_each(data, address, segment_size, traffic_class)
        self.counters.trains_sent += 1
        return None

    def _send_each(self, data: bytes, address: SocketAddress, segment_size: int, traffic_class: int) -> OSError | None:
        lost = None
        for datagram in cut(data, segment_size):
            lost = self.transmit(datagram, address, 0, traffic_class) or lost
        return lost

    def _control(self, address: SocketAddress, traffic_class: int) -> list[ControlMessage]:
        asked = self.asked.get(address) if self.asked else None
        control = [] if asked is None else [asked]
        if traffic_class:
            control.append((self._options.level, self._options.traffic_class, _INT.pack(traffic_class)))
        return control

    def note_asked(self) -> None:
        """Note in `asked` the destinations of datagrams from now on."""
        with contextlib.suppress(OSError):
            self.setsockopt(self._options.level, self._options.tell_destination, 1)

    def _ask_for_trains(self) -> None:
        """Let the kernel return whole trains, and the traffic class of each datagram."""
        try:
            self.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        except OSError:
            # Linux before 5.0, or a sandbox: datagrams arrive one by one.
            self.counters.no_coalescing += 1
        with contextlib.suppress(OSError):
            self.setsockopt(self._options.level, self._options.tell_class, 1)


def discard_waiting(sockets: Sequence[UdpSocket]) -> int:
    """Drop all waiting datagrams and return the number of reads. Datagrams that arrive meanwhile may remain."""
    discarded = 0
    for each in sockets:
        with contextlib.suppress(OSError):
            for _ in range(_MOST_WAITING):
                if each.recvfrom(1, socket.MSG_DONTWAIT)[1] is None:
                    # The socket is shut down.
                    break
                discarded += 1
    return discarded


def is_broken(error: OSError) -> bool:
    """Check whether an error makes the socket unusable. Other errors lose one datagram."""
    return error.errno in _BROKEN


def name_of(error: OSError) -> str:
    """Return the name of an error, for counting: one of errno's names."""
    return errno.errorcode.get(error.errno or 0, "unknown")
