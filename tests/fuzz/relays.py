"""A small relay to be fuzzed, and how one gets an allocation with a channel on it."""

from relay.core.addresses import Family
from relay.core.commands import BindPort, SendToClient
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.instant import Instant
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from tests.simulation import wire
from tests.simulation.wire import Address

SECRET = "the secret of the relay that is fuzzed"
START = Instant(monotonic=1000.0, unix=1_700_000_000.0)
HOSTS = {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8::1"}
PORTS = range(50000, 50006)
CHANNEL = 0x4001
CLIENT: Address = ("203.0.113.1", 1000)
PEER: Address = ("198.51.100.1", 5000)
# So little of everything that some hundred deeds come to the end of it.
CONFIG = ServerConfig(
    secret=RelaySecret(SECRET),
    public_hosts=HOSTS,
    ports=PORTS,
    peers=PeerPolicy(frozenset(HOSTS.values()), frozenset((3478,)), PORTS, frozenset(HOSTS.values())),
    max_allocations=3,
    max_allocations_per_address=2,
    max_channels=2,
    unauthenticated_rate=2,
    unauthenticated_burst=12,
    software="relay under fuzzing",
    offloads=True,
)


def username(name: str, lives: int = 100_000) -> str:
    return f"{int(START.unix) + lives}:{name}"


def proof(name: str, nonce: bytes) -> tuple[tuple[int, bytes], ...]:
    """Give the attributes by which a request proves who sent it."""
    return ((wire.USERNAME, name.encode()), (wire.REALM, b"firezone"), (wire.NONCE, nonce))


def established(server: Server) -> Server:
    """Give a server on which the client has an allocation, and a channel bound to the peer."""
    name = username("client")
    key = wire.long_term_key(name, SECRET)

    def ask(method: int, *attributes: tuple[int, bytes]) -> bytes | None:
        data = wire.write(wire.REQUEST, method, bytes(12), attributes, key)
        server.handle_client_arrival((data, CLIENT, 0, 0), START)
        commands = server.drain()
        for command in commands:
            if isinstance(command, BindPort):
                server.handle_bound(command.allocation, START)
        (answer,) = [wire.read(each.data) for each in (*commands, *server.drain()) if isinstance(each, SendToClient)]
        assert answer is not None
        return answer.get(wire.NONCE)

    nonce = ask(wire.ALLOCATE) or b""
    ask(wire.ALLOCATE, wire.UDP, *proof(name, nonce))
    channel = (wire.CHANNEL_NUMBER, CHANNEL.to_bytes(2, "big") + b"\0\0")
    ask(wire.CHANNEL_BIND, channel, (wire.PEER_ADDRESS, wire.address(PEER, bytes(12))), *proof(name, nonce))
    return server
