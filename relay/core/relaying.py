"""From a client to its peers and back: what happens to every packet (RFC 8656 §12.6 and §12.7).

Datagrams that go the same way, one after another and of one length, leave as one train: a run. A run begins as a command
for its first datagram, and grows as long as what follows fits; a shorter datagram ends it, since only the last of a train
may be shorter. Anything else that goes the same way begins a run of its own, so that the order of each flow is kept.

Runs live while one batch of arrivals is worked off, and are left alone as soon as anything else than relaying happens in
it: so a run never relays for a channel that has changed.
"""

import math
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, PeerAddress, SocketAddress
from relay.core.allocations import Allocations, ChannelBinding
from relay.core.commands import Command, SendToClient, SendToPeer
from relay.core.counters import SIZE_SHIFT, Counters, DropReason
from relay.core.trains import Arrival, is_uniform

CHANNEL_DATA_FIRST_BYTES = range(64, 128)
"""By which ChannelData is told from STUN (RFC 8656 §12, RFC 7983). RFC 8656 has 64–79; 80–127 belong to the channel numbers
of RFC 5766."""

CHANNEL_HEADER_LENGTH = 4

_CHANNEL_HEADER = struct.Struct("!HH")
_pack_header = _CHANNEL_HEADER.pack
_unpack_header = _CHANNEL_HEADER.unpack_from

Direction: TypeAlias = tuple[AllocationId, ChannelNumber]
"""Of a channel; in one batch, all goes to clients or all to peers."""

Signature: TypeAlias = tuple[SocketAddress, bytes | int, int]
"""What the next datagram of a run has: source, ChannelData header or length, traffic class."""


ToPeer: TypeAlias = tuple[AllocationId, bytes, PeerAddress, int, int]
"""The fields of a `SendToPeer`, for a third of its price."""

ToClient: TypeAlias = tuple[bytes, ClientAddress, int, int]
"""The fields of a `SendToClient`."""


class Run:
    """Datagrams that leave together, still growing."""

    __slots__ = ("append", "at", "binding", "direction", "header", "length", "pieces", "signature", "size", "traffic_class")

    def __init__(
        self, signature: Signature, binding: ChannelBinding, first: bytes, length: int, header: bytes = b""
    ) -> None:
        self.signature = signature
        self.binding = binding
        self.direction = (binding.allocation, binding.number)
        self.pieces = [first]
        self.append: Callable[[bytes], None] = self.pieces.append
        self.at = 0
        """Of its command, among the commands."""
        self.length = length
        """Of each datagram that continues it, as it arrives."""
        self.size = len(first)
        """Of each datagram, as it leaves."""
        self.header = header
        """Put before each datagram."""
        self.traffic_class = signature[2]


