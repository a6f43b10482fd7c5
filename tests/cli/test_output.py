"""Failed output prints an error line and exits with 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.process import run
from tests.support.program import kept_environment


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("credentials", "--relay-secret-file", "{secret}")])
def test_a_full_disk_is_a_one_line_error(arguments: tuple[str, ...], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 4)
    with Path("/dev/full").open("w") as full:
        done = run(*(each.format(secret=secret) for each in arguments), stdout=full.fileno())
    assert (done.returncode, done.stderr) == (1, "firezone-relay: can't write to standard output: No space left on device\n")


def test_a_closed_pipe_prints_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        done = run("--help", stdout=gone.fileno())
    assert (done.returncode, done.stderr) == (1, "")


def test_unencodable_characters_are_replaced() -> None:
    """Such as a non-ASCII letter on an ASCII terminal."""
    code = r"import click; from relay import cli; cli.cli = click.command()(lambda: print('frankf\u00fcrt')); cli.main()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, "frankf?rt\n")


def test_help_lists_the_options_in_sections() -> None:
    sections = [
        line.strip(" :") for line in run("--help").stdout.splitlines() if line.startswith("  ") and line.endswith(": ")
    ]
    assert sections == ["Portal", "Addresses", "Limits", "Kernel", "Logs and metrics", "Advanced"]


def test_a_shell_completes_options_and_their_values() -> None:
    script = run(env=kept_environment() | {"_FIREZONE_RELAY_COMPLETE": "bash_source"}).stdout
    assert "complete -o nosort -F _firezone_relay_completion firezone-relay" in script
    words = {"COMP_WORDS": "firezone-relay --log-format j", "COMP_CWORD": "2", "_FIREZONE_RELAY_COMPLETE": "bash_complete"}
    assert run(env=kept_environment() | words).stdout == "plain,json\n"
