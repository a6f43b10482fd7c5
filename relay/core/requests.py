"""Requests: Binding (RFC 8489 §12), and Allocate, Refresh, CreatePermission and ChannelBind (RFC 8656 §7–§12)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress, host_number
from relay.core.allocation import Allocation, AllocationState, ChannelBinding
from relay.core.allocations import Allocations
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    EVEN_PORT,
    LIFETIME,
    NONCE,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    RESERVATION_TOKEN,
    UNKNOWN_ATTRIBUTES,
    XOR_MAPPED_ADDRESS,
    XOR_PEER_ADDRESS,
    AddressNumber,
    Attribute,
    MalformedAttributeError,
    address_of,
    unpack_number,
)
from relay.core.authentication import authenticate, claimed_user
from relay.core.commands import Commands
from relay.core.config import ASSURED_CHANNELS, ServerConfig
from relay.core.counters import Counters, DropReason, FreeReason
from relay.core.credentials import key_cache
from relay.core.early import EarlyData
from relay.core.errors import ErrorCode, Reason
from relay.core.events import (
    AllocationRefreshed,
    ChannelBound,
    ChannelRefreshed,
    Limit,
    PeerRefused,
    RelayedAddressDeleted,
)
from relay.core.history import WITHHELD, History
from relay.core.lifecycle import Lifecycle
from relay.core.limiter import Limiter
from relay.core.nonces import Nonces, second_of
from relay.core.overload import CHANNELS_PER_EXPIRY, EXPIRIES
from relay.core.peers import MAY_EMBED
from relay.core.randomness import RandomSource
from relay.core.replays import Replays
from relay.core.responses import AttributeValues, RequestError, Responder, ResponseContext, limit_error
from relay.core.stun import Message, Method
from relay.core.timestamp import Timestamp

DEFAULT_LIFETIME = 600
"""Seconds. Also the shortest granted lifetime (RFC 8656 §3.2, §7.2)."""

MAX_LIFETIME = 3600
"""Seconds (RFC 8656 §7.2 suggests an hour)."""

UDP = 17
"""The only supported transport (RFC 8656 §18.7)."""

CHANNEL_NUMBERS = range(0x4000, 0x8000)
"""RFC 8656 §12 has 0x4000–0x4FFF. RFC 5766 had numbers up to 0x7FFF, which deployed clients still use."""


_PEER: Attribute[AddressNumber] = Attribute(XOR_PEER_ADDRESS.type, XOR_PEER_ADDRESS.name, lambda _, __: b"", unpack_number)
"""XOR-PEER-ADDRESS as numbers, only for decoding: a CreatePermission may have dozens of peers."""

_METHODS: dict[int, Method] = {
    int(method): method
    for method in (Method.BINDING, Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND)
}


class Requests:
    """Handles requests. Each response is sent at once; only a successful Allocate is answered later."""

    def __init__(
        self,
        config: ServerConfig,
        tables: Allocations,
        counters: Counters,
        commands: Commands,
        random: RandomSource,
        early: EarlyData,
    ) -> None:
        self._config = config
        self._peers = config.peers
        self._tables = tables
        self._counters = counters
        self._commands = commands
        self._early = early
        self._nonces = Nonces(random, counters.nonces)
        self.replays = Replays()
        self._keys = key_cache(config.realm, config.secret)
        self._limiter: Limiter | None = None
        if config.unauthenticated_rate:
            self._limiter = Limiter(config.unauthenticated_rate, config.unauthenticated_burst, random)
        self.history = History()
        self._responder = Responder(config, self._keys, self._nonces, counters, self.history, commands)
        self.lifecycle = Lifecycle(config, tables, early, self._responder, counters, commands, random)
        self._arrived: frozenset[str] = frozenset()
        """New addresses of this machine, until `_to_review` is empty."""
        self._to_review: Iterator[ChannelBinding] = iter(())
        self._handlers = {
            Method.ALLOCATE: self._allocate,
            Method.REFRESH: self._refresh,
            Method.CREATE_PERMISSION: self._create_permission,
            Method.CHANNEL_BIND: self._bind_channel,
        }

    def change_own_addresses(self, addresses: frozenset[str], now: float) -> None:
        """Judge peers by new addresses of this machine. Live channels to peers that are denied now expire in portions."""
        arrived = addresses - self._peers.relay_addresses
        self._peers = replace(self._peers, relay_addresses=addresses)
        if arrived:
            # A review that is not over begins again.
            self._arrived |= arrived
            self._to_review = self._live_channels()
            self.review_channels(now)

    @property
    def is_reviewing(self) -> bool:
        """Whether `review_channels` has work left."""
        return bool(self._arrived)

    def review_channels(self, now: float) -> None:
        """Judge a portion of the channels from before the last change of addresses."""
        left: float = EXPIRIES
        for binding in self._to_review:
            host, port = binding.peer[:2]
            # The text of an address decides in 0.3 µs.
            is_suspect = host in self._arrived or host.startswith(MAY_EMBED)
            if is_suspect and self._peers.rule_against(*host_number(host), port) is not None:
                self.lifecycle.expire_channel(binding, now)
            left -= 1 if is_suspect else 1 / CHANNELS_PER_EXPIRY
            if left <= 0:
                return
        self._arrived = frozenset()

    def _live_channels(self) -> Iterator[ChannelBinding]:
        """Yield the channels that are live now, except those that have ended when their turn comes."""
        for allocation in tuple(self._tables.by_id.values()):
            for binding in tuple(allocation.live.values()):
                if binding.live and self._tables.by_id.get(allocation.id) is allocation:
                    yield binding

    def export(self) -> dict[str, Any]:
        """Return the keys and the limiter as plain data."""
        limiter = self._limiter
        return {
            "nonce_key": self._nonces.key.hex(),
            "replays_too_old": self.replays.too_old,
            "limiter": limiter and [limiter.key.hex(), *limiter.export()],
        }

    def restore(self, exported: dict[str, Any]) -> None:
        """Continue with the keys and the limiter of another relay."""
        self._nonces.key = bytes.fromhex(exported["nonce_key"])
        self.replays.too_old = exported["replays_too_old"]
        if self._limiter is not None and exported["limiter"] is not None:
            key, *rows = exported["limiter"]
            self._limiter.restore(bytes.fromhex(key), rows)
        # The other relay may not have seen, or not have reviewed, the latest addresses of this machine.
        self._arrived = self._peers.relay_addresses
        self._to_review = self._live_channels()

    def handle(self, message: Message, client: ClientAddress, now: Timestamp) -> None:
        """Handle a request of any client."""
        method = _METHODS.get(message.method)
        if method is None:
            # RFC 8489 §6.3: unknown methods are ignored.
            self._counters.drops[DropReason.UNKNOWN_METHOD] += 1
            return
        try:
            _check_attributes(message)
            user = None if method is Method.BINDING else authenticate(message, client, now, self._nonces, self._keys)
        except RequestError as error:
            self._respond_unauthenticated(message, method, client, now, error)
            return
        if user is None:
            self._respond_unauthenticated(message, method, client, now)
            return
        context = ResponseContext(
            client,
            method,
            now.monotonic,
            message.transaction_id,
            message.has_fingerprint,
            user.key,
            user.username.text,
        )
        self.lifecycle.catch_up_with(self._tables.by_client.get(client), now.monotonic)
        self.lifecycle.catch_up_with(self._tables.by_username.get(context.username), now.monotonic)
        try:
            attributes = self._handlers[method](message, context)
        except MalformedAttributeError:
            self._responder.reject(context, RequestError(ErrorCode.BAD_REQUEST, Reason.MALFORMED_ATTRIBUTE))
        except RequestError as error:
            self._responder.reject(context, error)
        else:
            if attributes is not None:
                self._responder.succeed(context, attributes)

    def _respond_unauthenticated(
        self, message: Message, method: Method, client: ClientAddress, now: Timestamp, error: RequestError | None = None
    ) -> None:
        """Respond to an unauthenticated client, unless the rate limit of its address is reached. None means success."""
        # An old nonce proves the address as well as a valid nonce does.
        limiter = None if error is not None and error.reason is Reason.OLD_NONCE else self._limiter
        if limiter is not None and not limiter.allows(client, now.monotonic):
            code = None if error is None else error.code
            self._counters.withheld[method, code] += 1
            self.history.note(client, method, now.monotonic, code, WITHHELD)
            return
        user = None if method is Method.BINDING else claimed_user(message, self._keys)
        key = None if user is None else user.key
        context = ResponseContext(client, method, now.monotonic, message.transaction_id, message.has_fingerprint, key)
        if error is None:
            self._responder.succeed(context, ((XOR_MAPPED_ADDRESS, client),))
        else:
            self._responder.reject(context, error)

    def _allocate(self, message: Message, context: ResponseContext) -> None:
        existing = self._tables.by_client.get(context.client)
        if existing is not None:
            self._repeat_allocate(existing, context)
            return
        transport = message.get(REQUESTED_TRANSPORT)
        if transport is None:
            raise RequestError(ErrorCode.BAD_REQUEST, Reason.NO_TRANSPORT)
        if transport != UDP:
            raise RequestError(ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL)
        families, missing = self._families(message)
        reserve = message.get(EVEN_PORT)
        if reserve or message.has(RESERVATION_TOKEN):
            # Reservations serve RTP and RTCP on neighbouring ports. Firezone clients do not use reservations.
            raise RequestError(ErrorCode.INSUFFICIENT_CAPACITY, Reason.RESERVATION)
        if self._is_over(message):
            self._counters.drops[DropReason.REPEATED] += 1
            return
        lifetime = _granted_lifetime(message.get(LIFETIME))
        self.lifecycle.begin(context, families, missing, even_port=reserve is not None, lifetime=lifetime)
        self._remember(message, context.now)

    def _is_over(self, message: Message) -> bool:
        """Check whether a request was handled before.

        Raises:
            RequestError: the request may have been forgotten.
        """
        if message.integrity in self.replays:
            return True
        if self.replays.is_too_old(second_of(message.get(NONCE) or b"")):
            raise RequestError(ErrorCode.STALE_NONCE, Reason.OLD_NONCE)
        return False

    def _remember(self, message: Message, now: float) -> None:
        self.replays.add(message.integrity, second_of(message.get(NONCE) or b""), now)

    def _repeat_allocate(self, existing: Allocation, context: ResponseContext) -> None:
        if (existing.transaction_id, existing.username) != (context.transaction_id, context.username):
            raise RequestError(ErrorCode.ALLOCATION_MISMATCH)
        if existing.state is AllocationState.BINDING:
            self._counters.drops[DropReason.ALLOCATE_UNDER_WAY] += 1
        else:
            self._responder.send(context, existing.success)

    def _families(self, message: Message) -> tuple[tuple[Family, ...], tuple[Family, ...]]:
        """Return the served and the missing families of a request (RFC 8656 §7.2, steps 7–9)."""
        requested = message.get(REQUESTED_ADDRESS_FAMILY)
        additional = message.get(ADDITIONAL_ADDRESS_FAMILY)
        if additional is not None and (requested is not None or additional != Family.IPV6):
            raise RequestError(ErrorCode.BAD_REQUEST, Reason.CONTRADICTING_FAMILIES)
        single = Family.IPV4 if requested is None else requested
        served = tuple(family for family in self._config.public_hosts if family in (single, additional))
        if not served:
            raise RequestError(ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)
        missing = () if additional is None else tuple({Family.IPV4, Family.IPV6}.difference(served))
        return served, missing

    def _refresh(self, message: Message, context: ResponseContext) -> AttributeValues:
        lifetime = message.get(LIFETIME)
        deletes = lifetime == 0
        allocation = self._own_allocation(context, deletes=deletes)
        family = message.get(REQUESTED_ADDRESS_FAMILY)
        if family is not None and family not in allocation.families:
            raise RequestError(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)
        if deletes:
            # A repeated deletion is answered as before: the client may have lost the response.
            if not self._is_over(message):
                self._remember(message, context.now)
                self._delete(allocation, None if family is None else Family(family))
            return ((LIFETIME, 0),)
        allocation.lifetime = _granted_lifetime(lifetime)
        self._tables.extend(allocation, context.now + allocation.lifetime)
        if AllocationRefreshed in self._commands.watched:
            self._commands.append(AllocationRefreshed(allocation.id, allocation.client, allocation.lifetime))
        return ((LIFETIME, allocation.lifetime),)

    def _delete(self, allocation: Allocation, family: Family | None) -> None:
        """Delete an allocation, or one of two relayed addresses (RFC 8656 §8.1)."""
        if family is None or len(allocation.families) == 1:
            self.lifecycle.free(allocation, FreeReason.DELETED)
        else:
            self._tables.remove_family(allocation, family)
            if RelayedAddressDeleted in self._commands.watched:
                self._commands.append(RelayedAddressDeleted(allocation.id, allocation.client, family))

    def _create_permission(self, message: Message, context: ResponseContext) -> AttributeValues:
        """Only check the peers. The relay relays only through channels (docs/protocol.md)."""
        allocation = self._own_allocation(context)
        peers = list(message.get_all(_PEER))
        if not peers:
            raise RequestError(ErrorCode.BAD_REQUEST, Reason.NO_PEER)
        if not {family for family, _, _ in peers}.issubset(allocation.families):
            raise RequestError(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)
        # A permission applies to all ports (RFC 8656 §10.2).
        for peer in peers:
            self._check_peer(allocation, context.method, peer, port=None)
        return ()

    def _bind_channel(self, message: Message, context: ResponseContext) -> AttributeValues:
        allocation = self._own_allocation(context)
        number = message.get(CHANNEL_NUMBER)
        address = message.get(_PEER)
        if number is None or number not in CHANNEL_NUMBERS:
            raise RequestError(ErrorCode.BAD_REQUEST, Reason.NO_CHANNEL_NUMBER)
        if address is None or address[2] == 0:
            raise RequestError(ErrorCode.BAD_REQUEST, Reason.NO_PEER)
        if address[0] not in allocation.families:
            raise RequestError(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)
        self._check_peer(allocation, context.method, address, port=address[2])
        peer = PeerAddress(address_of(address))
        number = ChannelNumber(number)
        self.lifecycle.catch_up_with(allocation, context.now, *allocation.held(number, peer))
        before, of_peer = allocation.held(number, peer)
        if before is not of_peer:
            raise RequestError(ErrorCode.BAD_REQUEST, Reason.PEER_TAKEN if before is None else Reason.CHANNEL_TAKEN)
        if before is None:
            self._check_limits(allocation)
        kind = ChannelBound if before is None or not before.live else ChannelRefreshed
        self._tables.bind_channel(allocation, number, peer, context.now)
        self._counters.channels_bound += 1
        self._early.release(allocation.id, number, context.now)
        if kind in self._commands.watched:
            self._commands.append(kind(allocation.id, allocation.client, number, peer))
        return ()

    def _check_limits(self, allocation: Allocation) -> None:
        """Raise 508 if an allocation may have no more channels."""
        count = allocation.channel_count
        if count >= self._config.max_channels:
            raise limit_error(allocation.client, Limit.CHANNELS)
        if count >= ASSURED_CHANNELS and self._tables.channels >= self._config.max_channels_in_all:
            raise limit_error(allocation.client, Limit.CHANNELS_IN_ALL)

    def _check_peer(self, allocation: Allocation, method: Method, peer: AddressNumber, *, port: int | None) -> None:
        """Raise 403 if a rule denies a port of a peer, or all ports (None)."""
        rule = self._peers.rule_against(peer[0], peer[1], port)
        if rule is not None:
            address = PeerAddress(address_of(peer))
            event = PeerRefused(allocation.id, allocation.client, method, address, rule)
            raise RequestError(ErrorCode.FORBIDDEN, event=event)

    def _own_allocation(self, context: ResponseContext, *, deletes: bool = False) -> Allocation:
        allocation = self._tables.by_client.get(context.client)
        if allocation is None or (allocation.state is AllocationState.BINDING and not deletes):
            raise RequestError(ErrorCode.ALLOCATION_MISMATCH)
        # After 437 for its Allocate, a Firezone client with new credentials and its old address deletes the old allocation
        # with the new credentials, and allocates again. The nonce proves that the client owns the address.
        if allocation.username != context.username and not deletes:
            raise RequestError(ErrorCode.WRONG_CREDENTIALS)
        return allocation


def _check_attributes(message: Message) -> None:
    """Raise 420 if the request has attributes that must be understood and are unknown (RFC 8489 §6.3.1)."""
    if unknown := message.unknown_attributes():
        raise RequestError(ErrorCode.UNKNOWN_ATTRIBUTE, attributes=((UNKNOWN_ATTRIBUTES, unknown),))


def _granted_lifetime(requested: int | None) -> int:
    """Return the granted lifetime in seconds (RFC 8656 §7.2)."""
    return min(max(requested or 0, DEFAULT_LIFETIME), MAX_LIFETIME)
