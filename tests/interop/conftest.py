"""The program itself, run as an operator runs it."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import pytest

from relay.core.credentials import Credential
from tests.conftest import wait_until

START_SECONDS = 60
STOP_SECONDS = 30

# What the program gets of the environment of the tests: no setting of a relay, no proxy, and no authorities.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "ALLOW_ROOT")

# Clients know port 3478 only, so each relay has an address of its own.
_hosts = (f"127.{os.getpid() % 200 + 20}.{high}.{low}" for high, low in itertools.product(range(1, 255), range(1, 255)))


class Program:
    """A ``firezone-relay``, started.

    Args:
        options: beside the addresses.
        hosts: its public addresses; one that no other program of these tests has, if none is given.
        reads_log: whether someone reads what it logs.
        network: variables for one that is in a network; None for one that is ``--standalone``.
        by: a command that runs the one that follows it, as somebody or in some place.
        variables: further ones of its environment.
    """

    def __init__(
        self,
        *options: str,
        hosts: tuple[str, ...] = (),
        reads_log: bool = True,
        network: Mapping[str, str] | None = None,
        by: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.host = next(_hosts) if not hosts else hosts[0]
        self.introduction = ""
        public = [
            argument
            for host in (hosts or (self.host,))
            for argument in ("--public-ip6-addr" if ":" in host else "--public-ip4-addr", host)
        ]
        self.command = [
            *(*by, sys.executable, "-m", "relay", *public, *(("--standalone",) if network is None else ())),
            *("--health-address", f"{self.host}:8080" if ":" not in self.host else f"[{self.host}]:8080"),
            *("--control-address", "127.0.0.1:0", "--max-allocations", "2000", *options),
        ]
        self._prints_credential = network is None and "--relay-secret-file" not in options
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: os.environ[name] for name in _KEPT if name in os.environ}
            | dict(network or {})
            | dict(variables or {}),
            text=True,
        )
        self._log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read_log)
        if reads_log:
            self._reader.start()
        else:
            # It prints its credential once it is ready, too.
            self._ready.set()

    @property
    def credential(self) -> Credential:
        """The one it printed."""
        found = dict(re.findall(r"(username|password): (\S+)", self.introduction))
        return Credential(found["username"], found["password"])

    @property
    def log(self) -> str:
        return "".join(self._log)

    def wait_until_ready(self) -> None:
        """Wait until it answers, and read what it prints then."""
        assert self._ready.wait(START_SECONDS), f"not ready: {self.log}"
        assert self.process.poll() is None, self.log
        assert self.process.stdout is not None
        if self._prints_credential:
            for line in self.process.stdout:
                self.introduction += line
                if " probe " in line:
                    break

    def wait_for_log(self, text: str) -> None:
        """Wait until it has logged something."""
        wait_until(lambda: text in self.log, START_SECONDS)

    def dropped(self) -> int:
        """Give how many packets its sockets and threads were too busy for, so far."""
        ends = "--- end of dump"
        before = self.log.count(ends)
        self.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: self.log.count(ends) > before, START_SECONDS)
        counted = re.findall(r"^(?:dropped_late|dropped_stale|kernel_drops): (\d+)$", self.log, re.MULTILINE)
        return sum(map(int, counted[-3:]))

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and give the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait until it has ended and all that it logged was read, and give the exit code."""
        code = self.process.wait(seconds)
        if self._reader.ident is not None:
            self._reader.join(STOP_SECONDS)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._log.append(line)
                if "ready" in line:
                    self._ready.set()
        # It has ended: whoever waits for it shall look.
        self._ready.set()


ProgramStarter: TypeAlias = Callable[..., Program]


@pytest.fixture
def start_program() -> Iterator[ProgramStarter]:
    """Start programs; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(
            *options: str,
            hosts: tuple[str, ...] = (),
            reads_log: bool = True,
            variables: Mapping[str, str] | None = None,
        ) -> Program:
            program = Program(*options, hosts=hosts, reads_log=reads_log, variables=variables)
            stack.callback(program.close)
            program.wait_until_ready()
            return program

        yield start


@pytest.fixture
def program(start_program: ProgramStarter) -> Program:
    """A relay to whose peers on loopback may belong."""
    return start_program("--allow-peer", "127.0.0.0/8,::1/128")
