"""What libraries and the interpreter have to say: it goes to the log, filtered and made harmless like all else."""

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Protocol

from relay.ops.logs.filter import Level

_QUIET = ("pykka", "websocket")
"""Libraries of which nothing is written: what fails in pykka's actors our supervisors hear of anyway, and websocket-client
has a line for each connection that breaks."""

_PYTHON = "python"


class Write(Protocol):
    """Writes an event."""

    def __call__(
        self, target: str, level: Level, event: str, fields: dict[str, object], exception: BaseException | None = None, /
    ) -> None:
        """Write an event of a target."""


class _Foreign(logging.Handler):
    """Writes what libraries log."""

    def __init__(self, write: Write) -> None:
        super().__init__(logging.WARNING)
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write what a library logged."""
        level = Level.ERROR if record.levelno >= logging.ERROR else Level.WARN
        try:
            said = record.getMessage()
        except Exception as error:  # noqa: BLE001 - a library's mistake is no reason to fail
            said = f"{record.msg!r}, which can't be written ({type(error).__name__})"
        error_told = record.exc_info[1] if record.exc_info else None
        self._write(record.name, level, "a library logged", {"said": said}, error_told)


@contextlib.contextmanager
def others_heard_by(write: Write) -> Iterator[None]:
    """Have what others say written, for as long as the context lasts."""

    def thread_failed(told: threading.ExceptHookArgs) -> None:
        name = None if told.thread is None else told.thread.name
        write(_PYTHON, Level.ERROR, "a thread failed", {"thread": name}, told.exc_value)

    def unraisable(told: "sys.UnraisableHookArgs") -> None:
        write(_PYTHON, Level.ERROR, "an exception that nobody hears of", {"said": told.err_msg}, told.exc_value)

    def warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        fields: dict[str, object] = {"said": message, "kind": category.__name__, "at": f"{filename}:{lineno}"}
        write(_PYTHON, Level.WARN, "Python warned", fields)

    root, handler = logging.getLogger(), _Foreign(write)
    levels = {name: logging.getLogger(name).level for name in _QUIET}
    hooks = threading.excepthook, sys.unraisablehook, warnings.showwarning
    root.addHandler(handler)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    threading.excepthook, sys.unraisablehook = thread_failed, unraisable
    warnings.showwarning = warned  # type: ignore[assignment]  # it takes all that the other does
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook, warnings.showwarning = hooks
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        root.removeHandler(handler)
