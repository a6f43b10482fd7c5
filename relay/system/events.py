"""Events of a running relay, for the supervisor."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from relay.core.commands import Drained
from relay.core.portal.commands import Begin, Fatal, Left

REQUEST_TIMEOUT: Final = 3.0
"""Seconds for the main thread to handle a request of an operator. It handles most events at once; a dump takes longer."""


class SystemRequest(Enum):
    """A request from a signal, or from the liveness check."""

    LEAVE = "leave"
    """Leave the portal, drain and exit. A second request acts like `STOP`."""
    STOP = "stop"
    """Exit at once."""
    LISTEN = "listen"
    """Start a thread for each socket of the port for clients."""
    DUMP = "dump"
    """Write the state and all stacks."""


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """An operator's request to drain, or to stop draining."""

    seconds: float | None
    """The time from now on. None: stop draining."""
    respond: Callable[[str | None], object]
    """Gets the reason of a refusal, or None."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of an actor that the relay needs."""

    actor: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Another process relays now: this process can end."""


Event: TypeAlias = SystemRequest | DrainRequest | Failure | Begin | Left | Fatal | Drained | HandedOver

EventQueue: TypeAlias = queue.SimpleQueue[Event]
"""Any thread may put events. The main thread gets them."""


def request_drain(events: EventQueue, seconds: float | None) -> str | None:
    """Ask the supervisor to drain, or to stop draining (None). Return the reason of a refusal, or None."""
    response: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    events.put(DrainRequest(seconds, response.put))
    try:
        return response.get(timeout=REQUEST_TIMEOUT)
    except queue.Empty:
        return f"the relay did not answer within {REQUEST_TIMEOUT:g} s: see its log"
