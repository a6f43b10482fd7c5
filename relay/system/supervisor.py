"""Supervise a running relay: handle its events in the main thread until it must stop."""

import contextlib
import queue
from collections.abc import Callable
from typing import Any

import pykka

from relay.core.commands import Drained
from relay.core.portal.commands import Begin, Fatal, Left
from relay.logger import Logger
from relay.ops.logs.render import exception_words
from relay.system.events import DrainRequest, Event, Failure, HandedOver, SystemRequest
from relay.system.system import System

_log = Logger("relay.actors.system")


def supervise(system: System, dump: Callable[[], None]) -> int:
    """Handle events until the relay must stop. Return the exit code: 0 if it was requested to stop, else 1.

    Args:
        system: a started system.
        dump: writes the state and all stacks.
    """
    while True:
        event: Event | None = None
        with contextlib.suppress(queue.Empty):
            event = system.events.get(timeout=system.shutdown.timeout())
        with system.deciding:
            if system.has_successor:
                return _wait_until_handed_over(system, event)
            code = (
                system.shutdown.expire(len(system.core.allocations.by_id)) if event is None else _handle(system, event, dump)
            )
            if code is not None:
                # No handover may begin any more.
                system.has_begun = False
                return code


def _wait_until_handed_over(system: System, event: Event | None) -> int:
    """Leave everything to the successor. Requests to end stay in the queue."""
    late = []
    while not isinstance(event, HandedOver):
        if event in {SystemRequest.LEAVE, SystemRequest.STOP}:
            late.append(event)
        event = system.events.get()
    for each in late:
        system.events.put(each)
    return 0


def _handle(system: System, event: Event, dump: Callable[[], None]) -> int | None:
    """Act on an event. Return the exit code if the relay must stop."""
    code = None
    match event:
        case SystemRequest.DUMP:
            _dump(dump)
        case SystemRequest.STOP:
            code = 0
        case SystemRequest.LEAVE:
            code = _begin_shutdown(system, system.portal_actor, exit_code=0)
        case DrainRequest():
            code = _drain(system, event)
        case SystemRequest.LISTEN:
            system.start_listeners()
        case Begin():
            system.begin()
        case Left() | Drained():
            code = system.shutdown.complete(event, len(system.core.allocations.by_id))
        case Fatal():
            _log.critical("the relay can't be part of its network", reason=event.reason)
            code = _begin_shutdown(system, None, exit_code=1)
        case Failure():
            _log.critical(
                "an actor failed and the relay can't go on",
                actor=event.actor,
                error=exception_words(event.error),
                exc_info=event.error,
            )
            code = 1
    return code


def _dump(dump: Callable[[], None]) -> None:
    try:
        dump()
    except Exception:  # noqa: BLE001 - a failed dump must not stop the relay
        _log.exception("the dump failed; the relay goes on")


def _drain(system: System, request: DrainRequest) -> int | None:
    if request.seconds is None:
        request.respond(system.shutdown.cancel(system.portal_actor, system.server))
        return None
    # Before `init` there are no clients.
    seconds = request.seconds if system.has_begun else 0
    code = system.shutdown.drain(system.portal_actor, system.server, seconds, len(system.core.allocations.by_id))
    request.respond(None)
    return code


def _begin_shutdown(system: System, portal: pykka.ActorRef[Any] | None, exit_code: int) -> int | None:
    # Before `init` there are no clients.
    drain_seconds = system.config.drain_timeout if system.has_begun else 0
    return system.shutdown.begin(portal, system.server, drain_seconds, len(system.core.allocations.by_id), exit_code)
