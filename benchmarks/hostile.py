"""What a datagram costs the core, by what is wrong with it: ``python -m benchmarks.hostile``.

Nobody can be kept from sending, but what is sent in vain should cost no more than what is sent for good. Here one thread
hands datagrams to the core, each from another address, and takes its commands; what the system calls cost is not in it, and
is the same for all (`python -m benchmarks`).
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import RESULTS, run
from benchmarks.measure import machine
from relay.core.addresses import AllocationId, ClientAddress, Family, PeerAddress
from relay.core.attributes import (
    CHANNEL_NUMBER,
    LIFETIME,
    NONCE,
    REALM,
    REQUESTED_TRANSPORT,
    USERNAME,
    XOR_PEER_ADDRESS,
)
from relay.core.commands import BindPort, SendToClient
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret, integrity_key, mint
from relay.core.instant import Instant
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.stun import Message, MessageClass, Method, decode, encode
from relay.core.trains import Arrival

COUNT = 2000
"""Datagrams of a kind in a round."""

ROUNDS = 7

NOW = Instant(1000.0, 1_700_000_000.0)
SECRET = RelaySecret("the secret of a benchmark")
PEER = PeerAddress(("198.51.100.9", 5000))
REALM_NAME = "firezone"
LONGEST = 1500
CHANNEL = (0x4000).to_bytes(2, "big")
PAYLOAD = bytes(172)


class Load(NamedTuple):
    """Datagrams of one kind, and the relay that they are for."""

    server: Server
    arrivals: list[Arrival]
    allocation: AllocationId | None = None
    """Where they arrive, if not at the port that clients talk to."""


class Kind(NamedTuple):
    """A kind of datagram."""

    name: str
    load: Callable[[], Load]
    good: bool = False


def sources(count: int = 0) -> list[ClientAddress]:
    """Give addresses, each its own: `COUNT`, or some."""
    return [ClientAddress((f"203.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}", 40000)) for n in range(count or COUNT)]


def new_server(*, rate: int = 500, burst: int = 5000) -> Server:
    """Give a relay with room for all."""
    config = ServerConfig(
        SECRET,
        {Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8::1"},
        range(10000, 60000),
        PeerPolicy(),
        50000,
        "firezone-relay/0",
        unauthenticated_rate=rate,
        unauthenticated_burst=burst,
    )
    return Server(config, Random(1))


class Client:
    """Someone with a credential and a nonce."""

    def __init__(self, server: Server, address: ClientAddress) -> None:
        self.server = server
        self.address = address
        self.credential = mint(SECRET, int(NOW.unix) + 3600, f"{address[0]}")
        self.key = integrity_key(self.credential.username, REALM_NAME, self.credential.password)
        self.nonce = b""

    def take_nonce(self) -> None:
        """Get a nonce as anybody can."""
        self.server.handle_client_arrival((bare(Method.ALLOCATE), self.address, 0, 0), NOW)
        (challenge,) = self.server.drain()
        assert isinstance(challenge, SendToClient)  # noqa: S101
        message = decode(challenge.data)
        assert isinstance(message, Message)  # noqa: S101
        self.nonce = message.get(NONCE) or b""

    def request(self, method: Method, *attributes: object, username: str | None = None, key: bytes | None = None) -> Arrival:
        """Write a request that proves who it is from, unless told otherwise."""
        proof = [(USERNAME, username or self.credential.username), (REALM, REALM_NAME), (NONCE, self.nonce)]
        data = encode(
            MessageClass.REQUEST,
            method,
            self.address[0].encode().ljust(12)[:12],
            [*attributes, *proof],  # type: ignore[list-item]
            key=key or self.key,
        )
        return data, self.address, 0, 0


ALLOCATE = (REQUESTED_TRANSPORT, 17)
REFRESH = (LIFETIME, 600)
PEERS = ((XOR_PEER_ADDRESS, PEER),) * 59
BIND = ((CHANNEL_NUMBER, 0x4000), (XOR_PEER_ADDRESS, PEER))


def bare(method: Method, *attributes: object) -> bytes:
    """Write a request that proves nothing."""
    return encode(MessageClass.REQUEST, method, bytes(12), attributes)  # type: ignore[arg-type]


def stuffed(method: Method, attribute: bytes) -> bytes:
    """Write a request with as many attributes as fit."""
    body = attribute * ((LONGEST - 20) // len(attribute))
    return bare(method)[:2] + len(body).to_bytes(2, "big") + bare(method)[4:] + body


def clients(server: Server, *, allocate: bool = False, count: int = 0) -> list[Client]:
    """Give clients with nonces, and with an allocation and a channel each if so wanted."""
    made = [Client(server, address) for address in sources(count)]
    for each in made:
        each.take_nonce()
        if allocate:
            carry_out(server, each.request(Method.ALLOCATE, ALLOCATE))
            carry_out(server, each.request(Method.CHANNEL_BIND, *BIND))
    return made


def carry_out(server: Server, arrival: Arrival) -> None:
    """Hand in a datagram, and bind what it asks for."""
    server.handle_client_arrival(arrival, NOW)
    for command in server.drain():
        if isinstance(command, BindPort):
            server.handle_bound(command.allocation, NOW)
            server.drain()


def of_strangers(data: bytes, *, withheld: bool = False, port: int = 40000) -> Load:
    """Give the same datagram from all addresses; or where answers are withheld, twice from each."""
    server = new_server(rate=1, burst=1) if withheld else new_server()
    arrivals: list[Arrival] = [(data, (host, port), 0, 0) for host, _, *_ in sources()]
    if withheld:
        for each in arrivals:
            carry_out(server, each)
    return Load(server, arrivals)


def of_clients(write: Callable[[Client], Arrival], *, allocate: bool = False, withheld: bool = False) -> Load:
    """Give what each of many clients writes; where answers are withheld, they had theirs with the nonce."""
    server = new_server(rate=1, burst=1) if withheld else new_server()
    return Load(server, [write(each) for each in clients(server, allocate=allocate)])


def of_peers(address: PeerAddress) -> Load:
    """Give datagrams that arrive at a relayed address."""
    server = new_server()
    clients(server, allocate=True, count=1)
    return Load(server, [(PAYLOAD, address, 0, 0)] * COUNT, AllocationId(1))


def old_nonce(client: Client) -> Arrival:
    """Write a request with a nonce that is none of this relay's."""
    client.nonce = b"A" * 16
    return client.request(Method.ALLOCATE, ALLOCATE)


