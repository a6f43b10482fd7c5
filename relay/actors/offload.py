"""Keeps the kernel's data path in step with the network: next hops, interfaces, this machine's addresses."""

import contextlib
import math
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, cast

import pykka
import structlog

from relay.actors.actor import Actor, FailureListener
from relay.actors.clock import Clock
from relay.actors.inbox import TimedInbox
from relay.actors.messages import Failed, Tick
from relay.core.addresses import Family
from relay.core.commands import OFFLOAD_COMMANDS, Command
from relay.offload.datapath import Datapath, asking, usage_by_client
from relay.offload.layout import OWN_ADDRESSES, packed_address
from relay.offload.netlink import Monitor, Network
from relay.offload.network import AddressesChanged, Link, LinkNews, NeighbourNews, News, Overrun, RoutesChanged
from relay.offload.next_hops import NextHops, own_addresses
from relay.ops.logs.lines import exception_words
from relay.ops.threads import yield_cpu

ROUTES_REST: Final = 0.25
"""Seconds from one time that all routes are asked for to the next: 16,000 take 0.15 s, and some machines get new routes all
the time."""

STOP_TIMEOUT: Final = 0.5
"""Seconds for each of the two to end."""

SWITCH_TIMEOUT: Final = 5.0
"""Seconds for an operator to wait. To attach takes some milliseconds, with drivers that restart their queues a second."""

ROUTES_LIFETIME: Final = 30.0
"""Seconds after which all routes are asked for without news: of paths that were found to be narrow, and of routers that sent
us to another, there is none."""

_PORTION: Final = 256
"""Routes asked for and entries written before packets get their chance."""

_UNSPECIFIED: Final = frozenset(("0.0.0.0", "::"))  # noqa: S104 - what sockets are bound to

_log = structlog.get_logger("relay.actors.offload")


class Followed(NamedTuple):
    """Destinations are needed from now on, or no longer."""

    changes: dict[int, str | None]


class KernelNews(NamedTuple):
    """The kernel says what has changed in its network."""

    news: list[News]


class SwitchOffload(NamedTuple):
    """Attach the program to the interfaces, or take it from them. The answer is whether that went well."""

    attached: bool


