"""The TURN server.

How it works
============

Inputs are datagrams (from clients, and from peers at a relayed address), reports on sockets, this machine's addresses, the
wish to drain or to resume, and the passing of time. Each input comes with the `Timestamp` at which it happened. The same
inputs with the same seed give the same commands.

**Two kinds of output.** The data plane changes no table, so `handle_client_datagram` and `handle_peer_datagram` return the
command that relays a datagram. All other inputs change the tables and append commands, which `drain` returns.
`relay_to_peer` is the part of `handle_client_datagram` that relays: it needs no wall clock, which would cost each packet
another system call.

**Inputs and commands.** After each input the driver carries out the returned command, and then commands until `drain`
returns none; only then comes the next input. There is one exception: a report on a socket (`handle_bound`,
`handle_bind_refused`, `handle_allocation_failed`) may come while commands are being carried out, because it is the outcome
of a command. Its own commands come with the next `drain`, after all commands of the current one. So commands are carried out
in the order of the inputs. A command may concern an allocation whose sockets the driver could not open or has closed: the
driver drops that command.

**GRO batches** (`relay.core.data.Datagram`) have the same effect as their datagrams one by one, in fewer commands: all
datagrams of a source are handled in their order, and a request takes effect on the data that follows it.

**Time** can't pass unseen: every input first handles all passed deadlines. So a channel relays nothing after its expiry even
if the wake-up comes late. `poll_timeout` returns the time of the next wake-up.

**States.** An allocation begins with an Allocate that passed all checks. The allocation is in the tables at once, so that a
repeated request is recognised. The response follows when the sockets are bound:

====================  ==========================  ==============================================
state                 input                       what follows
====================  ==========================  ==============================================
(none)                Allocate                    BindPort; BINDING
BINDING               bound                       success response; ESTABLISHED
BINDING               port refused, others left   BindPort of another port; BINDING
BINDING               refused, nothing left       508; freed
BINDING               5 s pass                    508; freed
ESTABLISHED           lifetime passes             freed
BINDING, ESTABLISHED  Refresh with LIFETIME 0     success response; freed
BINDING, ESTABLISHED  same username, new address  freed; the new one goes to BINDING
BINDING, ESTABLISHED  its sockets failed          (508 if BINDING); freed
BINDING, ESTABLISHED  an operator ends it         (508 if BINDING); freed
(none)                Allocate, while draining    508
====================  ==========================  ==============================================

**Inside.** Data for the relayed address of another allocation does not leave the machine, because a NAT in front of the
relay may not return it. Its command is one of those that `drain` returns.

**Early data.** A client may send ChannelData right behind a ChannelBind. If the data arrives first, it waits for the
ChannelBind (`relay.core.early`). The commands that relay it come with the commands of the ChannelBind.

Four modules act on the tables of `relay.core.allocations`: this one (dispatch, reports, time), `relay.core.data` (the data
plane), `relay.core.requests` (requests of clients), `relay.core.lifecycle` (the beginning and the end of an allocation, with
the one function that frees).
"""

import math
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from relay.core.addresses import AllocationId, ClientAddress, SocketAddress
from relay.core.allocation import Allocation, AllocationState
from relay.core.allocations import Allocations
from relay.core.commands import Command, Commands, HandIn, SendToPeer, cut
from relay.core.config import ServerConfig
from relay.core.counters import Counters, DropReason, FreeReason
from relay.core.data import (
    CHANNEL_DATA_FIRST_BYTES,
    Datagram,
    DataPlane,
    InsideData,
    by_channel,
    count_drop,
    count_of,
    is_of_one_channel,
    is_truncated,
)
from relay.core.early import EarlyData
from relay.core.events import CoreEvent
from relay.core.handover import Handover
from relay.core.lifecycle import BindRefusal
from relay.core.overload import (
    CLIENT_REQUESTS,
    LONGEST_STUN,
    MIXED_DATAGRAMS,
    MIXED_INTERVAL,
    MIXED_SENDS,
    REQUESTS_IN_A_BATCH,
    UNAUTHENTICATED_REQUESTS,
)
from relay.core.randomness import RandomSource
from relay.core.requests import Requests
from relay.core.stun import Malformed, MessageClass, Method, decode, is_stun
from relay.core.timestamp import Timestamp

