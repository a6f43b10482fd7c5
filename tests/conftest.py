"""Fixtures and options of all tests."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pykka
import pytest

from relay.config import LogFormat
from relay.ops.logs import log as logs
from tests.support.examples import register_profiles
from tests.support.waiting import PATIENCE

# Tests run as root in CI and in containers: each program started by tests inherits this variable.
os.environ["ALLOW_ROOT"] = "1"

register_profiles()

IN_OWN_NETWORK: Final = Path(__file__).with_name("in-own-network")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of test processes: 0 without network namespaces.

    More than the CPUs, because about half of the processes wait at any time.
    """
    done = subprocess.run([IN_OWN_NETWORK, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(f"All tests run in one process, which takes longer: no network namespaces here: {done.stderr}")
        return 0
    return 2 * len(os.sched_getaffinity(0))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """Start each worker in its own network namespace, where port 3478 of every address is free."""
    for spec in specs:
        spec.python = shlex.join((str(IN_OWN_NETWORK), sys.executable))


class ShownByPytest:
    """The stream of the log, which pytest shows for a failed test."""

    lost = 0

    def write(self, text: str, /) -> None:
        sys.stderr.write(text)

    def close(self) -> None:
        """Do nothing."""


@pytest.fixture(autouse=True)
def _no_actor_outlives_its_test() -> Iterator[None]:
    with logs.events_to(logs.Log(LogFormat.HUMAN, ShownByPytest())):
        yield
    left = pykka.ActorRegistry.get_all()
    pykka.ActorRegistry.stop_all(timeout=PATIENCE)
    assert not left, f"left running: {left}"