class OffloadActor(Actor):
    """Writes where packets go next, and attaches and detaches the program.

    Args:
        datapath: what it keeps.
        hosts: where the relay's sockets are bound, by family.
        clock: for the rest between two rounds of asking for routes.
        failed: hears of its failure.
    """

    def __init__(self, datapath: Datapath, hosts: Mapping[Family, str], clock: Clock, failed: FailureListener) -> None:
        super().__init__("offload", failed)
        self._datapath = datapath
        # None leaves the choice to the kernel, as with a socket that is bound to all addresses.
        self._sources = {family: None if host in _UNSPECIFIED else host for family, host in hosts.items()}
        self._clock = clock
        self._inbox = cast(TimedInbox, self.actor_inbox)
        self._next_hops = NextHops()
        self._links: dict[int, Link] = {}
        self._wanted = True
        self._asked_at = -math.inf
        self._network = Network()
        self._inputs: dict[type, Callable[[Any], object]] = {
            Followed: lambda told: self._follow(told.changes),
            KernelNews: lambda told: self._hear(told.news),
            SwitchOffload: lambda told: self._switch(attached=told.attached),
            Tick: lambda _: self._ask_for_routes(),
            Failed: _raise,
        }

    @staticmethod
    def _create_actor_inbox() -> Any:  # noqa: ANN401 - pykka's protocol for it is private
        return TimedInbox()

    def on_start(self) -> None:
        """See what there is."""
        try:
            self._look_around()
        except Exception:
            # Pykka calls that for a message only.
            self.on_failure(*sys.exc_info())
            raise

    def on_receive(self, message: object) -> object:
        """Take one message, and write what follows from it."""
        try:
            answer = self._inputs[type(message)](message)
            self._write()
        except Exception as error:
            if not isinstance(message, SwitchOffload):
                raise
            # Or whoever asks for it would get the failure, and nobody else hear of it.
            self.actor_ref.tell(Failed(error))
            return False
        return answer

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - what sys.exc_info() gives
        """Have the sockets relay everything, since nobody keeps the next hops; and tell the supervisor."""
        self._datapath.detach()
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Ask the kernel nothing any more."""
        self._network.close()

    def _look_around(self) -> None:
        """Take in all that the kernel has, instead of what it said before."""
        links = self._network.links()
        self._links = {each.ifindex: each for each in links}
        self._next_hops.replace(links, self._network.neighbours())
        self._attach()
        self._write()

    def _follow(self, changes: dict[int, str | None]) -> None:
        for entry, host in changes.items():
            if host is None:
                self._next_hops.unfollow(entry)
            else:
                family = Family.IPV6 if ":" in host else Family.IPV4
                self._next_hops.follow(entry, host, self._sources.get(family))

    def _hear(self, news: list[News]) -> None:
        addresses = routes = False
        for each in news:
            match each:
                case NeighbourNews():
                    self._next_hops.neighbour(each)
                case LinkNews():
                    routes |= self._take_link(each)
                    addresses = True
                case AddressesChanged():
                    addresses = routes = True
                case RoutesChanged():
                    routes = True
                case Overrun():
                    self._look_around()
        if addresses:
            self._attach()
        if routes:
            self._ask_for_routes()

    def _ask_for_routes(self) -> None:
        """Ask for all routes again; if that was done a moment ago, when it has been a while, and for all news until then."""
        now = self._clock.monotonic()
        if now >= self._asked_at + ROUTES_REST:
            self._asked_at = now
            self._next_hops.routes_changed()
            self._inbox.wake_at(now + ROUTES_LIFETIME, self._clock)
        else:
            self._inbox.wake_at(self._asked_at + ROUTES_REST, self._clock)

    def _take_link(self, news: LinkNews) -> bool:
        ifindex, link = news
        before = self._links.get(ifindex)
        if link is None:
            self._links.pop(ifindex, None)
            return self._next_hops.link(news)
        if link.ipv6_mtu < link.mtu and (before is None or before.mtu != link.mtu):
            # The kernel tells of a new MTU before IPv6 has it, and nothing when it has.
            link = next((each for each in self._network.links() if each.ifindex == ifindex), link)
        self._links[ifindex] = link
        return self._next_hops.link(LinkNews(ifindex, link))

    def _switch(self, *, attached: bool) -> bool:
        self._wanted = attached
        if attached:
            self._look_around()
            return not self._datapath.devices.failures
        self._datapath.detach()
        self._next_hops.attach({})
        _log.info("detached: the sockets relay everything")
        return True

    def _attach(self) -> None:
        """Let the interfaces that are there have the program, and the program know them and this machine's addresses."""
        devices, program = self._datapath.devices, self._datapath.program
        if not self._wanted:
            return
        for note in devices.attach(self._links):
            if note in devices.failures.values():
                _log.warning("offload not possible", why=note)
            else:
                _log.info("offload changed", what=note)
        attached = devices.by_ifindex()
        own = own_addresses(self._network.addresses(), self._links.values(), attached, limit=sys.maxsize)
        self._datapath.channels.own_hosts = frozenset(_host(each.address) for each in own)
        ours = [each for each in own if self._is_served(each.address)]
        if len(ours) > OWN_ADDRESSES:
            _log.warning("too many addresses: packets for some are relayed by the sockets", most=OWN_ADDRESSES)
        program.write_settings(ours, devices.packed())
        self._next_hops.attach(attached)

    def _is_served(self, address: bytes) -> bool:
        """Tell whether the relay's sockets receive what is sent to an address of this machine."""
        family = Family.IPV6 if ":" in _host(address) else Family.IPV4
        source = self._sources.get(family)
        return family in self._sources and (source is None or packed_address(source) == address)

    def _write(self) -> None:
        """Ask for routes and write next hops until there is nothing left to do."""
        hops, program = self._next_hops, self._datapath.program
        while hops.pending:
            questions = hops.look_ups(_PORTION)
            for question, outcome in zip(questions, self._network.look_up(questions), strict=True):
                hops.found(question, outcome)
            for entry, hop in hops.entries(_PORTION):
                program.write_next_hop(entry, hop)


