"""Processes forked for tests behave like normally started processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import self_portrait
from tests.support.machine import new_machines
from tests.support.process import Forked
from tests.support.program import kept_environment

MODULE: Final = self_portrait.__name__
SECONDS: Final = 30


def forked(*arguments: str, **variables: str) -> Forked:
    return Forked(*arguments, env=kept_environment() | variables, module=MODULE)


def said_by(process: Forked) -> Any:  # noqa: ANN401 - JSON
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_a_forked_process_has_the_environment_of_a_real_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = kept_environment() | {"PYTHONPATH": str(Path.cwd()), "LC_ALL": "C.UTF-8", "VARIABLE": "\udcff = ü"}
    monkeypatch.setenv("OF_THE_TESTS", "which is not for others")
    monkeypatch.chdir(tmp_path)
    real = subprocess.run(
        [sys.executable, "-m", MODULE, "exit", "3"],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    with forked("exit", "3", **environment) as process:
        assert said_by(process) == json.loads(real.stdout)
        assert process.wait(SECONDS) == real.returncode == 3


def test_an_exception_is_printed_and_exits_with_1() -> None:
    with forked("raise") as process:
        assert process.stderr is not None
        assert process.stderr.read().endswith("\nZeroDivisionError\n")
        assert process.wait(SECONDS) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_fatal_signal_is_the_exit_code(number: signal.Signals) -> None:
    with forked("wait") as process:
        assert said_by(process)["arguments"] == ["wait"]
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        assert process.wait(SECONDS) == process.poll() == process.returncode == -number
        process.send_signal(number)


def test_children_share_no_state() -> None:
    with forked("wait", FIRST="1") as first, forked("wait") as second:
        assert said_by(first)["environment"].keys() - said_by(second)["environment"].keys() == {"FIRST"}
        # Only the test has the other end of the child's streams.
        first.kill()
        assert first.stdout is not None
        assert first.stdout.read() == ""
        assert second.poll() is None
        second.kill()


def test_a_child_is_in_the_network_namespace_of_its_thread() -> None:
    found = []
    with new_machines(1, "NO NETWORK of its own can be made here") as (machine,):
        with machine.entered(), forked("exit", "0") as process:
            found.append(said_by(process)["network"])
        with forked("exit", "0") as process:
            found.append(said_by(process)["network"])
        assert found == [os.fstat(machine.descriptor).st_ino, Path("/proc/self/ns/net").stat().st_ino]
