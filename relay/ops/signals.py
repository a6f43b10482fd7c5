"""Signals: what an operator or a supervisor can tell a running relay.

They are blocked in every thread, and one thread waits for them. A handler would run in the main thread only, which does not
notice a signal that comes in the moment before it begins to wait; and before there is a handler, a signal ends the process,
or is lost on one that is the first of its container.
"""

import signal
import threading
from collections.abc import Callable, Mapping

_HELD = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT))


def hold() -> None:
    """Let signals wait for `listen`; to be called before any thread is started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def let_go() -> None:
    """Let signals do what they do by default: nobody is going to listen."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def listen(actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Have each signal call a function, in a thread of its own.

    Args:
        actions: for SIGINT, SIGTERM, SIGUSR1 and SIGQUIT.
    """
    hold()

    def wait() -> None:
        while True:
            actions[signal.Signals(signal.sigwait(_HELD))]()

    threading.Thread(target=wait, name="signals", daemon=True).start()
