"""Effect of one greedy client with valid credentials on other clients: ``python -m benchmarks.greedy``.

Each attack runs beside a victim, which sends 200 packets per second, and beside new clients, which allocate in a row. The
servers run with short lifetimes of channels and nonces, so that both can run out during a measurement.
"""

import contextlib
import random
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.clients import CHANNEL, Client, allocate, bind_channels, check_all, udp_socket
from benchmarks.flooding import source
from benchmarks.floods import PACE
from benchmarks.measure import MeasurementError, memory
from benchmarks.pinning import on, places
from benchmarks.servers import COTURN, RELAY, Server, coturn_server, loopback, relay_server, started
from relay.core.attributes import XOR_PEER_ADDRESS
from relay.core.stun import MessageClass, Method, encode

HONEST, TRAINS, SEGMENTS, DATAGRAMS, PERMISSIONS, PEERS, FORGED = 12_500, 128, 64, 60_000, 2000, 58, 3400
"""Packets of an honest client per second (20 Mbit/s); GSO trains in a burst, datagrams in a train, and per second;
CreatePermissions per second, and peers in each; requests in a client's name per second (1.3 Mbit/s)."""

MOST_CHANNELS, HOARDERS, SHORT = 4096, 20, 5
"""Channels and greedy clients; seconds of a short lifetime."""

SHORT_LIVES = "import relay.core.requests as r, relay.core.nonces as n; r.DEFAULT_LIFETIME, n.NONCE_LIFETIME = {}, {}; "
_UDP_SEGMENT = 103
_FORK = get_context("fork")
_SENT_AT = struct.Struct("=d")

Attack = Callable[[float, float], object]
"""Attacks from one moment to another, in monotonic seconds, and returns a remark. Its preparation is not measured."""


def every(seconds: float, since: float, until: float) -> Iterator[int]:
    """Yield numbers at a steady pace."""
    for number in range(int((until - since) / seconds)):
        time.sleep(max(0.0, since + number * seconds - time.monotonic()))
        yield number


def client_of(server: Server, number: int) -> tuple[Client, socket.socket]:
    """Return a client with an allocation and one channel, and its peer."""
    client, peer = Client(server, number), udp_socket(server.endpoints.peer[0])
    allocate([client])
    _refresh([client], 3600)
    bind_channels([client], peer.getsockname())
    return client, peer


def victim(server: Server) -> Attack:
    """Send packets; return the lost share and the delays in seconds."""
    client, peer = client_of(server, 1)
    peer.settimeout(0)
    head = struct.pack("!HH", CHANNEL, 172)

    def exchange(since: float, until: float) -> tuple[float, list[float]]:
        delays: list[float] = []
        count, sent = int((until - since) / PACE), 0
        while (now := time.monotonic()) < until + 1:
            due = since + sent * PACE if sent < count else until + 1
            if sent < count and now >= due:
                client.socket.send(head + _SENT_AT.pack(time.monotonic()) + bytes(164))
                sent += 1
            elif select.select([peer], [], [], max(0.0, due - now))[0]:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        delays.append(-_SENT_AT.unpack_from(peer.recv(2048))[0] + time.monotonic())
        return 1 - len(delays) / count, delays

    return exchange


def newcomers(server: Server, since: float, until: float) -> list[float]:
    """Allocate for new clients in a row; return the seconds of each."""
    taken: list[float] = []
    time.sleep(max(0.0, since - time.monotonic()))
    while time.monotonic() < until:
        began, client = time.monotonic(), Client(server, 100_000 + len(taken))
        with contextlib.suppress(MeasurementError):
            allocate([client])
        taken.append(time.monotonic() - began)
        _refresh([client], 0)
        client.close()
        time.sleep(0.02)
    return taken


