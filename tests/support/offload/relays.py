"""A running relay with offload, its clients, and its counters."""

import contextlib
import http.client
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from relay.core.addresses import Family, SocketAddress, socket_address
from relay.core.credentials import Credential, RelaySecret, mint
from tests.support.machine import put_first
from tests.support.offload.topology import CLIENT, PEER, RELAY, Host, Row
from tests.support.program import Program
from tests.support.turn_client import TurnClient
from tests.support.udp import SO_RCVBUFFORCE

SECRET: Final = "secret of those in the kernel"
SERVICE: Final = 3478
WITHIN: Final = 10.0
"""Timeout in seconds for following changes of the network: an idle machine needs less than 0.5 s."""

MODES: Final = ("generic", "driver")


def credential() -> Credential:
    """Return a unique credential."""
    return mint(RelaySecret(SECRET), int(time.time()) + 86400, os.urandom(8).hex())


class Counts(NamedTuple):
    """The kernel's counters."""

    to_peer: int
    to_client: int
    passed: Counter[str]

    def since(self, before: "Counts") -> "Counts":
        return Counts(self.to_peer - before.to_peer, self.to_client - before.to_client, self.passed - before.passed)


class Offloading:
    """A relay on a machine, and its control address.

    Args:
        host: the machine.
        control: host and port.
    """

    def __init__(self, host: Host, control: tuple[str, int]) -> None:
        self.host = host
        self.control = control

    @property
    def log(self) -> str:
        """Return the log, as far as available."""
        return ""

    def ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        """Return a JSON response of the control address."""
        body: dict[str, Any] = json.loads(self.read(path, method))
        return body

    def read(self, path: str, method: str = "GET") -> bytes:
        """Return a response of the control address."""
        with self.host.entered():
            connection = http.client.HTTPConnection(*self.control, timeout=30)
            connection.connect()
        with contextlib.closing(connection):
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == http.client.OK, body
            return body

    def state(self) -> dict[str, Any]:
        return self.ask("/offload")

    def counts(self) -> Counts:
        state = self.state()
        packets = state["xdp_packets"]
        return Counts(packets["to_peer"], packets["to_client"], Counter(state["xdp_passed"]))

    def attach(self) -> dict[str, Any]:
        return self.ask("/offload/attach", "POST")

    def detach(self) -> dict[str, Any]:
        return self.ask("/offload/detach", "POST")

    def client(self, at: Host, family: Family = Family.IPV4, host: str | None = None) -> TurnClient:
        """Make a client on some machine."""
        with at.entered():
            made = TurnClient((RELAY[family], SERVICE), credential(), host or CLIENT[family])
        made.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        return made


class Running(Offloading):
    """A relay in a process of its own."""

    def __init__(self, host: Host, program: Program) -> None:
        found = re.search(r"control=(\S+):(\d+)", program.log)
        assert found, program.log
        super().__init__(host, (found[1], int(found[2])))
        self.program = program

    @property
    def log(self) -> str:
        return self.program.log

    def dropped(self) -> int:
        """Return the number of packets dropped by sockets and threads so far."""
        return self.program.dropped()


@contextlib.contextmanager
def running(
    host: Host,
    folder: Path,
    mode: str,
    *options: str,
    links: str = "r0,r1",
    public: Sequence[str] = tuple(RELAY.values()),
    by: tuple[str, ...] = (),
) -> Iterator[Running]:
    """Start a relay on a machine, and stop the relay at the end of the context."""
    secret = folder / "secret"
    secret.write_text(SECRET)
    with host.entered():
        program = Program(
            *("--relay-secret-file", str(secret), "--ebpf-offloading", links, "--ebpf-attach-mode", mode),
            *("--health-check-addr", "127.0.0.1:0", *options),
            hosts=tuple(public),
            by=by,
        )
    try:
        program.wait_until_ready()
        put_first(program.process.pid)
        relay = Running(host, program)
        assert relay.state()["xdp_attached"] == dict.fromkeys(links.split(","), "driver" if mode == "auto" else mode)
        yield relay
        assert program.process.poll() is not None or program.stop() == 0
    finally:
        program.close()
    assert "Traceback" not in program.log, program.log
    assert "xdp" not in host.links(), "the program stays behind"


class Lab(NamedTuple):
    """A relay with a client and a peer, with known neighbours."""

    network: Row
    relay: Running
    mode: str


class Talk:
    """A client with a channel to a peer."""

    def __init__(
        self,
        relay: Offloading,
        client: TurnClient,
        peer: socket.socket,
        relayed: SocketAddress | None = None,
        number: int = 0x4123,
    ) -> None:
        """Bind the channel, in a new allocation if the client has none to give."""
        self.relay = relay
        self.client = client
        self.peer = peer
        family = Family.IPV6 if peer.family == socket.AF_INET6 else Family.IPV4
        self.relayed: SocketAddress = relayed or client.allocate(family=family)[0]
        self.number = number
        host, port, *_ = peer.getsockname()
        assert client.bind_channel(self.number, socket_address(host, port)) is None

    def to_peer(self, payload: bytes) -> None:
        """Relay a packet, and check its arrival."""
        self.client.send(self.number, payload)
        data, source = self.peer.recvfrom(65535)
        assert (data, source[:2]) == (payload, self.relayed[:2])

    def to_client(self, payload: bytes) -> None:
        self.peer.sendto(payload, self.relayed[:2])
        assert self.client.receive() == (self.number, payload)

    def both(self, payload: bytes = bytes(range(100))) -> None:
        self.to_peer(payload)
        self.to_client(payload)

    def wait_for_kernel(self, seconds: float = WITHIN) -> None:
        """Go on until the kernel relays, both ways."""

        until = time.monotonic() + seconds
        while True:
            before = self.by_kernel()
            self.both()
            after = self.by_kernel()
            if all(later > earlier for earlier, later in zip(before, after, strict=True)):
                return
            assert time.monotonic() < until, f"not relayed: {after}\n{self.relay.state()}\n{self.relay.log}"

    def by_kernel(self) -> tuple[int, int]:
        """Return the number of packets relayed by the kernel, to the peer and to the client."""
        host, port = self.client.address
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        used = self.relay.ask("/offload/channels")["clients"].get(shown, {}).get(f"{self.number:#06x}")
        return (used["to_peer"]["packets"], used["to_client"]["packets"]) if used else (0, 0)


@contextlib.contextmanager
def talk(relay: Offloading, network: Row, families: tuple[Family, Family] = (Family.IPV4, Family.IPV4)) -> Iterator[Talk]:
    """Exchange packets of these families between client and peer until the kernel relays them."""
    with relay.client(network.client, families[0]) as client, network.peer.udp(PEER[families[1]]) as peer:
        made = Talk(relay, client, peer)
        made.wait_for_kernel()
        yield made
