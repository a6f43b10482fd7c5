"""The command line of the live view."""

import os
import sys

import click

from relay.config import BadUseError, Endpoint
from relay.options import EndpointType
from relay.top.fetching import Address, Query, UnreachableError, fetch

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where a relay listens, which this does not
"""Where a relay that listens everywhere is to be found on this machine."""

_SORTS = ("rate", "traffic", "age", "expiry", "client", "port", "channels")


@click.command(name="top", short_help="Watch a running relay: throughput, and who relays what.")
@click.option(
    "--control-address",
    "control",
    type=EndpointType(),
    envvar="CONTROL_ENDPOINT",
    show_envvar=True,
    default="127.0.0.1:9999",
    show_default=True,
    help="The control address of the relay.",
)
@click.option(
    "--interval",
    type=click.FloatRange(1, 60),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to ask it.",
)
@click.option(
    "--sort", type=click.Choice(_SORTS), default="rate", show_default=True, help="What allocations are ordered by."
)
@click.option("--invert", is_flag=True, help="The other way round: smallest, youngest or last first.")
@click.option("--once", is_flag=True, help="Write one table and end.")
@click.option("--json", "json_", is_flag=True, help="With --once: write what the relay answered, as one JSON object.")
@click.option(
    "--limit", type=click.IntRange(0, 500), default=20, show_default=True, help="With --once: how many allocations."
)
@click.pass_context
def top(  # noqa: PLR0913 - one for each option
    ctx: click.Context,
    control: Endpoint,
    interval: float,
    sort: str,
    limit: int,
    *,
    invert: bool,
    once: bool,
    json_: bool,
) -> None:
    """Watch a running relay: throughput both ways, totals, the portal, and the busiest allocations.

    It asks the relay's control address, so it runs where that can be reached: on the same machine, unless you changed it.
    `h` shows what keys do, `q` ends it. Without a terminal, or for one look only, there is --once; it takes a second, since
    a rate takes two looks.

    Exit code: 0 all is well, 1 the relay can't be reached, 2 bad use.

    \b
    Examples:
      firezone-relay top
      firezone-relay top --once --sort traffic --limit 5
      firezone-relay top --once --json | jq .totals
    """  # noqa: D301 - click takes this backspace for "keep the lines as they are"
    if json_ and not once:
        raise click.UsageError("--json is for --once: give both")
    at = Address(_ANY_HOST.get(control.host, control.host), control.port)
    query = Query(sort, (sort not in {"expiry", "client", "port"}) != invert, limit)
    try:
        code = _print(at, query, json_=json_) if once else _watch(at, query, interval, inverted=invert)
    except UnreachableError as error:
        click.echo(
            f"firezone-relay: no status from {at}: {error}; is the relay running, and is this its --control-address?",
            err=True,
        )
        code = 1
    ctx.exit(code)


def _print(at: Address, query: Query, *, json_: bool) -> int:
    from relay.top import once  # noqa: PLC0415 - what draws takes a tenth of a second to import

    history = once.look_twice(at, query)
    assert history.latest is not None  # noqa: S101 - or there was no answer
    if json_:
        click.echo(once.as_json(history.latest))
    else:
        once.write_table(at, history)
    return 0


def _watch(at: Address, query: Query, interval: float, *, inverted: bool) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        raise BadUseError("top needs a terminal that it can draw on: give --once for a table")
    first = fetch(at, Query())
    from relay.top.history import History  # noqa: PLC0415 - see above
    from relay.top.live import Live  # noqa: PLC0415
    from relay.top.terminal import Screen  # noqa: PLC0415
    from relay.top.view import Scene, Wishes  # noqa: PLC0415

    scene = Scene(str(at), Wishes(query.sort, inverted=inverted), History(interval * 3 / 4))
    scene.history.add(first)
    keyboard = sys.stdin.fileno()
    screen = Screen(keyboard, sys.stdout.fileno())
    return Live(screen, keyboard, scene, lambda asked: fetch(at, asked), interval).run()
