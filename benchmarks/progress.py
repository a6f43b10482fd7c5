"""What is said while the suite runs: a bar on a terminal, a line for each case elsewhere; both with the time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class Said:
    """Progress in expected seconds. Nothing is drawn while something is measured. Use it as a context."""

    def __init__(self, console: Console, seconds: float) -> None:
        self._console = console
        self._seconds = seconds
        self._done = 0.0
        self._began = time.monotonic()
        # A bar that draws itself would take CPU time from the load.
        columns = (BarColumn(24), TextColumn("{task.fields[left]} left  {task.description}", markup=False))
        self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._task: TaskID = self._bar.add_task("", total=seconds, left=_minutes(seconds))

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """Say what is measured from now on."""
        left = _minutes(self._left())
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._done, description=what, left=left, refresh=True)
        else:
            self._console.print(f"{left} left  {what}", highlight=False, markup=False)

    def end(self, seconds: float) -> None:
        """Count something as done that was expected to take some seconds."""
        self._done += seconds

    def say(self, text: str) -> None:
        """Say something that stays."""
        self._console.print(text, highlight=False, markup=False)

    def _left(self) -> float:
        """Guess from what was expected, and how much longer or shorter it took so far."""
        if self._done < self._seconds / 20:
            return self._seconds - self._done
        pace = (time.monotonic() - self._began) / self._done
        return (self._seconds - self._done) * pace


def _minutes(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 60:2d}:{whole % 60:02d}"