_DROPPED_INDICATIONS: dict[int, DropReason] = {
    Method.SEND: DropReason.SEND_INDICATION,
    Method.DATA: DropReason.DATA_INDICATION,
}


class Server:
    """The relay as a state machine.

    Args:
        config: the settings.
        random: the source of ports and of the key of nonces. A seeded source makes a run repeatable.
    """

    def __init__(self, config: ServerConfig, random: RandomSource) -> None:
        self.counters = Counters()
        commands = self.commands = Commands()
        """Commands that wait for `drain`."""
        tables = self.allocations = Allocations(config.is_relayed, commands if config.offloads else None)
        self._mixed_left: dict[SocketAddress, int] = {}
        """The shares of clients that sent batches of several channels since `_mixed_since`."""
        self._mixed_since = -math.inf
        self._early = EarlyData(self.relay, tables, self.counters)
        self._requests = Requests(config, tables, self.counters, commands, random, self._early)
        lifecycle = self._lifecycle = self._requests.lifecycle
        data, inside = (
            DataPlane(channels, tables, self.counters, lifecycle.before_client_data, lifecycle.before_peer_data)
            for channels in (tables.live_channels, tables.inside_channels)
        )
        self._inside = InsideData(inside, tables, commands)
        self.handover = Handover(tables, self._requests, self._early)
        """Writes the state for a successor, or reads the state of a predecessor."""
        self.history = self._requests.history
        self.free_ports = lifecycle.ports
        """The ports without an allocation."""
        # Not methods of this class: each packet would pay for another call.
        self.relay_to_peer = data.to_peer
        """Handle a datagram or a GRO batch on the port for clients, if all of it is ChannelData of one live channel that is
        not inside."""
        self.handle_peer_datagram = data.to_client
        """Handle a datagram or a GRO batch that arrived on the relayed addresses of an allocation."""

    @property
    def free_port_count(self) -> int:
        """The number of ports without an allocation."""
        return len(self.free_ports)

    def watch(self, kinds: AbstractSet[type[CoreEvent]]) -> None:
        """Add events of these kinds, and no other events, to the commands. Any thread may call this."""
        self.commands.watched = kinds

    def drain(self) -> list[Command]:
        """Return the commands of all inputs so far, in the order in which to carry them out, and forget them."""
        commands = self.commands.copy()
        self.commands.clear()
        return commands

    def poll_timeout(self) -> float | None:
        """Return the monotonic time at which to call `handle_timeout`; None if there is no deadline."""
        if self.allocations.is_kernel_behind or self._requests.is_reviewing:
            return -math.inf
        earliest = self.allocations.deadlines.earliest
        return None if earliest == math.inf else earliest

    def handle_timeout(self, now: Timestamp) -> None:
        """Handle a portion of the passed deadlines. If some are left, `poll_timeout` returns a time that has passed."""
        self._lifecycle.handle_timeout(now.monotonic)
        self._requests.review_channels(now.monotonic)
        self._requests.replays.forget(now.monotonic)
        self._forget_shares(now.monotonic)

    def handle_client_datagram(self, datagram: Datagram, now: Timestamp) -> SendToPeer | None:
        """Handle a datagram or a GRO batch that arrived on the port for clients; return the command that relays it, if any.

        An exception is a bug.
        """
        command = self.relay_to_peer(datagram, now.monotonic)
        if command is None and not self._inside.relay(datagram, now.monotonic):
            data, client, segment_size, _ = datagram
            is_channel_data = bool(data) and data[0] in CHANNEL_DATA_FIRST_BYTES
            if segment_size and not (is_channel_data and is_of_one_channel(data, segment_size)):
                self._handle_mixed_batch(datagram, now)
            elif is_channel_data:
                if is_truncated(data):
                    count_drop(self.counters, DropReason.SHORT_CHANNEL_DATA, self._of_client(client))
                else:
                    self._early.hold(datagram, now.monotonic)
            elif is_stun(data):
                self._handle_stun(data, ClientAddress(client), now)
            else:
                self.counters.drops[DropReason.UNKNOWN_PROTOCOL if data else DropReason.EMPTY] += 1
        return command

    def shed(self, batch: Iterable[Datagram]) -> list[Datagram]:
        """Drop requests of a batch beyond the first few of each client and of all addresses without an allocation together.

        The driver calls this in a flood: more requests arrive than the relay can respond to.
        """
        kept: list[Datagram] = []
        requests: Counter[SocketAddress | None] = Counter()
        for datagram in batch:
            data, client, segment_size, traffic_class = datagram
            is_known = client in self.allocations.by_client
            if is_known and not is_stun(data):
                kept.append(datagram)
                continue
            most, of = (CLIENT_REQUESTS, client) if is_known else (UNAUTHENTICATED_REQUESTS, None)
            for each in cut(data, segment_size):
                requests[of] += is_stun(each)
                if requests[of] <= most or not is_stun(each):
                    kept.append((each, client, 0, traffic_class))
                else:
                    count_drop(self.counters, DropReason.FLOOD, self._of_client(client))
        return kept

    def handle_bound(self, allocation: AllocationId, now: Timestamp) -> None:
        """Handle the report that every socket of a `BindPort` is bound."""
        waiting = self._waiting(allocation, now)
        if waiting is not None:
            self._lifecycle.establish(waiting, now.monotonic)

    def handle_bind_refused(self, allocation: AllocationId, refusal: BindRefusal, now: Timestamp) -> None:
        """Handle the report that a `BindPort` failed; none of its sockets is open."""
        waiting = self._waiting(allocation, now)
        if waiting is None:
            return
        if refusal is BindRefusal.PORT:
            self._lifecycle.try_another_port(waiting)
        else:
            self._lifecycle.free(waiting, FreeReason.REFUSED)

    def handle_allocation_failed(self, allocation: AllocationId, now: Timestamp) -> None:
        """Handle the report that a socket or the reader of an allocation failed."""
        self._end(allocation, FreeReason.FAILED, now)

    def handle_kick(self, allocation: AllocationId, now: Timestamp) -> bool:
        """End an allocation at an operator's request. Return whether it existed. Its client may allocate again."""
        return self._end(allocation, FreeReason.KICKED, now)

    def _end(self, allocation: AllocationId, reason: FreeReason, now: Timestamp) -> bool:
        ended = self._current(allocation, now)
        if ended is not None:
            self._lifecycle.free(ended, reason)
        return ended is not None

    def handle_drain(self, now: Timestamp) -> None:
        """Make no more allocations. Existing allocations go on; `Drained` follows when the last of them has ended."""
        self._lifecycle.catch_up(now.monotonic)
        self._lifecycle.drain()

    def handle_resume(self, now: Timestamp) -> None:
        """Make allocations again after `handle_drain`."""
        self._lifecycle.catch_up(now.monotonic)
        self._lifecycle.resume()

    def handle_own_addresses(self, addresses: frozenset[str], now: Timestamp) -> None:
        """Deny this machine's current addresses as peers, and no former addresses. Channels to denied peers expire.

        With thousands of channels, wake-ups do a part of this.
        """
        self._lifecycle.catch_up(now.monotonic)
        self._requests.change_own_addresses(addresses, now.monotonic)

    def relay(self, datagram: Datagram, now: float) -> bool:
        """Relay ChannelData of one live channel. Return False for anything else.

        `drain` returns the command. No table changes, except by passed deadlines.
        """
        command = self.relay_to_peer(datagram, now)
        if command is None:
            return self._inside.relay(datagram, now)
        self.commands.append(command)
        return True

    def _handle_mixed_batch(self, datagram: Datagram, now: Timestamp) -> None:
        """Handle a GRO batch of several channels, or with requests: the data of each channel together if possible.

        After `REQUESTS_IN_A_BATCH` the rest is handed in again. Data beyond the share of a client is dropped.
        """
        data, client, segment_size, traffic_class = datagram
        count = count_of(datagram)
        self._forget_shares(now.monotonic)
        left = self._mixed_left.get(client, MIXED_SENDS)
        if not left and min(data[::segment_size]) in CHANNEL_DATA_FIRST_BYTES:
            # Without requests, there is no need to cut the batch.
            count_drop(self.counters, DropReason.MIXED, self._of_client(client), count)
            return
        pieces = cut(data[: MIXED_DATAGRAMS * segment_size], segment_size)
        dropped = count - len(pieces)
        requests = REQUESTS_IN_A_BATCH
        rest: list[Datagram] = []
        for same in by_channel(pieces):
            is_request = is_stun(same[0])
            joined, size = b"".join(same), len(same[0])
            if left and len(same) > 1 and is_of_one_channel(joined, size):
                parts: list[Datagram] = [(joined, client, size, traffic_class)]
            else:
                kept = same if is_request else same[:left]
                dropped += len(same) - len(kept)
                parts = [(each, client, 0, traffic_class) for each in kept]
            left -= 0 if is_request else len(parts)
            if rest or (is_request and not requests):
                rest += parts
                continue
            requests -= is_request
            for part in parts:
                command = self.handle_client_datagram(part, now)
                if command is not None:
                    self.commands.append(command)
        self._mixed_left[client] = left
        count_drop(self.counters, DropReason.MIXED, self._of_client(client), dropped)
        if rest:
            self.commands.append(HandIn(rest))

    def _forget_shares(self, now: float) -> None:
        if not 0 <= now - self._mixed_since < MIXED_INTERVAL:
            self._mixed_since = now
            self._mixed_left.clear()

    def _handle_stun(self, data: bytes, client: ClientAddress, now: Timestamp) -> None:
        if client[1] == 0:
            # No response could reach this port.
            self.counters.drops[DropReason.SOURCE_PORT_ZERO] += 1
            return
        if len(data) > LONGEST_STUN:
            self.counters.drops[DropReason.STUN_TOO_LONG] += 1
            return
        message = decode(data)
        if isinstance(message, Malformed):
            self.counters.drops[DropReason(message)] += 1
        elif message.message_class is MessageClass.REQUEST:
            self._requests.handle(message, client, now)
        elif message.message_class is not MessageClass.INDICATION:
            self.counters.drops[DropReason.RESPONSE] += 1
        elif message.method == Method.BINDING:
            # A keep-alive (RFC 8489 §2).
            self.counters.binding_indications += 1
        else:
            self.counters.drops[_DROPPED_INDICATIONS.get(message.method, DropReason.INDICATION)] += 1

    def _of_client(self, client: SocketAddress) -> Allocation | None:
        return self.allocations.by_client.get(ClientAddress(client))

    def _waiting(self, allocation: AllocationId, now: Timestamp) -> Allocation | None:
        """Return the allocation that waits for this report on a bind; None if it has ended or had a report before."""
        found = self._current(allocation, now)
        return found if found is not None and found.state is AllocationState.BINDING else None

    def _current(self, allocation: AllocationId, now: Timestamp) -> Allocation | None:
        """Return an allocation that has not ended."""
        self._lifecycle.catch_up(now.monotonic)
        self._lifecycle.catch_up_with(self.allocations.by_id.get(allocation), now.monotonic)
        return self.allocations.by_id.get(allocation)
