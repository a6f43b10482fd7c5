"""The requests of an authenticated client: Allocate, Refresh, CreatePermission and ChannelBind (RFC 8656 §7–§12)."""

from typing import NamedTuple

from relay.core.addresses import ChannelNumber, ClientAddress, Family, PeerAddress, family_of
from relay.core.allocations import Allocation, Allocations, AllocationState
from relay.core.answers import Answers, AttributeValues, Recipient
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    EVEN_PORT,
    LIFETIME,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    RESERVATION_TOKEN,
    XOR_PEER_ADDRESS,
    MalformedAttributeError,
)
from relay.core.authentication import ErrorCode, Reason
from relay.core.commands import Commands
from relay.core.config import ServerConfig
from relay.core.counters import Counters, DropReason, FreeReason
from relay.core.events import (
    AllocationRefreshed,
    ChannelBound,
    ChannelRefreshed,
    Limit,
    LimitReached,
    PeerRefused,
    RelayedAddressDeleted,
)
from relay.core.lifecycle import AllocationRequest, Lifecycle
from relay.core.peers import PeerRule
from relay.core.stun import Message, Method

DEFAULT_LIFETIME = 600
"""Seconds; also the shortest that is granted (RFC 8656 §3.2, §7.2)."""

MAX_LIFETIME = 3600
"""Seconds (RFC 8656 §7.2 suggests an hour)."""

UDP = 17
"""The only transport that is relayed (RFC 8656 §18.7)."""

CHANNEL_NUMBERS = range(0x4000, 0x8000)
"""RFC 8656 §12 has 0x4000–0x4FFF; RFC 5766 had up to 0x7FFF, and clients in the field still use them."""


class Request(NamedTuple):
    """An authenticated request."""

    message: Message
    client: ClientAddress
    username: str
    recipient: Recipient
    now: float