def trains(server: Server, *, channels: int, size: int, segments: int = SEGMENTS) -> Attack:
    """Send bursts of packets or GSO trains, whose datagrams are of some channels in turn."""
    client, _ = client_of(server, 2)
    for number in range(1, channels):
        client.check_success(client.ask(client.bind((server.endpoints.peer[0], 6000 + number), CHANNEL + number)))
    train = b"".join(struct.pack("!HH", CHANNEL + n % channels, size) + bytes(size) for n in range(segments))
    control = [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", 4 + size))] if segments > 1 else []
    burst, rate = (TRAINS, DATAGRAMS / segments) if segments > 1 else (10, HONEST)

    def attack(since: float, until: float) -> None:
        for _ in every(burst / rate, since, until):
            for _ in range(burst):
                client.socket.sendmsg([train], control)

    return attack


def permissions(server: Server) -> Attack:
    """Request permissions for random peers."""
    client, _ = client_of(server, 2)
    of = [[f"{random.randrange(11, 99)}.{n >> 8}.{n & 255}.{peer}" for peer in range(PEERS)] for n in range(500)]
    made = [client.request(Method.CREATE_PERMISSION, [(XOR_PEER_ADDRESS, (host, 1)) for host in hosts]) for hosts in of]

    def attack(since: float, until: float) -> None:
        for n in every(1 / PERMISSIONS, since, until):
            client.socket.send(made[n % len(made)].data)

    return attack


def hoard(server: Server, *, deletes: bool) -> Attack:
    """Bind all channels of some credentials; then delete all at once, or let all allocations expire together."""
    clients = [Client(server, 10 + n) for n in range(HOARDERS)]
    allocate(clients)
    _refresh(clients, 3600)
    for client in clients:
        check_all((client, client.bind((f"203.0.{n >> 8}.{n & 255}", 9), CHANNEL + n)) for n in range(MOST_CHANNELS))

    def attack(since: float, _: float) -> None:
        time.sleep(max(0.0, since + 1 - time.monotonic()))
        _refresh(clients, 0 if deletes else SHORT)

    return attack


def replay(server: Server) -> Attack:
    """Repeat the Allocate of a client that has roamed, from its old address; return whether its new allocation lives."""
    old, new = Client(server, 3), Client(server, 3)
    for _ in range(2):
        request = old.allocate()
        if (response := old.ask(request)).message_class is MessageClass.ERROR:
            old.learn_nonce(response)
    allocate([new])

    def attack(since: float, until: float) -> str:
        for _ in every(0.01, since, until):
            old.socket.send(request.data)
        return "lives" if new.ask(new.refresh()).message_class is MessageClass.SUCCESS else "freed"

    return attack


def forged(server: Server) -> Attack:
    """Flood in the name of a client whose nonce is too old; return how many of its Refreshes get their 438."""
    client, _ = client_of(server, 3)
    old = [client.refresh().data for _ in range(30)]
    data = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), ())
    control = source(int.from_bytes(socket.inet_aton(server.endpoints.client_host), "big"))
    client.socket.settimeout(0)
    time.sleep(SHORT + 1)

    def attack(since: float, until: float) -> str:
        got, step = set(), int((until - since) * FORGED / len(old))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for n in every(1 / FORGED, since, until):
                with contextlib.suppress(OSError):
                    sock.sendmsg([data], control, 0, server.address)
                if n % step == 0 and n // step < len(old):
                    client.socket.send(old[n // step])
                with contextlib.suppress(BlockingIOError):
                    got.add(client.socket.recv(2048)[8:20])
        return f"{len(got & {each[8:20] for each in old})} of {len(old)} answered"

    return attack


def _refresh(clients: Sequence[Client], lifetime: int) -> None:
    for client in clients:
        client.socket.send(client.refresh(lifetime).data)


def forked(job: Callable[[], Any]) -> Callable[[], Any]:
    """Start a job in a process of its own; return the function that waits for its result, with EOFError after a failure."""
    here, there = _FORK.Pipe(duplex=False)
    _FORK.Process(target=lambda: there.send(job()), daemon=True).start()
    there.close()
    return here.recv


def run(server: Server, pid: int, prepare: Callable[[Server], Attack], seconds: float) -> Iterator[str]:
    """Measure an attack, and yield the cells of its row."""
    attack = prepare(server)
    since = time.monotonic() + 1
    jobs = [forked(partial(each, since, since + seconds)) for each in (victim(server), partial(newcomers, server), attack)]
    (lost, delays), taken, note = (each() for each in jobs)
    percentiles = quantiles(delays, n=100) if len(delays) > 1 else [float("nan")] * 99
    yield f"{lost:.2%}"
    yield from (f"{each * 1000:.2f}" for each in (percentiles[49], percentiles[98], max(delays, default=float("nan"))))
    times = sorted(taken) or [float("nan")]
    yield from (f"{each * 1000:.1f}" for each in (times[len(times) // 2], times[-1]))
    yield from (f"{len(taken) / seconds:.0f}", f"{memory(pid).resident / 1024:.0f}", str(note or ""))


ATTACKS: dict[str, Callable[[Server], Attack]] = {
    "nothing": lambda _: lambda _, __: None,
    "20 Mbit/s of one channel": partial(trains, channels=1, size=196, segments=1),
    "trains of one channel": partial(trains, channels=1, size=1),
    "trains of 8 channels": partial(trains, channels=8, size=0),
    f"CreatePermission for {PEERS} peers": permissions,
    f"{MOST_CHANNELS:,} channels of {HOARDERS} clients deleted": partial(hoard, deletes=True),
    f"{MOST_CHANNELS:,} channels of {HOARDERS} clients expire": partial(hoard, deletes=False),
    "an old Allocate repeated": replay,
    "requests in a client's name": forged,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seconds", default=8.0, type=click.FloatRange(1, 600), help="Duration of each attack.")
@click.option("--only", "names", multiple=True, help="Attacks whose name contains this text.")
@click.option("--coturn", is_flag=True, help="Attack coturn instead.")
def main(*, seconds: float, names: Sequence[str], coturn: bool) -> None:
    """Attack a relay of this checkout, and print the effect on other clients."""
    where, table = places(), Table("attack", "lost", "p50", "p99", "max", "alloc p50", "alloc max", "allocs/s", "MB", "")
    with tempfile.TemporaryDirectory(prefix="relay-greedy-") as name, on(where.load):
        for title, prepare in ATTACKS.items():
            if names and not any(each in title for each in names):
                continue
            ours = relay_server(Path(name), loopback(RELAY))
            lives = SHORT_LIVES.format(SHORT if "expire" in title else 600, SHORT if "name" in title else 3600)
            code = f"{lives}import sys; sys.argv = ['relay', *sys.argv[1:]]; from relay.__main__ import main; main()"
            ours = replace(ours, command=(ours.command[0], "-c", code, *ours.command[3:]))
            theirs = coturn_server(Path(name), loopback(COTURN), "--allow-loopback-peers") if coturn else None
            server = theirs or ours
            with started(server, where.server) as relay:
                table.add_row(title, *run(server, relay.pid, prepare, seconds))
    Console(width=150, highlight=False).print(table)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.greedy")
