"""systemd: hears that the relay is ready, how it fares and that it stops; its watchdog is told that the relay works.

The protocol is sd_notify(3): lines of ``NAME=value`` in one datagram to the Unix socket that NOTIFY_SOCKET names.
"""

import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping

import structlog

PATIENCE = 0.8
"""Part of the time between two words to the watchdog in which the relay has to show that it works. Less than all of it, so
that the log says what is wrong before systemd ends the process."""

CLOSE_TIMEOUT = 1.0
"""Seconds to wait for the watchdog thread at the end."""

STATUS_LENGTH = 500
"""Characters of a status. systemd ignores a message of more than 4096 bytes whole, and READY=1 with it."""

_NUMBER = re.compile(r"[1-9][0-9]{0,14}")
"""Microseconds or a process: not 0, and no more digits than a wait of a thread can take (31 years)."""

_log = structlog.get_logger("relay.ops.systemd")


class Systemd:
    """What started this process, if that is systemd and it wants to hear of it; if not, nothing here does anything.

    No call waits and none fails: that systemd does not listen is no reason to end. What it can't be told is lost, and the
    first such loss is logged.

    Args:
        environ: the environment of this process, of which NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are read. A value
            that makes no sense is logged and taken as not given.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _socket_address(environ)
        # Opened once: with all descriptors in use the watchdog must still hear that the relay works.
        self._socket = _open_socket() if self._address else None
        self._watchdog_seconds = _watchdog_seconds(environ) if self._address else None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._has_lost = False
        self._has_complained = False

    def ready(self, status: str) -> None:
        """Say that the relay answers clients."""
        self._tell("READY=1", _status(status))

    def status(self, status: str) -> None:
        """Say how the relay fares, in a line that ``systemctl status`` shows."""
        self._tell(_status(status))

    def stopping(self, status: str, seconds: float) -> None:
        """Say that the relay has begun to stop, and have systemd wait for it.

        systemd counts the seconds from when it gets the message, and ends the process when both they and TimeoutStopSec are
        over. So one message lasts for a whole stop, and a short time takes nothing away from TimeoutStopSec.

        Args:
            status: what it is doing until it ends.
            seconds: how long the stop may take from now on.
        """
        self._tell("STOPPING=1", _status(status), f"EXTEND_TIMEOUT_USEC={math.ceil(seconds * 1_000_000)}")

    def watch(self, is_alive: Callable[[float], bool]) -> None:
        """Tell the watchdog, if there is one, that the relay works, for as long as it does.

        systemd's watchdog counts from `ready`, so this is to be called shortly before or after.

        Args:
            is_alive: tells whether the relay works, within the given number of seconds. It is called in a thread of its own;
                that it raises counts as no.
        """
        if self._watchdog_seconds is None:
            return
        arguments = (is_alive, self._watchdog_seconds / 2)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say nothing more. To be called before what `watch` asks is stopped, or else that is reported as dead."""
        self._ended.set()
        if self._thread is not None:
            # It may be waiting for an answer, and can be left to that: it says nothing any more.
            self._thread.join(CLOSE_TIMEOUT)
        if self._socket is not None:
            self._socket.close()

    def _watch(self, is_alive: Callable[[float], bool], interval: float) -> None:
        pause = interval
        while not self._ended.wait(pause):
            began = time.monotonic()
            if self._works(is_alive, interval * PATIENCE):
                self._tell("WATCHDOG=1")
            # From beat to beat, not from answer to beat: a slow answer must not put off the next word.
            pause = max(0.0, interval - (time.monotonic() - began))

    def _works(self, is_alive: Callable[[float], bool], seconds: float) -> bool:
        error = None
        try:
            if is_alive(seconds):
                return True
        except Exception as raised:  # noqa: BLE001 - whatever it is, the relay does not work
            error = raised
        if not self._has_complained and not self._ended.is_set():
            self._has_complained = True
            _log.error("the server actor does not answer", seconds=seconds, exc_info=error)
        return False

    def _tell(self, *lines: str) -> None:
        if self._socket is None or self._ended.is_set():
            return
        try:
            # To the address each time: a connection would not outlive the socket at the other end.
            self._socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            if not self._has_lost:
                self._has_lost = True
                _log.warning("systemd can't be told", lost=lines, error=str(error))


def _socket_address(environ: Mapping[str, str]) -> str:
    """Give the address of systemd's socket, "" if there is none."""
    given = environ.get("NOTIFY_SOCKET", "")
    if given.startswith("@"):
        # How an address that is no path, but a name in the kernel, is written where no NUL can be.
        return "\0" + given[1:]
    if given and not given.startswith("/"):
        _log.warning("NOTIFY_SOCKET names no Unix socket: systemd hears nothing", given=given)
        return ""
    return given


def _open_socket() -> socket.socket | None:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        _log.warning("no Unix socket can be opened: systemd hears nothing", error=str(error))
        return None


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Give the seconds after which systemd ends a process that it hears nothing of; None if it does not watch this one."""
    microseconds, process = _number(environ, "WATCHDOG_USEC"), _number(environ, "WATCHDOG_PID")
    if microseconds is None or process not in {None, os.getpid()}:
        return None
    return microseconds / 1_000_000


def _number(environ: Mapping[str, str], name: str) -> int | None:
    given = environ.get(name, "")
    if _NUMBER.fullmatch(given):
        return int(given)
    if given:
        _log.warning("no number that makes sense: ignored", variable=name, given=given)
    return None


def _status(text: str) -> str:
    """Write a status in one line: line breaks would begin another field, and a NUL makes systemd ignore the message."""
    return "STATUS=" + "".join(each if each.isprintable() else " " for each in text[:STATUS_LENGTH])
