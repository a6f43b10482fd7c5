"""Offload as a part of the system: starts and stops its actors, and passes the server actor's commands to the kernel."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import pykka

from relay.actors.messages import NO_LINKS, Failed, OffloadedLinks, OwnAddresses, Ping
from relay.actors.offload import (
    Followed,
    MonitorActor,
    OffloadActor,
    ReadLinks,
    ReplaceProgram,
    SwitchOffload,
    sources_of,
)
from relay.core.addresses import ClientAddress, Family, family_of, show
from relay.core.commands import OFFLOAD_COMMANDS, Command, InstallChannel
from relay.logger import Logger
from relay.net.handover import close_all
from relay.net.routes import source_toward
from relay.net.threads import yield_cpu
from relay.net.udp import UdpSocket
from relay.offload.bpf import XdpMode
from relay.offload.datapath import Datapath, asking
from relay.offload.devices import InheritedLink
from relay.offload.netlink import Changes, Monitor
from relay.ops.clock import Clock
from relay.ops.logs.render import exception_words
from relay.ops.machine import UNSPECIFIED

STOP_TIMEOUT: Final = 0.5
"""Seconds for each actor to stop."""

SWITCH_TIMEOUT: Final = 5.0
"""Timeout in seconds of an operator's request. Attaching takes some milliseconds, or a second if the driver restarts its
queues."""

_log = Logger("relay.actors.offload")


class Offloading:
    """The interface to both actors, from start to stop.

    Their failure does not stop the relay, because the sockets relay everything.
    """

    def __init__(
        self,
        datapath: Datapath,
        hosts: Mapping[Family, str],
        listening: Mapping[Family, UdpSocket],
        clock: Clock,
        by_sockets: Callable[[], int],
    ) -> None:
        self.datapath = datapath
        self._hosts = hosts
        self._listening = listening
        self._clock = clock
        self._by_sockets = by_sockets
        self._offload: pykka.ActorRef[OffloadActor] | None = None
        self._stops: list[Callable[[], object]] = []

    def start(self, inherited: OffloadedLinks | None = None) -> None:
        """Start both actors.

        Args:
            inherited: the interfaces of a predecessor, which keep its program until `replace`.

        Raises:
            UsageError: the kernel rejects rtnetlink queries.
        """
        # The monitor opens before the first query, so that no change is missed.
        with asking():
            monitor = Monitor()
        if inherited is not None:
            rows = zip(inherited.content["links"], inherited.descriptors, strict=True)
            self.datapath.devices.inherit(
                InheritedLink(name, ifindex, bytes.fromhex(mac), mtu, XdpMode(mode), descriptor)
                for (name, ifindex, mac, mtu, mode), descriptor in rows
            )
        self._offload = OffloadActor.start(
            self.datapath,
            self._hosts,
            self._clock,
            self._by_sockets,
            _failed,
            is_wanted=inherited is None or inherited.content["wanted"],
        )
        listener = MonitorActor.start(monitor, self._tell, _failed)
        self._stops = [monitor.stop, lambda: _stop(listener), lambda: _stop(self._offload)]

    def stop(self) -> None:
        """Stop both actors, and detach the program. A second call does nothing."""
        stops, self._stops = self._stops, []
        for stop in stops:
            stop()
        if stops:
            self.datapath.detach()

    @contextlib.contextmanager
    def links(self) -> Iterator[OffloadedLinks]:
        """Return the interfaces with the program, for a successor. The descriptors are closed at the end."""
        links: OffloadedLinks = self._ask(ReadLinks()) or NO_LINKS
        try:
            yield links
        finally:
            close_all(links.descriptors)

    def install(self, commands: list[Command]) -> None:
        """Apply the offload commands of a predecessor's state, and return when the next hops are written."""
        self.carry_out(commands)
        self._ask(Ping())

    def replace(self) -> None:
        """Replace the predecessor's program on its interfaces."""
        self._ask(ReplaceProgram())

    def carry_out(self, commands: list[Command]) -> None:
        """Apply the offload commands of a batch, in the server actor's current thread."""
        ours = [
            command
            for command in commands
            if isinstance(command, OFFLOAD_COMMANDS)
            and (not isinstance(command, InstallChannel) or self._leaves_from_asked(command.client))
        ]
        if not ours:
            return
        try:
            changes = self.datapath.channels.carry_out(ours)
        except OSError as error:
            # The kernel may still have ended channels, so that it must relay nothing.
            self.datapath.program.write_settings((), ())
            self._tell(Failed(error))
        else:
            if changes:
                self._tell(Followed(changes))

    def follow(self, own: OwnAddresses) -> None:
        """Send from the addresses to which sockets of allocations are bound from now on."""
        self._hosts = own.hosts
        self._tell(own)

    def _leaves_from_asked(self, client: ClientAddress) -> bool:
        """Check whether the kernel sends to a client from the address asked by the client, as far as noted."""
        family = family_of(client)
        asked = self._listening[family].asked.host(client)
        if asked is None:
            return True
        try:
            return asked == (sources_of(self._hosts)[family] or source_toward(family, client[0], UNSPECIFIED[family]))
        except OSError:
            # No descriptor is free.
            return False

    def _tell(self, message: Followed | Changes | OwnAddresses | Failed) -> None:
        """Tell the offload actor, which is dead after a failure."""
        if self._offload is not None:
            with contextlib.suppress(pykka.ActorDeadError):
                self._offload.tell(message)

    def channels(self) -> dict[str, object]:
        """Return the kernel's usage counters by client and channel."""
        told: dict[str, dict[str, object]] = {}
        for portion in self.datapath.usage():
            now = self._clock.monotonic()
            for each in portion:
                told.setdefault(show(each.client), {})[f"{each.number:#06x}"] = each.readable(now)
            yield_cpu()
        return {"clients": told}

    def switch(self, attached: bool) -> bool:  # noqa: FBT001 - the only argument
        """Attach or detach the program, and return whether this succeeded."""
        return bool(self._ask(SwitchOffload(attached)))

    def _ask(self, message: SwitchOffload | ReadLinks | ReplaceProgram | Ping) -> Any:  # noqa: ANN401 - as in Pykka
        """Return the reply of the offload actor, or None if the actor is dead or too slow."""
        if self._offload is None:
            return None
        try:
            return self._offload.ask(message, timeout=SWITCH_TIMEOUT)
        except (pykka.ActorDeadError, pykka.Timeout):
            return None


def _stop(actor: pykka.ActorRef[Any] | None) -> None:
    if actor is not None:
        with contextlib.suppress(pykka.Timeout):
            actor.stop(timeout=STOP_TIMEOUT)


def _failed(actor: str, error: BaseException) -> None:
    _log.error("offload failed: the sockets relay everything", actor=actor, error=exception_words(error), exc_info=error)
