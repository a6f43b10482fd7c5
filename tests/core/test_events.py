"""Events of the core: each event once and in order, only for watched kinds, and without usernames."""

from typing import Any

import pytest

from relay.core.addresses import AllocationId, ChannelNumber, ClientAddress, Family, PeerAddress
from relay.core.allocation import CHANNEL_LIFETIME
from relay.core.attributes import (
    ADDITIONAL_ADDRESS_FAMILY,
    CHANNEL_NUMBER,
    EVEN_PORT,
    NONCE,
    REALM,
    REQUESTED_ADDRESS_FAMILY,
    REQUESTED_TRANSPORT,
    RESERVATION_TOKEN,
    USERNAME,
    XOR_PEER_ADDRESS,
    Attribute,
)
from relay.core.commands import FreeAllocation, SendToClient
from relay.core.counters import FreeReason
from relay.core.errors import ErrorCode, Reason
from relay.core.events import (
    CORE_EVENTS,
    AllocationCreated,
    AllocationFreed,
    AllocationRefreshed,
    Answered,
    ChannelBound,
    ChannelExpired,
    ChannelRefreshed,
    CoreEvent,
    Limit,
    LimitReached,
    PeerRefused,
    RelayedAddressDeleted,
    RequestRefused,
)
from relay.core.lifecycle import BindRefusal
from relay.core.peers import PeerRule
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CONFIG,
    FORBIDDEN_PEER,
    HOSTS,
    OTHER_CHANNEL,
    OTHER_CLIENT,
    OTHER_PEER,
    PEER,
    PEER6,
    START,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    opaque,
    relay_with,
)

FIRST = AllocationId(1)
HERE = ClientAddress(CLIENT)
BOTH = (ADDITIONAL_ADDRESS_FAMILY, Family.IPV6)
LIFETIME = 600


def watching(relay: Relay | None = None, *, answers: bool = False) -> Relay:
    relay = relay or Relay()
    relay.watch(*(kind for kind in CORE_EVENTS if answers or kind is not Answered))
    return relay


@pytest.fixture
def relay() -> Relay:
    return watching()


@pytest.fixture
def client(relay: Relay) -> Client:
    client = Client(relay)
    client.take_nonce()
    return client


def test_no_event_is_recorded_without_a_watcher() -> None:
    relay = Relay()
    client = Client(relay)
    client.allocate()
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, FORBIDDEN_PEER)
    client.refresh(0)
    assert relay.events == []


def test_only_watched_events_are_recorded() -> None:
    relay = Relay()
    relay.watch(AllocationFreed)
    client = Client(relay)
    client.allocate()
    client.refresh(0)
    assert relay.take_events() == [AllocationFreed(FIRST, HERE, FreeReason.DELETED, START.monotonic, 0, 0)]
    relay.watch()
    client.allocate()
    client.refresh(0)
    assert relay.events == []


def test_an_allocation_event_at_the_response_has_all_relayed_addresses(relay: Relay, client: Client) -> None:
    bind = client.begin_allocate(BOTH)
    assert relay.take_events() == []
    relay.report_bound(bind.allocation)
    relayed = ((HOSTS[Family.IPV4], bind.port), (HOSTS[Family.IPV6], bind.port, 0, 0))
    assert relay.take_events() == [AllocationCreated(FIRST, HERE, relayed, (), LIFETIME)]


def test_an_unsupported_family_is_an_event() -> None:
    relay = watching(relay_with(public_hosts={Family.IPV4: HOSTS[Family.IPV4]}))
    allocated = Client(relay).allocate(BOTH)
    relayed = ((HOSTS[Family.IPV4], allocated.port),)
    assert relay.take_events() == [AllocationCreated(FIRST, HERE, relayed, (Family.IPV6,), LIFETIME)]


def test_a_refresh_event_has_the_granted_lifetime(relay: Relay, client: Client) -> None:
    client.allocate()
    relay.take_events()
    client.refresh(100_000)
    assert relay.take_events() == [AllocationRefreshed(FIRST, HERE, 3600)]


def test_each_end_of_an_allocation_is_a_single_event_with_its_reason(relay: Relay, client: Client) -> None:
    def ended() -> list[tuple[object, ...]]:
        return [event[:3] for event in relay.take_events() if isinstance(event, AllocationFreed)]

    client.allocate()
    client.bind_channel()
    client.refresh(0)
    assert ended() == [(FIRST, HERE, FreeReason.DELETED)]
    client.allocate()
    relay.pass_time(LIFETIME)
    relay.wake()
    assert ended() == [(AllocationId(2), HERE, FreeReason.EXPIRED)]
    roaming = Client(relay, OTHER_CLIENT)
    roaming.credential = client.credential
    client.allocate()
    third = roaming.allocate()
    assert ended() == [(AllocationId(3), HERE, FreeReason.REPLACED)]
    assert FreeAllocation(third.id, FreeReason.FAILED) in relay.report_failed(third.id)
    assert ended() == [(third.id, ClientAddress(OTHER_CLIENT), FreeReason.FAILED)]


