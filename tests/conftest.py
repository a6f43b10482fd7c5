"""What tests of every kind use."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pykka
import pytest
import structlog
from hypothesis import HealthCheck, settings

from relay.config import LogFormat
from relay.ops.logs import log as logs

# CI is root, and so is who tries a relay in a container: each program that tests start finds this in its environment.
os.environ["ALLOW_ROOT"] = "1"


def has_ipv6() -> bool:
    """Whether this machine can talk to itself over IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = has_ipv6()

# Containers often have no IPv6 at all: then there is nothing to be tested.
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")

# An example that takes long is no failure: the machine may have other work. People's runs search at random, and find more
# over time; CI's repeat themselves, so that a red one is about the change.
settings.register_profile("people", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("people"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "people")

PATIENCE = 30.0
"""Seconds for what takes a hundredth of one where nothing else is to be done: a machine may be slow, and have other work."""


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Wait for what another thread or process does and says nothing about; fail if it does not."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not so within {seconds} s"
        # Lets the other threads have the interpreter.
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _no_actor_outlives_its_test() -> Iterator[None]:
    with logs.events_to(logs.Log(LogFormat.HUMAN, sys.stderr)):
        yield
    left = pykka.ActorRegistry.get_all()
    pykka.ActorRegistry.stop_all(timeout=PATIENCE)
    structlog.reset_defaults()
    assert not left, f"left running: {left}"
