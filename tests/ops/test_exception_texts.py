"""Exceptions in the log: with type and stack, and without texts quoting a value."""

import pytest

from relay.ops.logs.render import exception_text, exception_words

USERNAME = "1795465516:salt-of-somebody"


def failing(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Return a raised exception, with a stack."""
    try:
        raise error from cause
    except type(error) as raised:
        return raised


def look_up() -> BaseException:
    found: dict[str, int] = {}
    try:
        return ValueError(found[USERNAME])
    except KeyError as raised:
        return raised


@pytest.mark.parametrize(
    "error",
    [
        look_up(),
        failing(ValueError(f"invalid literal for int() with base 10: {USERNAME!r}")),
        failing(UnicodeDecodeError("utf-8", USERNAME.encode(), 0, 1, f"of {USERNAME}")),
        failing(RuntimeError("it failed"), failing(KeyError(USERNAME))),
        failing(KeyError(f"first\n{USERNAME}")),
        failing(BaseExceptionGroup("several", [failing(KeyError(USERNAME)), failing(RuntimeError("another"))])),
    ],
    ids=lambda error: type(error).__name__,
)
def test_values_quoted_by_exceptions_are_redacted_at_any_depth(error: BaseException) -> None:
    text = exception_text(error)
    assert "salt-of-somebody" not in text + exception_words(error)
    assert "its text is left out" in text
    assert "test_exception_texts.py" in text, "where it happened is there"


def test_literal_exception_texts_are_kept() -> None:
    error = failing(OSError(24, "Too many open files"))
    assert exception_text(error).endswith("OSError: [Errno 24] Too many open files")
    assert exception_words(error) == "OSError: [Errno 24] Too many open files"
    assert "it failed" in exception_text(failing(RuntimeError("it failed"), failing(KeyError(USERNAME))))


def test_a_cycle_of_exceptions_is_rendered_once() -> None:
    error = failing(KeyError(USERNAME))
    error.__context__ = failing(RuntimeError("another"), error)
    assert "salt-of-somebody" not in exception_text(error)