def test_the_end_of_an_allocation_has_its_traffic_counts(relay: Relay, client: Client) -> None:
    allocation = client.allocate().id
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, OTHER_PEER)
    client.send_on_channel(b"four")
    client.send_on_channel(b"and six", OTHER_CHANNEL)
    relay.receive_from_peer(allocation, b"and back", PEER)
    relay.pass_time(5)
    relay.take_events()
    client.refresh(0)
    assert relay.take_events() == [AllocationFreed(FIRST, HERE, FreeReason.DELETED, START.monotonic, 11, 8)]


def test_a_failed_allocation_has_no_end_event(relay: Relay, client: Client) -> None:
    client.begin_allocate()
    client.refresh(0)
    assert relay.take_events() == []


def test_deleting_one_of_two_relayed_addresses_is_no_end_event(relay: Relay, client: Client) -> None:
    client.allocate(BOTH)
    relay.take_events()
    client.refresh(0, (REQUESTED_ADDRESS_FAMILY, Family.IPV6))
    assert relay.take_events() == [RelayedAddressDeleted(FIRST, HERE, Family.IPV6)]


def test_a_bind_in_the_grace_period_is_a_new_bind_event(relay: Relay, client: Client) -> None:
    client.allocate()
    relay.take_events()
    names = (FIRST, HERE, ChannelNumber(CHANNEL), PEER)
    client.bind_channel()
    client.bind_channel()
    assert relay.take_events() == [ChannelBound(*names), ChannelRefreshed(*names)]
    client.refresh(3600)
    relay.take_events()
    relay.pass_time(CHANNEL_LIFETIME)
    relay.wake()
    assert relay.take_events() == [ChannelExpired(*names)]
    client.bind_channel()
    assert relay.take_events() == [ChannelBound(*names)]


def test_a_failed_channel_bind_is_no_event(relay: Relay, client: Client) -> None:
    client.allocate()
    client.bind_channel()
    relay.take_events()
    assert client.bind_channel(OTHER_CHANNEL, PEER).code == 400
    assert relay.take_events() == [RequestRefused(HERE, Method.CHANNEL_BIND, ErrorCode.BAD_REQUEST, Reason.PEER_TAKEN)]


def test_a_forbidden_peer_event_has_the_peer(relay: Relay, client: Client) -> None:
    client.allocate()
    relay.take_events()
    assert client.bind_channel(CHANNEL, FORBIDDEN_PEER).code == 403
    assert relay.take_events() == [PeerRefused(FIRST, HERE, Method.CHANNEL_BIND, FORBIDDEN_PEER, PeerRule.NEVER_A_PEER)]
    assert client.create_permission(PEER, FORBIDDEN_PEER, PeerAddress(("127.0.0.9", 1))).code == 403
    assert relay.take_events() == [PeerRefused(FIRST, HERE, Method.CREATE_PERMISSION, FORBIDDEN_PEER, PeerRule.NEVER_A_PEER)]


def test_each_limit_event_has_the_error_code_of_the_response() -> None:
    relay = watching(relay_with(ports=range(50000, 50002), max_allocations=1))
    Client(relay).allocate()
    other = Client(relay, OTHER_CLIENT, salt="other")
    there = ClientAddress(OTHER_CLIENT)
    relay.take_events()

    def refused(relay: Relay, client: Client, *attributes: tuple[object, object]) -> list[CoreEvent]:
        code = client.ask(Method.ALLOCATE, (REQUESTED_TRANSPORT, 17), *attributes).code  # type: ignore[arg-type]
        (event,) = relay.take_events()
        assert isinstance(event, LimitReached)
        assert event.code == code
        return [event]

    assert refused(relay, other) == [LimitReached(there, Limit.ALLOCATIONS, ErrorCode.ALLOCATION_QUOTA_REACHED)]
    relay.server.handle_drain(relay.now)
    assert refused(relay, other) == [LimitReached(there, Limit.DRAINING, ErrorCode.INSUFFICIENT_CAPACITY)]
    odd = watching(relay_with(ports=range(50001, 50002)))
    assert refused(odd, Client(odd), (EVEN_PORT, False)) == [
        LimitReached(HERE, Limit.PORTS, ErrorCode.INSUFFICIENT_CAPACITY)
    ]
    shared = watching(relay_with(max_allocations_per_address=1))
    Client(shared).allocate()
    next_door = (CLIENT[0], CLIENT[1] + 1)
    shared.take_events()
    assert refused(shared, Client(shared, next_door, salt="other")) == [
        LimitReached(ClientAddress(next_door), Limit.ALLOCATIONS_OF_ADDRESS, ErrorCode.ALLOCATION_QUOTA_REACHED)
    ]


