"""Channels come and go while packets flow through other channels: packets reach only their receivers, and nothing leaks."""

import contextlib
import ctypes
import itertools
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import pytest

from relay.core.addresses import Family, SocketAddress, socket_address
from relay.offload import syscall
from relay.offload.layout import CHANNEL, END, packed_address
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.model import End
from tests.support.offload.relays import MODES, Lab, Running, Talk, running
from tests.support.offload.stream import Stream
from tests.support.offload.tables import entries, read
from tests.support.offload.topology import PEER, row
from tests.support.requirements import needs_ipv6
from tests.support.turn_client import TIMEOUT, TurnClient

pytestmark = [needs_bpf, needs_ipv6, pytest.mark.usefixtures("object_file")]

SECONDS: Final = 1.0
ROUNDS: Final = 6
"""Minimum of seconds and of rounds of a churner."""
CHURNERS: Final = 3
PEERS: Final = 3
PORTS: Final = ("--lowest-port", "50000", "--highest-port", "50015")
"""Few ports, so that each is reused many times."""

LATE: Final = b"late"
TRIES, PATIENCE = 20, 0.3

_HASH: Final = 1
_GET_FD_BY_ID: Final = 14


@pytest.fixture(params=MODES)
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    with row() as network:
        network.know_all()
        with running(network.relay, tmp_path, request.param, *PORTS) as relay:
            yield Lab(network, relay, request.param)


