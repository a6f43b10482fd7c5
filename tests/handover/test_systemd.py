"""systemd follows a relay that is taken over: its main process changes, and the watchdog is fed by the successor."""

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.handover import Starter

_CREDENTIALS = struct.Struct("=3i")


class Notified(NamedTuple):
    """A message to systemd, and its sender."""

    lines: list[str]
    process: int


class ServiceManager:
    """The end of systemd's notification socket. It closes the descriptors of a barrier, as systemd does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.settimeout(30)

    def close(self) -> None:
        self._socket.close()

    def next(self) -> Notified:
        data, ancillary, _, _ = self._socket.recvmsg(4096, 256)
        process = 0
        for _, kind, content in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                process = _CREDENTIALS.unpack(content)[0]
            else:
                for each in struct.unpack(f"={len(content) // 4}i", content):
                    os.close(each)
        return Notified(data.decode().splitlines(), process)

    def wait_for(self, line: str, process: int | None = None) -> Notified:
        """Return the next message with a line, from a process."""
        while True:
            message = self.next()
            if any(each.startswith(line) for each in message.lines) and process in {None, message.process}:
                return message


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    manager = ServiceManager(tmp_path / "notify")
    yield manager
    manager.close()


def test_the_successor_becomes_the_main_process_and_feeds_the_watchdog(start: Starter, manager: ServiceManager) -> None:
    relay = start(NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="1000000")
    main = manager.wait_for("READY=1").process
    for _ in range(2):
        # As ExecReload=, without NOTIFY_SOCKET.
        command = start("--take-over", "--detach", real=True)
        assert command.process.wait(60) == 0
        message = manager.wait_for("MAINPID=", main)
        successor = int(message.lines[0].removeprefix("MAINPID="))
        assert successor != main
        for line in ("READY=1", "WATCHDOG=1", "WATCHDOG=1"):
            manager.wait_for(line, successor)
        assert relay.wait() == 0
        main, relay = successor, command
    os.kill(main, 15)
    manager.wait_for("STOPPING=1", main)
