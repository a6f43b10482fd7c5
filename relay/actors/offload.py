"""Updates of the kernel's data path after changes of the network: next hops, interfaces, own addresses."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from relay.actors.actor import Actor, FailureListener, TimedActor
from relay.actors.messages import Failed, OffloadedLinks, OwnAddresses, Ping, Tick
from relay.core.addresses import Family
from relay.logger import Logger
from relay.offload.datapath import Datapath
from relay.offload.layout import OWN_ADDRESSES, V4_MAPPED, packed_address
from relay.offload.netlink import Changes, Monitor, Network
from relay.offload.network import Link
from relay.offload.next_hops import NextHops, own_addresses
from relay.offload.watch import Figures, ProgramWatch, received_packets
from relay.ops.clock import Clock
from relay.ops.machine import UNSPECIFIED

REST: Final = 0.25
"""Minimum seconds between two queries of all state: 16,000 routes take 0.15 s, and the routes of some machines change
constantly."""

STATE_LIFETIME: Final = 30.0
"""Maximum seconds between two queries of all state: path MTUs and redirects cause no notification."""

_PORTION: Final = 256
"""Lookups and writes before other threads get the GIL."""

_log = Logger("relay.actors.offload")


class Followed(NamedTuple):
    """Destinations of channels have changed."""

    changes: dict[str, bool]
    """Hosts to which channels lead for the first time (True), or no longer (False)."""


class SwitchOffload(NamedTuple):
    """A request to attach or detach the program. The reply is whether this succeeded."""

    attached: bool


class ReadLinks(NamedTuple):
    """A request for `OffloadedLinks`."""


class ReplaceProgram(NamedTuple):
    """Replace the program of a predecessor on its interfaces, then attach the program to further interfaces."""


class OffloadActor(TimedActor):
    """The actor that writes next hops, and attaches and detaches the program.

    Args:
        datapath: the data path to update.
        hosts: bind addresses of the relay's sockets, by family.
        clock: the clock for intervals between route queries.
        by_sockets: returns the number of packets that the sockets have relayed.
        failed: receives failures.
        is_wanted: whether the program is attached, or an operator has detached it.
    """

    def __init__(
        self,
        datapath: Datapath,
        hosts: Mapping[Family, str],
        clock: Clock,
        by_sockets: Callable[[], int],
        failed: FailureListener,
        *,
        is_wanted: bool = True,
    ) -> None:
        super().__init__("offload", failed)
        self._datapath = datapath
        self._sources = sources_of(hosts)
        self._by_sockets = by_sockets
        self._watch = ProgramWatch()
        self._clock = clock
        self._next_hops = NextHops()
        self._wanted = is_wanted
        self._looked_at = -math.inf
        self._network = Network()
        self._inputs: dict[type, Callable[[Any], object]] = {
            Followed: lambda told: self._follow(told.changes),
            Changes: self._hear,
            OwnAddresses: self._bind,
            SwitchOffload: lambda told: self._switch(attached=told.attached),
            ReadLinks: lambda _: self._links(),
            ReplaceProgram: lambda _: self._replace(),
            Ping: lambda _: None,
            Tick: lambda _: self._look_soon(),
            Failed: _raise,
        }

    def on_receive(self, message: object) -> object:
        """Process a message, and write the changed next hops."""
        try:
            answer = self._inputs[type(message)](message)
            self._write()
        except Exception as error:
            if not isinstance(message, SwitchOffload):
                raise
            # Otherwise Pykka would raise the failure only in the requesting thread, and this actor would continue.
            self.actor_ref.tell(Failed(error))
            return False
        return answer

    def on_failure(self, *failure: Any) -> None:  # noqa: ANN401 - as from sys.exc_info()
        """Detach the program, because next hops would become outdated, and notify the supervisor."""
        self._datapath.detach()
        super().on_failure(*failure)
        self.on_stop()

    def on_stop(self) -> None:
        """Close the rtnetlink socket."""
        self._network.close()

    def _look_around(self) -> None:
        """Replace the known state by the kernel's current state, and attach the program to the current interfaces."""
        self._looked_at = self._clock.monotonic()
        self._inbox.wake_at(self._looked_at + STATE_LIFETIME, self._clock)
        links = self._network.links()
        self._next_hops.replace(links, self._network.neighbours())
        if self._wanted:
            self._watch_program()
            self._attach(links)
        self._write()

    def _follow(self, changes: dict[str, bool]) -> None:
        for host, is_used in changes.items():
            if is_used:
                self._next_hops.follow(host, self._sources.get(_family(host)))
            else:
                self._next_hops.unfollow(host)

    def _bind(self, own: OwnAddresses) -> None:
        # Hosts that are followed already keep their source, as do the open sockets.
        self._sources = sources_of(own.hosts)
        self._look_soon()

    def _hear(self, changes: Changes) -> None:
        for each in changes.neighbours:
            self._next_hops.neighbour(each)
        if changes.others:
            self._look_soon()

    def _look_soon(self) -> None:
        """Query all state, or set a timer if the last query was too recent, or if the state changes too fast."""
        if self._clock.monotonic() >= self._looked_at + REST:
            with contextlib.suppress(InterruptedError):
                return self._look_around()
        self._inbox.wake_at(self._looked_at + REST, self._clock)
        return None

    def _switch(self, *, attached: bool) -> bool:
        self._wanted = attached
        if attached:
            self._look_around()
            return not self._datapath.devices.failures
        self._datapath.detach()
        self._watch = ProgramWatch()
        self._next_hops.attach({})
        _log.info("detached: the sockets relay everything")
        return True

    def _links(self) -> OffloadedLinks:
        links = self._datapath.devices.links()
        rows = [[each.name, each.ifindex, each.mac.hex(), each.mtu, each.mode] for each in links]
        return OffloadedLinks({"wanted": self._wanted, "links": rows}, [each.descriptor for each in links])

    def _replace(self) -> None:
        for note in self._datapath.devices.replace():
            _log.info("offload changed", what=note)
        self._watch = ProgramWatch()
        self._inbox.wake_at(self._clock.monotonic(), self._clock)

    def _watch_program(self) -> None:
        """Step down from a mode in which the program does not run: `_attach` then tries the next mode."""
        datapath = self._datapath
        # Without channels, the sockets rightly relay everything.
        devices = datapath.devices.packed() if datapath.channels.installed else []

        def read() -> Figures:
            return Figures(datapath.program.totals().frames, received_packets(), self._by_sockets())

        for name in self._watch.look(self._looked_at, devices, read):
            _log.warning("the XDP program stands still", why=datapath.devices.stalled(name))
            if datapath.devices.modes[name] is None:
                self._watch = ProgramWatch()

    def _attach(self, links: list[Link]) -> None:
        """Attach the program, and write this machine's addresses."""
        devices, program = self._datapath.devices, self._datapath.program
        for note in devices.attach(links):
            if note in devices.failures.values():
                _log.warning("offload not possible", why=note)
            else:
                _log.info("offload changed", what=note)
        attached = devices.by_ifindex()
        own = own_addresses(self._network.addresses(), links, attached)
        ours = [each for each in own if self._is_served(each.address)]
        if len(ours) > OWN_ADDRESSES:
            _log.warning("too many addresses: packets for some are relayed by the sockets", most=OWN_ADDRESSES)
        program.write_settings(ours, devices.packed())
        self._next_hops.attach(attached)

    def _is_served(self, address: bytes) -> bool:
        """Return whether the relay's sockets receive packets for an address of this machine."""
        family = Family.IPV4 if address.startswith(V4_MAPPED) else Family.IPV6
        source = self._sources.get(family)
        return family in self._sources and (source is None or packed_address(source) == address)

    def _write(self) -> None:
        """Query routes and write next hops until no work is left."""
        hops, program, places = self._next_hops, self._datapath.program, self._datapath.channels.places
        while hops.pending:
            questions = hops.look_ups(_PORTION)
            for question, route in zip(questions, self._network.look_up(questions), strict=True):
                hops.found(question, route)
            program.write_next_hops(hops.entries(_PORTION))
            # The server actor takes the place of a host without channels.
            ways = ((places.get(host), way) for host, way in hops.ways().items())
            program.write_ways({place: way for place, way in ways if place is not None})


class MonitorActor(Actor):
    """The owner of the notification socket, which forwards notifications to the offload actor.

    Its thread waits in the socket and not in the inbox, so stop the monitor before the actor.
    """

    def __init__(self, monitor: Monitor, tell: Callable[[Changes | Failed], None], failed: FailureListener) -> None:
        super().__init__("monitor", failed)
        self._monitor = monitor
        self._tell = tell

    def on_start(self) -> None:
        """Receive notifications until stopped."""
        try:
            while (changes := self._monitor.receive()) is not None:
                self._tell(changes)
        except Exception as error:  # noqa: BLE001 - without notifications, next hops become outdated
            self._tell(Failed(error))

    def on_stop(self) -> None:
        """Close the socket."""
        self._monitor.close()


def sources_of(hosts: Mapping[Family, str]) -> dict[Family, str | None]:
    """Return the sources of packets by family. None: the kernel's choice, as for a socket bound to all addresses."""
    return {family: None if host == UNSPECIFIED[family] else host for family, host in hosts.items()}


def _family(host: str) -> Family:
    return Family.IPV6 if ":" in host else Family.IPV4


def _raise(message: Failed) -> None:
    raise message.error
