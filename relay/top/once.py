"""The table for scripts: one look, or rather two, since a rate takes as many."""

import json
import sys
import time

from rich.console import Console
from rich.text import Text

from relay.status.model import Status
from relay.top import columns
from relay.top.fetching import Address, Query, fetch
from relay.top.history import History
from relay.top.terminal import is_unicode, size_of
from relay.top.view import Scene, headlines, shown_columns

APART = 1.1
"""Seconds between both looks: the relay looks at all allocations once a second at most."""

_PEERS = 4


def look_twice(at: Address, query: Query) -> History:
    """Ask twice, for the rates in between.

    Raises:
        UnreachableError: there is no answer.
    """
    history = History()
    history.add(fetch(at, Query()))
    time.sleep(APART)
    history.add(fetch(at, query._replace(channels=_PEERS)))
    return history


def as_json(status: Status) -> str:
    """Write an answer as one object."""
    return json.dumps(status, indent=2)


def write_table(at: Address, history: History) -> None:
    """Write the table: as wide as a terminal, or else as wide as it takes and without colours."""
    assert history.latest is not None  # noqa: S101 - see above
    status, rows = history.latest, history.latest["allocations"]
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    is_terminal = console.is_terminal
    size = size_of(sys.stdout.fileno(), is_unicode=is_unicode()) if is_terminal else None
    fitted = columns.fit(rows, status, size.width if size else None, shown_columns(status))
    lines = [*headlines(Scene(str(at), history=history), status, is_unicode=is_unicode()), Text()]
    if rows:
        lines.append(columns.header(fitted, status["page"]["sort"]))
        lines += [columns.line(row, status, fitted, "…" if size and size.is_unicode else "~") for row in rows]
    else:
        lines.append(Text("no allocations"))
    for line in lines:
        line.rstrip()
        if size is None:
            print(line.plain, file=console.file)
        else:
            line.truncate(size.width)
            console.print(line)
