"""Signals: commands from an operator or a service manager to a running relay.

All threads block these signals, and one thread waits for them with sigwait. A Python handler would run only in the main
thread, which misses a signal just before its wait. Without a handler, a signal ends the process, or is lost if the process
is the first of a container.
"""

import signal
import threading
from collections.abc import Callable, Mapping

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGQUIT, signal.SIGABRT, signal.SIGHUP, signal.SIGUSR2)


def block() -> None:
    """Keep signals pending until `handle`. Call this before any thread is started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)


def unblock() -> None:
    """Restore the default actions of the signals, for commands that do not call `handle`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)


def handle(actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
    """Start a thread that calls a function for each signal.

    Args:
        actions: a function for each of the handled signals.
    """
    block()

    def wait() -> None:
        while True:
            actions[signal.Signals(signal.sigwait(_HANDLED))]()

    threading.Thread(target=wait, name="signals", daemon=True).start()
