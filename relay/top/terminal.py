"""The terminal: taken over for a while, and always given back as it was."""

import contextlib
import io
import locale
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Self

from rich.console import Console
from rich.text import Text

from relay.top.view import Size

_TAKE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
"""Another screen, without a cursor; what is too long is cut off, and no line is broken."""
_GIVE_BACK = "\x1b[?7h\x1b[?25h\x1b[0m\x1b[?1049l"

_NARROWEST, _LOWEST, _WIDEST = 20, 4, 4096
_USUAL = os.terminal_size((80, 24))


class Screen:
    """A terminal that shows frames. Use it as a context: leaving it gives the terminal back, whatever happened.

    Args:
        keyboard: the descriptor that keys are read from.
        output: the descriptor that is written to.
    """

    def __init__(self, keyboard: int, output: int) -> None:
        self._keyboard = keyboard
        self._output = output
        self._before: Any = None
        # What the terminal gets is written in one go; and what colours it has, its name and the environment say.
        self._console = Console(
            file=io.StringIO(), force_terminal=True, width=_WIDEST, highlight=False, markup=False, emoji=False
        )
        self._is_unicode = is_unicode()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def take(self) -> None:
        """Take the terminal over: keys come one by one and are not shown."""
        if self._before is None:
            self._before = termios.tcgetattr(self._keyboard)
        wanted = termios.tcgetattr(self._keyboard)
        # Nor does Ctrl-S stop the output: whoever waited for it could not be ended any more.
        wanted[0] &= ~termios.IXON
        wanted[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(self._keyboard, termios.TCSADRAIN, wanted)
        self._write(_TAKE)

    def give_back(self) -> None:
        """Give it back as it was. If there is none any more, there is nothing to do."""
        before, self._before = self._before, None
        if before is not None:
            with contextlib.suppress(OSError):
                self._write(_GIVE_BACK)
            with contextlib.suppress(termios.error):
                # What was typed ahead was for this screen.
                termios.tcsetattr(self._keyboard, termios.TCSAFLUSH, before)

    def size(self) -> Size:
        """Give its size now."""
        return size_of(self._output, is_unicode=self._is_unicode)

    def draw(self, lines: Sequence[Text], size: Size) -> None:
        """Show a frame.

        Raises:
            OSError: the terminal is gone.
        """
        written = []
        for at, line in enumerate(lines, 1):
            # In a full line, the cursor is still on its last character, which would be cleared.
            clear = "\x1b[K" if line.cell_len < size.width else ""
            written.append(f"\x1b[{at};1H{self._encoded(line)}\x1b[0m{clear}")
        # All at once, for terminals that know how.
        self._write("\x1b[?2026h" + "".join(written) + "\x1b[?2026l")

    def _encoded(self, line: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(line, end="", no_wrap=True, crop=False)
        return capture.get()

    def _write(self, text: str) -> None:
        encoding = "utf-8" if self._is_unicode else "ascii"
        data = memoryview(text.encode(encoding, errors="replace"))
        while data:
            data = data[os.write(self._output, data) :]


def size_of(output: int, *, is_unicode: bool) -> Size:
    """Give the size of a terminal; that of most, if it does not say."""
    try:
        columns, lines = os.get_terminal_size(output)
    except OSError:
        columns, lines = _USUAL
    columns, lines = columns or _USUAL.columns, lines or _USUAL.lines
    return Size(max(columns, _NARROWEST), max(lines, _LOWEST), is_unicode)


def is_unicode() -> bool:
    """Tell whether the terminal, or whatever the output is, has more than ASCII."""
    encodings = locale.getpreferredencoding(do_setlocale=False), sys.stdout.encoding or ""
    return all(each.lower().replace("-", "") == "utf8" for each in encodings)


@contextlib.contextmanager
def listening(heard: Callable[[signal.Signals], None], signals: Sequence[signal.Signals]) -> Iterator[int]:
    """Hear of signals, for as long as the context lasts.

    Yields:
        A descriptor that can be read from once one has come.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def handle(number: int, _: FrameType | None) -> None:
        heard(signal.Signals(number))

    before = {each: signal.signal(each, handle) for each in signals}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(woken)
        for each, handler in before.items():
            signal.signal(each, handler)
        os.close(reader)
        os.close(writer)
