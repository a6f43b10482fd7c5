"""A minimal relay: the core's `Server`, with a single thread that executes its commands on real sockets."""

import contextlib
import random
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_network
from typing import Self

from relay.core.addresses import AllocationId, ClientAddress, Family, PeerAddress
from relay.core.commands import BindPort, Command, FreeAllocation, SendToClient, SendToPeer
from relay.core.config import ServerConfig
from relay.core.credentials import RelaySecret
from relay.core.lifecycle import BindRefusal
from relay.core.peers import PeerPolicy
from relay.core.server import Server
from relay.core.timestamp import Timestamp

HOSTS = {Family.IPV4: "127.0.0.1", Family.IPV6: "::1"}
SECRET = RelaySecret("a secret of tests")
PORTS = range(61000, 64000)

Edit = Callable[[Command], Iterable[Command]]


def open_udp(family: Family, port: int = 0) -> socket.socket:
    opened = socket.socket(socket.AF_INET if family is Family.IPV4 else socket.AF_INET6, socket.SOCK_DGRAM)
    try:
        opened.bind((HOSTS[family], port))
    except OSError:
        opened.close()
        raise
    opened.settimeout(0)
    return opened


class Shell:
    """Runs inside ``with``. ``edit`` may drop, change or add commands of the server."""

    def __init__(
        self, families: Iterable[Family], *, peers_allowed: bool = True, loops_allowed: bool = True, edit: Edit | None = None
    ) -> None:
        hosts = {family: HOSTS[family] for family in families}
        addresses = frozenset(HOSTS.values())
        policy = PeerPolicy(
            relay_addresses=addresses,
            relayed_ports=PORTS if loops_allowed else range(0),
            public_addresses=addresses,
            allow=(ip_network("127.0.0.0/8"), ip_network("::1/128")) if peers_allowed else (),
        )
        self.server = Server(ServerConfig(SECRET, hosts, PORTS, policy, 100, "shell"), random.SystemRandom())
        self.edit: Edit = edit or (lambda command: (command,))
        self.error: Exception | None = None
        self.port = 0
        self._families = tuple(hosts)
        self._selector = selectors.DefaultSelector()
        self._service: dict[Family, socket.socket] = {}
        self._relayed: dict[tuple[AllocationId, Family], socket.socket] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._open_service()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        for each in (*self._service.values(), *self._relayed.values()):
            each.close()
        self._selector.close()
        if self.error is not None:
            raise self.error

    def _open_service(self) -> None:
        """Bind the same port for all families."""
        for _ in range(50):
            first, *others = self._families
            self._service[first] = open_udp(first)
            self.port = self._service[first].getsockname()[1]
            try:
                for family in others:
                    self._service[family] = open_udp(family, self.port)
            except OSError:
                self._service.pop(first).close()
                continue
            for family, each in self._service.items():
                self._selector.register(each, selectors.EVENT_READ, (None, family))
            return
        raise OSError("no port is free for both families")

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                for key, _ in self._selector.select(0.02):
                    self._receive(key.fileobj, key.data[0])  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - raised again in __exit__
            self.error = error

    def _receive(self, source: socket.socket, allocation: AllocationId | None) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
            while source.fileno() >= 0:
                data, sender = source.recvfrom(0xFFFF)
                now = Timestamp(time.monotonic(), time.time())
                if allocation is None:
                    relayed: Command | None = self.server.handle_client_datagram((data, sender, 0, 0), now)
                else:
                    relayed = self.server.handle_peer_datagram((data, sender, 0, 0), now.monotonic, allocation)
                self._carry_out(now, [] if relayed is None else [relayed])

    def _carry_out(self, now: Timestamp, returned: Sequence[Command] = ()) -> None:
        while commands := [*returned, *self.server.drain()]:
            returned = ()
            for command in (each for original in commands for each in self.edit(original)):
                if isinstance(command, SendToClient):
                    self._send(self._service[_family(command.client)], command.data, command.client)
                elif isinstance(command, SendToPeer):
                    self._send(self._relayed[command.allocation, _family(command.peer)], command.data, command.peer)
                elif isinstance(command, BindPort):
                    self._bind(command, now)
                elif isinstance(command, FreeAllocation):
                    self._free(command)

    def _send(self, source: socket.socket, data: bytes, to: ClientAddress | PeerAddress) -> None:
        with contextlib.suppress(OSError):
            source.sendto(data, to)

    def _bind(self, command: BindPort, now: Timestamp) -> None:
        opened: dict[Family, socket.socket] = {}
        try:
            for family in command.families:
                opened[family] = open_udp(family, command.port)
        except OSError:
            for each in opened.values():
                each.close()
            self.server.handle_bind_refused(command.allocation, BindRefusal.PORT, now)
            return
        for family, each in opened.items():
            self._relayed[command.allocation, family] = each
            self._selector.register(each, selectors.EVENT_READ, (command.allocation, family))
        self.server.handle_bound(command.allocation, now)

    def _free(self, command: FreeAllocation) -> None:
        for family in Family:
            each = self._relayed.pop((command.allocation, family), None)
            if each is not None:
                self._selector.unregister(each)
                each.close()


def _family(address: ClientAddress | PeerAddress) -> Family:
    return Family.IPV6 if ":" in address[0] else Family.IPV4
