"""Prometheus's own tool accepts the alerts and the metrics of a running relay."""

import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.support.program import ProgramStarter, start_program

__all__ = ["start_program"]

TESTS: Final = Path(__file__).with_name("prometheus-rules.test.yml")
RULES: Final = Path(__file__).parents[2] / "deploy" / "prometheus-rules.yml"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="PROMTOOL is not installed: apt-get install prometheus"
)


def promtool(*arguments: str, given: str | None = None) -> tuple[int, str]:
    done = subprocess.run(
        ["promtool", *arguments],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


@needs_promtool
def test_each_alert_has_its_cause_and_no_other() -> None:
    code, said = promtool("test", "rules", str(TESTS))
    assert code == 0, said


def test_the_unit_tests_let_every_alert_fire() -> None:
    fired = {
        each["alertname"] for test in yaml.safe_load(TESTS.read_text())["tests"] for each in test["alert_rule_test"]
        if each.get("exp_alerts")
    }  # fmt: skip
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert fired == {rule["alert"] for rule in group["rules"]}


@needs_promtool
def test_the_metrics_break_no_rule_of_promtool(start_program: ProgramStarter) -> None:
    """The name has all characters that the format escapes."""
    started = start_program("--name", 'a "relay"\\\n{of=1}')
    with urllib.request.urlopen(f"http://{started.control}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert promtool("check", "metrics", given=text) == (0, "")
    assert r'name="a \"relay\"\\\n{of=1}"' in text
    assert f'public_ip4="{started.host}"' in text
