"""Relays to watch, and a terminal to watch them on."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyte
import pytest

from relay.config import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Page, Query
from tests.core.driver import Client
from tests.status.conftest import Watched

HOST = "127.0.0.1"
PATIENCE = 30
"""Seconds for what takes one on a machine that has nothing else to do."""


class Stage:
    """A relay whose time is a test's, and which is asked over real HTTP."""

    def __init__(self) -> None:
        self.watched = Watched()
        self.answer: Callable[[Query], Page] = self._status
        self.queries: list[dict[str, str]] = []
        self.endpoint: HttpEndpoint | None = None
        self.port = 0
        self.clients: list[Client] = []
        self.meanwhile: tuple[int, ...] = ()
        """What is relayed while someone waits for a second look."""

    def open(self) -> None:
        """Be there, at the same port as before if there was one."""
        self.endpoint = HttpEndpoint("control", Endpoint(HOST, self.port), {"/status": self._page})
        self.port = self.endpoint.port

    def close(self) -> None:
        """Be gone."""
        if self.endpoint is not None:
            self.endpoint.stop()
            self.endpoint = None

    def relay(self, *packets: int) -> None:
        """Have each of some clients send packets of 1000 bytes, and let a second pass."""
        for at, count in enumerate(packets):
            if at == len(self.clients):
                client = self.watched.client()
                client.allocate()
                client.bind_channel()
                self.clients.append(client)
            for _ in range(count):
                self.clients[at].send_on_channel(bytes(1000))
        self.watched.relay.pass_time(1)

    def _page(self, query: Query) -> Page:
        self.queries.append(dict(query))
        return self.answer(query)

    def _status(self, query: Query) -> Page:
        return self.watched.page(query)


class Terminal:
    """A terminal with a program on it: what it shows is what a terminal of today would.

    Args:
        command: what runs there, as the leader of its session.
    """

    def __init__(
        self,
        *command: str,
        width: int = 80,
        height: int = 24,
        says_size: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        """All that it was sent."""
        self.keyboard, self.line = pty.openpty()
        if says_size:
            self._set_size(width, height)
        self.before = termios.tcgetattr(self.line)
        environment = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"} | dict(env or {})
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=self.line, stdout=self.line, stderr=self.line, env=environment
        )

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def resize(self, width: int, height: int) -> None:
        """Be of another size, and say so."""
        self.screen.resize(height, width)
        self._set_size(width, height)

    def until(self, condition: Callable[[], bool]) -> None:
        """Show what comes until something is so."""
        end = time.monotonic() + PATIENCE
        while not condition():
            left = end - time.monotonic()
            assert left > 0, f"not so within {PATIENCE} s; the screen is\n{self.text}"
            self._read(min(left, 0.1))

    def shows(self, *texts: str) -> None:
        """Show what comes until all of some texts are on the screen."""
        self.until(lambda: all(text in self.text for text in texts))

    def prompts(self, *, after: bytes) -> None:
        """Show what comes until a shell asks for its next line after something it was sent last.

        What is typed before that is at whoever had the terminal: a program that gives it back throws it away.
        """
        self.until(lambda: b"shell> " in self.raw[self.raw.rfind(after) :])

    def ends(self) -> int:
        """Show what comes until the program has ended; give its exit code."""
        self.until(lambda: self.process.poll() is not None)
        while self._read(0.05):
            pass
        assert self.process.returncode is not None
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Whether it has the screen and the cursor that it had, and does with lines and keys what it did."""
        last = {
            mode: max(self.raw.rfind(b"\x1b[?%dh" % mode), self.raw.rfind(b"\x1b[?%dl" % mode)) for mode in (25, 7, 1049)
        }
        ends = {mode: self.raw[at : at + 8].partition(b"\x1b[?%d" % mode)[2][:1] for mode, at in last.items()}
        return ends == {25: b"h", 7: b"h", 1049: b"l"} and termios.tcgetattr(self.line) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(PATIENCE)
        os.close(self.keyboard)
        os.close(self.line)

    def _set_size(self, width: int, height: int) -> None:
        fcntl.ioctl(self.line, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.keyboard], [], [], seconds)
        if not ready:
            return False
        data = os.read(self.keyboard, 65536)
        self.raw += data
        self._stream.feed(data)
        return True


@pytest.fixture
def stage() -> Iterator[Stage]:
    opened = Stage()
    opened.open()
    yield opened
    opened.close()


TerminalMaker = Callable[..., Terminal]


@pytest.fixture
def start(stage: Stage) -> Iterator[TerminalMaker]:
    """Watch the relay, on a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, **terminal: Any) -> Terminal:  # noqa: ANN401 - as Terminal takes them
            command = (sys.executable, "-m", "relay", "top", "--control-address", f"{HOST}:{stage.port}")
            made = Terminal(*command, "--interval", "1", *options, **terminal)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody answers."""
    with socket.socket() as taken:
        # Bound, and not listened at: nobody else gets it, and whoever connects is refused.
        taken.bind((HOST, 0))
        yield taken.getsockname()[1]
