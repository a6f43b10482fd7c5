"""A small relay for fuzzing, and an allocation with a channel."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from relay.core import allocations, early, lifecycle, requests, server
from relay.core.addresses import Family
from relay.core.commands import BindPort, SendToClient
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.timestamp import Timestamp
from tests.simulation import wire
from tests.simulation.wire import Address

SECRET = "the secret of the relay that is fuzzed"
START = Timestamp(monotonic=1000.0, unix=1_700_000_000.0)
HOSTS = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8::1"}
PORTS = range(50000, 50006)
CHANNEL = 0x4001
CLIENT: Address = ("203.0.113.1", 1000)
PEER: Address = ("198.51.100.1", 5000)
# Low limits, so that some hundred actions reach them.
CONFIG = ServerConfig(
    secret=RelaySecret(SECRET),
    public_hosts=HOSTS,
    ports=PORTS,
    peers=PeerPolicy(frozenset(HOSTS.values()), frozenset((3478,)), PORTS, frozenset(HOSTS.values())),
    max_allocations=3,
    max_allocations_per_address=2,
    max_channels=5,
    unauthenticated_rate=2,
    unauthenticated_burst=12,
    software="relay under fuzzing",
    offloads=True,
)
# Low limits of a turn and of early data, for the same reason.
EXPIRIES, KERNEL_PORTION, MIXED_SENDS = 3, 2, 8
EARLY_CLIENT_BYTES, EARLY_BYTES = 8192, 16384


@contextlib.contextmanager
def small_turns() -> Iterator[None]:
    """Let the relay do little in one turn, and hold little early data."""
    with (
        patch.multiple(lifecycle, EXPIRIES=EXPIRIES),
        patch.multiple(requests, EXPIRIES=EXPIRIES),
        patch.multiple(allocations, KERNEL_PORTION=KERNEL_PORTION),
        patch.multiple(server, MIXED_SENDS=MIXED_SENDS, MIXED_DATAGRAMS=64, REQUESTS_IN_A_BATCH=4),
        patch.multiple(early, EARLY_CLIENT_BYTES=EARLY_CLIENT_BYTES, EARLY_BYTES=EARLY_BYTES),
    ):
        yield


def username(name: str, lives: int = 100_000) -> str:
    return f"{int(START.unix) + lives}:{name}"


def proof(name: str, nonce: bytes) -> tuple[tuple[int, bytes], ...]:
    """Return the attributes that authenticate a request."""
    return ((wire.USERNAME, name.encode()), (wire.REALM, b"firezone"), (wire.NONCE, nonce))


def established(relay: Server) -> Server:
    """Return a server with an allocation of the client and a channel to the peer."""
    name = username("client")
    key = wire.long_term_key(name, SECRET)

    def ask(method: int, *attributes: tuple[int, bytes]) -> bytes | None:
        data = wire.write(wire.REQUEST, method, bytes(12), attributes, key)
        relay.handle_client_datagram((data, CLIENT, 0, 0), START)
        commands = relay.drain()
        for command in commands:
            if isinstance(command, BindPort):
                relay.handle_bound(command.allocation, START)
        (answer,) = [wire.read(each.data) for each in (*commands, *relay.drain()) if isinstance(each, SendToClient)]
        assert answer is not None
        return answer.get(wire.NONCE)

    nonce = ask(wire.ALLOCATE) or b""
    ask(wire.ALLOCATE, wire.UDP, *proof(name, nonce))
    channel = (wire.CHANNEL_NUMBER, CHANNEL.to_bytes(2, "big") + b"\0\0")
    ask(wire.CHANNEL_BIND, channel, (wire.PEER_ADDRESS, wire.address(PEER, bytes(12))), *proof(name, nonce))
    return relay
