"""Requests to the control address of a running relay, and the commands `kick` and `explain`."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from ipaddress import ip_network
from typing import Any, TypeVar

import click

from relay.config import Endpoint
from relay.net.http import request
from relay.options import Parsed, local_endpoint
from relay.tools.top.figures import printable, shortened

T = TypeVar("T", bound=Callable[..., Any])

TIMEOUT = 5.0
"""Seconds for a complete response. A busy relay with 16,384 allocations needs a second."""

_MAX_BYTES = 4 << 20
_MAX_QUOTE = 120


def _parse_network(text: str) -> str:
    try:
        return str(ip_network(text, strict=False))
    except ValueError:
        raise ValueError(f"{text!r} is not an address or a network: use 203.0.113.5 or 203.0.113.0/24") from None


NETWORK = Parsed("CIDR", _parse_network)
"""The type of arguments that are an address or a network."""


class NoAnswerError(Exception):
    """There is no valid response. The message is a line with the reason."""


class RejectedError(NoAnswerError):
    """The relay rejected the request. The message is the relay's reason."""


def control_option(command: T) -> T:
    """Add the option for the control address, as the parameter ``at``."""
    return click.option(
        "--control-endpoint",
        "at",
        type=Parsed("HOST:PORT", local_endpoint),
        envvar="CONTROL_ENDPOINT",
        show_envvar=True,
        default="127.0.0.1:9999",
        help="Control address of the relay.",
    )(command)


@contextlib.contextmanager
def exit_without_answer(at: Endpoint) -> Iterator[None]:
    """Print the reason of a missing response in one line, and exit with code 1."""
    try:
        yield
    except NoAnswerError as error:
        advice = "is the relay running, and is this its --control-endpoint?"
        text = str(error) if isinstance(error, RejectedError) else f"no answer from {at}: {error}; {advice}"
        click.echo(f"firezone-relay: {text}", err=True)
        click.get_current_context().exit(1)


def ask(at: Endpoint, target: str, method: str = "GET", timeout: float = TIMEOUT) -> Any:  # noqa: ANN401 - any JSON
    """Send a request, and return the JSON of the response.

    Raises:
        NoAnswerError: there was no response in time, an invalid response, or an error.
    """
    try:
        response = request(at, target, {}, time.monotonic() + timeout, limit=_MAX_BYTES, method=method)
    except TimeoutError as error:
        raise NoAnswerError(f"no answer within {timeout:g} s") from error
    except (OSError, ValueError) as error:
        raise NoAnswerError((getattr(error, "strerror", None) or str(error)).lower()) from error
    if response.status != HTTPStatus.OK:
        raise RejectedError(f"HTTP status {response.status} ({_reason(response.body)})")
    try:
        return json.loads(response.body)
    except (ValueError, RecursionError) as error:
        raise NoAnswerError("the server is no relay of this version") from error


def _reason(body: bytes) -> str:
    """Return the error message of a response."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return shortened(printable(str(text).strip()), _MAX_QUOTE) or "no message"


@click.command(short_help="End an allocation of a running relay.")
@click.argument("allocation", metavar="ID", type=click.IntRange(1))
@control_option
def kick(at: Endpoint, allocation: int) -> None:
    """End the allocation ID, as listed by top. Its client may allocate again.

    Exit codes: 0 the allocation has ended, 1 there is none or the relay is unreachable, 2 usage error.
    """
    with exit_without_answer(at):
        ask(at, f"/allocations/{allocation}", "DELETE")
    click.echo(f"allocation {allocation} has ended")
