"""Log what libraries and the interpreter report: log records, warnings, failed threads, unraisable exceptions."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator

from relay.logger import Level, Logger

_QUIET = frozenset(("pykka", "websocket"))
"""Ignored libraries: the supervisors report failures in pykka's actors, and websocket-client logs each broken connection."""

_log = Logger("python")


class _Handler(logging.Handler):
    """Logs the warnings and errors of libraries."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record as an event of its library."""
        if record.name.partition(".")[0] in _QUIET:
            return
        try:
            said = record.getMessage()
        except Exception as error:  # noqa: BLE001 - a library's mistake must not fail its caller
            said = f"{record.msg!r}, which can't be written ({type(error).__name__})"
        level = Level.ERROR if record.levelno >= logging.ERROR else Level.WARN
        raised = record.exc_info and record.exc_info[1]
        Logger(record.name).log(level, "a library logged", said=said, exc_info=raised)


def _thread_failed(told: threading.ExceptHookArgs) -> None:
    name = None if told.thread is None else told.thread.name
    _log.error("a thread failed", thread=name, exc_info=told.exc_value)


def _unraisable(told: "sys.UnraisableHookArgs") -> None:
    _log.error("an exception that nobody hears of", said=told.err_msg, exc_info=told.exc_value)


def _warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    _log.warning("Python warned", said=message, kind=category.__name__, at=f"{filename}:{lineno}")


@contextlib.contextmanager
def stdlib_logged() -> Iterator[None]:
    """Log the reports of libraries and the interpreter, for as long as the context lasts."""
    root, handler = logging.getLogger(), _Handler(logging.WARNING)
    hooks = threading.excepthook, sys.unraisablehook, warnings.showwarning
    root.addHandler(handler)
    threading.excepthook, sys.unraisablehook = _thread_failed, _unraisable
    warnings.showwarning = _warned  # type: ignore[assignment]  # accepts every argument of the original
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
        root.removeHandler(handler)
