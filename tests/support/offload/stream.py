"""Numbered packets that flow through a relay in both directions, during another action."""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Self

from tests.support.offload.relays import Talk
from tests.support.turn_client import TIMEOUT
from tests.support.waiting import PATIENCE, wait_until

_NUMBER: Final = struct.Struct("!Q")
_SIZE: Final = 200
_TICK: Final = 0.005


class Stream:
    """Packets between a client and its peer, for the duration of a context.

    Args:
        way: client and peer.
        per_second: packets in each direction.
        to_client: whether packets flow to the client.
        loses: whether losses are expected, so that nothing waits for missing packets at the end.
        dropped: returns the number of packets dropped by the relay, which are not awaited at the end.
    """

    def __init__(
        self,
        way: Talk,
        per_second: int = 1000,
        *,
        loses: bool = False,
        to_client: bool = True,
        dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._way = way
        self.to_client = to_client
        self._burst = max(1, round(per_second * _TICK))
        self._patience = 0.05 if loses else PATIENCE
        self._dropped = dropped
        self._ended = threading.Event()
        self._quiet = threading.Event()
        self.sent = 0
        """In each direction."""
        self.at_peer: Counter[int] = Counter()
        self.at_client: Counter[int] = Counter()
        self.strange: list[bytes] = []
        """Arrived packets that were never sent."""
        self._threads = [
            threading.Thread(target=self._send),
            threading.Thread(target=self._receive, args=(way.peer, self.at_peer, 0)),
            threading.Thread(target=self._receive, args=(way.client.socket, self.at_client, 4)),
        ]

    def __enter__(self) -> Self:
        for sock in (self._way.peer, self._way.client.socket):
            sock.settimeout(0.05)
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads[0].join()
        # Wait for packets in flight, unless losses are expected.
        until = time.monotonic() + self._patience
        while self.lost() and self.lost() > self._dropped() and time.monotonic() < until:
            time.sleep(_TICK)
        self._quiet.set()
        for each in self._threads:
            each.join()
        for sock in (self._way.peer, self._way.client.socket):
            sock.settimeout(TIMEOUT)
        assert self.strange == []

    @property
    def arrived(self) -> int:
        """Return the number of arrived packets in both directions."""
        return len(self.at_peer) + len(self.at_client)

    def wait_for(self, count: int, seconds: float = 30) -> None:
        """Wait until so many more have arrived."""
        wanted = self.arrived + count
        wait_until(lambda: self.arrived >= wanted, seconds)

    def lost(self) -> int:
        """How many never arrived."""
        return (2 if self.to_client else 1) * self.sent - self.arrived

    def doubled(self) -> int:
        return self.at_peer.total() + self.at_client.total() - self.arrived

    def _send(self) -> None:
        way, number = self._way, self._way.number
        header = struct.pack("!HH", number, _SIZE)
        due = time.monotonic()
        while not self._ended.is_set():
            for _ in range(self._burst):
                payload = _NUMBER.pack(self.sent) + self._mark + bytes(_SIZE - _NUMBER.size - len(self._mark))
                way.client.socket.sendto(header + payload, way.client.server)
                if self.to_client:
                    way.peer.sendto(payload, way.relayed[:2])
                self.sent += 1
            due += _TICK
            self._ended.wait(max(0.0, due - time.monotonic()))

    @property
    def _mark(self) -> bytes:
        """Return a mark unique to this stream."""
        return repr((self._way.client.address, self._way.relayed)).encode()[:100]

    def _receive(self, sock: socket.socket, arrived: Counter[int], skip: int) -> None:
        mark = self._mark
        while not self._quiet.is_set():
            try:
                data = sock.recv(2048)[skip:]
            except TimeoutError:
                continue
            if data[_NUMBER.size : _NUMBER.size + len(mark)] == mark:
                arrived[_NUMBER.unpack_from(data)[0]] += 1
            else:
                self.strange.append(data)
