"""An audit says that all is well only if it looked at everything."""

import json

import pytest

from supply.audit import FOUND, UNKNOWN, judge

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
FLAW = {"id": "PYSEC-0000-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}
FLAWED = {"name": "flawed", "version": "1.0", "vulns": [FLAW]}
SKIPPED = {"name": "private", "skip_reason": "Dependency not found and could not be audited"}


def report(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_all_is_well_if_nothing_is_known_against_anything(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(report(SOUND), "") == 0
    assert "audited" in capsys.readouterr().out


def test_a_flaw_is_said_with_the_version_that_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(report(SOUND, FLAWED), "") == FOUND
    assert "VULNERABLE: flawed 1.0: PYSEC-0000-1, fixed in 1.1" in capsys.readouterr().out


def test_a_package_that_the_service_does_not_know_is_not_taken_for_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(report(SOUND, SKIPPED), "") == UNKNOWN
    assert "NOT AUDITED: the advisory service knows nothing of 1 of 2 packages (private, ...)" in capsys.readouterr().err


def test_a_flaw_counts_even_where_something_else_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(report(FLAWED, SKIPPED), "") == FOUND
    said = capsys.readouterr()
    assert "VULNERABLE" in said.out
    assert "NOT AUDITED" in said.err


@pytest.mark.parametrize("broken", [None, "", "{", "[]", "{}", '{"dependencies": []}'])
def test_no_report_is_no_clean_bill(broken: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert judge(broken, "first\nconnection refused\n") == UNKNOWN
    said = capsys.readouterr()
    assert "NOT AUDITED" in said.err or broken == '{"dependencies": []}'
    assert "audited:" not in said.out
