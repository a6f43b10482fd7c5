"""The command that checks a relay: for containers, which have no other program for that."""

import time
from http import HTTPStatus

import click

from relay.net.endpoint import Endpoint
from relay.net.http import request
from relay.options import LOCAL_ENDPOINT

_MAX_RESPONSE = 65536


@click.command(name="healthcheck", short_help="Check a relay on this machine.")
@click.option(
    "--health-check-addr",
    "at",
    envvar="HEALTH_CHECK_ADDR",
    show_envvar=True,
    type=LOCAL_ENDPOINT,
    default="0.0.0.0:8080",
    help="Health address of the relay, as in its own configuration.",
)
@click.option("--ready", is_flag=True, help="Request /readyz (responds to clients) instead of /livez (does not hang).")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 60),
    default=4.0,
    metavar="SECONDS",
    help="Maximum time for the whole response.",
)
@click.pass_context
def healthcheck(ctx: click.Context, at: Endpoint, timeout: float, *, ready: bool) -> None:
    """Check a relay on this machine, and print the result in one line.

    Exit codes: 0 healthy, 1 unhealthy or no response, 2 usage error.

    A relay that waits for its portal is alive but not ready. A check that restarts the relay must not use --ready.
    """
    path = "/readyz" if ready else "/livez"
    page = f"http://{at}{path}"
    try:
        status = request(at, path, {}, time.monotonic() + timeout, limit=_MAX_RESPONSE).status
    except TimeoutError:
        click.echo(f"{page} did not answer within {timeout:g} s")
    except (OSError, ValueError) as error:
        click.echo(f"{page} can't be asked: {getattr(error, 'strerror', None) or error}")
    else:
        click.echo(f"{page} answered {status}")
        if status == HTTPStatus.OK:
            return
    ctx.exit(1)
