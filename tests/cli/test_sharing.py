"""The options and variables for CPU affinity and the switch interval."""

import os
import sys

import pytest

from relay.config import ANY_CPU
from tests.support.command_line import setting
from tests.support.process import run

HOST = "127.81.0.2"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_AFFINITY", "SWITCH_INTERVAL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "cpu"), [("auto", ANY_CPU), ("AUTO", ANY_CPU), ("off", None), ("0", 0), ("3", 3), (" 12 ", 12), ("00", 0)]
)
def test_the_cpu_is_auto_off_or_a_number(monkeypatch: pytest.MonkeyPatch, text: str, cpu: int | None) -> None:
    assert setting("cpu", "--cpu-affinity", text) == cpu
    monkeypatch.setenv("CPU_AFFINITY", text)
    assert setting("cpu") == cpu


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.5", 0.5), ("0.0001", 0.0001), ("10", 10), ("off", sys.getswitchinterval()), (" Off ", 0.005)]
)
def test_the_switch_interval_is_in_seconds_or_off(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    assert setting("switch_interval", "--switch-interval", text) == pytest.approx(seconds)
    monkeypatch.setenv("SWITCH_INTERVAL", text)
    assert setting("switch_interval") == pytest.approx(seconds)


def test_defaults_are_auto_and_half_a_second() -> None:
    assert setting("cpu") == ANY_CPU
    assert setting("switch_interval") == 0.5


def test_the_error_for_an_unusable_cpu_lists_the_usable_cpus() -> None:
    done = run("--standalone", "--public-ip4-addr", HOST, "--cpu-affinity", "99999")
    usable = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"firezone-relay: can't run on CPU 99999: --cpu-affinity takes one of {usable}, auto, or off\n"