class MonitorActor(Actor):
    """Owns the socket by which the kernel tells what changes, and tells the offload actor.

    Its thread is in the read, not in the inbox: so stop the monitor first, and then the actor.
    """

    def __init__(self, monitor: Monitor, offload: pykka.ActorRef[OffloadActor], failed: FailureListener) -> None:
        super().__init__("monitor", failed)
        self._monitor = monitor
        self._offload = offload

    def on_start(self) -> None:
        """Read until stopped."""
        try:
            while (news := self._monitor.receive()) is not None:
                if news:
                    self._offload.tell(KernelNews(news))
        except pykka.ActorDeadError:
            # It has told the supervisor what of.
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody knows any more what changes
            with contextlib.suppress(pykka.ActorDeadError):
                self._offload.tell(Failed(error))

    def on_stop(self) -> None:
        """Give the socket back."""
        self._monitor.close()


class Offloading:
    """The two of them, from their start to their stop, and what others ask of them.

    Their failure is no reason to end: the sockets relay everything.
    """

    def __init__(self, datapath: Datapath, hosts: Mapping[Family, str], clock: Clock) -> None:
        self.datapath = datapath
        self._hosts = hosts
        self._clock = clock
        self._offload: pykka.ActorRef[OffloadActor] | None = None
        self._stops: list[Callable[[], object]] = []

    def start(self) -> None:
        """Start them.

        Raises:
            BadUseError: the kernel can't be asked about its network.
        """
        # What changes from here on is not missed by who looks around next.
        with asking():
            monitor = Monitor()
        self._offload = OffloadActor.start(self.datapath, self._hosts, self._clock, _failed)
        listener = MonitorActor.start(monitor, self._offload, _failed)
        self._stops = [monitor.stop, lambda: _stop(listener), lambda: _stop(self._offload)]

    def stop(self) -> None:
        """Stop them, and have the sockets relay everything."""
        for stop in self._stops:
            stop()
        self.datapath.detach()

    def carry_out(self, commands: list[Command]) -> None:
        """Do what is for the kernel, of some commands; in the thread of whoever is the server actor."""
        ours = [command for command in commands if isinstance(command, OFFLOAD_COMMANDS)]
        if ours:
            changes = self.datapath.channels.carry_out(ours)
            if changes:
                self._tell(Followed(changes))

    def _tell(self, message: object) -> None:
        if self._offload is not None:
            with contextlib.suppress(pykka.ActorDeadError):
                self._offload.tell(message)

    def channels(self) -> dict[str, object]:
        """Give what the kernel relayed for each channel of each client."""
        told: dict[str, dict[str, object]] = {}
        for portion in self.datapath.usage():
            for client, used in usage_by_client(portion, self._clock.monotonic()).items():
                told.setdefault(client, {}).update(used)
            yield_cpu()
        return {"clients": told}

    def switch(self, attached: bool) -> bool:  # noqa: FBT001 - the only thing there is to say
        """Attach the program to the interfaces, or take it from them; give whether that went well."""
        if self._offload is None:
            return False
        try:
            return bool(self._offload.ask(SwitchOffload(attached), timeout=SWITCH_TIMEOUT))
        except (pykka.ActorDeadError, pykka.Timeout):
            return False


def _stop(actor: pykka.ActorRef[Any] | None) -> None:
    if actor is not None:
        with contextlib.suppress(pykka.Timeout):
            actor.stop(timeout=STOP_TIMEOUT)


def _failed(actor: str, error: BaseException) -> None:
    _log.error("offload failed: the sockets relay everything", actor=actor, error=exception_words(error), exc_info=error)


def _raise(message: Failed) -> None:
    raise message.error


def _host(address: bytes) -> str:
    """Spell an address as a socket does."""
    if address.startswith(b"\0" * 10 + b"\xff\xff"):
        return socket.inet_ntoa(address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)
