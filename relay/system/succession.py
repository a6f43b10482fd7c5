"""Take a running relay over, by the protocol in `relay.system.handover`."""

import contextlib
import functools
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import pykka

from relay.actors.handover import InheritedReader
from relay.actors.messages import NO_LINKS, ClientDatagrams, Execute, OffloadedLinks, PeerDatagrams
from relay.actors.readers import RelayedSockets
from relay.actors.server import ServerActor
from relay.actors.sockets import AllocationHandle
from relay.config import Config, UsageError
from relay.core.addresses import AllocationId, Family, RelayedPort, family_of
from relay.core.handover import FORMAT
from relay.core.server import Server
from relay.logger import Logger
from relay.net.asked import AskedAddresses
from relay.net.handover import HandoverError, HandoverLink, Message, close_all, network_of
from relay.net.many import ManyReceiver
from relay.net.reuseport import ReuseportGroup
from relay.net.udp import ADDRESS_FAMILIES, UdpCounters, UdpSocket
from relay.ops.systemd import Systemd
from relay.ops.totals import Handovers
from relay.system.announcement import Announcement

READABLE: Final = frozenset((FORMAT,))
"""Readable formats of the state."""

PREPARATION: Final = 30.0
"""Seconds until the successor must be ready. Meanwhile the relay goes on as always."""

SUCCESSION: Final = 30.0
"""Seconds for which the relay stays in the portal's presence until the successor has joined."""

_log = Logger("relay.system.handover")


def settings_of(config: Config, hosts: Mapping[Family, str]) -> dict[str, object]:
    """Return the settings that a successor must share, with a name for each."""
    return {
        "public addresses": list(config.public_hosts.values()),
        "bound addresses": list(hosts.values()),
        "health address": str(config.health),
        "control address": str(config.control),
        "metrics address": config.metrics and str(config.metrics),
        "portal": None if config.portal is None else config.portal.url.text,
    }


