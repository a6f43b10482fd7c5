"""The command line with any interval for ``top``, because the relay in these tests has a simulated clock."""

from typing import NoReturn

import click

from relay import __main__ as program
from relay.tools.top.command import top


def main() -> NoReturn:
    """Run the command line with any interval."""
    (interval,) = (each for each in top.params if each.name == "interval")
    interval.type = click.FloatRange(min=0, min_open=True)
    program.main()
