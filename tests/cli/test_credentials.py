"""`firezone-relay credentials` makes credentials for relays with the same secret."""

import json
from pathlib import Path

import pytest
from freezegun import freeze_time

from relay.core.credentials import RelaySecret, mint, parse_username
from tests.support.command_line import run


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    path = tmp_path / "secret"
    path.write_text("  the secret\n")
    return str(path)


@freeze_time("2026-01-01T00:00:00Z")
@pytest.mark.parametrize(
    ("ttl", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("12h", 43200), ("1d", 86400), ("2w", 1209600)]
)
def test_a_credential_is_valid_for_the_time_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret_file: str, ttl: str, seconds: int
) -> None:
    assert run(monkeypatch, "credentials", "--relay-secret-file", secret_file, "--ttl", ttl, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["expires_at"] == 1767225600 + seconds
    expiry, _, salt = made["username"].partition(":")
    assert made["password"] == mint(RelaySecret("the secret"), int(expiry), salt).password


@freeze_time("2026-01-01T00:00:00Z")
def test_a_credential_is_valid_for_a_day_and_shown_in_two_lines_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret_file: str
) -> None:
    assert run(monkeypatch, "credentials", "--relay-secret-file", secret_file) == 0
    first, second = capsys.readouterr().out.splitlines()
    username = parse_username(first.removeprefix("username: "))
    assert username is not None
    assert username.expiry == 1767225600 + 86400
    assert second.startswith("password: ")


def test_the_secret_file_may_be_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret_file: str
) -> None:
    monkeypatch.setenv("RELAY_SECRET_FILE", secret_file)
    assert run(monkeypatch, "credentials") == 0
    assert capsys.readouterr().out.startswith("username: ")


def test_no_two_credentials_are_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret_file: str
) -> None:
    for _ in range(2):
        run(monkeypatch, "credentials", "--relay-secret-file", secret_file)
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == 4