class Inheritance:
    """A running relay, taken over by this process.

    Args:
        link: the connection.
        offer: the content of its offer.
        token: the token of decision.
        relays: a descriptor to write to when this process relays.
    """

    def __init__(self, link: HandoverLink, offer: dict[str, Any], token: int, relays: int | None) -> None:
        self._link = link
        self._relays = relays
        self._token = token
        self.secret: str = offer["secret"]
        self.portal_token: str | None = offer["token"]
        self.systemd: dict[str, str] = offer["systemd"]
        self.predecessor: str = offer["version"]
        self.handovers = Handovers(offer["handovers"] + 1)
        self.groups: dict[Family, ReuseportGroup] = {}
        self.allocations: dict[AllocationId, AllocationHandle] = {}
        self.receiver: ManyReceiver[AllocationId | None] = ManyReceiver()
        """Reads all sockets, from the decision on."""
        self.pages: dict[str, list[socket.socket]] = {}
        self._links = NO_LINKS
        self._asked: dict[AllocationId, str | None] = {}

    def receive(self, config: Config, hosts: Mapping[Family, str], core: Server, counters: UdpCounters, limit: int) -> None:
        """Receive the sockets and the state.

        Raises:
            UsageError: the relay refuses, or is gone.
        """
        with self._failure_explained():
            self._say_hello(config, hosts, limit)
            self._receive_until("ready?", core, counters)
            self.receiver.add(None, [each for group in self.groups.values() for each in group.all])

    def decide(self, core: Server, counters: UdpCounters, complete: Callable[[], None]) -> None:
        """Receive the last changes, and decide: afterwards this process relays.

        Args:
            core: the core.
            counters: the counters of the sockets.
            complete: prepares the relay for the state of the core.

        Raises:
            UsageError: the relay is gone, or went on alone.
        """
        with self._failure_explained():
            self._link.send("ready")
            core.handover.read_rest(self._receive_until("rest", core, counters))
            for id_ in self.allocations.keys() - core.allocations.by_id.keys():
                self.receiver.remove(id_)
                self.allocations.pop(id_).sockets.close()
            complete()
            os.eventfd_read(self._token)

    @contextlib.contextmanager
    def _failure_explained(self) -> Iterator[None]:
        try:
            yield
        except (HandoverError, TimeoutError, BlockingIOError, OSError, LookupError, TypeError, ValueError) as error:
            reason = "it did not wait any longer" if isinstance(error, BlockingIOError) else str(error) or "it is too slow"
            self.close()
            raise UsageError(f"can't take over the running relay: {reason}") from error

    def restore(self, asked: AskedAddresses, family: Family, core: Server) -> None:
        """Restore the addresses asked by the clients of a family."""
        for id_, host in self._asked.items():
            allocation = core.allocations.by_id.get(id_)
            if host is not None and allocation is not None and family_of(allocation.client) is family:
                asked.put(allocation.client, socket.inet_pton(ADDRESS_FAMILIES[family], host))

    def close(self) -> None:
        """Close everything. The running relay goes on."""
        for group in self.groups.values():
            for opened in group.all:
                opened.close()
        for handle in self.allocations.values():
            handle.sockets.close()
        for each in itertools.chain(*self.pages.values()):
            each.close()
        close_all(self._links.descriptors)
        self._link.close()

    def take_links(self) -> OffloadedLinks:
        """Return the interfaces with the predecessor's XDP program. The caller closes the descriptors."""
        links, self._links = self._links, NO_LINKS
        return links

    def follow(self, server: pykka.ActorRef[ServerActor], systemd: Systemd, reader: InheritedReader) -> None:
        """Tell the running relay that this process relays, and receive its last packets, in a thread."""
        # If the running relay has ended, this process relays all the more.
        with contextlib.suppress(HandoverError, TimeoutError):
            self._link.send("relaying")
        if self._relays is not None:
            os.write(self._relays, b"1")
            os.close(self._relays)
        threading.Thread(target=self._follow, args=(server, systemd, reader), name="handover", daemon=True).start()

    def joined(self) -> None:
        """Tell the running relay that the portal has this process."""
        with contextlib.suppress(HandoverError, TimeoutError):
            self._link.send("joined")

    def _follow(self, server: pykka.ActorRef[ServerActor], systemd: Systemd, reader: InheritedReader) -> None:
        try:
            while (message := self._link.receive("stray", "retired", "go", timeout=SUCCESSION)).kind != "go":
                if message.kind == "stray":
                    server.tell(_stray(*message.content))
                else:
                    self._end_of_predecessor(server, *message.content)
                    reader.predecessor_left()
        except (HandoverError, TimeoutError, TypeError, ValueError, pykka.ActorDeadError) as error:
            _log.warning("the former relay ended early", reason=str(error))
            reader.predecessor_left()
        systemd.ready("answering clients")

    def _end_of_predecessor(self, server: pykka.ActorRef[ServerActor], waited: float, counts: list[Any]) -> None:
        self.handovers = self.handovers._replace(requests_waited=waited)
        server.ask(Execute(functools.partial(_add_counts, rows=counts)))
        _log.info(
            "taken over",
            version=self.predecessor,
            allocations=len(self.allocations),
            requests_waited=round(waited, 4),
        )

    def _say_hello(self, config: Config, hosts: Mapping[Family, str], limit: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            network = network_of(probe)
        self._link.send(
            "hello",
            {
                "settings": settings_of(config, hosts),
                "ports": [config.lowest_port, config.highest_port],
                "network": network,
                "now": time.monotonic(),
                "descriptors": limit,
            },
        )

    def _receive_until(self, last: str, core: Server, counters: UdpCounters) -> Any:  # noqa: ANN401 - plain data
        """Receive everything up to a message, and return the content of this message."""
        while True:
            message = self._link.receive("group", "pages", "links", "some", "replays", last, timeout=PREPARATION)
            match message.kind:
                case "links":
                    self._links = OffloadedLinks(message.content, message.descriptors)
                case "group":
                    self._adopt_group(message, counters)
                case "pages":
                    left = iter(message.descriptors)
                    self.pages = {
                        name: [socket.socket(fileno=next(left)) for _ in range(count)] for name, count in message.content
                    }
                case "some":
                    self._adopt(message.content["sockets"], message.descriptors, counters)
                    core.handover.read_allocations(message.content["rows"])
                    self._link.send("some")
                case "replays":
                    core.handover.read_replays(message.content)
                case _:
                    return message.content

    def _adopt_group(self, message: Message, counters: UdpCounters) -> None:
        family, has_rest = Family(message.content[0]), message.content[1]
        sockets = tuple(UdpSocket(family, "", 0, counters, descriptor=each) for each in message.descriptors)
        self.groups[family] = ReuseportGroup(sockets[:-1], sockets[-1]) if has_rest else ReuseportGroup(sockets, None)

    def _adopt(self, allocations: list[Any], descriptors: list[int], counters: UdpCounters) -> None:
        left = iter(descriptors)
        for id_, port, families, asked in allocations:
            self._asked[id_] = asked
            sockets = {Family(each): UdpSocket(Family(each), "", 0, counters, descriptor=next(left)) for each in families}
            self.allocations[id_] = AllocationHandle.of(RelayedSockets(RelayedPort(port), sockets))
            self.receiver.add(id_, sockets.values())


def _stray(allocation: int | None, batch: list[Any]) -> ClientDatagrams | PeerDatagrams:
    datagrams = [(bytes.fromhex(data), tuple(address), *more) for data, address, *more in batch]
    return ClientDatagrams(datagrams) if allocation is None else PeerDatagrams(datagrams, AllocationId(allocation))


def _add_counts(actor: ServerActor, rows: list[Any]) -> None:
    actor.core.handover.add_counts(rows)


def take_over(announcement: Announcement) -> Inheritance | None:
    """Return the offer of the running relay; None if no relay runs.

    Raises:
        UsageError: the running relay can't be taken over.
    """
    link = announcement.link
    if link is None:
        return None
    try:
        _, offer, (token,) = link.receive("offer")
        inheritance = Inheritance(link, offer, token, announcement.relays)
    except (HandoverError, TimeoutError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"can't take over the running relay: {str(error) or 'it does not answer'}") from error
    if not link.is_of_same_user():
        raise UsageError("can't take over the running relay: it runs as another user")
    if offer["format"] not in READABLE:
        raise UsageError(f"can't take over the running relay: version {offer['version']} has another format of the state")
    return inheritance
