"""The program, run like an operator."""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import pytest

from relay.core.credentials import Credential
from tests.support.process import COMMAND, Forked, Process
from tests.support.waiting import wait_until

START_SECONDS = 60
STOP_SECONDS = 30

# Without settings of a relay, a proxy or CA certificates.
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "ALLOW_ROOT")


def kept_environment() -> dict[str, str]:
    """Environment variables passed from the tests to a program."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ}


# Some clients support only port 3478, so each relay has its own address.
_hosts = (f"127.{os.getpid() % 200 + 20}.{high}.{low}" for high, low in itertools.product(range(1, 255), range(1, 255)))


class Program:
    """A started ``firezone-relay``.

    Args:
        options: options in addition to the addresses.
        hosts: public addresses; by default an address used by no other program of these tests.
        reads_log: whether the log is read.
        network: variables for a relay with a portal; None for ``--standalone``.
        by: a command prefix, for example to change the user or the namespace.
        variables: further environment variables.
        real: whether the process is started normally instead of forked; always true with ``by``.
        command: the program; by default the program of this interpreter.
    """

    def __init__(  # noqa: PLR0913 - each serves some tests
        self,
        *options: str,
        hosts: tuple[str, ...] = (),
        reads_log: bool = True,
        network: Mapping[str, str] | None = None,
        by: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
        real: bool = False,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        self.host = next(_hosts) if not hosts else hosts[0]
        self.introduction = ""
        public = [
            argument
            for host in (hosts or (self.host,))
            for argument in ("--public-ip6-addr" if ":" in host else "--public-ip4-addr", host)
        ]
        arguments = [
            *(*public, *(("--standalone",) if network is None else ())),
            *("--health-check-addr", f"{self.host}:8080" if ":" not in self.host else f"[{self.host}]:8080"),
            *("--control-endpoint", "127.0.0.1:0", "--max-allocations", "2000", *options),
        ]
        self._prints_credential = network is None and "--relay-secret-file" not in options
        env = kept_environment() | dict(network or {}) | dict(variables or {})
        self.process: Process
        if by or real or command != COMMAND:
            self.process = subprocess.Popen(
                [*by, *command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=env,
                text=True,
            )
        else:
            self.process = Forked(*arguments, env=env)
        self._log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read_log)
        if reads_log:
            self._reader.start()
        else:
            # The ready relay prints its credential, too.
            self._ready.set()

    @property
    def credential(self) -> Credential:
        """The printed credential."""
        found = dict(re.findall(r"(username|password): (\S+)", self.introduction))
        return Credential(found["username"], found["password"])

    @property
    def log(self) -> str:
        return "".join(self._log)

    @property
    def control(self) -> str:
        """The control address of the ready program, as HOST:PORT."""
        found = re.search(r"\bcontrol=(\S+)", self.log)
        assert found is not None, self.log
        return found[1]

    def wait_until_ready(self) -> None:
        """Wait until the program responds, and read its output."""
        assert self._ready.wait(START_SECONDS), f"not ready: {self.log}"
        assert self.process.poll() is None, self.log
        assert self.process.stdout is not None
        if self._prints_credential:
            for line in self.process.stdout:
                self.introduction += line
                if " probe " in line:
                    break

    def wait_for_log(self, text: str) -> None:
        """Wait until the log contains a text."""
        wait_until(lambda: text in self.log, START_SECONDS)

    def dump(self, number: signal.Signals = signal.SIGUSR1) -> dict[str, str]:
        """Request a dump, and return the state of the relay, by name."""
        ends = "end of dump"
        before = self.log.count(ends)
        self.process.send_signal(number)
        wait_until(lambda: self.log.count(ends) > before, START_SECONDS)
        return dict(re.findall(r"^    \| ([\w.]+)=(.*)$", self.log.rpartition(" state ")[2], re.MULTILINE))

    def dropped(self) -> int:
        """Return the number of packets dropped because of overload."""
        return self.counted("relay.drops")["late"] + self.counted("relay.receive_buffer.drops")[""]

    def counted(self, name: str) -> Counter[str]:
        """Return a metric from a dump by its labels; the key is empty for a metric without labels."""
        found = self.dump().get(name, "")
        return Counter({kind: int(count) for kind, count in re.findall(r"([^:,]*?):?(\d+)(?:\.\d+)?(?:,|$)", found)})

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for the exit and the end of the log; return the exit code."""
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
        # The program has exited: wake waiting threads.
        self._ready.set()


ProgramStarter: TypeAlias = Callable[..., Program]


@pytest.fixture
def start_program() -> Iterator[ProgramStarter]:
    """Start programs, which end with the test."""
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
    """A relay that allows peers on loopback."""
    return start_program("--allow-peer", "127.0.0.0/8,::1/128")
