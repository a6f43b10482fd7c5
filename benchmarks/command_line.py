"""How the suite's commands end: bad use is one line on standard error, and exit code 2."""

import signal
import sys
from typing import NoReturn

import click

BAD_USE = 2


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
