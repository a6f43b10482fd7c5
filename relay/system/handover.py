"""Hand a running relay over to another process, or take one over: see docs/upgrades.md for the protocol and its reasons.

==========  ===========================================  ==========================================================
message     sent by the                                  content
==========  ===========================================  ==========================================================
offer       relay                                        format, secrets, systemd's environment, the token of decision
hello       successor                                    its settings: some must not differ
refuse      relay                                        the reason; the relay goes on
group       relay, for each family                       the sockets of the port for clients
pages       relay                                        the listening sockets of the pages
links       relay, with offload                          the interfaces with its XDP program
some        relay, repeatedly; the successor confirms    allocations with their sockets
replays     relay, repeatedly                            remembered requests
ready?      relay; the successor answers with ready      everything but the last changes is sent
rest        relay, which is frozen from now on           the last changes
relaying    successor, with the token of decision        the point of no return
stray       relay, repeatedly                            packets in the hand of its readers
retired     relay                                        its readers have left; counts of the last moments
joined      successor                                    the portal has accepted its join: the relay may end
==========  ===========================================  ==========================================================

The token of decision is an eventfd with the value 1, which a single process can read. The successor reads the token before
its first packet. The relay reads the token if the successor is too slow. So exactly one process goes on.
"""

import contextlib
import functools
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import pykka

from relay import __version__
from relay.actors.messages import ClientDatagrams, Execute, PeerDatagrams, Succeeded
from relay.actors.server import ServerActor
from relay.config import UsageError
from relay.core.addresses import AllocationId, Family, RelayedPort, family_of
from relay.core.handover import FORMAT
from relay.logger import Logger
from relay.net.handover import (
    HandoverError,
    HandoverLink,
    Reader,
    close_all,
    listen,
    network_of,
    withdraw,
)
from relay.net.threads import yield_cpu
from relay.ops.machine import OTHER_DESCRIPTORS
from relay.system.events import HandedOver
from relay.system.succession import PREPARATION, SUCCESSION, settings_of
from relay.system.system import System

PORTION: Final = 64
"""Allocations in a message: 0.8 ms of the server actor."""

DECISION: Final = 2.0
"""Seconds for which requests wait for the successor, at most. On an idle machine, they wait for some 10 ms. Clients
retransmit their requests meanwhile."""

FOREVER: Final = 1e6
"""Seconds."""

RETIREMENT: Final = 5.0
"""Seconds for the readers of the relay to leave."""

SHUTTING_DOWN: Final = "the relay is shutting down"

_log = Logger("relay.system.handover")


class _WrittenAllocation(NamedTuple):
    id: AllocationId
    port: RelayedPort
    families: list[Family]
    asked: str | None
    """The address of this machine asked by the client, if noted."""
    descriptors: list[int]
    """Copies: the relay may close its own at any time."""


