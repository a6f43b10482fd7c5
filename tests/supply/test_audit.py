"""An audit succeeds only if the advisory service knows all packages."""

import os
import subprocess
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[2] / "supply" / "audit"

SKIPPED = "Name  Skip Reason\nh11 not found"
VULNERABLE = "Name Version ID Fix Versions\nh11 0.1 PYSEC-0000-1 0.2"


def audit(tmp_path: Path, table: str, code: int, unknown: str = "") -> subprocess.CompletedProcess[str]:
    """Run the audit with a stand-in for pip-audit, which prints a table and ends with a code."""
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(f"#!/bin/sh\nprintf '{table}'\nexit {code}\n")
    stand_in.chmod(0o755)
    environment = os.environ | {"PIP_AUDIT": str(stand_in), "UNKNOWN": unknown}
    return subprocess.run([str(AUDIT)], env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_an_audit_without_findings_succeeds(tmp_path: Path) -> None:
    done = audit(tmp_path, "", 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("unknown", ["", "ok"])
@pytest.mark.parametrize("table", [VULNERABLE, f"{VULNERABLE}\n{SKIPPED}"])
def test_a_known_vulnerability_fails_the_audit_and_is_shown(tmp_path: Path, table: str, unknown: str) -> None:
    done = audit(tmp_path, table, 1, unknown)
    assert done.returncode == 1
    assert "h11 0.1 PYSEC-0000-1 0.2" in done.stdout


@pytest.mark.parametrize(("table", "code"), [("", 1), ("", 124), (SKIPPED, 0)])
def test_an_incomplete_audit_fails_unless_allowed(tmp_path: Path, table: str, code: int) -> None:
    for unknown, expected in (("", 3), ("ok", 0)):
        done = audit(tmp_path, table, code, unknown)
        assert done.returncode == expected
        assert "NOT AUDITED" in done.stderr
