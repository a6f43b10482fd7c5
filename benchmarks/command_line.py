"""What the suite's commands have in common: which cases they take, where results go, and how they end.

Bad use is one line on standard error, and exit code 2.
"""

import fnmatch
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import click

BAD_USE = 2

RESULTS = Path(__file__).parent / "results"


class Named(Protocol):
    """A case, as far as commands know it."""

    @property
    def name(self) -> str:
        """How it is asked for."""

    @property
    def title(self) -> str:
        """What it is."""


C = TypeVar("C", bound=Named)


def chosen(cases: Sequence[C], patterns: Iterable[str]) -> tuple[C, ...]:
    """Give the cases whose names match, or begin with, one of the patterns; all if there are none.

    Raises:
        click.ClickException: a pattern has no case.
    """
    names = {case.name for case in cases}
    patterns = tuple(patterns)

    def matches(case: C, pattern: str) -> bool:
        if pattern in names:
            return case.name == pattern
        return case.name.startswith(pattern) or fnmatch.fnmatchcase(case.name, pattern)

    for pattern in patterns:
        if not any(matches(case, pattern) for case in cases):
            raise click.ClickException(f"no case is called {pattern!r}: --list names them all")
    return tuple(case for case in cases if not patterns or any(matches(case, pattern) for pattern in patterns))


def list_cases(cases: Sequence[Named]) -> None:
    """Name them, and say what they are."""
    width = max(len(case.name) for case in cases)
    for case in cases:
        click.echo(f"{case.name:<{width}}  {case.title}")


def results_directory(*, quick: bool, partial: bool) -> Path:
    """Keep what is less than a full run apart from it: the README's figures are a full run's."""
    if partial:
        return RESULTS / "partial"
    return RESULTS / "quick" if quick else RESULTS


def run(command: click.Command, name: str) -> NoReturn:
    """Run a command, and end the process. What the command can't do, it says by `click.ClickException`."""
    try:
        command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"{name}: {' '.join(error.format_message().split())}", err=True)
        sys.exit(BAD_USE)
    except click.Abort:
        click.echo(f"{name}: ended early, nothing is written", err=True)
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)
