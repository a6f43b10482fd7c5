"""What happens to a running system: the supervisor's inbox."""

import queue
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from relay.core.commands import Drained
from relay.core.portal.commands import Begin, Fatal, Left


class Request(Enum):
    """What someone outside wants of it."""

    LEAVE = "leave"
    """End, and take the time to do it politely; wanted twice, it is `STOP`."""
    STOP = "stop"
    """End at once."""
    DUMP = "dump"


@dataclass(frozen=True, slots=True)
class Failure:
    """An actor failed, and the system can't go on without it."""

    actor: str
    error: BaseException


Event: TypeAlias = Request | Failure | Begin | Left | Fatal | Drained

News: TypeAlias = queue.SimpleQueue[Event]
"""Any thread may put to it."""
