"""The TURN server.

How it works
============

Inputs are batches of datagrams (from clients, and from peers by way of an allocation's sockets), reports on sockets, the
wish to end, and the passing of time; each comes with the `Instant` at which it happened. An input changes the tables, and
appends commands; whoever drives the server drains them after each: they keep their order. A batch leaves, flow by flow, the
same datagrams in the same order as if each had come alone; but in fewer commands.
`poll_timeout` says by when the server wants an input, at the latest.

Time can't pass unseen: every input first does what is due. So a channel relays nothing after its expiry even if the wake-up
comes late, and inputs alone decide what comes out: the same inputs with the same seed give the same bytes.

An allocation begins with an Allocate that passed all checks. It is in the tables at once (so that a repeated request is
recognised), but is answered only when the sockets are bound:

====================  ==========================  ==============================================
state                 input                       what follows
====================  ==========================  ==============================================
(none)                Allocate                    BindPort; BINDING
BINDING               bound                       success answer; ESTABLISHED
BINDING               port refused, others left   BindPort of another port; BINDING
BINDING               refused, nothing left       508; freed
BINDING               5 s pass                    508; freed
ESTABLISHED           lifetime passes             freed
BINDING, ESTABLISHED  Refresh with LIFETIME 0     success answer; freed
BINDING, ESTABLISHED  same username, new address  freed; the new one goes to BINDING
BINDING, ESTABLISHED  its sockets failed          (508 if BINDING); freed
(none)                Allocate, while draining    508
====================  ==========================  ==============================================

Four modules act on the tables of `relay.core.allocations`: this one (which datagram is what, reports, time),
`relay.core.relaying` (data), `relay.core.requests` (what clients ask), `relay.core.lifecycle` (how an allocation begins and
ends, with the one function that frees).
"""

import math
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from relay.core.addresses import AllocationId, ClientAddress, PeerAddress
from relay.core.allocations import Allocation, Allocations, AllocationState
from relay.core.answers import Answers, AttributeValues, Recipient
from relay.core.attributes import NONCE, REALM, UNKNOWN_ATTRIBUTES, XOR_MAPPED_ADDRESS
from relay.core.authentication import Claims, ErrorCode, Unproven, authenticate
from relay.core.commands import Command, Commands
from relay.core.config import ServerConfig
from relay.core.counters import MALFORMED_DROPS, Counters, DropReason, FreeReason
from relay.core.events import CoreEvent
from relay.core.instant import Instant
from relay.core.lifecycle import BindRefusal, Lifecycle
from relay.core.limiter import Limiter
from relay.core.nonces import Nonces
from relay.core.randomness import RandomSource
from relay.core.relaying import CHANNEL_DATA_FIRST_BYTES, CHANNEL_HEADER_LENGTH, Relaying
from relay.core.requests import Request, Requests
from relay.core.stun import Malformed, Message, MessageClass, Method, decode, is_stun
from relay.core.trains import Arrival, cut

_LONGEST_STUN = 1500
"""Bytes. A STUN message fits the path's MTU (RFC 8489 §6.1); one of 64 KiB could name 5,000 peers, each to be judged, and
held up everybody's packets for 130 ms."""

STRANGERS = 16
"""Requests from addresses without an allocation that are looked at in a batch while there is a flood. To read and drop
one costs 3 µs, to answer it 30 to 60: with batches of 128, a flood has to be several times as large until its mere reading
leaves no time for others."""

_REQUESTS: dict[int, Method] = {
    int(method): method
    for method in (Method.BINDING, Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND)
}
_DROPPED_INDICATIONS: dict[int, DropReason] = {
    Method.SEND: DropReason.SEND_INDICATION,
    Method.DATA: DropReason.DATA_INDICATION,
}


