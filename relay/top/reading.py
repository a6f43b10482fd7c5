"""Sees to it that an answer is what `relay.status.model` says: whoever is asked may be anyone."""

import types
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

T = TypeVar("T")

_TOO_LARGE = 1e18
"""For a relay's counts and times: an exabyte, and longer than there has been a world."""


class UnreadableError(Exception):
    """It is something else; the message says what, in a few words."""


def read(model: type[T], value: object) -> T:
    """Give a value that came as JSON as what it is said to be; more fields than are known of are fine.

    Raises:
        UnreadableError: it is something else.
    """
    _check(model, value, "answer")
    return cast(T, value)


def _check(model: Any, value: object, name: str) -> None:  # noqa: ANN401 - any type that JSON can be
    if is_typeddict(model):
        for field, type_ in get_type_hints(model).items():
            if field not in _of(dict, value, name):
                raise UnreadableError(f"{name} has no {field}")
            _check(type_, _of(dict, value, name)[field], field)
        return
    origin, arguments = get_origin(model), get_args(model)
    if origin in {Union, types.UnionType}:
        if value is not None:
            # Nothing but "or null" is in use.
            _check(arguments[0], value, name)
    elif origin is list:
        for each in _of(list, value, name):
            _check(arguments[0], each, name)
    elif origin is dict:
        for each in _of(dict, value, name).values():
            _check(arguments[1], each, name)
    else:
        _of(model, value, name)


def _of(type_: type[T], value: object, name: str) -> T:
    # In JSON, a number is a number; in Python, a truth value is one too.
    accepted = (int, float) if type_ is float else type_
    if not isinstance(value, accepted) or (isinstance(value, bool) and type_ is not bool):
        raise UnreadableError(f"{name} is no {type_.__name__}")
    # Not for NaN either, which JSON in Python can be.
    if isinstance(value, int | float) and not abs(value) < _TOO_LARGE:
        raise UnreadableError(f"{name} is out of range")
    return cast(T, value)
