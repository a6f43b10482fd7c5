"""Blocking UDP sockets, read by one thread and sent from by another."""

import contextlib
import errno
import select
import socket
from collections.abc import Sequence
from typing import TypeAlias

from relay.core.addresses import Family, SocketAddress

Datagram: TypeAlias = tuple[bytes, SocketAddress]

ADDRESS_FAMILIES = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}

RECEIVE_BUFFER = 4 * 1024 * 1024
"""Bytes asked of the kernel for each socket. With 64 KiB a bursty stream of 2 Mbit/s lost 9 % of its packets, with 4 MiB
none; memory is used only while datagrams wait."""

_DATAGRAM_LIMIT = 65535
_BATCH_DATAGRAMS = 32
_BATCH_BYTES = 64 * 1024
"""Bounds of a batch: large enough to share the cost of handing it over, small enough not to delay others."""

_PROBE_EVERY = 16
"""A read that finds nothing costs 1.4 µs. So more is read after a wake-up only if the last one found more than one
datagram, or if this many wake-ups have passed."""

_READ_ERRORS_IN_A_ROW = 32
"""A socket that gives nothing but errors is broken; a few are an ICMP message or a moment without memory."""

_MOST_WAITING = 65536
"""Datagrams that fit a receive buffer, at the least: the kernel counts some 700 bytes for the smallest."""

_BROKEN = frozenset((errno.EBADF, errno.ENOTSOCK, errno.EPIPE))
_READABLE = select.POLLIN | select.POLLRDHUP


def open_socket(family: Family, host: str, port: int) -> socket.socket:
    """Open and bind a socket of one family.

    Args:
        family: an IPv6 socket takes no IPv4 packets.
        host: address of this machine, or the unspecified one, as text.
        port: 1–65535, or 0 for any.

    Raises:
        OSError: it can't be opened or bound; nothing is left open.
    """
    opened = socket.socket(ADDRESS_FAMILIES[family], socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        if family is Family.IPV6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        opened.bind((host, port))
    except BaseException:
        opened.close()
        raise
    return opened


def is_receive_buffer_capped(sock: socket.socket) -> bool:
    """Tell whether the kernel gave a socket less than `RECEIVE_BUFFER` (``net.core.rmem_max`` is its limit)."""
    # The kernel reports twice what it grants, for its own bookkeeping (socket(7)).
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 2 * RECEIVE_BUFFER


def send(sock: socket.socket, data: bytes, address: SocketAddress) -> OSError | None:
    """Send one datagram without ever waiting; give the error if it was lost.

    A full send buffer loses the datagram, as a full queue in any router would: waiting would hold up everybody's packets.
    """
    try:
        sock.sendto(data, socket.MSG_DONTWAIT, address)
    except OSError as error:
        return error
    return None


def discard_waiting(sock: socket.socket) -> int:
    """Throw away the datagrams that wait to be read; give how many. Those that go on arriving may be left over."""
    discarded = 0
    with contextlib.suppress(OSError):
        while discarded < _MOST_WAITING:
            sock.recv(1, socket.MSG_DONTWAIT)
            discarded += 1
    return discarded


def is_broken(error: OSError) -> bool:
    """Tell whether a socket can't be used any more, rather than having lost one datagram."""
    return error.errno in _BROKEN


class Receiver:
    """Reads from one socket or several until it is stopped.

    With one socket, `receive` blocks in the read itself; with several it waits for any of them first.
    """

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = tuple(sockets)
        self._by_descriptor = {each.fileno(): each for each in sockets}
        self._poll: select.poll | None = None
        if len(self._sockets) > 1:
            self._poll = select.poll()
            for each in self._sockets:
                self._poll.register(each, _READABLE)
        self._stopped = False
        self._wakes = 0
        self._busy = False
        self._errors = 0

    def receive(self) -> list[Datagram]:
        """Wait for datagrams and give them, oldest first; an empty list once it is stopped.

        Raises:
            OSError: the socket is broken.
        """
        while not self._stopped:
            batch = self._read(self._sockets[0], 0) if self._poll is None else self._wait(self._poll)
            if batch:
                self._errors = 0
                return batch
        return []

    def stop(self) -> None:
        """Make `receive` return, now and from now on; to be called from any thread.

        Closing a socket does not wake a thread that is blocked in reading it; shutting it down does. It can still be sent
        from.
        """
        self._stopped = True
        for each in self._sockets:
            try:
                each.shutdown(socket.SHUT_RD)
            except OSError:
                # ENOTCONN, though it did wake the reader; EBADF if the reader was faster.
                continue

    def _wait(self, poll: select.poll) -> list[Datagram]:
        batch: list[Datagram] = []
        for descriptor, events in poll.poll():
            if events & ~select.POLLIN:
                self._note_shutdown()
            batch += self._read(self._by_descriptor[descriptor], socket.MSG_DONTWAIT)
        return batch

    def _read(self, sock: socket.socket, flags: int) -> list[Datagram]:
        """Read what there is, within the bounds of a batch; nothing if stopped, or if the socket gave an error."""
        try:
            data, address = sock.recvfrom(_DATAGRAM_LIMIT, flags)
        except OSError as error:
            self._tolerate(error)
            return []
        if address is None:
            # Not an empty datagram: that has an address.
            self._note_shutdown()
            return []
        batch: list[Datagram] = [(data, address)]
        self._wakes += 1
        if self._busy or self._wakes % _PROBE_EVERY == 0:
            self._drain(sock, batch, len(data))
            self._busy = len(batch) > 1
        return batch

    def _drain(self, sock: socket.socket, batch: list[Datagram], size: int) -> None:
        while len(batch) < _BATCH_DATAGRAMS and size < _BATCH_BYTES:
            try:
                data, address = sock.recvfrom(_DATAGRAM_LIMIT, socket.MSG_DONTWAIT)
            except OSError:
                # Mostly that there is no more; an error of the socket comes again at the next read.
                return
            if address is None:
                return
            batch.append((data, address))
            size += len(data)

    def _note_shutdown(self) -> None:
        """Find a socket shut down: by `stop`, or it is broken; reading on would give nothing, over and over."""
        if not self._stopped:
            raise OSError(errno.EPIPE, "the socket was shut down")

    def _tolerate(self, error: OSError) -> None:
        self._errors += not isinstance(error, BlockingIOError)
        if not self._stopped and (is_broken(error) or self._errors > _READ_ERRORS_IN_A_ROW):
            raise error
