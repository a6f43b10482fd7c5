"""How threads share CPUs and the interpreter is the operator's to say, by option or variable."""

import os
import subprocess
import sys
from typing import Any

import pytest

from relay.cli import cli
from relay.config import ANY_CPU

HOST = "127.81.0.2"


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_AFFINITY", "SWITCH_INTERVAL"):
        monkeypatch.delenv(name, raising=False)


def setting(name: str, *arguments: str) -> Any:  # noqa: ANN401 - whatever the option's type makes
    """Give what a command line sets."""
    with cli.make_context("firezone-relay", list(arguments)) as context:
        return context.params[name]


@pytest.mark.parametrize(
    ("text", "cpu"), [("auto", ANY_CPU), ("AUTO", ANY_CPU), ("off", None), ("0", 0), ("3", 3), (" 12 ", 12), ("00", 0)]
)
def test_the_cpu_is_any_or_none_or_the_one_given(monkeypatch: pytest.MonkeyPatch, text: str, cpu: int | None) -> None:
    assert setting("cpu", "--cpu-affinity", text) == cpu
    monkeypatch.setenv("CPU_AFFINITY", text)
    assert setting("cpu") == cpu


@pytest.mark.parametrize(
    ("text", "seconds"), [("0.5", 0.5), ("0.0001", 0.0001), ("10", 10), ("off", sys.getswitchinterval()), (" Off ", 0.005)]
)
def test_the_switch_interval_is_in_seconds_or_pythons_own(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: float
) -> None:
    assert setting("switch_interval", "--switch-interval", text) == pytest.approx(seconds)
    monkeypatch.setenv("SWITCH_INTERVAL", text)
    assert setting("switch_interval") == pytest.approx(seconds)


def test_unset_is_any_cpu_and_half_a_second() -> None:
    assert setting("cpu") == ANY_CPU
    assert setting("switch_interval") == 0.5


def test_a_cpu_that_the_process_may_not_use_is_refused_with_those_it_may() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay", "--standalone", "--public-ip4-addr", HOST, "--cpu-affinity", "99999"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    usable = ",".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"firezone-relay: can't run on CPU 99999: --cpu-affinity takes one of {usable}, auto, or off\n"