class Server:
    """The whole relay, as a state machine.

    Args:
        config: what it serves.
        random: draws ports and the key of nonces; a seeded one makes a run repeatable.
    """

    def __init__(self, config: ServerConfig, random: RandomSource) -> None:
        self.counters = Counters()
        self._config = config
        commands = self._commands = Commands()
        self.allocations = Allocations(commands if config.offloads else None)
        self._nonces = Nonces(random, self.counters.nonces)
        self._claims = Claims(config.realm, config.secret)
        self._strangers_left = math.inf
        self._limiter: Limiter | None = None
        if config.unauthenticated_rate:
            self._limiter = Limiter(config.unauthenticated_rate, config.unauthenticated_burst, random)
        self._answers = Answers(config.software, self.counters, commands)
        self._lifecycle = Lifecycle(config, self.allocations, self._answers, self.counters, commands, random)
        self._relaying = Relaying(self.allocations, self.counters, commands)
        # The shortest way, for the commonest case: without a call in between.
        self.forward_to_peer = self._relaying.forward_to_peer
        self.forward_to_client = self._relaying.forward_to_client
        self._requests = Requests(config, self.allocations, self._lifecycle, self._answers, self.counters, commands)

    def watch(self, kinds: AbstractSet[type[CoreEvent]]) -> None:
        """Tell of these events, among the commands, and of no others; of none, unless this is called. Any thread may."""
        self._commands.watched = kinds

    def drain(self) -> list[Command]:
        """Take the commands that inputs have left, in the order in which they are to be carried out."""
        if not self._commands:
            return []
        commands = self._commands.copy()
        self._commands.clear()
        return commands

    def poll_timeout(self) -> float | None:
        """Give the monotonic time by which `handle_timeout` wants to be called; None if nothing is waited for."""
        return None if self._relaying.due_at == math.inf else self._relaying.due_at

    def handle_timeout(self, now: Instant) -> None:
        """Do what is due."""
        self._lifecycle.expire(now.monotonic)
        self._set_wake_up()

    def handle_client_arrival(self, arrival: Arrival, now: Instant) -> None:
        """Take what arrived on the port that clients talk to, if it is alone: most often, unless there is much traffic."""
        if now.monotonic >= self._relaying.due_at:
            self.handle_timeout(now)
        data, client, segment, traffic_class = arrival
        if segment:
            self.handle_client_arrivals((arrival,), now)
        else:
            self._take_from_client(data, ClientAddress(client), traffic_class, now, batched=False)

    def handle_peer_arrival(self, allocation: AllocationId, arrival: Arrival, now: Instant) -> None:
        """Take what arrived on a relayed address, if it is alone."""
        if now.monotonic >= self._relaying.due_at:
            self.handle_timeout(now)
        data, peer, segment, traffic_class = arrival
        if segment:
            self._relaying.train_to_client(data, allocation, PeerAddress(peer), segment, traffic_class)
        else:
            self._relaying.to_client(data, allocation, PeerAddress(peer), traffic_class)

    def handle_client_arrivals(self, arrivals: Iterable[Arrival], now: Instant, *, is_flood: bool = False) -> None:
        """Take what arrived on the port that clients talk to, oldest first.

        An exception is a bug. With an iterator, the rest can be handed in again: what was taken from it is done with.

        Args:
            arrivals: a batch.
            now: when.
            is_flood: more arrives than can be taken. Of requests from addresses without an allocation, only the first
                `STRANGERS` of the batch are looked at then, so that who has one is heard.
        """
        self._strangers_left = STRANGERS if is_flood else math.inf
        if now.monotonic >= self._relaying.due_at:
            self.handle_timeout(now)
        runs = self._relaying.runs
        for data, client, segment, traffic_class in arrivals:
            run = runs.get((client, data[:CHANNEL_HEADER_LENGTH], traffic_class))
            if run is not None and run.length == len(data) and not segment:
                run.append(data[CHANNEL_HEADER_LENGTH:])
            elif segment and self._relaying.train_to_peer(data, ClientAddress(client), segment, traffic_class):
                continue
            else:
                for each in cut(data, segment):
                    self._take_from_client(each, ClientAddress(client), traffic_class, now, batched=True)
        self._relaying.finish()
        self._strangers_left = math.inf

    def handle_peer_arrivals(self, allocation: AllocationId, arrivals: Iterable[Arrival], now: Instant) -> None:
        """Take what arrived on a relayed address, oldest first, as with `handle_client_arrivals`."""
        if now.monotonic >= self._relaying.due_at:
            self.handle_timeout(now)
        relaying = self._relaying
        runs = relaying.runs
        for data, peer, segment, traffic_class in arrivals:
            run = runs.get((peer, len(data), traffic_class))
            if segment:
                relaying.train_to_client(data, allocation, PeerAddress(peer), segment, traffic_class)
            elif run is not None:
                run.append(run.header + data)
            else:
                relaying.to_client(data, allocation, PeerAddress(peer), traffic_class, batched=True)
        relaying.finish()

    def handle_bound(self, allocation: AllocationId, now: Instant) -> None:
        """Take the report that every socket of a `BindPort` is bound."""
        waiting = self._waiting(allocation, now)
        if waiting is not None:
            self._lifecycle.establish(waiting, now.monotonic)
            self._set_wake_up()

    def handle_bind_refused(self, allocation: AllocationId, refusal: BindRefusal, now: Instant) -> None:
        """Take the report that a `BindPort` could not be carried out; none of its sockets is open."""
        waiting = self._waiting(allocation, now)
        if waiting is None:
            return
        if refusal is BindRefusal.PORT:
            self._lifecycle.try_another_port(waiting)
        else:
            self._lifecycle.free(waiting, FreeReason.REFUSED)
        self._set_wake_up()

    def handle_allocation_failed(self, allocation: AllocationId, now: Instant) -> None:
        """Take the report that the sockets of an allocation, or what serves them, broke."""
        self.handle_timeout(now)
        failed = self.allocations.by_id.get(allocation)
        if failed is not None:
            self._lifecycle.free(failed, FreeReason.FAILED)
            self._set_wake_up()

    def handle_drain(self, now: Instant) -> None:
        """Take the wish to end: no allocation is made any more, those there are go on; `Drained` says when none is left."""
        self.handle_timeout(now)
        self._lifecycle.drain()

    def _take_from_client(
        self, data: bytes, client: ClientAddress, traffic_class: int, now: Instant, *, batched: bool
    ) -> None:
        if not data:
            self.counters.drops[DropReason.EMPTY] += 1
        elif data[0] in CHANNEL_DATA_FIRST_BYTES:
            self._relaying.to_peer(data, client, traffic_class, batched=batched)
        elif is_stun(data):
            if client not in self.allocations.by_client:
                if not self._strangers_left:
                    self.counters.drops[DropReason.FLOOD] += 1
                    return
                self._strangers_left -= 1
            # It may change what is relayed, and how.
            self._relaying.finish()
            self._handle_stun(data, client, now)
            self._set_wake_up()
        else:
            self.counters.drops[DropReason.UNKNOWN_PROTOCOL] += 1

    def _handle_stun(self, data: bytes, client: ClientAddress, now: Instant) -> None:
        if client[1] == 0:
            # No answer could reach it.
            self.counters.drops[DropReason.SOURCE_PORT_ZERO] += 1
            return
        if len(data) > _LONGEST_STUN:
            self.counters.drops[DropReason.STUN_TOO_LONG] += 1
            return
        message = decode(data)
        if isinstance(message, Malformed):
            self.counters.drops[MALFORMED_DROPS[message]] += 1
        elif message.message_class is MessageClass.REQUEST:
            self._handle_request(message, client, now)
        elif message.message_class is not MessageClass.INDICATION:
            self.counters.drops[DropReason.RESPONSE] += 1
        elif message.method == Method.BINDING:
            # A keep-alive (RFC 8489 §2).
            self.counters.binding_indications += 1
        else:
            self.counters.drops[_DROPPED_INDICATIONS.get(message.method, DropReason.INDICATION)] += 1

    def _handle_request(self, message: Message, client: ClientAddress, now: Instant) -> None:
        method = _REQUESTS.get(message.method)
        if method is None:
            # RFC 8489 §6.3: silence for a method that is not known.
            self.counters.drops[DropReason.UNKNOWN_METHOD] += 1
            return
        to = Recipient(client, method, message.transaction_id, message.has_fingerprint)
        if unknown := message.unknown_attributes():
            self._refuse_unproven(to, Unproven(ErrorCode.UNKNOWN_ATTRIBUTE), message, now, [(UNKNOWN_ATTRIBUTES, unknown)])
        elif method is Method.BINDING:
            if self._may_answer(to, None, now):
                self._answers.succeed(to, [(XOR_MAPPED_ADDRESS, client)])
        else:
            checked = authenticate(message, client, now, self._nonces, self._claims)
            if isinstance(checked, Unproven):
                self._refuse_unproven(to, checked, message, now)
            else:
                username, key = checked
                proven = Recipient(client, method, to.transaction_id, to.fingerprint, key, authenticated=True)
                self._requests.handle(Request(message, client, username.text, proven, now.monotonic))

    def _refuse_unproven(
        self, to: Recipient, unproven: Unproven, message: Message, now: Instant, attributes: AttributeValues = ()
    ) -> None:
        """Refuse a request whose sender is not known, unless its address has had enough answers."""
        code, reason = unproven
        if not self._may_answer(to, code, now):
            return
        if code.is_challenge:
            attributes = ((REALM, self._config.realm), (NONCE, self._nonces.issue(to.client, now)))
        if to.method is not Method.BINDING:
            claim = self._claims.of(message)
            to = to if claim is None else to._replace(key=claim.key)
        self._answers.refuse(to, code, attributes, reason)

    def _may_answer(self, to: Recipient, code: ErrorCode | None, now: Instant) -> bool:
        """Tell whether an answer may go to who has proven nothing; before any work is done for it."""
        if self._limiter is None or self._limiter.allows(to.client, now.monotonic):
            return True
        self.counters.count_withheld(to.method, code)
        return False

    def _waiting(self, allocation: AllocationId, now: Instant) -> Allocation | None:
        """Find the allocation that a report on a bind is about; None if it is gone or was reported on before."""
        self.handle_timeout(now)
        found = self.allocations.by_id.get(allocation)
        return found if found is not None and found.state is AllocationState.BINDING else None

    def _set_wake_up(self) -> None:
        earliest = self.allocations.deadlines.earliest()
        self._relaying.due_at = math.inf if earliest is None else earliest
