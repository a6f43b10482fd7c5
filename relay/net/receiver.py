"""Reads sockets in batches, in one thread."""

import contextlib
import errno
import math
import select
import socket
import time
from collections.abc import Sequence

from relay.core.data import Datagram
from relay.core.overload import BATCH_BYTES, BATCH_DATAGRAMS, DATAGRAM_BYTES, LEAST_WAITING
from relay.net.backlog import Backlog
from relay.net.udp import RECEIVE_BUFFER, UdpSocket, discard_waiting, is_broken, name_of

_PROBE_EVERY = 16
_FEW = 4
"""A read that finds nothing costs 1.4 µs. So if the last wake-up found fewer than `_FEW` datagrams, this wake-up reads no
more than that number, except for every sixteenth. Further datagrams come with the next batch."""

_QUIET_WAKES = 4
"""Wake-ups for which a reader waits without the 64 KiB buffer of a read. Most allocations are never used, and this saves 4
KB for each. It costs a system call, so busy sockets do without."""

_READ_ERRORS_IN_A_ROW = 32
"""Errors after which a socket counts as broken; a few errors are ICMP messages or a moment without memory."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
"""Seconds between reads that fail, doubled after each failure: the reader outlasts 6 s without memory."""

_READABLE = select.POLLIN | select.POLLRDHUP


class Receiver:
    """Reads from one or several sockets until stopped.

    With one socket, `receive` blocks in the read itself; with several sockets it polls first.

    Args:
        sockets: open sockets; the caller closes them.
        least: datagrams that may wait in each socket, even in an overload.
        most: datagrams and GRO batches in a batch.
        stale_after: seconds after which a full batch is dropped, with the queue behind it, so that new packets find room. By
            default nothing is dropped.
    """

    __slots__ = (
        "_backlogs",
        "_by_descriptor",
        "_errors",
        "_expected",
        "_filled_at",
        "_least",
        "_most",
        "_poll",
        "_sockets",
        "_stale_after",
        "_stopped",
        "_wakes",
        "is_behind",
        "is_flooded",
        "keeps_buffers",
        "thread",
    )

    def __init__(
        self,
        sockets: Sequence[UdpSocket],
        least: int = LEAST_WAITING,
        most: int = BATCH_DATAGRAMS,
        stale_after: float = math.inf,
    ) -> None:
        self._sockets = tuple(sockets)
        self._by_descriptor: dict[int, UdpSocket] = {}
        self._poll: select.poll | None = None
        if len(self._sockets) > 1:
            self._by_descriptor = {each.fileno(): each for each in sockets}
            self._poll = select.poll()
            for each in self._sockets:
                self._poll.register(each, _READABLE)
        self._least = least
        self._most = most
        self._stale_after = stale_after
        self._filled_at = -math.inf
        for each in self._sockets if stale_after != math.inf else ():
            # From now on the kernel notes arrival times.
            each.waited()
        self._stopped = False
        self._wakes = 0
        self._expected = 1
        self._errors = 0
        self._backlogs: dict[UdpSocket, Backlog] | None = None
        self.is_behind = False
        """Whether the last batch was full: more datagrams probably wait."""
        self.is_flooded = False
        """Whether batches have been full for longer than a burst."""
        self.keeps_buffers = False
        """Whether receive buffers stay large even in an overload: in a handover, nobody may read for a moment."""
        self.thread = 0
        """The native id of the thread that reads; 0 if none does."""

    def receive(self) -> list[Datagram]:
        """Wait for datagrams and return them, oldest first; return an empty list after `stop`.

        Raises:
            OSError: the socket is broken.
        """
        while not self._stopped:
            try:
                if self._poll is not None:
                    sock, flags = self._wait(self._poll), int(socket.MSG_DONTWAIT)
                else:
                    sock, flags = self._sockets[0], 0
                    if self._wakes < _QUIET_WAKES:
                        sock.wait()
                first = sock.receive(flags)
            except OSError as error:
                self._tolerate(error)
                continue
            if first is None:
                self._note_shutdown()
                continue
            self._errors = 0
            self._wakes += 1
            batch = [first]
            if self._wakes % _PROBE_EVERY == 0 or self._expected >= _FEW:
                self._drain(sock, batch, self._most)
            elif self._expected > 1:
                self._drain(sock, batch, self._expected)
            if self.is_behind and self._is_stale(sock):
                sock.counters.dropped_stale += len(batch) + discard_waiting((sock,))
                continue
            return batch
        return []

    def stop(self) -> None:
        """Make `receive` return, now and from now on. Any thread may call this.

        Closing a socket does not wake a thread that is blocked in a read; shutting it down does, and allows further sends.
        """
        self._stopped = True
        for each in self._sockets:
            # ENOTCONN, although the reader woke up; EBADF if the reader was faster.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RD)

    def withdraw(self) -> None:
        """Return nothing more from the next read on, because another process reads the sockets now."""
        self._stopped = True

    def descriptors(self) -> list[int]:
        """Return the descriptors of the sockets."""
        return [each.fileno() for each in self._sockets]

    def _wait(self, poll: select.poll) -> UdpSocket:
        """Return a readable socket; of several, alternate."""
        ready = poll.poll()
        descriptor, events = ready[self._wakes % len(ready)]
        if events & ~select.POLLIN:
            self._note_shutdown()
        return self._by_descriptor[descriptor]

    def _drain(self, sock: UdpSocket, batch: list[Datagram], most: int) -> None:
        """Read the datagrams behind the first, within the bounds of a batch."""
        size, extra = len(batch[0][0]), 0
        receive = sock.receive
        self.is_behind = False
        while len(batch) < most and size < BATCH_BYTES:
            try:
                datagram = receive(socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                # A lasting error fails the next read too.
                self._count(error)
                break
            if datagram is None:
                break
            batch.append(datagram)
            size += len(datagram[0])
            if datagram[2]:
                more = len(datagram[0]) // datagram[2] * DATAGRAM_BYTES
                size, extra = size + more, extra + more
        else:
            self.is_behind = most == self._most
        self._expected = len(batch)
        if self.is_behind or self._backlogs is not None:
            self._note_backlog(sock, size - extra, len(batch))

    def _is_stale(self, sock: UdpSocket) -> bool:
        """Check whether a full batch has waited for too long. The kernel is asked only if no batch was read in that time."""
        now = time.monotonic()
        if now - self._filled_at > self._stale_after and sock.waited() > self._stale_after:
            return True
        self._filled_at = now
        return False

    def _note_backlog(self, sock: UdpSocket, size: int, datagrams: int) -> None:
        if self.keeps_buffers:
            if self._backlogs is not None:
                self._backlogs = None
                self.is_flooded = False
                for each in self._sockets:
                    each.set_receive_buffer(RECEIVE_BUFFER)
            return
        if self._backlogs is None:
            # Most sockets never need a backlog.
            self._backlogs = {each: Backlog(each, self._least) for each in self._sockets}
        backlog = self._backlogs[sock]
        backlog.note(size, datagrams, is_behind=self.is_behind)
        self.is_flooded = self.is_behind and backlog.is_small

    def _note_shutdown(self) -> None:
        """Raise EPIPE for a socket that was shut down, except by `stop`: further reads would return nothing at once."""
        if not self._stopped:
            raise OSError(errno.EPIPE, "the socket was shut down")

    def _tolerate(self, error: OSError) -> None:
        """Continue after a failed read, more slowly after repeated failures."""
        if self._stopped or isinstance(error, BlockingIOError):
            return
        self._count(error)
        self._errors += 1
        if is_broken(error) or self._errors > _READ_ERRORS_IN_A_ROW:
            raise error
        if self._errors > 1:
            time.sleep(min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2**self._errors))

    def _count(self, error: OSError) -> None:
        self._sockets[0].counters.receive_errors[name_of(error)] += 1
