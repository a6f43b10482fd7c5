"""The rate limit of responses to unauthenticated addresses."""

import ipaddress
from collections import defaultdict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.addresses import ClientAddress, SocketAddress, network_of, unpack_address
from relay.core.attributes import CHANNEL_NUMBER, LIFETIME, NONCE, REALM, USERNAME, XOR_PEER_ADDRESS
from relay.core.commands import SendToClient
from relay.core.limiter import BUCKETS, Limiter
from relay.core.stun import MessageClass, Method, encode
from tests.support.core import (
    CHANNEL,
    CLIENT,
    CLIENT6,
    OTHER_CLIENT,
    PEER,
    UDP,
    AttributeValue,
    Client,
    Relay,
    answer_in,
    of_kind,
    opaque,
    relay_with,
)

UNKNOWN = opaque(0x7F01)


def v4(number: int, port: int = 1000) -> ClientAddress:
    return ClientAddress(unpack_address(number.to_bytes(4, "big"), port))


def taken(limiter: Limiter, client: SocketAddress, now: float, tries: int = 1000) -> int:
    """Return the number of allowed responses."""
    return sum(limiter.allows(ClientAddress(client), now) for _ in range(tries))


def test_a_source_gets_its_burst_and_then_its_rate() -> None:
    limiter = Limiter(20, 100, Random(1))
    assert taken(limiter, CLIENT, 1000.0) == 100
    assert taken(limiter, CLIENT, 1000.5) == 10
    assert [taken(limiter, CLIENT, 1001.0 + second) for second in range(30)] == [10, *[20] * 29]


def test_unused_tokens_accumulate_up_to_the_burst() -> None:
    limiter = Limiter(20, 100, Random(1))
    assert taken(limiter, CLIENT, 1000.0) == 100
    assert taken(limiter, CLIENT, 1004.0) == 80
    assert taken(limiter, CLIENT, 2000.0) == 100


@given(st.integers(1, 100_000), st.integers(1, 300), st.floats(0, 1e9), st.integers(0, 2**32))
def test_a_burst_is_exact_at_any_time(rate: int, burst: int, now: float, seed: int) -> None:
    assert taken(Limiter(rate, burst, Random(seed)), CLIENT, now, burst + 5) == burst


def test_ports_of_an_address_share_its_tokens() -> None:
    limiter = Limiter(1, 100, Random(1))
    assert sum(limiter.allows(v4(7, port), 5.0) for port in range(1, 1000)) == 100


def test_an_ipv6_64_network_shares_its_tokens() -> None:
    limiter = Limiter(1, 100, Random(1))
    same = [ClientAddress((f"2001:db8:5:6::{host:x}", 1000, 0, 0)) for host in range(1, 1000)]
    assert sum(limiter.allows(each, 5.0) for each in same) == 100
    assert limiter.allows(ClientAddress(("2001:db8:5:7::1", 1000, 0, 0)), 5.0)


@given(st.binary(min_size=16, max_size=16) | st.lists(st.sampled_from([0, 0, 1, 0xFFFF]), min_size=8, max_size=8))
def test_ipv6_networks_differ_in_their_first_64_bits(host: bytes | list[int]) -> None:
    packed = host if isinstance(host, bytes) else b"".join(each.to_bytes(2, "big") for each in host)
    network = network_of(unpack_address(packed, 1000))
    assert ipaddress.IPv6Address(f"{network}::").packed == packed[:8] + bytes(8)


def test_a_flood_does_not_use_tokens_of_another_source() -> None:
    limiter = Limiter(10, 50, Random(1))
    taken(limiter, CLIENT, 1000.0)
    assert taken(limiter, OTHER_CLIENT, 1000.0) == 50