class Relaying:
    """Relays what channels are bound for, counts it, and drops the rest."""

    def __init__(self, tables: Allocations, counters: Counters, commands: list[Command]) -> None:
        self.runs: dict[Signature, Run] = {}
        """Runs by what continues them: one look-up a datagram."""
        self.due_at = math.inf
        """The earliest deadline there is, in monotonic seconds: to look at it is all that a packet pays for time."""
        self._live_channels: dict[tuple[SocketAddress, int], ChannelBinding] = tables.live_channels
        self._live_peers: dict[tuple[AllocationId, SocketAddress], ChannelBinding] = tables.live_peers
        self._counters = counters
        self._commands = commands
        self._latest: dict[Direction, Run] = {}
        """The run that a datagram would have to continue, if any: later ones of a flow can't overtake."""
        self._begun: list[Run] = []

    def finish(self) -> None:
        """Turn runs into commands, and let none grow any further: a batch is worked off, or something else happens in it."""
        for run in self._begun:
            count = len(run.pieces) - 1
            if count:
                self._complete(run, count)
        self._begun.clear()
        self.runs.clear()
        self._latest.clear()

    def forward_to_peer(self, arrivals: Sequence[Arrival], now: float) -> ToPeer | None:
        """Take a batch that arrived on the port that clients talk to, if it is one run and nothing else is to be done.

        None says that there is more to do, or something else, and that nothing was done: `Server.handle_client_arrivals` is
        to be asked. ``now`` is monotonic.
        """
        data, client, segment, traffic_class = arrivals[0]
        size = len(data)
        if size < CHANNEL_HEADER_LENGTH or segment or now >= self.due_at:
            return None
        number, length = _unpack_header(data)
        end = CHANNEL_HEADER_LENGTH + length
        binding = self._live_channels.get((client, number))
        if binding is None or end > size:
            return None
        payload = data[CHANNEL_HEADER_LENGTH:end]
        count = len(arrivals)
        if count > 1:
            if not length:
                # Nothing, many times over, can't be told from nothing.
                return None
            header = data[:CHANNEL_HEADER_LENGTH]
            for more, *rest in arrivals:
                if len(more) != end or more[:CHANNEL_HEADER_LENGTH] != header or rest != [client, 0, traffic_class]:
                    return None
            payload = b"".join([each[0][CHANNEL_HEADER_LENGTH:] for each in arrivals])
        counters = self._counters
        relayed = len(payload)
        counters.to_peer_sizes[length >> SIZE_SHIFT] += count
        counters.to_peer_bytes += relayed
        binding.to_peer_packets += count
        binding.to_peer_bytes += relayed
        return binding.allocation, payload, binding.peer, length, traffic_class

    def forward_to_client(self, arrivals: Sequence[Arrival], now: float, allocation: AllocationId) -> ToClient | None:
        """Take a batch that arrived on a relayed address, as `forward_to_peer` does."""
        data, peer, segment, traffic_class = arrivals[0]
        binding = self._live_peers.get((allocation, peer))
        if binding is None or segment or now >= self.due_at:
            return None
        length = len(data)
        header = _pack_header(binding.number, length)
        count = len(arrivals)
        if count == 1:
            frames = header + data
        else:
            for more, *rest in arrivals:
                if len(more) != length or rest != [peer, 0, traffic_class]:
                    return None
            # The header goes before each: an empty piece before the first makes that a join.
            frames = header.join([b"", *[each[0] for each in arrivals]])
        counters = self._counters
        relayed = count * length
        counters.to_client_sizes[length >> SIZE_SHIFT] += count
        counters.to_client_bytes += relayed
        binding.to_client_packets += count
        binding.to_client_bytes += relayed
        return frames, binding.client, CHANNEL_HEADER_LENGTH + length, traffic_class

    def to_peer(self, data: bytes, client: ClientAddress, traffic_class: int, *, batched: bool = False) -> None:
        """Relay ChannelData; what follows the length it states is padding.

        Args:
            data: a datagram.
            client: where it is from.
            traffic_class: DSCP and ECN.
            batched: more of the same may follow before `finish`.
        """
        size = len(data)
        if size < CHANNEL_HEADER_LENGTH:
            self._counters.drops[DropReason.SHORT_CHANNEL_DATA] += 1
            return
        number, length = _unpack_header(data)
        end = CHANNEL_HEADER_LENGTH + length
        if end > size:
            self._counters.drops[DropReason.SHORT_CHANNEL_DATA] += 1
            return
        binding = self._live_channels.get((client, number))
        if binding is None:
            self._counters.drops[DropReason.UNBOUND_CHANNEL] += 1
            return
        payload = data[CHANNEL_HEADER_LENGTH:end]
        if batched and self._continue(binding, payload, traffic_class):
            return
        counters = self._counters
        counters.to_peer_sizes[length >> SIZE_SHIFT] += 1
        counters.to_peer_bytes += length
        binding.to_peer_packets += 1
        binding.to_peer_bytes += length
        self._commands.append(SendToPeer(binding.allocation, payload, binding.peer, 0, traffic_class))
        if batched and length:
            self._begin(Run((client, data[:CHANNEL_HEADER_LENGTH], traffic_class), binding, payload, end))

    def to_client(
        self, data: bytes, allocation: AllocationId, peer: PeerAddress, traffic_class: int, *, batched: bool = False
    ) -> None:
        """Relay what a peer sent to a relayed address; as for `to_peer`."""
        binding = self._live_peers.get((allocation, peer))
        if binding is None:
            self._counters.drops[DropReason.UNBOUND_PEER] += 1
            return
        length = len(data)
        header = _pack_header(binding.number, length)
        frame = header + data
        if batched and self._continue(binding, frame, traffic_class):
            return
        counters = self._counters
        counters.to_client_sizes[length >> SIZE_SHIFT] += 1
        counters.to_client_bytes += length
        binding.to_client_packets += 1
        binding.to_client_bytes += length
        self._commands.append(SendToClient(frame, binding.client, 0, traffic_class))
        if batched:
            self._begin(Run((peer, length, traffic_class), binding, frame, length, header))

    def train_to_peer(self, data: bytes, client: ClientAddress, segment: int, traffic_class: int) -> bool:
        """Relay a train of one channel and length as a whole; False, and nothing is done, if it is not one.

        The last datagram may be shorter; there is no empty one.
        """
        if segment <= CHANNEL_HEADER_LENGTH or len(data) < segment or data[0] not in CHANNEL_DATA_FIRST_BYTES:
            return False
        header = data[:CHANNEL_HEADER_LENGTH]
        number, length = _unpack_header(header)
        if not 0 < length <= segment - CHANNEL_HEADER_LENGTH or not is_uniform(data, segment, header):
            return False
        count, rest = divmod(len(data), segment)
        view = memoryview(data)
        begin = CHANNEL_HEADER_LENGTH
        pieces = [view[at : at + length] for at in range(begin, count * segment, segment)]
        if rest:
            if rest <= CHANNEL_HEADER_LENGTH:
                return False
            last_number, last_length = _unpack_header(data, count * segment)
            if last_number != number or not 0 < last_length <= min(length, rest - CHANNEL_HEADER_LENGTH):
                return False
            begin += count * segment
            pieces.append(view[begin : begin + last_length])
        binding = self._live_channels.get((client, number))
        if binding is None:
            self._counters.drops[DropReason.UNBOUND_CHANNEL] += len(pieces)
            return True
        self._leave_latest(binding)
        payload = b"".join(pieces)
        self._count_to_peer(binding, len(pieces) - 1, length, len(pieces[-1]))
        self._commands.append(SendToPeer(binding.allocation, payload, binding.peer, length, traffic_class))
        return True

    def train_to_client(
        self, data: bytes, allocation: AllocationId, peer: PeerAddress, segment: int, traffic_class: int
    ) -> None:
        """Relay a train that a peer sent."""
        count, rest = divmod(len(data), segment)
        binding = self._live_peers.get((allocation, peer))
        if binding is None:
            self._counters.drops[DropReason.UNBOUND_PEER] += count + (rest > 0)
            return
        self._leave_latest(binding)
        header = _pack_header(binding.number, segment)
        view = memoryview(data)
        # The header goes before each: an empty piece before the first makes that a join.
        frames = header.join((b"", *(view[at : at + segment] for at in range(0, count * segment, segment))))
        if rest:
            frames += _pack_header(binding.number, rest) + data[-rest:]
        self._count_to_client(binding, count - (rest == 0), segment, rest or segment)
        self._commands.append(SendToClient(frames, binding.client, CHANNEL_HEADER_LENGTH + segment, traffic_class))

    def _continue(self, binding: ChannelBinding, datagram: bytes, traffic_class: int) -> bool:
        """Put a datagram at the end of the latest run of its flow, if it fits; that run has its end then."""
        run = self._leave_latest(binding)
        if run is None or run.traffic_class != traffic_class or not 0 < len(datagram) <= run.size:
            return False
        run.append(datagram)
        return True

    def _begin(self, run: Run) -> None:
        """Let what follows continue a run, whose command is the last one."""
        run.at = len(self._commands) - 1
        self.runs[run.signature] = run
        self._latest[run.direction] = run
        self._begun.append(run)

    def _leave_latest(self, binding: ChannelBinding) -> Run | None:
        """Let nothing more continue the latest run of a flow, and give it."""
        if not self._latest:
            return None
        run = self._latest.pop((binding.allocation, binding.number), None)
        if run is not None:
            self.runs.pop(run.signature, None)
        return run

    def _complete(self, run: Run, more: int) -> None:
        """Write the command of a run, and count what came after its first datagram."""
        data = b"".join(run.pieces)
        size, last = run.size, len(run.pieces[-1])
        command = self._commands[run.at]
        if isinstance(command, SendToClient):
            self._count_to_client(run.binding, more - 1, size - CHANNEL_HEADER_LENGTH, last - CHANNEL_HEADER_LENGTH)
            self._commands[run.at] = SendToClient(data, command.client, size, run.traffic_class)
        elif isinstance(command, SendToPeer):
            self._count_to_peer(run.binding, more - 1, size, last)
            self._commands[run.at] = SendToPeer(command.allocation, data, command.peer, size, run.traffic_class)

    def _count_to_peer(self, binding: ChannelBinding, whole: int, length: int, last: int) -> None:
        """Count a number of packets of one length, and one that may be shorter."""
        counters = self._counters
        relayed = whole * length + last
        counters.to_peer_sizes[length >> SIZE_SHIFT] += whole
        counters.to_peer_sizes[last >> SIZE_SHIFT] += 1
        counters.to_peer_bytes += relayed
        binding.to_peer_packets += whole + 1
        binding.to_peer_bytes += relayed

    def _count_to_client(self, binding: ChannelBinding, whole: int, length: int, last: int) -> None:
        """Count packets to a client, as `_count_to_peer` does."""
        counters = self._counters
        relayed = whole * length + last
        counters.to_client_sizes[length >> SIZE_SHIFT] += whole
        counters.to_client_sizes[last >> SIZE_SHIFT] += 1
        counters.to_client_bytes += relayed
        binding.to_client_packets += whole + 1
        binding.to_client_bytes += relayed
