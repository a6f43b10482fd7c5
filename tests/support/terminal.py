"""Relays and a terminal for ``top``."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import pyte
import pytest

from relay.net.endpoint import Endpoint
from relay.ops.http.endpoint import HttpEndpoint, Page, Query
from tests.support import hasty_top
from tests.support.core import Client
from tests.support.process import COMMAND, Forked, Process
from tests.support.status import Watched

HOST = "127.0.0.1"
SOON = "0.05"
"""Seconds between requests to a relay."""
PATIENCE = 30
"""Seconds for an action of one second, on a busy machine."""


SECOND = 2

Starter: TypeAlias = Callable[[int, Mapping[str, str]], Process]
"""Starts a program with a terminal as its standard streams, in an environment."""


def running(*command: str) -> Starter:
    """Run a command on a terminal, as the leader of its session."""

    def start(line: int, env: Mapping[str, str]) -> Process:
        return subprocess.Popen(["setsid", "--ctty", *command], stdin=line, stdout=line, stderr=line, env=env, text=True)

    return start


def watching(port: int, *options: str) -> Starter:
    """Run ``top`` on a terminal, by default with a short interval."""

    def start(line: int, env: Mapping[str, str]) -> Process:
        arguments = ("top", "--control-endpoint", f"{HOST}:{port}", "--interval", SOON, *options)
        return Forked(
            *arguments, env=env, stdin=line, stdout=line, stderr=line, leads_session=True, module=hasty_top.__name__
        )

    return start


class Stage:
    """A relay with a simulated clock and a real HTTP address."""

    def __init__(self) -> None:
        self.watched = Watched()
        self.answer: Callable[[Query], Page] = self._status
        self.queries: list[dict[str, str]] = []
        self.endpoint: HttpEndpoint | None = None
        self.port = 0
        self.clients: list[Client] = []
        self.meanwhile: tuple[int, ...] | None = None
        """Traffic between the first and the second request."""
        # A request sees all packets of a second, or none.
        self._lock = threading.RLock()

    def open(self) -> None:
        """Start to listen, on the same port after a restart."""
        self.endpoint = HttpEndpoint("control", Endpoint(HOST, self.port), {"/status": self._page})
        self.port = self.endpoint.port

    def close(self) -> None:
        """Stop listening."""
        if self.endpoint is not None:
            self.endpoint.stop()
            self.endpoint = None

    def relay(self, *packets: int) -> None:
        """Send packets of 1000 bytes, with a count per client, and advance the clock by a second."""
        with self._lock:
            for at, count in enumerate(packets):
                if at == len(self.clients):
                    client = self.watched.client()
                    client.allocate()
                    client.bind_channel()
                    self.clients.append(client)
                for _ in range(count):
                    self.clients[at].send_on_channel(bytes(1000))
            self.watched.relay.pass_time(1)

    def start_again(self, *packets: int) -> None:
        """Replace the relay by a new relay with a second of traffic."""
        with self._lock:
            self.watched = Watched()
            self.clients.clear()
            self.relay(*packets)

    def _page(self, query: Query) -> Page:
        with self._lock:
            self.queries.append(dict(query))
            if self.meanwhile is not None and len(self.queries) == SECOND:
                self.relay(*self.meanwhile)
            return self.answer(query)

    def _status(self, query: Query) -> Page:
        return self.watched.page(query)


class Terminal:
    """An emulated modern terminal with a running program.

    Args:
        starter: starts the program.
        width: characters per line; the height is in lines.
        says_size: whether the program can query the size.
        env: further environment variables of the program.
    """

    def __init__(
        self,
        starter: Starter,
        *,
        width: int = 80,
        height: int = 24,
        says_size: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        """All output of the program."""
        self.keyboard, self.line = pty.openpty()
        if says_size:
            self._set_size(width, height)
        self.before = termios.tcgetattr(self.line)
        environment = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"} | dict(env or {})
        self.process = starter(self.line, environment)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def resize(self, width: int, height: int) -> None:
        """Resize the terminal, and send SIGWINCH."""
        self.screen.resize(height, width)
        self._set_size(width, height)

    def until(self, condition: Callable[[], bool]) -> None:
        """Process output until a condition is true."""
        end = time.monotonic() + PATIENCE
        while not condition():
            left = end - time.monotonic()
            assert left > 0, f"not so within {PATIENCE} s; the screen is\n{self.text}"
            self._read(min(left, 0.1))

    def shows(self, *texts: str) -> None:
        """Process output until the screen contains all texts."""
        self.until(lambda: all(text in self.text for text in texts))

    def prompts(self, *, after: bytes) -> None:
        """Process output until the shell prompts again after the last input.

        Earlier input goes to the previous program, which discards pending input at its exit.
        """
        self.until(lambda: b"shell> " in self.raw[self.raw.rfind(after) :])

    def ends(self) -> int:
        """Process output until the program has ended; return its exit code."""
        self.until(lambda: self.process.poll() is not None)
        while self._read(0.05):
            pass
        assert self.process.returncode is not None
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Return whether screen, cursor and terminal modes are restored."""
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
    """Run ``top`` for the relay on a terminal."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, real: bool = False, **terminal: Any) -> Terminal:  # noqa: ANN401 - as Terminal takes them
            command = (*COMMAND, "top", "--control-endpoint", f"{HOST}:{stage.port}", "--interval", "1", *options)
            made = Terminal(running(*command) if real else watching(stage.port, *options), **terminal)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A closed port."""
    with socket.socket() as taken:
        # Bound without listen: the port is reserved, and connections are refused.
        taken.bind((HOST, 0))
        yield taken.getsockname()[1]
