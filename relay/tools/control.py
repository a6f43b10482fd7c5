"""Requests to the control address of a running relay, and the command `kick`."""

import json
import time
import types
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints, is_typeddict
from urllib.parse import urlencode

import click

from relay.net.endpoint import Endpoint
from relay.net.http import request
from relay.options import LOCAL_ENDPOINT
from relay.status.model import Status
from relay.tools.figures import printable, shortened

T = TypeVar("T")

TIMEOUT = 5.0
"""Seconds for a complete response. A busy relay with 16,384 allocations needs a second."""

_MAX_BYTES = 4 << 20
_MAX_QUOTE = 120

_TOO_LARGE = 1e18
"""Upper bound of counts and times: an exabyte, or longer than the age of the universe."""

control_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--control-endpoint",
    "at",
    type=LOCAL_ENDPOINT,
    envvar="CONTROL_ENDPOINT",
    show_envvar=True,
    default="127.0.0.1:9999",
    help="Control address of the relay.",
)
"""Adds the option for the control address, as the parameter ``at``."""


class NoAnswerError(click.ClickException):
    """There is no valid response. A command that does not catch the error prints one line, and exits with code 1."""

    def __init__(self, at: Endpoint, reason: str) -> None:
        super().__init__(reason)
        self.at = at

    def format_message(self) -> str:
        """Return the reason with advice."""
        return f"no answer from {self.at}: {self}; is the relay running, and is this its --control-endpoint?"


class RejectedError(NoAnswerError):
    """The relay rejected the request, for the relay's reason."""

    def format_message(self) -> str:
        """Return the reason."""
        return str(self)


class StatusQuery(NamedTuple):
    """Parameters of a request for the status."""

    sort: str = "rate"
    limit: int = 0
    offset: int = 0
    channels: int = 0
    client: str | None = None
    peer: str | None = None
    port: int | None = None


def fetch(at: Endpoint, query: StatusQuery, timeout: float = TIMEOUT) -> Status:
    """Request the status. Raise as `ask` does."""
    given = {name: value for name, value in query._asdict().items() if value is not None}
    return ask(Status, at, f"/status?{urlencode(given)}", timeout=timeout)


def ask(model: type[T], at: Endpoint, target: str, method: str = "GET", timeout: float = TIMEOUT) -> T:
    """Send a request, and return the JSON of the response, which matches the model.

    Raises:
        NoAnswerError: there was no response in time, an invalid response, or an error.
    """
    try:
        response = request(at, target, {}, time.monotonic() + timeout, limit=_MAX_BYTES, method=method)
    except TimeoutError as error:
        raise NoAnswerError(at, f"no answer within {timeout:g} s") from error
    except (OSError, ValueError) as error:
        raise NoAnswerError(at, (getattr(error, "strerror", None) or str(error)).lower()) from error
    if response.status != HTTPStatus.OK:
        raise RejectedError(at, f"HTTP status {response.status} ({_reason(response.body)})")
    try:
        return read(model, json.loads(response.body))
    except (ValueError, RecursionError) as error:
        raise NoAnswerError(at, "the server is no relay of this version") from error


def _reason(body: bytes) -> str:
    """Return the error message of a response."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return shortened(printable(str(text).strip()), _MAX_QUOTE) or "no message"


def read(model: type[T], value: object) -> T:
    """Return a value from JSON that matches a model. Additional fields are accepted. Any server may have sent it.

    Raises:
        ValueError: the value does not match. The message is a few words.
    """
    _check(model, value, "answer")
    return cast(T, value)


def _check(model: Any, value: Any, name: str) -> None:  # noqa: ANN401 - any type that JSON can be
    origin, arguments = get_origin(model), get_args(model)
    # The model has no unions but "or None".
    if origin is types.UnionType:
        if value is not None:
            _check(arguments[0], value, name)
        return
    kind = dict if is_typeddict(model) else origin or model
    # JSON does not distinguish integers from floats. In Python, a bool is an int.
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind not in (bool, object)):
        raise ValueError(f"{name} is no {kind.__name__}")
    if is_typeddict(model):
        for field, type_ in get_type_hints(model).items():
            if field not in value:
                raise ValueError(f"{name} has no {field}")
            _check(type_, value[field], field)
    elif arguments:
        for each in value if kind is list else value.values():
            _check(arguments[-1], each, name)
    # The comparison is also false for NaN, which Python's JSON accepts.
    elif isinstance(value, int | float) and not abs(value) < _TOO_LARGE:
        raise ValueError(f"{name} is out of range")


@click.command(short_help="End an allocation of a running relay.")
@click.argument("allocation", metavar="ID", type=click.IntRange(1))
@control_option
def kick(at: Endpoint, allocation: int) -> None:
    """End the allocation ID, as listed by top. Its client may allocate again.

    Exit codes: 0 the allocation has ended, 1 there is none or the relay is unreachable, 2 usage error.
    """
    ask(object, at, f"/allocations/{allocation}", "DELETE")
    click.echo(f"allocation {allocation} has ended")
