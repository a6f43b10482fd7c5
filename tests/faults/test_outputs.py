"""Standard streams that are closed, full or without a reader."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.failing import PATIENCE, Failing, running
from tests.support.process import COMMAND
from tests.support.requirements import works
from tests.support.waiting import wait_until

FULL: Final = "/dev/full"
HOST: Final = "127.82.0.3"
MOUNTS: Final = ("unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt")

SIZE: Final = 65536
"""Bytes of the small disk."""


def wait_until_served(program: Failing) -> None:
    """Wait for a relay without a readable log."""
    until, patience = time.monotonic() + PATIENCE, 0.05
    while True:
        with contextlib.suppress(TimeoutError, ConnectionError), program.client() as client:
            client.socket.settimeout(patience)
            client.allocate()
            return
        patience *= 1.5
        assert program.process.poll() is None
        assert time.monotonic() < until


@pytest.mark.parametrize(
    "redirections",
    [">&-", "2>&-", f">{FULL} 2>{FULL}", "<&- >&- 2>&-"],
)
def test_the_relay_runs_and_exits_with_any_standard_streams(tmp_path: Path, redirections: str) -> None:
    by = ("sh", "-c", f'exec "$0" "$@" {redirections}')
    with running(tmp_path, by=by, reads_log=False) as program:
        wait_until_served(program)
        for number in (signal.SIGUSR1, signal.SIGQUIT):
            program.process.send_signal(number)
        program.assert_serves()
        if os.geteuid() == 0:
            # Only root may read the links. Output to a descriptor number must not reach a socket.
            streams = [str(Path(f"/proc/{program.process.pid}/fd/{number}").readlink()) for number in range(3)]
            assert not [each for each in streams if each.startswith("socket:")]
        assert program.stop() == 0


def test_an_unprintable_credential_is_a_usage_error() -> None:
    command = [*COMMAND, "--standalone", "--public-ip4-addr", HOST, "--max-allocations", "10"]
    command += ["--health-check-addr", f"{HOST}:0", "--control-endpoint", f"{HOST}:0"]
    # The interpreter opens its streams at startup.
    shell = ["sh", "-c", f"exec {shlex.join(command)} >&-"]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "can't print the credential" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class OnSmallDisk(Failing):
    """A relay with its log on a small disk."""

    def __init__(self, directory: Path) -> None:
        self._disk = directory / "disk"
        self._disk.mkdir()
        mounted = f'mount -t tmpfs -o size={SIZE} none "$0" && exec "$@" 2>>"$0/log"'
        super().__init__(directory, by=("unshare", "--mount", "sh", "-c", mounted, str(self._disk)), reads_log=False)

    @property
    def disk(self) -> Path:
        """Return the path in the mount namespace of the relay."""
        return Path(f"/proc/{self.process.pid}/root{self._disk}")

    @property
    def log(self) -> str:
        return (self.disk / "log").read_text()

    @property
    def room(self) -> int:
        found = os.statvfs(self.disk)
        return found.f_bfree * found.f_bsize


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Iterator[OnSmallDisk]:
    if not works(*MOUNTS):
        pytest.skip("NO SMALL DISK can be mounted here: run as root")
    started = OnSmallDisk(tmp_path)
    try:
        wait_until_served(started)
        yield started
    finally:
        started.close()


def test_log_lines_lost_on_a_full_disk_are_counted_and_reported(on_small_disk: OnSmallDisk) -> None:
    (on_small_disk.disk / "other").write_bytes(bytes(on_small_disk.room - 4096))
    while on_small_disk.room:
        on_small_disk.process.send_signal(signal.SIGUSR1)
        on_small_disk.assert_serves()
    on_small_disk.assert_serves()
    for _ in range(3):
        on_small_disk.process.send_signal(signal.SIGUSR1)
    on_small_disk.assert_serves()
    (on_small_disk.disk / "other").unlink()
    # The first dump may be one of those that were asked for above.
    wait_until(lambda: on_small_disk.counted("relay.log.lost")[""] > 0)
    torn = [line for line in on_small_disk.log.splitlines() if "lines of the log dropped" in line]
    assert torn
    assert all(line.startswith("20") for line in torn), "lines of their own, after what was cut off"
    assert on_small_disk.stop() == 0


def test_a_log_pipe_without_a_reader_loses_only_lines(tmp_path: Path) -> None:
    with running(tmp_path, reads_log=False) as program:
        assert program.process.stderr is not None
        wait_until_served(program)
        program.process.stderr.close()
        for _ in range(3):
            program.process.send_signal(signal.SIGUSR1)
        program.assert_serves()
        assert program.stop() == 0