@contextlib.contextmanager
def opened_map(map_id: int) -> Iterator[int]:
    """Open a map of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.create_string_buffer(struct.pack("=III", map_id, 0, 0), 64)
    fd = libc.syscall(syscall.NUMBER, _GET_FD_BY_ID, argument, 64)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    try:
        yield fd
    finally:
        os.close(fd)


class Tables:
    """The kernel's tables of channels."""

    def __init__(self, relay: Running) -> None:
        found: dict[int, int] = {}
        for each in Path(f"/proc/{relay.program.process.pid}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):
                facts = dict(re.findall(r"(map_type|value_size|map_id):\s+(\d+)", each.read_text()))
                if facts.get("map_type") == str(_HASH) and facts["value_size"] == str(CHANNEL.size):
                    found[int(each.name)] = int(facts["map_id"])
        # In the order of program.c.
        self._clients, self._peers = (found[fd] for fd in sorted(found))

    def ends(self) -> set[tuple[End, End]]:
        """Return the two ends of each channel."""
        with opened_map(self._clients) as clients, opened_map(self._peers) as peers:
            channels = read(*(entries(fd, END.size, CHANNEL.size) for fd in (clients, peers)))
        return {(each.client, each.peer) for each in channels.values()}


class Bound(NamedTuple):
    """A channel."""

    client: SocketAddress
    number: int
    peer: SocketAddress
    relayed: SocketAddress

    @property
    def ends(self) -> tuple[End, End]:
        """The ends in the format of the tables."""
        return (
            (packed_address(self.client[0]), self.client[1], self.number),
            (packed_address(self.peer[0]), self.peer[1], self.relayed[1]),
        )


def late(peer: SocketAddress, relayed: SocketAddress) -> bytes:
    return LATE + repr((peer[:2], relayed[:2])).encode()


class Churner:
    """A client that repeatedly allocates, binds, sends and frees, with equal numbers and changing peers.

    Each message names its allocation and its peer, and each receiver checks both.
    """

    def __init__(self, lab: Lab, place: int) -> None:
        family = list(Family)[place % 2]
        self.client: TurnClient = lab.relay.client(lab.network.client, family)
        families = itertools.islice(itertools.cycle(Family), place, place + PEERS)
        self._peers = [lab.network.peer.udp(PEER[each]) for each in families]
        self._offsets = itertools.cycle((0, 1, 2, 1, 0, 2))
        self.rounds = 0
        self.exchanged = 0
        self._repeated: set[bytes] = set()
        for each in self._peers:
            each.settimeout(PATIENCE)
        self.failure: BaseException | None = None
        self.bound: list[Bound] = []
        self._thread = threading.Thread(target=self._run)
        self._until = time.monotonic() + SECONDS

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self.client.socket.close()
        for each in self._peers:
            each.close()

    def join(self) -> None:
        """Wait for the end of the thread, and raise its failure."""
        self._thread.join()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            while time.monotonic() < self._until or self.rounds < ROUNDS:
                self._round()
                self.rounds += 1
        except BaseException as failure:  # noqa: BLE001 - raised in the waiting thread
            self.failure = failure

    def _round(self) -> None:
        if self.bound:
            assert self.client.refresh(0) is None
            self._send_late()
        relayed = {Family.IPV6 if ":" in each[0] else Family.IPV4: each for each in self.client.allocate(dual=True)}
        offset = next(self._offsets)
        self.bound = []
        for place in range(PEERS):
            peer = self._peers[(place + offset) % PEERS]
            host, port, *_ = peer.getsockname()
            own = relayed[Family.IPV6 if ":" in host else Family.IPV4]
            bound = Bound(self.client.address, 0x4000 + place, socket_address(host, port), own)
            assert self.client.bind_channel(bound.number, bound.peer) is None
            self.bound.append(bound)
            for _ in range(3):
                self._exchange(bound, peer)

    def _send_late(self) -> None:
        """Let peers send to ended allocations, whose ports may belong to a new allocation by now."""
        for bound in self.bound:
            for peer in self._peers:
                if (":" in peer.getsockname()[0]) == (":" in bound.relayed[0]):
                    peer.sendto(late(peer.getsockname(), bound.relayed), bound.relayed[:2])

    def _exchange(self, bound: Bound, peer: socket.socket) -> None:
        text = repr((bound, self.rounds, self.exchanged)).encode()
        self._deliver(
            b"to the peer" + text,
            lambda data: self.client.send(bound.number, data),
            lambda: peer.recvfrom(2000),
            lambda data, source: source[:2] == bound.relayed[:2] and data.startswith(b"to the peer"),
        )
        self._deliver(
            b"to the client" + text,
            lambda data: peer.sendto(data, bound.relayed[:2]),
            self._receive,
            lambda _, number: number == bound.number,
        )

    def _deliver(
        self,
        data: bytes,
        send: Callable[[bytes], object],
        receive: Callable[[], tuple[bytes, Any]],
        is_right: Callable[[bytes, Any], bool],
    ) -> None:
        """Send a message until it arrives: on a busy machine the sockets drop packets."""
        for _ in range(TRIES):
            send(data)
            with contextlib.suppress(TimeoutError):
                while True:
                    found, origin = receive()
                    if found == data:
                        assert is_right(found, origin), origin
                        self.exchanged += 1
                        return
                    assert found in self._repeated, found
            self._repeated.add(data)
        pytest.fail(f"it does not arrive: {data!r}")

    def _receive(self) -> tuple[bytes, int]:
        """Return the client's next message and its channel."""
        self.client.socket.settimeout(PATIENCE)
        try:
            return self._read()
        finally:
            self.client.socket.settimeout(TIMEOUT)

    def _read(self) -> tuple[bytes, int]:
        while True:
            number, data = self.client.receive()
            if not data.startswith(LATE):
                return data, number
            (channel,) = (each for each in self.bound if each.number == number)
            assert data == late(channel.peer, channel.relayed), "from a peer that it has bound, to the port that it has"


def bound_by(way: Talk) -> Bound:
    host, port, *_ = way.peer.getsockname()
    return Bound(way.client.address, way.number, socket_address(host, port), way.relayed)


def test_churn_causes_no_loss_and_leaves_the_tables_correct(lab: Lab) -> None:
    network, relay, _ = lab
    tables = Tables(relay)
    with contextlib.ExitStack() as stack:
        steady = []
        for one, other in ((Family.IPV4, Family.IPV4), (Family.IPV6, Family.IPV4)):
            client = stack.enter_context(relay.client(network.client, one))
            steady.append(Talk(relay, client, stack.enter_context(network.peer.udp(PEER[other]))))
            steady[-1].wait_for_kernel()
        with contextlib.ExitStack() as flowing:
            streams = [flowing.enter_context(Stream(each, per_second=400)) for each in steady]
            churners = [stack.enter_context(Churner(lab, place)) for place in range(CHURNERS)]
            for each in churners:
                each.join()
        assert [(stream.lost(), stream.doubled()) for stream in streams] == [(0, 0)] * len(streams)
        exchanged = sum(churner.exchanged for churner in churners) + sum(stream.arrived for stream in streams)
        assert sum(relay.counts()[:2]) > 0.9 * exchanged, "the kernel has relayed most of it"
        check_tables(relay, tables, [*map(bound_by, steady), *(bound for churner in churners for bound in churner.bound)])
        for client in (*(way.client for way in steady), *(churner.client for churner in churners)):
            assert client.refresh(0) is None
        check_tables(relay, tables, [])


def check_tables(relay: Running, tables: Tables, expected: list[Bound]) -> None:
    """Check that the kernel has exactly these channels."""
    assert tables.ends() == {each.ends for each in expected}
    state = relay.state()
    assert (state["xdp_channels"], state["xdp_table_failures"], state["xdp_channels_refused"]) == (len(expected), 0, 0)