def of_no_form() -> Iterable[Kind]:
    """Give what is not even a request."""
    send = encode(MessageClass.INDICATION, Method.SEND, bytes(12), [(XOR_PEER_ADDRESS, PEER)])
    long = bare(Method.BINDING, (USERNAME, "x" * 1450))
    yield Kind("garbage, 172 B", lambda: of_strangers(b"\xff" + bytes(171)))
    yield Kind("garbage, 1,200 B", lambda: of_strangers(b"\xff" + bytes(1199)))
    yield Kind("STUN with a bad cookie", lambda: of_strangers(bytes(20)))
    yield Kind("STUN of 1,504 B", lambda: of_strangers(stuffed(Method.BINDING, bytes(4)) + bytes(24)))
    yield Kind("STUN cut off", lambda: of_strangers(old_nonce(Client(new_server(), sources(1)[0]))[0][:-8]))
    yield Kind("a wrong FINGERPRINT over 1,480 B", lambda: of_strangers(with_wrong_fingerprint(long)))
    yield Kind("a response", lambda: of_strangers(encode(MessageClass.SUCCESS, Method.BINDING, bytes(12), [])))
    yield Kind("a Send indication", lambda: of_strangers(send))
    yield Kind("from port 0", lambda: of_strangers(bare(Method.BINDING), port=0))
    yield Kind("ChannelData of no channel", lambda: of_strangers(CHANNEL + b"\x00\xac" + PAYLOAD))
    yield Kind("ChannelData cut off", lambda: of_clients(cut_off, allocate=True))
    yield Kind("from a peer of no channel", lambda: of_peers(PeerAddress(("198.51.100.10", 1))))


def cut_off(client: Client) -> Arrival:
    """Write ChannelData that is shorter than it says."""
    return CHANNEL + b"\x00\xff" + PAYLOAD, client.address, 0, 0


def with_wrong_fingerprint(message: bytes) -> bytes:
    """Append a FINGERPRINT that does not hold."""
    return message[:2] + (len(message) - 12).to_bytes(2, "big") + message[4:] + b"\x80\x28\x00\x04" + bytes(4)


