"""The command line, in this process."""

import sys
from typing import Any

import pytest

from relay.cli import cli, main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["firezone-relay", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def setting(name: str, *arguments: str) -> Any:  # noqa: ANN401 - depends on the option
    """Return the value of a setting on a command line."""
    with cli.make_context("firezone-relay", list(arguments)) as context:
        return context.params[name]
