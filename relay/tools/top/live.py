"""The live view: periodic requests, frames, keys and signals."""

import math
import os
import queue
import signal
import threading
import time
from typing import TypeAlias

from relay.net.endpoint import Endpoint
from relay.status.model import Status
from relay.tools.control import NoAnswerError, StatusQuery, fetch
from relay.tools.top.scene import QUIT, Scene, keys_in, press
from relay.tools.top.terminal import Screen
from relay.tools.top.view import frame, rows_in

_EXIT_CODES = {signal.SIGINT: 0, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGHUP: 128 + signal.SIGHUP}
"""Ctrl-C is a normal way to quit, like `q`."""

_SIGNALS = (*_EXIT_CODES, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)

_MAX_ROWS = 500
_WIDE = 100
"""Columns of a terminal on which peers are shown."""

_REDRAW = 1.0
"""Seconds between two redraws of the title while there is no response."""

FIRST_INTERVAL = 1.1
"""Seconds until the second request. The relay knows rates after two scans, which are a second apart."""

ViewEvent: TypeAlias = Status | Exception | signal.Signals | bytes
"""A response or its absence, a signal, or keyboard input."""


class Live:
    """A run of the view. Threads wait for events, so that keys are handled without delay."""

    def __init__(self, screen: Screen, scene: Scene, at: Endpoint, query: StatusQuery, interval: float) -> None:
        self._screen = screen
        self._scene = scene
        self._at = at
        self._query = query
        self._interval = interval
        self._events: queue.SimpleQueue[ViewEvent] = queue.SimpleQueue()
        self._responded_at = time.monotonic()
        self._request_at = 0.0
        self._is_requesting = False

    def run(self) -> int:
        """Show frames until the user quits; return the exit code."""
        # Threads inherit the mask, so sigwait gets all signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with self._screen:
            for wait in (self._wait_for_signals, self._wait_for_keys):
                threading.Thread(target=wait, daemon=True).start()
            try:
                while True:
                    code = self._step()
                    if code is not None:
                        return code
            except OSError:
                # The terminal has gone.
                return _EXIT_CODES[signal.SIGHUP]

    def _wait_for_signals(self) -> None:
        while True:
            self._events.put(signal.Signals(signal.sigwait(_SIGNALS)))

    def _wait_for_keys(self) -> None:
        data = b"-"
        while data:
            try:
                data = os.read(self._screen.keyboard, 4096)
            except OSError:
                data = b""
            self._events.put(data)

    def _request(self, query: StatusQuery) -> None:
        try:
            self._events.put(fetch(self._at, query))
        except Exception as error:  # noqa: BLE001 - raised in the main thread
            self._events.put(error)

    def _step(self) -> int | None:
        """Send a request if it is due, draw, and handle an event. Return the exit code at the end."""
        now, scene, size = time.monotonic(), self._scene, self._screen.size()
        if now >= self._request_at and not self._is_requesting:
            self._is_requesting = True
            rows, channels = min(_MAX_ROWS, self._rows()), int(size.columns >= _WIDE)
            query = self._query._replace(sort=scene.sort, limit=rows, offset=scene.offset, channels=channels)
            threading.Thread(target=self._request, args=(query,), daemon=True).start()
            has_rates = scene.latest["totals"]["rates_over"] is not None
            pause = self._interval if has_rates else min(self._interval, FIRST_INTERVAL)
            self._request_at = math.inf if scene.paused else now + pause
        scene.silent_for = now - self._responded_at
        self._screen.draw(frame(scene, size))
        due = math.inf if self._is_requesting else self._request_at - now
        wait = min(due, math.inf if scene.problem is None else _REDRAW)
        try:
            event = self._events.get(timeout=None if wait == math.inf else max(0.0, wait))
        except queue.Empty:
            return None
        if isinstance(event, bytes):
            return self._handle_keys(event)
        if isinstance(event, signal.Signals):
            return self._handle_signal(event)
        self._is_requesting = False
        self._handle_result(event)
        return None

    def _rows(self) -> int:
        return rows_in(self._screen.size(), self._scene)

    def _handle_signal(self, received: signal.Signals) -> int | None:
        if received is signal.SIGTSTP:
            # Restore the terminal and stop, as Ctrl-Z asks; continue here later.
            self._screen.give_back()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTSTP])
            signal.raise_signal(signal.SIGTSTP)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
        if received in {signal.SIGTSTP, signal.SIGCONT}:
            # Another program may have changed the terminal.
            self._screen.take()
        self._request_at = 0.0
        return _EXIT_CODES.get(received)

    def _handle_keys(self, data: bytes) -> int | None:
        if not data:
            return _EXIT_CODES[signal.SIGHUP]
        scene = self._scene
        for key in keys_in(data):
            if key in QUIT:
                return 0
            before = scene.sort, scene.offset, scene.paused
            press(key, scene, self._rows())
            if (scene.sort, scene.offset, scene.paused) != before:
                self._request_at = math.inf if scene.paused and not before[-1] else 0.0
        return None

    def _handle_result(self, result: Status | Exception) -> None:
        if isinstance(result, NoAnswerError):
            self._scene.miss(str(result))
        elif isinstance(result, Exception):
            raise result
        else:
            self._responded_at = time.monotonic()
            self._scene.add(result)
            before = self._scene.offset
            self._scene.scroll_to(before, self._rows())
            if self._scene.offset != before:
                # Allocations have ended, so the list is shorter.
                self._request_at = 0.0
