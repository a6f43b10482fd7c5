"""The terminal: its modes, its size, and frames."""

import contextlib
import os
import termios
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

_TAKE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
"""Switch to the alternate screen, hide the cursor, and truncate long lines."""
_GIVE_BACK = "\x1b[?7h\x1b[?25h\x1b[0m\x1b[?1049l"
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
"""In this mode, terminals show the whole frame at once."""

_MIN_WIDTH, _MIN_HEIGHT = 20, 4
_DEFAULT_WIDTH, _DEFAULT_HEIGHT = 80, 24


class Screen:
    """Terminal for frames. The end of its context restores the terminal."""

    def __init__(self, keyboard: int, output: int) -> None:
        self.keyboard = keyboard
        self._output = open(output, "w", errors="replace", closefd=False)  # noqa: SIM115 - a descriptor
        self._before: Any = None
        # Rich takes the colours of the terminal from TERM and the environment.
        self._console = Console(file=self._output, force_terminal=True, highlight=False, markup=False, emoji=False)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def take(self) -> None:
        """Switch to single keys without echo, and clear the screen."""
        wanted = termios.tcgetattr(self.keyboard)
        self._before = self._before or wanted.copy()
        # Without IXON, Ctrl-S can't stop the output and block this process.
        wanted[0] &= ~termios.IXON
        wanted[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self.keyboard, termios.TCSADRAIN, wanted)
        print(_TAKE, end="", file=self._output, flush=True)

    def give_back(self) -> None:
        """Restore the terminal, if it still exists."""
        before, self._before = self._before, None
        if before is not None:
            with contextlib.suppress(OSError):
                print(_GIVE_BACK, end="", file=self._output, flush=True)
            with contextlib.suppress(termios.error):
                # Discard keys that were typed for this screen.
                termios.tcsetattr(self.keyboard, termios.TCSAFLUSH, before)

    def size(self) -> os.terminal_size:
        """Return the current size."""
        return size_of(self._output.fileno())

    def draw(self, lines: Sequence[Text]) -> None:
        """Show a frame.

        Raises:
            OSError: the terminal has gone.
        """
        width = self.size().columns
        self._output.write(_BEGIN_FRAME)
        with self._console:
            for at, line in enumerate(lines):
                self._console.control(Control.move_to(0, at))
                self._console.print(line, end="", soft_wrap=True)
                # After a full line, the cursor is still on the last character, which would be erased.
                if line.cell_len < width:
                    self._console.control(Control((ControlType.ERASE_IN_LINE, 0)))
        print(_END_FRAME, end="", file=self._output, flush=True)


def size_of(output: int) -> os.terminal_size:
    """Return the size of a terminal; 80x24 if it is unknown."""
    columns = lines = 0
    with contextlib.suppress(OSError):
        columns, lines = os.get_terminal_size(output)
    return os.terminal_size((max(columns or _DEFAULT_WIDTH, _MIN_WIDTH), max(lines or _DEFAULT_HEIGHT, _MIN_HEIGHT)))