def of_requests() -> Iterable[Kind]:
    """Give requests that prove nothing."""
    allocate, binding = bare(Method.ALLOCATE, ALLOCATE), bare(Method.BINDING)
    named = bare(Method.ALLOCATE, ALLOCATE, (USERNAME, f"{int(NOW.unix)}:salt"))
    digits = bare(Method.ALLOCATE, (USERNAME, "1" * 506 + ":s"))
    yield Kind("Binding", lambda: of_strangers(binding))
    yield Kind("Binding, withheld", lambda: of_strangers(binding, withheld=True))
    yield Kind("Binding, 370 empty attributes", lambda: of_strangers(stuffed(Method.BINDING, b"\x80\x22\0\0")))
    yield Kind("Binding, 370 unknown attributes", lambda: of_strangers(stuffed(Method.BINDING, b"\x7f\x22\0\0")))
    yield Kind("Allocate without proof: 401", lambda: of_strangers(allocate))
    yield Kind("Allocate without proof, withheld", lambda: of_strangers(allocate, withheld=True))
    yield Kind("Allocate with a username only: signed 401", lambda: of_strangers(named))
    yield Kind("Allocate with a username of 506 digits", lambda: of_strangers(digits))
    yield Kind("a wrong nonce: signed 438", lambda: of_clients(old_nonce))
    yield Kind("a wrong nonce, withheld", lambda: of_clients(old_nonce, withheld=True))
    yield Kind(
        "a good nonce, a malformed username: 401",
        lambda: of_clients(lambda each: each.request(Method.ALLOCATE, ALLOCATE, username="nobody")),
    )
    yield Kind("a good nonce, a wrong password: signed 401", lambda: of_clients(wrong_password))
    yield Kind("a good nonce, a wrong password, withheld", lambda: of_clients(wrong_password, withheld=True))
    yield Kind("a wrong password over 1,480 B, withheld", lambda: of_clients(long_wrong_password, withheld=True))


def wrong_password(client: Client) -> Arrival:
    """Write a request that all is right with but the password."""
    return client.request(Method.REFRESH, REFRESH, key=b"wrong")


def long_wrong_password(client: Client) -> Arrival:
    """Write one that is as long as may be."""
    return client.request(Method.REFRESH, (NONCE, client.nonce), (NONCE, bytes(1250)), key=b"wrong")


def of_good() -> Iterable[Kind]:
    """Give what the relay is for."""
    frame = CHANNEL + len(PAYLOAD).to_bytes(2, "big") + PAYLOAD
    yield Kind("a packet to a peer", lambda: of_clients(lambda each: (frame, each.address, 0, 0), allocate=True), good=True)
    yield Kind("a packet to a client", lambda: of_peers(PEER), good=True)
    yield Kind("Refresh", lambda: of_clients(lambda each: each.request(Method.REFRESH, REFRESH), allocate=True), good=True)
    yield Kind(
        "ChannelBind", lambda: of_clients(lambda each: each.request(Method.CHANNEL_BIND, *BIND), allocate=True), good=True
    )
    yield Kind(
        "CreatePermission for 59 peers",
        lambda: of_clients(lambda each: each.request(Method.CREATE_PERMISSION, *PEERS), allocate=True),
        good=True,
    )
    yield Kind("Allocate, both halves", lambda: of_clients(lambda each: each.request(Method.ALLOCATE, ALLOCATE)), good=True)


def all_kinds() -> list[Kind]:
    """Give all of them, good ones first."""
    return [*of_good(), *of_no_form(), *of_requests()]


def cost(kind: Kind) -> float:
    """Give microseconds of CPU for a datagram: of the fastest round, as noise only adds."""
    least = float("inf")
    for _ in range(ROUNDS):
        server, arrivals, allocation = kind.load()
        if allocation is None:
            began = time.thread_time_ns()
            for each in arrivals:
                carry_out(server, each)
        else:
            began = time.thread_time_ns()
            for each in arrivals:
                server.handle_peer_arrival(allocation, each, NOW)
                server.drain()
        least = min(least, (time.thread_time_ns() - began) / len(arrivals) / 1000)
    return least


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--results",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    help="Where hostile.json goes.  [default: benchmarks/results]",
)
def main(*, directory: Path) -> None:
    """Measure what a datagram costs the core, by what is wrong with it."""
    kinds = all_kinds()
    costs = {kind.name: cost(kind) for kind in kinds}
    refresh = costs["Refresh"]
    table = Table("datagram", "µs", "÷ Refresh")
    for kind in kinds:
        name = f"[bold]{kind.name}[/bold]" if kind.good else kind.name
        table.add_row(name, f"{costs[kind.name]:.2f}", f"{costs[kind.name] / refresh:.2f}")
    Console(width=80, highlight=False).print(table)
    directory.mkdir(parents=True, exist_ok=True)
    written = {"machine": machine(None), "microseconds": {name: round(value, 2) for name, value in costs.items()}}
    (directory / "hostile.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main, "python -m benchmarks.hostile")
