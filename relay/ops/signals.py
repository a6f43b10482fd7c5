"""Signals: what an operator or a supervisor can tell a running relay."""

import signal
from collections.abc import Callable
from types import FrameType

from relay.ops.dump import register_wedged_dump


def listen(stop: Callable[[], None], dump: Callable[[], None]) -> None:
    """Have SIGINT and SIGTERM call one function, SIGUSR1 another; register SIGQUIT's dump.

    The functions run in a signal handler, thus between any two bytecodes of the main thread: all they may do is leave word
    somewhere, with the `put` of a `SimpleQueue` for instance, which is made for that.
    """

    def on_stop(_: int, __: FrameType | None) -> None:
        stop()

    def on_dump(_: int, __: FrameType | None) -> None:
        dump()

    signal.signal(signal.SIGINT, on_stop)
    signal.signal(signal.SIGTERM, on_stop)
    signal.signal(signal.SIGUSR1, on_dump)
    register_wedged_dump()
