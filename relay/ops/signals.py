"""Signals: what an operator or a supervisor can tell a running relay."""

import queue
import signal
from types import FrameType
from typing import Any

from relay.actors.system import Request
from relay.ops.dump import register_wedged_dump


def listen(news: "queue.SimpleQueue[Any]") -> None:
    """Put SIGINT and SIGTERM (stop) and SIGUSR1 (dump) among a system's news; register SIGQUIT's dump.

    A handler does no more than that: it may run between any two bytecodes of the main thread, and a `SimpleQueue` is made
    to be put to from there.
    """

    def stop(_: int, __: FrameType | None) -> None:
        news.put(Request.STOP)

    def dump(_: int, __: FrameType | None) -> None:
        news.put(Request.DUMP)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, dump)
    register_wedged_dump()
