"""Notify systemd of readiness, status and stop, and its watchdog that the relay works.

The protocol is sd_notify(3): lines of ``NAME=value`` in one datagram to the Unix socket in NOTIFY_SOCKET.
"""

import math
import os
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping

from relay.logger import Logger

RESPONSE_SHARE = 0.8
"""Share of the watchdog's interval within which the relay must respond. Less than 1, so that the log reports the problem
before systemd ends the process."""

REPORT_SHARE = 0.9
"""Share of systemd's timeout after which an interpreter that runs no thread is reported."""

CLOSE_TIMEOUT = 1.0
"""Seconds to wait for the watchdog thread at the end."""

BARRIER_TIMEOUT = 5.0
"""Seconds to wait until systemd has read all messages."""

STATUS_LENGTH = 500
"""Characters of a status. systemd ignores a message of more than 4096 bytes whole, and READY=1 with it."""

_NUMBER = re.compile(r"[1-9][0-9]{0,14}")
"""Microseconds or a process id: not 0, and at most 31 years, which a thread can wait."""

_log = Logger("relay.ops.systemd")


class Systemd:
    """The service manager of this process; without NOTIFY_SOCKET, all methods do nothing.

    No method blocks or raises: the relay goes on without systemd. A message is lost if sending fails, and the first loss is
    logged.

    Args:
        environ: the environment of this process, with NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID. Invalid values are
            logged and ignored.
        report_after: called with a number of seconds, and called again before they pass while Python runs.
    """

    def __init__(self, environ: Mapping[str, str], report_after: Callable[[float], object] = lambda _: None) -> None:
        self.environment = {name: environ[name] for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC") if name in environ}
        """The variables that a successor of this process needs. WATCHDOG_PID has the id of this process."""
        self._report_after = report_after
        self._address = _socket_address(environ)
        # Opened once: the watchdog needs messages even if all descriptors are in use.
        self._socket = _open_socket() if self._address else None
        self._watchdog_seconds = _watchdog_seconds(environ) if self._address else None
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._has_lost = False
        self._has_reported = False

    def ready(self, status: str) -> None:
        """Report that the relay answers clients."""
        self._tell("READY=1", _status(status))

    def status(self, status: str) -> None:
        """Set the status line of ``systemctl status``."""
        self._tell(_status(status))

    def pass_on_to(self, process: int) -> None:
        """Let systemd follow another process as the main process, and wait until systemd knows."""
        if self._socket is None or not process:
            return
        self._tell(f"MAINPID={process}")
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            # socket.send_fds ignores the address.
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", writing))
            self._socket.sendmsg([b"BARRIER=1"], [rights], socket.MSG_DONTWAIT, self._address)
            os.close(writing)
            select.select([reading], [], [], BARRIER_TIMEOUT)
        except OSError as error:
            _log.warning("systemd can't be told", lost="BARRIER=1", error=str(error))
        finally:
            os.close(reading)

    def stopping(self, status: str, seconds: float) -> None:
        """Report that the relay is stopping, and how long systemd must wait.

        systemd counts the seconds from the receipt of the message, and ends the process when both the seconds and
        TimeoutStopSec are over. One message covers the whole stop, and a short time does not shorten TimeoutStopSec.
        """
        self._tell("STOPPING=1", _status(status), f"EXTEND_TIMEOUT_USEC={math.ceil(seconds * 1_000_000)}")

    def watch(self, is_alive: Callable[[float], bool]) -> None:
        """Send keep-alives to the watchdog, if there is one, for as long as the relay works.

        systemd's watchdog counts from `ready`: call this method shortly before or after. A separate thread asks `is_alive`
        for an answer within a number of seconds. An exception counts as False.
        """
        if self._watchdog_seconds is None:
            return
        arguments = (is_alive, self._watchdog_seconds / 2)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send no more messages. Call this method before the target of `is_alive` stops, or a failure is reported."""
        self._ended.set()
        if self._thread is not None:
            # The thread may be waiting for a response; it sends no more messages.
            self._thread.join(CLOSE_TIMEOUT)
        if self._socket is not None:
            self._socket.close()

    def _watch(self, is_alive: Callable[[float], bool], interval: float) -> None:
        pause = interval
        while not self._ended.wait(pause):
            began = time.monotonic()
            # Shortly before systemd ends the process.
            self._report_after(2 * interval * REPORT_SHARE)
            if self._works(is_alive, interval * RESPONSE_SHARE):
                self._tell("WATCHDOG=1")
            # A slow response must not delay the next keep-alive.
            pause = max(0.0, interval - (time.monotonic() - began))

    def _works(self, is_alive: Callable[[float], bool], seconds: float) -> bool:
        error = None
        try:
            if is_alive(seconds):
                return True
        except Exception as raised:  # noqa: BLE001 - any exception means that the relay does not work
            error = raised
        if not self._has_reported and not self._ended.is_set():
            self._has_reported = True
            _log.error("the server actor does not answer", seconds=seconds, exc_info=error)
        return False

    def _tell(self, *lines: str) -> None:
        if self._socket is None or self._ended.is_set():
            return
        try:
            # Not connected: a connection would not survive a restart of systemd's socket.
            self._socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            if not self._has_lost:
                self._has_lost = True
                _log.warning("systemd can't be told", lost=lines, error=str(error))


def _socket_address(environ: Mapping[str, str]) -> str:
    """Return the address of systemd's socket, "" if there is none."""
    given = environ.get("NOTIFY_SOCKET", "")
    if given.startswith("@"):
        # An abstract socket address: "@" stands for NUL.
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
    """Return the watchdog's timeout in seconds; None without a watchdog for this process."""
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
    """Return a status in one line: a line break would begin another field, and systemd ignores a message with a NUL."""
    return "STATUS=" + "".join(each if each.isprintable() else " " for each in text[:STATUS_LENGTH])
