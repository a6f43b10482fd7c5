"""The terminal: its modes, its size, and frames."""

import contextlib
import io
import locale
import os
import termios
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.text import Text

_TAKE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
"""Switch to the alternate screen, hide the cursor, and truncate long lines."""
_GIVE_BACK = "\x1b[?7h\x1b[?25h\x1b[0m\x1b[?1049l"

_MIN_WIDTH, _MIN_HEIGHT, _MAX_WIDTH = 20, 4, 4096
_DEFAULT_WIDTH, _DEFAULT_HEIGHT = 80, 24


class Screen:
    """Terminal for frames. The end of its context restores the terminal."""

    def __init__(self, keyboard: int, output: int) -> None:
        self.keyboard = keyboard
        self._output = output
        self._before: Any = None
        # Rich takes the colours of the terminal from TERM and the environment.
        self._console = Console(
            file=io.StringIO(), force_terminal=True, width=_MAX_WIDTH, highlight=False, markup=False, emoji=False
        )
        self._encoding = locale.getpreferredencoding(do_setlocale=False)

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
        self._write(_TAKE)

    def give_back(self) -> None:
        """Restore the terminal, if it still exists."""
        before, self._before = self._before, None
        if before is not None:
            with contextlib.suppress(OSError):
                self._write(_GIVE_BACK)
            with contextlib.suppress(termios.error):
                # Discard keys that were typed for this screen.
                termios.tcsetattr(self.keyboard, termios.TCSAFLUSH, before)

    def size(self) -> os.terminal_size:
        """Return the current size."""
        return size_of(self._output)

    def draw(self, lines: Sequence[Text]) -> None:
        """Show a frame.

        Raises:
            OSError: the terminal has gone.
        """
        width = self.size().columns
        written = []
        for at, line in enumerate(lines, 1):
            # After a full line, the cursor is still on the last character, and \x1b[K would clear the character.
            clear = "\x1b[K" if line.cell_len < width else ""
            with self._console.capture() as capture:
                self._console.print(line, end="", no_wrap=True, crop=False)
            written.append(f"\x1b[{at};1H{capture.get()}\x1b[0m{clear}")
        # In this mode, terminals show the whole frame at once.
        self._write("\x1b[?2026h" + "".join(written) + "\x1b[?2026l")

    def _write(self, text: str) -> None:
        data = memoryview(text.encode(self._encoding, errors="replace"))
        while data:
            data = data[os.write(self._output, data) :]


def size_of(output: int) -> os.terminal_size:
    """Return the size of a terminal; 80x24 if it is unknown."""
    try:
        columns, lines = os.get_terminal_size(output)
    except OSError:
        columns = lines = 0
    return os.terminal_size((max(columns or _DEFAULT_WIDTH, _MIN_WIDTH), max(lines or _DEFAULT_HEIGHT, _MIN_HEIGHT)))
