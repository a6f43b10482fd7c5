"""The command line of the live view."""

import json
import os
import sys
import time

import click
from rich.console import Console
from rich.text import Text

from relay.config import UsageError
from relay.net.endpoint import Endpoint
from relay.options import NETWORK
from relay.tools.control import StatusQuery, control_option, fetch
from relay.tools.top import view
from relay.tools.top.live import FIRST_INTERVAL, Live
from relay.tools.top.scene import SORTS, Scene
from relay.tools.top.terminal import Screen, size_of


@click.command(name="top", short_help="Watch a running relay: throughput and allocations.")
@control_option
@click.option(
    "--interval",
    type=click.FloatRange(1, 60),
    default=2.0,
    metavar="SECONDS",
    help="Time between two updates.",
)
@click.option("--sort", type=click.Choice([*SORTS.values()]), default="rate", help="Order of allocations.")
@click.option("--client", type=NETWORK, help="Only allocations of this client address or network.")
@click.option("--peer", type=NETWORK, help="Only allocations with a channel to this address or network.")
@click.option("--port", type=click.IntRange(1, 65535), help="Only the allocation with this port.")
@click.option("--once", is_flag=True, help="Print one table and exit.")
@click.option("--json", "json_", is_flag=True, help="With --once: print one JSON object.")
@click.option("--limit", type=click.IntRange(0, 500), default=20, help="With --once: maximum number of allocations.")
def top(  # noqa: PLR0913 - one for each option
    at: Endpoint,
    interval: float,
    sort: str,
    limit: int,
    *,
    client: str | None,
    peer: str | None,
    port: int | None,
    once: bool,
    json_: bool,
) -> None:
    """Watch a running relay: throughput both ways, totals, the portal, and the busiest allocations.

    Press h for help and q to quit. Without a terminal, use --once. It takes a second, because a rate needs two samples.

    Exit codes: 0 success, 1 the relay is unreachable, 2 usage error.

    \b
    Examples:
      firezone-relay top
      firezone-relay top --once --sort traffic --limit 5
      firezone-relay top --once --json | jq .totals
      firezone-relay top --client 203.0.113.0/24
    """  # noqa: D301 - click takes this backspace for "keep the lines as they are"
    if json_ and not once:
        raise click.UsageError("--json requires --once: use both")
    query = StatusQuery(sort, limit, channels=1, client=client, peer=peer, port=port)
    if once:
        write_once(at, query, as_json=json_)
    else:
        click.get_current_context().exit(_watch(at, query, interval))


def write_once(at: Endpoint, query: StatusQuery, *, as_json: bool = False, apart: float = FIRST_INTERVAL) -> None:
    """Send two requests, since a rate needs two scans, and write the response: in the width of a terminal, or in full.

    Raises:
        NoAnswerError: there was no response.
    """
    scene = Scene(str(at), fetch(at, StatusQuery()))
    time.sleep(apart)
    scene.add(fetch(at, query))
    if as_json:
        click.echo(json.dumps(scene.latest, indent=2))
        return
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    width = size_of(sys.stdout.fileno()).columns if console.is_terminal else None
    lines = view.headlines(scene)
    if scene.latest["allocations"] or not scene.latest["matching"]:
        lines += [Text(), *view.table(scene.latest, width)]
    for line in lines:
        line.rstrip()
        if width is not None:
            line.truncate(width)
        console.print(line, soft_wrap=True)


def _watch(at: Endpoint, query: StatusQuery, interval: float) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("top needs a terminal: use --once for a single table")
    scene = Scene(str(at), fetch(at, query._replace(limit=0)), query.sort, interval=interval * 3 / 4)
    return Live(Screen(sys.stdin.fileno(), sys.stdout.fileno()), scene, at, query, interval).run()