def test_an_allocation_at_its_channel_limit_is_an_event() -> None:
    relay = watching(relay_with(max_channels=1))
    client = Client(relay)
    client.allocate()
    client.bind_channel()
    relay.take_events()
    assert client.bind_channel(OTHER_CHANNEL, OTHER_PEER).code == 508
    assert relay.take_events() == [LimitReached(HERE, Limit.CHANNELS, ErrorCode.INSUFFICIENT_CAPACITY)]


@pytest.mark.parametrize("refusal", BindRefusal)
def test_a_machine_out_of_sockets_is_a_limit_event(refusal: BindRefusal) -> None:
    relay = watching(relay_with(ports=range(50000, 50001)))
    bind = Client(relay).begin_allocate()
    (answer,) = (each for each in relay.report_refused(bind.allocation, refusal) if isinstance(each, SendToClient))
    assert answer.client == HERE
    assert relay.take_events() == [LimitReached(HERE, Limit.SOCKETS, ErrorCode.INSUFFICIENT_CAPACITY)]


def test_each_response_is_an_event_including_expected_errors() -> None:
    relay = watching(answers=True)
    client = Client(relay)
    client.send(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []))
    client.take_nonce()
    client.refresh(600)
    client.allocate()
    assert relay.take_events() == [
        Answered(HERE, Method.BINDING, None),
        Answered(HERE, Method.ALLOCATE, ErrorCode.UNAUTHENTICATED, Reason.NO_CREDENTIALS),
        Answered(HERE, Method.REFRESH, ErrorCode.ALLOCATION_MISMATCH),
        AllocationCreated(FIRST, HERE, ((HOSTS[Family.IPV4], relay.server.allocations.by_id[FIRST].port),), (), LIFETIME),
        Answered(HERE, Method.ALLOCATE, None),
    ]


def test_unauthenticated_clients_cause_no_rejection_events(relay: Relay, client: Client) -> None:
    """Otherwise unauthenticated clients would control the rate of events."""
    client.allocate()
    relay.take_events()
    unproven = client.write(Method.CHANNEL_BIND, key=b"wrong")
    unknown = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [(opaque(0x7ABC), b"")])
    assert answer_in(client.send(unknown)).code == 420
    for data in (unproven, unknown, encode(MessageClass.REQUEST, Method.REFRESH, bytes(12), [])):
        client.send(data)
    assert relay.take_events() == []


def test_an_authenticated_rejected_request_is_an_event(relay: Relay, client: Client) -> None:
    client.ask(Method.ALLOCATE, (REQUESTED_TRANSPORT, 6))
    client.allocate()
    relay.take_events()
    client.bind_channel(CHANNEL, PEER6)
    assert relay.take_events() == [
        RequestRefused(HERE, Method.CHANNEL_BIND, ErrorCode.PEER_ADDRESS_FAMILY_MISMATCH),
    ]


@pytest.mark.parametrize(
    ("method", "attributes", "code", "reason"),
    [
        (Method.ALLOCATE, [], ErrorCode.BAD_REQUEST, Reason.NO_TRANSPORT),
        (Method.ALLOCATE, [(opaque(REQUESTED_TRANSPORT.type), b"")], ErrorCode.BAD_REQUEST, Reason.MALFORMED_ATTRIBUTE),
        (
            Method.ALLOCATE,
            [(REQUESTED_TRANSPORT, 17), BOTH, (REQUESTED_ADDRESS_FAMILY, Family.IPV4)],
            ErrorCode.BAD_REQUEST,
            Reason.CONTRADICTING_FAMILIES,
        ),
        (
            Method.ALLOCATE,
            [(REQUESTED_TRANSPORT, 17), (EVEN_PORT, True)],
            ErrorCode.INSUFFICIENT_CAPACITY,
            Reason.RESERVATION,
        ),
        (
            Method.ALLOCATE,
            [(REQUESTED_TRANSPORT, 17), (RESERVATION_TOKEN, bytes(8))],
            ErrorCode.INSUFFICIENT_CAPACITY,
            Reason.RESERVATION,
        ),
    ],
)
def test_a_rejected_allocate_event_has_the_reason(
    relay: Relay, client: Client, method: Method, attributes: list[AttributeValue], code: ErrorCode, reason: Reason
) -> None:
    assert client.ask(method, *attributes).code == code
    assert relay.take_events() == [RequestRefused(HERE, method, code, reason)]


