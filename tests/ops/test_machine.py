"""The process that has a port."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from relay.ops.machine import holder


@pytest.mark.parametrize(("kind", "host"), [("udp", "127.0.0.1"), ("udp", "::1"), ("tcp", "127.0.0.1"), ("tcp", "::1")])
def test_a_port_in_use_has_a_holder(kind: str, host: str) -> None:
    script = (
        "import socket; opened = socket.socket("
        f"socket.{'AF_INET6' if ':' in host else 'AF_INET'}, socket.{'SOCK_STREAM' if kind == 'tcp' else 'SOCK_DGRAM'}); "
        f"opened.bind(({host!r}, 0)); {'opened.listen(); ' if kind == 'tcp' else ''}"
        "print(opened.getsockname()[1], flush=True); input()"
    )
    arguments = [sys.executable, "-c", script]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert holder(kind, port) == f"{psutil.Process(process.pid).name()} (pid {process.pid})"
        process.kill()


def test_a_port_of_this_process_is_the_relays() -> None:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        assert holder("tcp", opened.getsockname()[1]) == "this relay itself"


def test_an_unknown_holder_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors of other users' processes are invisible."""
    with socket.create_server(("127.0.0.1", 0)) as opened:
        monkeypatch.setattr(os, "readlink", lambda *_: "hidden")
        assert holder("tcp", opened.getsockname()[1]) == "another process"
