"""What a command does whose output can't be written: it says so in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("credentials", "--relay-secret-file", "{secret}")])
def test_a_disk_that_is_full_is_told_of_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 4)
    command = [sys.executable, "-m", "relay", *(each.format(secret=secret) for each in arguments)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "firezone-relay: the output can't be written: No space left on device\n")


def test_a_reader_that_has_read_enough_is_not_bothered() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        command = [sys.executable, "-m", "relay", "--help"]
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_where_not_all_can_be_shown_what_can_be_is() -> None:
    """A title with a letter of another alphabet, on a terminal of old."""
    code = r"import click; from relay import cli; cli.cli = click.command()(lambda: print('frankf\u00fcrt')); cli.main()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, "frankf?rt\n")