@pytest.mark.parametrize(("sources", "burst"), [(10_000, 250), pytest.param(200_000, 5000, marks=pytest.mark.long)])
def test_a_client_gets_responses_besides_any_number_of_sources(sources: int, burst: int) -> None:
    """The harmless number of sources must grow with the burst."""
    limiter = Limiter(500, burst, Random(1))
    asked = answered = 0
    # 100,000 sources per second, with an occasional new client that sends a few requests.
    for number in range(sources):
        now = 1000.0 + number / 100_000
        limiter.allows(v4(0x0A000000 + number), now)
        if number % 100 == 0:
            newcomer = v4(0xC0000000 + number // 200)
            asked += 1
            answered += limiter.allows(newcomer, now)
    assert asked == answered == sources // 100


def test_a_client_gets_responses_while_a_thousand_sources_flood() -> None:
    limiter = Limiter(10, 20, Random(1))
    for source in range(1000):
        taken(limiter, v4(source), 1000.0, 100)
    newcomers = [v4(0xC0000000 + number) for number in range(10_000)]
    held_up = sum(not limiter.allows(each, 1000.0) for each in newcomers)
    # The expected number is (1000 / 65536)² × 10,000, about two.
    assert held_up <= 10


def test_the_table_does_not_grow() -> None:
    limiter = Limiter(10, 20, Random(1))
    for source in range(10_000):
        limiter.allows(v4(source), 1000.0)
    assert [len(row) for row in limiter.rows] == [BUCKETS, BUCKETS]
    assert sum(row.itemsize * len(row) for row in limiter.rows) == 1 << 20


def test_another_seed_causes_different_collisions() -> None:
    def used(seed: int) -> list[int]:
        limiter = Limiter(10, 20, Random(seed))
        limiter.allows(v4(1), 1000.0)
        return [index for row in limiter.rows for index, full_at in enumerate(row) if full_at]

    assert used(1) == used(1) != used(2)
    assert len(used(1)) == 2


def test_a_limiter_continues_with_the_state_of_a_previous_limiter() -> None:
    class Same(Random):
        """Returns the key of the previous limiter."""

        def randbytes(self, n: int) -> bytes:
            assert n == len(one.key)
            return one.key

    one = Limiter(10, 20, Random(1))
    assert taken(one, CLIENT, 1000.0) == 20
    other = Limiter(10, 20, Same())
    for row, known in zip(other.rows, one.rows, strict=True):
        row[:] = known
    assert taken(other, CLIENT, 1001.0) == 10
    assert taken(other, OTHER_CLIENT, 1001.0) == 20


# Limited and unlimited responses of the server.

RATE, BURST = 1, 3
METHODS = (Method.ALLOCATE, Method.REFRESH, Method.CREATE_PERMISSION, Method.CHANNEL_BIND)


def limited() -> Relay:
    return relay_with(unauthenticated_rate=RATE, unauthenticated_burst=BURST)


def with_nonce(relay: Relay, address: SocketAddress = CLIENT) -> Client:
    """Return a client with a nonce, and with all tokens for its address."""
    client = Client(relay, address)
    client.take_nonce()
    relay.pass_time(10)
    return client


def unproven(client: Client, method: Method, kind: str) -> bytes:
    """Return an unauthenticated request that gets a certain error code."""
    return {
        "400": client.write(method, leave_out=(REALM,)),
        "401": encode(MessageClass.REQUEST, method, bytes(12), []),
        "401 without nonce": client.write(method, leave_out=(NONCE,)),
        "401 for a username": client.write(method, (USERNAME, "nobody"), leave_out=(USERNAME,)),
        "401 for the password": client.write(method, key=b"wrong"),
        "420": client.write(method, (UNKNOWN, b"")),
        "438": client.write(method, (NONCE, b"old"), leave_out=(NONCE,)),
    }[kind]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind", ["400", "401", "401 without nonce", "401 for a username", "401 for the password", "420", "438"]
)
def test_unauthenticated_error_responses_are_limited_and_counted(method: Method, kind: str) -> None:
    relay = limited()
    client = with_nonce(relay)
    data = unproven(client, method, kind)
    answers = [of_kind(SendToClient, client.send(data)) for _ in range(10)]
    assert [len(each) for each in answers] == [1] * BURST + [0] * (10 - BURST)
    code = int(kind[:3])
    assert answer_in(answers[0]).code == code
    assert relay.counters.withheld == {(method, code): 10 - BURST}
    assert relay.counters.errors[method, code] == BURST + (kind.startswith("401") and method is Method.ALLOCATE)
    relay.pass_time(1 / RATE)
    assert answer_in(client.send(data)).code == code


def test_binding_responses_are_limited_and_counted() -> None:
    relay = limited()
    data = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
    assert sum(len(relay.receive(data, CLIENT)) for _ in range(10)) == BURST
    assert sum(len(relay.receive(data, CLIENT6)) for _ in range(10)) == BURST
    assert relay.counters.withheld == {(Method.BINDING, None): 2 * (10 - BURST)}
    assert relay.counters.successes == {Method.BINDING: 2 * BURST}


def test_authenticated_clients_are_never_limited() -> None:
    relay = limited()
    client = with_nonce(relay)
    stranger = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
    neighbour: SocketAddress = (CLIENT[0], CLIENT[1] + 1)
    for _ in range(10):
        relay.receive(stranger, neighbour)
    assert relay.receive(stranger, CLIENT) == []
    client.allocate()
    bodies: dict[Method, list[AttributeValue]] = {
        Method.REFRESH: [(LIFETIME, 600)],
        Method.CREATE_PERMISSION: [(XOR_PEER_ADDRESS, PEER)],
        Method.CHANNEL_BIND: [(CHANNEL_NUMBER, CHANNEL), (XOR_PEER_ADDRESS, PEER)],
    }
    for _ in range(10):
        for method, body in bodies.items():
            assert client.ask(method, *body).code is None
        assert client.ask(Method.ALLOCATE, UDP).code == 437
    assert sum(relay.counters.withheld.values()) == 10 - BURST + 1


def test_authenticated_requests_take_no_tokens() -> None:
    relay = limited()
    client = with_nonce(relay)
    client.allocate()
    for _ in range(100):
        assert client.refresh(600).code is None
    data = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
    assert sum(len(relay.receive(data, CLIENT)) for _ in range(10)) == BURST


def test_a_rate_of_zero_disables_the_limit() -> None:
    relay = relay_with(unauthenticated_rate=0, unauthenticated_burst=1)
    data = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])
    assert sum(len(relay.receive(data, CLIENT)) for _ in range(1000)) == 1000
    assert relay.counters.withheld == {}


def test_wrong_credentials_do_not_block_clients_behind_the_same_nat() -> None:
    relay = limited()
    client = with_nonce(relay)
    client.allocate()
    neighbour = Client(relay, (CLIENT[0], CLIENT[1] + 1), salt="neighbour")
    neighbour.take_nonce()
    for _ in range(100):
        neighbour.send(neighbour.write(Method.REFRESH, key=b"wrong"))
    counts: dict[int | None, int] = defaultdict(int)
    for _ in range(10):
        counts[client.refresh(600).code] += 1
    assert counts == {None: 10}
    assert neighbour.refresh(600).code == 437