class HandoverListener:
    """Waits for successors, and hands the relay over to the first that is fit.

    Args:
        system: the running relay.
        path: the Unix socket.

    Raises:
        UsageError: the path can't be used.
    """

    def __init__(self, system: System, path: Path) -> None:
        self._system = system
        self._path = path
        try:
            self._listening = listen(path)
        except OSError as error:
            raise UsageError(f"can't listen on {path} ({error.strerror}): give --handover-socket another path") from error
        self._is_over = False
        threading.Thread(target=self._accept, name="handover", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Accept no more successors."""
        if not self._is_over:
            self._is_over = True
            with contextlib.suppress(OSError):
                self._path.unlink()
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while not self._is_over:
            try:
                accepted, _ = self._listening.accept()
            except OSError:
                return
            link = HandoverLink(accepted)
            try:
                if link.is_of_same_user():
                    _Predecessor(self._system, link, self._succeeded).hand_over()
                else:
                    link.send("refuse", "it runs as another user")
            except (HandoverError, TimeoutError) as error:
                _log.warning("not handed over: this relay goes on", reason=str(error))
            except Exception:  # noqa: BLE001 - a failed handover must not prevent the next
                _log.exception("a handover failed: please report this")
            finally:
                link.close()

    def _succeeded(self) -> None:
        # The path is the successor's now.
        self._is_over = True


class _Predecessor:
    """One attempt to hand the relay over."""

    def __init__(self, system: System, link: HandoverLink, succeeded: Callable[[], None]) -> None:
        self._system = system
        self._link = link
        self._succeeded = succeeded
        self._handover = system.core.handover
        self._until = time.monotonic() + PREPARATION
        self._frozen_at = 0.0
        self._held = 0.0
        """Seconds for which requests waited."""
        self._counts: dict[AllocationId, tuple[int, ...]] = {}
        self._offloaded: object = None
        """The interfaces with the XDP program."""

    def hand_over(self) -> None:
        """Hand over, or raise and go on.

        Raises:
            HandoverError: the successor is unfit, or is gone.
            TimeoutError: the successor is too slow.
        """
        token = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            try:
                self._in_actor(self._prepare)
                self._offer(token)
                self._send_all()
                self._link.receive("ready", timeout=self._left())
                with self._system.deciding:
                    self._send_rest()
                    self._decide(token)
                    self._system.has_successor = True
            except BaseException:
                self._in_actor(self._go_on)
                raise
        finally:
            os.close(token)
        try:
            self._retire()
        finally:
            # Whatever fails, the successor relays.
            self._system.events.put(HandedOver())

    def _offer(self, token: int) -> None:
        system = self._system
        self._link.send(
            "offer",
            {
                "format": FORMAT,
                "version": __version__,
                "secret": system.secret.expose(),
                "token": system.config.portal and system.config.portal.token.expose(),
                "systemd": system.systemd.environment,
                "handovers": system.handovers.number,
            },
            [token],
        )
        hello = self._link.receive("hello", timeout=self._left()).content
        try:
            reason = self._reason_against(hello)
        except (AttributeError, LookupError, TypeError, ValueError):
            reason = "its settings can't be read"
        if reason is not None:
            self._link.send("refuse", reason)
            raise HandoverError(reason)

    def _reason_against(self, hello: dict[str, Any]) -> str | None:  # noqa: PLR0911 - a list of reasons
        system = self._system
        if system.shutdown.has_begun:
            return SHUTTING_DOWN
        if not system.has_begun:
            return "the relay has not started yet"
        for name, here in settings_of(system.config, system.hosts).items():
            if hello["settings"].get(name) != here:
                return f"the {name} may not change in one step: {here} here, {hello['settings'].get(name)} there"
        if hello["network"] != network_of(next(iter(system.listening.values()))):
            return "it is in another network namespace"
        if abs(hello["now"] - time.monotonic()) > PREPARATION:
            return "its monotonic clock is another"
        lowest, highest = hello["ports"]
        allocations = list(system.core.allocations.by_id.values())
        used = [each.port for each in allocations]
        if used and not (lowest <= min(used) and max(used) <= highest):
            return f"an allocation has a port outside of {lowest}-{highest}"
        if hello["descriptors"] < sum(len(each.families) for each in allocations) + OTHER_DESCRIPTORS:
            return f"it may open {hello['descriptors']} files only: raise its limit (ulimit -n)"
        return None

    def _send_all(self) -> None:
        system = self._system
        for family, group in system.groups.items():
            content = [family, group.rest is not None]
            self._link.send("group", content, [each.fileno() for each in group.all])
        pages = {name: [each.listening.fileno() for each in server.listeners] for name, server in system.pages.items()}
        self._link.send("pages", [[name, len(each)] for name, each in pages.items()], list(itertools.chain(*pages.values())))
        if system.offload is not None:
            with system.offload.links() as (self._offloaded, descriptors):
                self._link.send("links", self._offloaded, descriptors)
        ids = self._in_actor(lambda _: self._handover.begin())
        for start in range(0, len(ids), PORTION):
            self._send_some(self._in_actor(functools.partial(self._write, ids=ids[start : start + PORTION])))
        while rows := self._in_actor(lambda _: self._handover.replays()):
            self._link.send("replays", rows)
        self._link.send("ready?")

    def _prepare(self, actor: ServerActor) -> None:
        """Let the start of the successor neither delay packets nor cause an overload in which buffers are shrunk."""
        actor.brace()
        self._keep_buffers(actor, large=True)

    def _keep_buffers(self, actor: ServerActor, *, large: bool) -> None:
        for each in (*self._system.readers, *(handle.receiver for handle in actor.allocations.values())):
            each.keeps_buffers = large

    def _write(self, actor: ServerActor, ids: Iterable[AllocationId]) -> tuple[list[Any], list[_WrittenAllocation]]:
        rows = self._handover.allocations(ids)
        return rows, [self._written(actor, AllocationId(row[0])) for row in rows]

    def _written(self, actor: ServerActor, id_: AllocationId) -> _WrittenAllocation:
        sockets = actor.allocations[id_].sockets
        self._counts[id_] = self._handover.counts(id_)
        descriptors = [os.dup(each.fileno()) for each in sockets.by_family.values()]
        client = self._system.core.allocations.by_id[id_].client
        asked = self._system.listening[family_of(client)].asked.host(client)
        return _WrittenAllocation(id_, sockets.port, list(sockets.by_family), asked, descriptors)

    def _send_some(self, written: tuple[list[Any], list[_WrittenAllocation]]) -> None:
        rows, allocations = written
        descriptors = [each for allocation in allocations for each in allocation.descriptors]
        try:
            content = {"rows": rows, "sockets": [each[:-1] for each in allocations]}
            self._link.send("some", content, descriptors)
            # Without confirmation, the kernel refuses too many descriptors in flight.
            self._link.receive("some", timeout=self._left())
        finally:
            close_all(descriptors)

    def _send_rest(self) -> None:
        if self._system.offload is not None:
            with self._system.offload.links() as (now, _):
                if now != self._offloaded:
                    raise HandoverError("an interface with the XDP program has changed: try again")
        self._frozen_at = time.monotonic()
        rest, new = self._in_actor(self._freeze)
        for start in range(0, len(new), PORTION):
            self._send_some(([], new[start : start + PORTION]))
        self._link.send("rest", rest)

    def _freeze(self, actor: ServerActor) -> tuple[dict[str, Any], list[_WrittenAllocation]]:
        if self._system.shutdown.has_begun or not self._system.has_begun:
            raise HandoverError(SHUTTING_DOWN)
        actor.freeze()
        rest = self._handover.rest()
        self._handover.end()
        written = [AllocationId(row[0]) for row in rest["allocations"]]
        new = [each for each in written if each not in self._counts]
        # The rows of changed allocations have new counts.
        self._counts.update((each, self._handover.counts(each)) for each in written)
        return rest, [self._written(actor, each) for each in new]

    def _go_on(self, actor: ServerActor) -> None:
        self._handover.end()
        self._keep_buffers(actor, large=False)
        actor.thaw()

    def _decide(self, token: int) -> None:
        """Wait until the successor relays.

        Raises:
            HandoverError: the successor is gone, before its first packet.
            TimeoutError: the successor is too slow.
        """
        try:
            self._link.receive("relaying", timeout=DECISION)
        except TimeoutError:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(token)
                raise
            # The successor has the token, and relays as soon as it can. Only its end gives the relay back to this process.
            self._link.receive("relaying", timeout=FOREVER)

    def _retire(self) -> None:
        system = self._system
        self._held = time.monotonic() - self._frozen_at
        self._succeeded()
        if system.offload is not None:
            # Its program runs no more, unless the successor has none.
            system.offload.stop()
        readers = self._in_actor(self._pass_on)
        if system.portal_actor is not None:
            system.portal_actor.tell(Succeeded())
        accepting = [each for server in system.pages.values() for each in server.listeners]
        left = withdraw([*system.readers, *accepting, *readers], RETIREMENT)
        if left:
            _log.warning("readers did not leave in time", readers=left)
        counts = [*self._in_actor(self._relayed_since), *self._relayed_in_kernel()]
        process = self._link.process
        try:
            self._link.send("retired", [self._held, counts])
            system.systemd.pass_on_to(process)
            self._link.send("go")
            if system.portal is not None:
                self._link.receive("joined", timeout=SUCCESSION)
        except (HandoverError, TimeoutError) as error:
            _log.warning("the successor is gone or not joined", reason=str(error))
        _log.info("handed over", process=process, allocations=len(self._counts), requests_waited=round(self._held, 4))

    def _pass_on(self, actor: ServerActor) -> list[Reader]:
        actor.retire(self._forward)
        return [each.receiver for each in actor.allocations.values()]

    def _relayed_since(self, _: ServerActor) -> list[list[int]]:
        """Return the packets and bytes of each allocation since its row was written."""
        since = [
            [id_, *(now - then for now, then in zip(self._handover.counts(id_), counts, strict=True))]
            for id_, counts in self._counts.items()
            if id_ in self._system.core.allocations.by_id
        ]
        return [each for each in since if any(each[1:])]

    def _relayed_in_kernel(self) -> Iterator[list[int]]:
        """Return the packets and bytes of each channel that the kernel relayed for this process."""
        offload, by_client = self._system.offload, self._system.core.allocations.by_client
        for portion in () if offload is None else offload.datapath.usage():
            for each in portion:
                allocation = by_client.get(each.client)
                if allocation is not None:
                    yield [allocation.id, *each.to_peer[:2], *each.to_client[:2]]
            yield_cpu()

    def _forward(self, message: ClientDatagrams | PeerDatagrams) -> None:
        allocation = message.allocation if isinstance(message, PeerDatagrams) else None
        with contextlib.suppress(HandoverError, TimeoutError):
            self._link.send("stray", [allocation, [[data.hex(), *more] for data, *more in message.batch]])

    def _in_actor(self, function: Callable[[ServerActor], Any]) -> Any:  # noqa: ANN401 - the result of the function
        try:
            return self._system.server.ask(Execute(function), timeout=PREPARATION)
        except (pykka.ActorDeadError, pykka.Timeout) as error:
            raise HandoverError("the server actor does not answer") from error

    def _left(self) -> float:
        return max(0.1, self._until - time.monotonic())
