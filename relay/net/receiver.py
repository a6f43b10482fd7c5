"""Reads sockets in batches, in one thread."""

import contextlib
import errno
import math
import select
import socket
import time
from collections.abc import Sequence

from relay.core.trains import Arrival
from relay.net.backlog import LEAST, Backlog
from relay.net.udp import UdpSocket, discard_waiting, is_broken, name_of

BATCH_DATAGRAMS = 48
"""Bound of a batch: large enough to share the cost of handing it over, small enough not to delay others. A reader of what
many flows share does with more, since there are few such readers, and more of a flow in a batch."""

BATCH_BYTES = 160 * 1024
"""Likewise; a train counts with all its bytes."""

_PROBE_EVERY = 16
_FEW = 4
"""A read that finds nothing costs 1.4 µs. So where the last wake-up found fewer datagrams than `_FEW`, no more than that are
asked for, but every so many wake-ups. If there are more, they come with the next batch."""

_QUIET_WAKES = 4
"""A socket that was read less often than this is waited for without the 64 KiB that a read may need: most allocations are
never used, and this saves each of those 4 KB. It costs a system call, so those that are used do without."""

_READ_ERRORS_IN_A_ROW = 32
"""A socket that gives nothing but errors is broken; a few are an ICMP message or a moment without memory."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.25
"""Seconds between reads that fail, each twice the one before: a machine that is short of memory for 6 s is waited for."""

_READABLE = select.POLLIN | select.POLLRDHUP


class Receiver:
    """Reads from one socket or several until it is stopped.

    With one socket, `receive` blocks in the read itself; with several it waits for any of them first.

    Args:
        sockets: open ones; they stay the caller's.
        least: datagrams that may wait in each, however large an overload is.
        most: datagrams and trains in a batch.
        stale_after: seconds. A full batch that has waited for longer is thrown away, and all that waits behind it: nobody
            has read for so long, and what is new finds room again. By default nothing is.
    """

    __slots__ = (
        "_backlogs",
        "_by_descriptor",
        "_errors",
        "_expected",
        "_filled_at",
        "_least",
        "_most",
        "_notes_arrivals",
        "_poll",
        "_sockets",
        "_stale_after",
        "_stopped",
        "_wakes",
        "is_behind",
        "is_flooded",
    )

    def __init__(
        self,
        sockets: Sequence[UdpSocket],
        least: int = LEAST,
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
        # If nothing is ever stale, there is nothing to ask for.
        self._notes_arrivals = stale_after == math.inf
        self._stopped = False
        self._wakes = 0
        self._expected = 1
        self._errors = 0
        self._backlogs: dict[UdpSocket, Backlog] | None = None
        self.is_behind = False
        """Whether the last batch was as large as one may be: more is likely to wait."""
        self.is_flooded = False
        """Whether it is so, and has been for longer than a burst."""

    def receive(self) -> list[Arrival]:
        """Wait for datagrams and give them, oldest first; an empty list once it is stopped.

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
        """Make `receive` return, now and from now on; to be called from any thread.

        Closing a socket does not wake a thread that is blocked in reading it; shutting it down does. It can still be sent
        from.
        """
        self._stopped = True
        for each in self._sockets:
            # ENOTCONN, though it did wake the reader; EBADF if the reader was faster.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RD)

    def _wait(self, poll: select.poll) -> UdpSocket:
        """Give a socket that has something, another one than last time if that has, too."""
        ready = poll.poll()
        descriptor, events = ready[self._wakes % len(ready)]
        if events & ~select.POLLIN:
            self._note_shutdown()
        return self._by_descriptor[descriptor]

    def _drain(self, sock: UdpSocket, batch: list[Arrival], most: int) -> None:
        """Read what there is beside the first, within the bounds of a batch."""
        size = len(batch[0][0])
        receive = sock.receive
        self.is_behind = False
        if not self._notes_arrivals:
            self._note_arrivals()
        while len(batch) < most and size < BATCH_BYTES:
            try:
                arrival = receive(socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                # If there is more to it than a moment, the next read fails, too.
                self._count(error)
                break
            if arrival is None:
                break
            batch.append(arrival)
            size += len(arrival[0])
        else:
            self.is_behind = most == self._most
        self._expected = len(batch)
        if self.is_behind or self._backlogs is not None:
            self._note_backlog(sock, size, len(batch))

    def _note_arrivals(self) -> None:
        """Have the kernel note when datagrams arrive. Most sockets are never read often enough to be worth asking."""
        self._notes_arrivals = True
        for each in self._sockets:
            each.waited()

    def _is_stale(self, sock: UdpSocket) -> bool:
        """Tell whether a full batch has waited for too long: asked of the kernel only if none was read in that time."""
        now = time.monotonic()
        if now - self._filled_at > self._stale_after and sock.waited() > self._stale_after:
            return True
        self._filled_at = now
        return False

    def _note_backlog(self, sock: UdpSocket, size: int, datagrams: int) -> None:
        if self._backlogs is None:
            # Most sockets never have one.
            self._backlogs = {each: Backlog(each, self._least) for each in self._sockets}
        backlog = self._backlogs[sock]
        backlog.note(size, datagrams, is_behind=self.is_behind)
        self.is_flooded = self.is_behind and backlog.is_small

    def _note_shutdown(self) -> None:
        """Find a socket shut down: by `stop`, or it is broken; reading on would give nothing, over and over."""
        if not self._stopped:
            raise OSError(errno.EPIPE, "the socket was shut down")

    def _tolerate(self, error: OSError) -> None:
        """Go on after a read that failed, more slowly if the one before it failed, too."""
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
