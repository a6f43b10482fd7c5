"""The command that asks a relay how it is: for containers, which have no other program to ask with."""

import re
import socket
import time
from ipaddress import ip_address

import click

from relay.config import Endpoint
from relay.options import EndpointType

_LONGEST_STATUS_LINE = 1024
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_OK = 200


@click.command(name="healthcheck", short_help="Ask a relay on this machine whether it is well.")
@click.option(
    "--health-address",
    "at",
    envvar="HEALTH_CHECK_ADDR",
    show_envvar=True,
    type=EndpointType(),
    default="0.0.0.0:8080",
    show_default=True,
    help="Where the relay answers, as it was told itself.",
)
@click.option("--ready", is_flag=True, help="Ask /readyz, whether it answers clients, and not /livez, whether it hangs.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 60),
    default=4.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the whole answer.",
)
@click.pass_context
def healthcheck(ctx: click.Context, at: Endpoint, timeout: float, *, ready: bool) -> None:
    """Ask a relay on this machine whether it is well, and say so in one line.

    Exit code: 0 it is, 1 it is not, or does not answer, 2 bad use.

    A relay that waits for its portal is well, but not ready: what restarts one that is not well shall ask without --ready.
    """
    path = "/readyz" if ready else "/livez"
    page = f"http://{at}{path}"
    try:
        status = _status(at, path, time.monotonic() + timeout)
    except TimeoutError:
        click.echo(f"{page} did not answer within {timeout:g} s")
    except (OSError, ValueError) as error:
        click.echo(f"{page} can't be asked: {getattr(error, 'strerror', None) or error}")
    else:
        click.echo(f"{page} answered {status}")
        if status == _OK:
            return
    ctx.exit(1)


def _status(at: Endpoint, path: str, until: float) -> int:
    """Ask for a page, and give the status of the answer.

    Not by http.client, whose limit on time is one for each read: who sends a byte now and then is waited for without end.

    Raises:
        OSError: it can't be asked; TimeoutError if there was no answer in time.
        ValueError: what answers speaks no HTTP.
    """
    address = ip_address(at.host)
    # All addresses is where it listens, not where it is.
    host = _LOOPBACK[address.version] if address.is_unspecified else at.host
    with socket.create_connection((host, at.port), _left(until)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {Endpoint(host, at.port)}\r\nConnection: close\r\n\r\n".encode())
        line = b""
        while b"\n" not in line and len(line) < _LONGEST_STATUS_LINE:
            connection.settimeout(_left(until))
            received = connection.recv(_LONGEST_STATUS_LINE)
            if not received:
                break
            line += received
    found = re.match(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r\n]", line)
    if found is None:
        raise ValueError("what answers there is no relay")
    return int(found[1])


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
