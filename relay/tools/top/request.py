"""Requests for the status of a relay, and the check of the response: any server may be listening at the address."""

import types
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints, is_typeddict
from urllib.parse import urlencode

from relay.config import Endpoint
from relay.status.model import Status
from relay.tools.control import TIMEOUT, NoAnswerError, ask

T = TypeVar("T")

_TOO_LARGE = 1e18
"""Upper bound of counts and times: an exabyte, or longer than the age of the universe."""


class StatusQuery(NamedTuple):
    """Parameters of a request."""

    sort: str = "rate"
    limit: int = 0
    offset: int = 0
    channels: int = 0
    client: str | None = None
    peer: str | None = None
    port: int | None = None


def fetch(at: Endpoint, query: StatusQuery, timeout: float = TIMEOUT) -> Status:
    """Request the status once.

    Raises:
        NoAnswerError: there was no response in time, or an invalid response.
    """
    given = {name: value for name, value in query._asdict().items() if value is not None}
    answer = ask(at, f"/status?{urlencode(given)}", timeout=timeout)
    try:
        return read(Status, answer)
    except ValueError as error:
        raise NoAnswerError("the server is no relay of this version") from error


def read(model: type[T], value: object) -> T:
    """Return a value from JSON that matches a model. Additional fields are accepted.

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
