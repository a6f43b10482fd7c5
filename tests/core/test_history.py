"""Records of refused requests: bounded, safe from floods, and without secrets."""

from relay.core.addresses import ClientAddress
from relay.core.attributes import NONCE
from relay.core.errors import ErrorCode, Reason
from relay.core.events import Limit
from relay.core.history import MAX_CLIENTS, MAX_RECORDS, WITHHELD
from relay.core.peers import PeerRule
from relay.core.stun import MessageClass, Method, encode
from relay.tools.explain import EXPLANATIONS
from tests.support.core import CLIENT, PEER, Client, Relay, peer_at


def records(relay: Relay, client: Client) -> list[tuple[str, int | None, str, int]]:
    """Return the records of a client: method, code, cause and count."""
    history = relay.server.history
    found = history.proven.get(client.address) or history.unproven.get(client.address) or []
    return [(each.method.name, each.code, each.cause, each.count) for each in found]


def forged(number: int) -> ClientAddress:
    return ClientAddress((f"198.18.{number >> 8 & 255}.{number & 255}", 1024 + (number >> 16)))


def test_an_attempt_is_recorded_from_its_challenge_on(relay: Relay, client: Client) -> None:
    client.allocate()
    assert records(relay, client) == [
        ("ALLOCATE", 401, Reason.NO_CREDENTIALS, 1),
        ("ALLOCATE", None, "", 1),
    ]


def test_a_client_without_a_refused_request_has_no_record(relay: Relay, client: Client) -> None:
    client.send(encode(MessageClass.REQUEST, Method.BINDING, bytes(12), []))
    assert records(relay, client) == []


def test_equal_responses_are_one_record_with_the_latest_time(relay: Relay, client: Client) -> None:
    client.allocate()
    denied = [peer_at("127.0.0.1", port) for port in (1, 2, 3)]
    for each in denied:
        relay.pass_time(1)
        assert client.bind_channel(peer=each).code == 403
    (*_, last) = relay.server.history.proven[client.address]
    assert (last.cause, last.count, last.about) == (PeerRule.NEVER_A_PEER, 3, "127.0.0.1:3")
    assert (last.first, last.last) == (relay.now.monotonic - 2, relay.now.monotonic)


def test_the_oldest_records_of_a_client_are_dropped(relay: Relay, client: Client) -> None:
    client.allocate()
    for _ in range(MAX_RECORDS):
        client.bind_channel(peer=peer_at("127.0.0.1", 1))
        client.bind_channel(peer=PEER)
    assert len(records(relay, client)) == MAX_RECORDS


def test_a_flood_from_forged_addresses_displaces_no_client_that_has_proven_its_address(relay: Relay) -> None:
    proven = Client(relay, CLIENT)
    assert proven.bind_channel().code == 437
    challenge = encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), [])
    stale = encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), [(NONCE, b"guessed")], key=b"key")
    for number in range(2 * MAX_CLIENTS):
        relay.receive(challenge if number % 2 else stale, forged(number))
    history = relay.server.history
    assert records(relay, proven)[-1] == ("CHANNEL_BIND", 437, "allocation_mismatch", 1)
    assert set(history.proven) == {proven.address}
    assert len(history.unproven) == MAX_CLIENTS


def test_the_tables_are_bounded_and_say_since_when_they_are_complete(relay: Relay) -> None:
    for number in range(MAX_CLIENTS + 2):
        relay.pass_time(0.5)
        Client(relay, forged(number), salt=str(number)).refresh(600)
    history = relay.server.history
    assert len(history.proven) == MAX_CLIENTS
    assert history.complete_since == relay.now.monotonic - 0.5 * MAX_CLIENTS


def test_a_withheld_response_is_recorded(relay: Relay, client: Client) -> None:
    for _ in range(relay.config.unauthenticated_burst + 3):
        client.send(encode(MessageClass.REQUEST, Method.ALLOCATE, bytes(12), []))
    assert records(relay, client)[-1] == ("ALLOCATE", 401, WITHHELD, 3)


def test_no_record_has_a_part_of_a_credential(relay: Relay) -> None:
    for client in (Client(relay, valid_for=-10, salt="a-salt"), Client(relay, forged(1), salt="b-salt")):
        client.refresh(600)
        client.send(client.write(Method.REFRESH, key=b"wrong"))
    shown = repr(relay.server.history.proven)
    assert Reason.CREDENTIAL_EXPIRED.value in shown
    assert Reason.WRONG_PASSWORD.value in shown
    assert "-salt" not in shown


def test_every_cause_but_an_invalid_request_has_an_explanation() -> None:
    with_reasons = {ErrorCode.BAD_REQUEST, ErrorCode.UNAUTHENTICATED, ErrorCode.FORBIDDEN, 486, 508}
    codes = {code.name.lower() for code in ErrorCode if code not in with_reasons}
    causes = {*Reason, *Limit, *PeerRule, *codes, WITHHELD}
    assert causes - EXPLANATIONS.keys() == {
        *("incomplete_credentials", "malformed_attribute", "no_transport", "contradicting_families"),
        *("no_peer", "no_channel_number"),
    }
    assert EXPLANATIONS.keys() <= causes