@pytest.mark.parametrize(
    ("method", "attributes", "reason"),
    [
        (Method.CREATE_PERMISSION, [], Reason.NO_PEER),
        (Method.CHANNEL_BIND, [(XOR_PEER_ADDRESS, PEER)], Reason.NO_CHANNEL_NUMBER),
        (Method.CHANNEL_BIND, [(CHANNEL_NUMBER, 0x3FFF), (XOR_PEER_ADDRESS, PEER)], Reason.NO_CHANNEL_NUMBER),
        (Method.CHANNEL_BIND, [(CHANNEL_NUMBER, OTHER_CHANNEL)], Reason.NO_PEER),
        (Method.CHANNEL_BIND, [(CHANNEL_NUMBER, OTHER_CHANNEL), (XOR_PEER_ADDRESS, (PEER[0], 0))], Reason.NO_PEER),
        (Method.CHANNEL_BIND, [(CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, OTHER_PEER)], Reason.CHANNEL_TAKEN),
        (Method.CHANNEL_BIND, [(CHANNEL_NUMBER, OTHER_CHANNEL), (XOR_PEER_ADDRESS, PEER)], Reason.PEER_TAKEN),
    ],
)
def test_a_rejected_channel_bind_event_has_the_reason(
    relay: Relay, client: Client, method: Method, attributes: list[AttributeValue], reason: Reason
) -> None:
    client.allocate()
    client.bind_channel()
    relay.take_events()
    assert client.ask(method, *attributes).code == ErrorCode.BAD_REQUEST
    assert relay.take_events() == [RequestRefused(HERE, method, ErrorCode.BAD_REQUEST, reason)]


@pytest.mark.parametrize(
    ("changes", "code", "reason"),
    [
        ({"leave_out": {NONCE}}, ErrorCode.UNAUTHENTICATED, Reason.NO_NONCE),
        ({"leave_out": {REALM}}, ErrorCode.BAD_REQUEST, Reason.INCOMPLETE_CREDENTIALS),
        ({"key": b"wrong"}, ErrorCode.UNAUTHENTICATED, Reason.WRONG_PASSWORD),
        ({"username": "alice"}, ErrorCode.UNAUTHENTICATED, Reason.NO_CREDENTIAL_OF_OURS),
        ({"username": f"{int(START.unix) - 1}:salt"}, ErrorCode.UNAUTHENTICATED, Reason.CREDENTIAL_EXPIRED),
        ({"nonce": b"somebody else's"}, ErrorCode.STALE_NONCE, None),
    ],
    ids=["no nonce", "no realm", "wrong key", "malformed username", "expired", "foreign nonce"],
)
def test_a_response_event_has_the_reason_of_an_authentication_failure(
    changes: dict[str, Any], code: ErrorCode, reason: Reason | None
) -> None:
    relay = Relay()
    client = Client(relay)
    client.take_nonce()
    changed: dict[Attribute[Any], Any] = {USERNAME: changes.pop("username", None), NONCE: changes.pop("nonce", None)}
    given = [(attribute, value) for attribute, value in changed.items() if value is not None]
    left_out = changes.pop("leave_out", set()) | {attribute for attribute, _ in given}
    relay.watch(Answered)
    assert answer_in(client.send(client.write(Method.REFRESH, *given, leave_out=left_out, **changes))).code == code
    assert relay.take_events() == [Answered(HERE, Method.REFRESH, code, reason)]


def test_watching_does_not_change_responses() -> None:
    def bytes_of(relay: Relay) -> list[object]:
        client = Client(relay)
        done: list[object] = [client.allocate(), client.bind_channel(), client.bind_channel(OTHER_CHANNEL, FORBIDDEN_PEER)]
        done += [client.send_on_channel(b"data"), client.refresh(0)]
        return done

    assert bytes_of(watching(Relay(CONFIG), answers=True)) == bytes_of(Relay(CONFIG))


def test_no_event_contains_a_username(relay: Relay, client: Client) -> None:
    relay = watching(answers=True)
    client = Client(relay)
    client.allocate()
    client.bind_channel()
    client.bind_channel(OTHER_CHANNEL, FORBIDDEN_PEER)
    client.refresh(0)
    assert len(relay.events) > 5
    assert client.credential.username not in repr(relay.events)