class RefusalError(Exception):
    """The error that a request is answered with, and why, if the code leaves that open."""

    def __init__(self, code: ErrorCode, reason: Reason | None = None) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class Requests:
    """Carries out requests; each is answered by the time it returns, but for an Allocate whose sockets come later."""

    def __init__(
        self,
        config: ServerConfig,
        tables: Allocations,
        lifecycle: Lifecycle,
        answers: Answers,
        counters: Counters,
        commands: Commands,
    ) -> None:
        self._config = config
        self._tables = tables
        self._lifecycle = lifecycle
        self._answers = answers
        self._counters = counters
        self._commands = commands
        self._service = {
            (int(single), additional): (
                tuple(family for family in asked if family in config.public_hosts),
                tuple(family for family in asked if family not in config.public_hosts),
            )
            for single, additional, asked in (
                (Family.IPV4, False, (Family.IPV4,)),
                (Family.IPV6, False, (Family.IPV6,)),
                (Family.IPV4, True, (Family.IPV4, Family.IPV6)),
            )
        }
        """What is served and what is not, by the family that is asked for, and whether IPv6 is asked for as well."""
        self._handlers = {
            Method.ALLOCATE: self._allocate,
            Method.REFRESH: self._refresh,
            Method.CREATE_PERMISSION: self._create_permission,
            Method.CHANNEL_BIND: self._bind_channel,
        }

    def handle(self, request: Request) -> None:
        """Carry out one request."""
        try:
            attributes = self._handlers[request.recipient.method](request)
        except MalformedAttributeError:
            self._answers.refuse(request.recipient, ErrorCode.BAD_REQUEST, reason=Reason.MALFORMED_ATTRIBUTE)
        except RefusalError as refusal:
            self._answers.refuse(request.recipient, refusal.code, reason=refusal.reason)
        else:
            if attributes is not None:
                self._answers.succeed(request.recipient, attributes)

    def _allocate(self, request: Request) -> AttributeValues | None:
        message = request.message
        existing = self._tables.by_client.get(request.client)
        if existing is not None:
            self._repeat_allocate(existing, request)
            return None
        transport = message.get(REQUESTED_TRANSPORT)
        if transport is None:
            raise RefusalError(ErrorCode.BAD_REQUEST, Reason.NO_TRANSPORT)
        if transport != UDP:
            raise RefusalError(ErrorCode.UNSUPPORTED_TRANSPORT_PROTOCOL)
        families, missing = self._families(message)
        reserve = message.get(EVEN_PORT)
        if reserve or message.has(RESERVATION_TOKEN):
            # Reservations serve RTP and RTCP on neighbouring ports, which nobody in a Firezone network asks for.
            raise RefusalError(ErrorCode.INSUFFICIENT_CAPACITY, Reason.RESERVATION)
        error = self._lifecycle.begin(
            AllocationRequest(
                client=request.client,
                username=request.username,
                transaction_id=message.transaction_id,
                fingerprint=message.has_fingerprint,
                families=families,
                missing_families=missing,
                even_port=reserve is not None,
                lifetime=_granted_lifetime(message.get(LIFETIME)),
            ),
            request.recipient.key,
            request.now,
        )
        if error is not None:
            raise RefusalError(error)
        return None

    def _repeat_allocate(self, existing: Allocation, request: Request) -> None:
        if (existing.transaction_id, existing.username) != (request.message.transaction_id, request.username):
            raise RefusalError(ErrorCode.ALLOCATION_MISMATCH)
        if existing.state is AllocationState.BINDING:
            self._counters.drops[DropReason.ALLOCATE_UNDER_WAY] += 1
        else:
            self._answers.repeat(request.recipient, existing.success)

    def _families(self, message: Message) -> tuple[tuple[Family, ...], tuple[Family, ...]]:
        """Give the families to serve and those asked for but not served (RFC 8656 §7.2, steps 7–9)."""
        requested = message.get(REQUESTED_ADDRESS_FAMILY)
        additional = message.get(ADDITIONAL_ADDRESS_FAMILY)
        if additional is not None and (requested is not None or additional != Family.IPV6):
            raise RefusalError(ErrorCode.BAD_REQUEST, Reason.CONTRADICTING_FAMILIES)
        single = Family.IPV4 if requested is None else requested
        served, missing = self._service.get((single, additional is not None), ((), ()))
        if not served:
            raise RefusalError(ErrorCode.ADDRESS_FAMILY_NOT_SUPPORTED)
        return served, missing

    def _refresh(self, request: Request) -> AttributeValues:
        message = request.message
        allocation = self._tables.by_client.get(request.client)
        lifetime = message.get(LIFETIME)
        deletes = lifetime == 0
        if allocation is None or (allocation.state is AllocationState.BINDING and not deletes):
            raise RefusalError(ErrorCode.ALLOCATION_MISMATCH)
        # A Firezone client with new credentials and its old address gets 437 for its Allocate, deletes what is in the way
        # with the new credentials, and allocates anew. The nonce proves that the address is its own.
        if allocation.username != request.username and not deletes:
            raise RefusalError(ErrorCode.WRONG_CREDENTIALS)
        family = message.get(REQUESTED_ADDRESS_FAMILY)
        if family is not None and family not in allocation.families:
            raise RefusalError(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)
        if deletes:
            self._delete(allocation, None if family is None else Family(family))
            return ((LIFETIME, 0),)
        allocation.lifetime = _granted_lifetime(lifetime)
        self._tables.extend(allocation, request.now + allocation.lifetime)
        if AllocationRefreshed in self._commands.watched:
            self._commands.append(AllocationRefreshed(allocation.id, allocation.client, allocation.lifetime))
        return ((LIFETIME, allocation.lifetime),)

    def _delete(self, allocation: Allocation, family: Family | None) -> None:
        """Delete an allocation, or only one of its two relayed addresses (RFC 8656 §8.1)."""
        if family is None or len(allocation.families) == 1:
            self._lifecycle.free(allocation, FreeReason.DELETED)
        else:
            self._tables.remove_family(allocation, family)
            if RelayedAddressDeleted in self._commands.watched:
                self._commands.append(RelayedAddressDeleted(allocation.id, allocation.client, family))

    def _create_permission(self, request: Request) -> AttributeValues:
        """Check the peers and do no more: a channel is all that lets a packet through (docs/protocol.md)."""
        allocation = self._own_allocation(request)
        peers = [PeerAddress(peer) for peer in request.message.get_all(XOR_PEER_ADDRESS)]
        if not peers:
            raise RefusalError(ErrorCode.BAD_REQUEST, Reason.NO_PEER)
        if not {family_of(peer) for peer in peers}.issubset(allocation.families):
            raise RefusalError(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)
        # The port in a permission means nothing (RFC 8656 §10.2).
        for peer in peers:
            rule = self._config.peers.rule_against_host(peer)
            if rule is not None:
                raise self._forbidden(allocation, request, peer, rule)
        return ()

    def _bind_channel(self, request: Request) -> AttributeValues:
        allocation = self._own_allocation(request)
        number = request.message.get(CHANNEL_NUMBER)
        address = request.message.get(XOR_PEER_ADDRESS)
        if number is None or number not in CHANNEL_NUMBERS:
            raise RefusalError(ErrorCode.BAD_REQUEST, Reason.NO_CHANNEL_NUMBER)
        if address is None or address[1] == 0:
            raise RefusalError(ErrorCode.BAD_REQUEST, Reason.NO_PEER)
        peer = PeerAddress(address)
        if family_of(peer) not in allocation.families:
            raise RefusalError(ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH)
        rule = self._config.peers.rule_against(peer)
        if rule is not None:
            raise self._forbidden(allocation, request, peer, rule)
        before = allocation.channels.get(ChannelNumber(number))
        if before is None and peer not in allocation.peers and len(allocation.channels) >= self._config.max_channels:
            raise self._limited(request)
        kind = ChannelBound if before is None or not before.live else ChannelRefreshed
        if not self._tables.bind_channel(allocation, ChannelNumber(number), peer, request.now):
            raise RefusalError(ErrorCode.BAD_REQUEST, Reason.PEER_TAKEN if before is None else Reason.CHANNEL_TAKEN)
        self._counters.channels_bound += 1
        if kind in self._commands.watched:
            self._commands.append(kind(allocation.id, allocation.client, ChannelNumber(number), peer))
        return ()

    def _forbidden(self, allocation: Allocation, request: Request, peer: PeerAddress, rule: PeerRule) -> RefusalError:
        """Tell of a peer that is never relayed to, and give the error that a client is answered for it."""
        if PeerRefused in self._commands.watched:
            method = request.recipient.method
            self._commands.append(PeerRefused(allocation.id, allocation.client, method, peer, rule))
        return RefusalError(ErrorCode.FORBIDDEN)

    def _limited(self, request: Request) -> RefusalError:
        """Tell of an allocation that has all channels it may have, and give the error for it (RFC 8656 §12.2)."""
        if LimitReached in self._commands.watched:
            self._commands.append(LimitReached(request.client, Limit.CHANNELS, ErrorCode.INSUFFICIENT_CAPACITY))
        return RefusalError(ErrorCode.INSUFFICIENT_CAPACITY)

    def _own_allocation(self, request: Request) -> Allocation:
        allocation = self._tables.by_client.get(request.client)
        if allocation is None or allocation.state is AllocationState.BINDING:
            raise RefusalError(ErrorCode.ALLOCATION_MISMATCH)
        if allocation.username != request.username:
            raise RefusalError(ErrorCode.WRONG_CREDENTIALS)
        return allocation


def _granted_lifetime(requested: int | None) -> int:
    """Give the lifetime to grant, in seconds (RFC 8656 §7.2)."""
    return min(max(requested or 0, DEFAULT_LIFETIME), MAX_LIFETIME)
