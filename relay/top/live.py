"""The live view: asks every now and then, draws, and does what keys and signals say."""

import math
import os
import queue
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from relay.status.model import Status
from relay.top.fetching import Query, UnreachableError
from relay.top.keys import QUIT, keys_in, press
from relay.top.terminal import Screen, listening
from relay.top.view import Scene, frame, rows_in

_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGWINCH,
    signal.SIGTSTP,
    signal.SIGCONT,
)

_ENDS = {signal.SIGINT: 0, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGHUP: 128 + signal.SIGHUP}
"""Exit codes. Who presses Ctrl-C is done with it, as with `q`."""

_MOST_ROWS = 500
_PEERS = 4
"""Channels of each allocation whose peers are shown, if there is room for that."""
_WIDE = 120

_LATE = 1.0
"""Seconds after which the title is drawn again that says for how long there has been no answer."""

_FIRST_INTERVAL = 1.1
"""Seconds until the second question: the relay knows rates once it has looked at all allocations twice, a second apart."""

Fetch: TypeAlias = Callable[[Query], Status]


class Asker:
    """Asks in a thread of its own, one question at a time, so that keys are not kept waiting."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._questions: queue.SimpleQueue[Query] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Status | Exception] = queue.SimpleQueue()
        self.is_asking = False
        self.answered, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        """Can be read from once there is an answer."""
        threading.Thread(target=self._work, name="asker", daemon=True).start()

    def ask(self, query: Query) -> None:
        """Ask; not while another question is open."""
        self.is_asking = True
        self._questions.put(query)

    def take(self) -> Status | UnreachableError:
        """Take the answer.

        Raises:
            Exception: there is none, for a reason that should not be.
        """
        os.read(self.answered, 1)
        self.is_asking = False
        answer = self._answers.get()
        if isinstance(answer, Exception) and not isinstance(answer, UnreachableError):
            raise answer
        return answer

    def _work(self) -> None:
        while True:
            query = self._questions.get()
            try:
                self._answers.put(self._fetch(query))
            except Exception as error:  # noqa: BLE001 - it is for the thread that waits for it
                self._answers.put(error)
            os.write(self._writer, b"!")


class Live:
    """One run of the view.

    Args:
        screen: what it is shown on.
        keyboard: the descriptor that keys come from.
        scene: what is shown, with the first answer.
        fetch: asks the relay.
        interval: seconds between questions.
    """

    def __init__(self, screen: Screen, keyboard: int, scene: Scene, fetch: Fetch, interval: float) -> None:
        self._screen = screen
        self._keyboard = keyboard
        self._scene = scene
        self._asker = Asker(fetch)
        self._interval = interval
        self._signals: queue.SimpleQueue[signal.Signals] = queue.SimpleQueue()
        self._answered_at = time.monotonic()
        self._ask_at = 0.0
        self._is_stale = True

    def run(self) -> int:
        """Show it until someone has seen enough; give the exit code."""
        with listening(self._signals.put, _SIGNALS) as woken, self._screen:
            try:
                while True:
                    code = self._step(woken)
                    if code is not None:
                        return code
            except OSError:
                # The terminal is gone, and with it whoever looked.
                return _ENDS[signal.SIGHUP]

    def _step(self, woken: int) -> int | None:
        """Do what there is to do, then wait; give the exit code if it is the end."""
        now = time.monotonic()
        if now >= self._ask_at and not self._asker.is_asking:
            self._asker.ask(self._query())
            self._ask_at = math.inf if self._scene.wishes.paused else now + self._pause()
        self._draw(now)
        ready, _, _ = select.select([woken, self._keyboard, self._asker.answered], [], [], self._patience(now))
        if woken in ready:
            os.read(woken, 4096)
        code = self._hear_signals()
        if code is None and self._keyboard in ready:
            code = self._hear_keys()
        if self._asker.answered in ready:
            self._hear_answer(self._asker.take())
        return code

    def _pause(self) -> float:
        """Give the seconds until the next question."""
        status = self._scene.history.latest
        first = status is None or status["totals"]["rates_over"] is None
        return min(self._interval, _FIRST_INTERVAL) if first else self._interval

    def _patience(self, now: float) -> float | None:
        """Give the seconds for which there is nothing to do by itself."""
        due = math.inf if self._asker.is_asking else self._ask_at - now
        wait = min(due, _LATE if self._scene.problem is not None else math.inf)
        return None if wait == math.inf else max(0.0, wait)

    def _draw(self, now: float) -> None:
        self._scene.silent_for = now - self._answered_at
        if self._is_stale or self._scene.problem is not None:
            size = self._screen.size()
            self._screen.draw(frame(self._scene, size), size)
            self._is_stale = False

    def _query(self) -> Query:
        size, wishes = self._screen.size(), self._scene.wishes
        rows = min(_MOST_ROWS, rows_in(size, self._scene))
        usual = wishes.sort not in {"expiry", "client", "port"}
        channels = _PEERS if size.width >= _WIDE else 0
        return Query(wishes.sort, usual != wishes.inverted, rows, wishes.offset, channels)

    def _hear_signals(self) -> int | None:
        while not self._signals.empty():
            heard = self._signals.get()
            if heard in _ENDS:
                return _ENDS[heard]
            if heard is signal.SIGTSTP:
                self._stop()
            elif heard is signal.SIGCONT:
                # Whatever ran meanwhile may have changed the terminal.
                self._screen.take()
            self._refresh()
        return None

    def _stop(self) -> None:
        """Be stopped, as any program that is told to; and go on where it was."""
        self._screen.give_back()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self._screen.take()

    def _hear_keys(self) -> int | None:
        data = os.read(self._keyboard, 4096)
        if not data:
            return _ENDS[signal.SIGHUP]
        status = self._scene.history.latest
        total = 0 if status is None else status["totals"]["allocations"]
        for key in keys_in(data):
            if key in QUIT:
                return 0
            wishes = self._scene.wishes
            listed, paused = wishes.listed, wishes.paused
            press(key, wishes, rows_in(self._screen.size(), self._scene), total)
            self._is_stale = True
            if wishes.paused and not paused:
                self._ask_at = math.inf
            elif wishes.listed != listed or wishes.paused != paused:
                self._ask_at = 0.0
        return None

    def _hear_answer(self, answer: Status | UnreachableError) -> None:
        self._is_stale = True
        if isinstance(answer, UnreachableError):
            self._scene.problem = str(answer)
            self._scene.history.miss()
            return
        self._scene.problem = None
        self._answered_at = time.monotonic()
        self._scene.history.add(answer)
        rows, total = rows_in(self._screen.size(), self._scene), answer["totals"]["allocations"]
        if self._scene.wishes.offset > max(0, total - rows):
            # There are fewer than there were.
            self._scene.wishes.offset = max(0, total - rows)
            self._refresh()

    def _refresh(self) -> None:
        """Draw at once what there is, and ask for what there is not."""
        self._is_stale = True
        self._ask_at = 0.0
