"""What the log says of an exception: its kind and its stack always, its text unless that quotes a value."""

import pytest

from relay.ops.logs.lines import exception_text, exception_words

USERNAME = "1795465516:salt-of-somebody"


def failing(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """An exception that was raised, so that it has a stack."""
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
def test_a_value_that_an_exception_quotes_is_left_out_however_deep_it_is(error: BaseException) -> None:
    text = exception_text(error)
    assert "salt-of-somebody" not in text + exception_words(error)
    assert "its text is left out" in text
    assert "test_exception_texts.py" in text, "where it happened is there"


def test_what_an_exception_says_of_itself_is_kept() -> None:
    error = failing(OSError(24, "Too many open files"))
    assert exception_text(error).endswith("OSError: [Errno 24] Too many open files")
    assert exception_words(error) == "OSError: [Errno 24] Too many open files"
    assert "it failed" in exception_text(failing(RuntimeError("it failed"), failing(KeyError(USERNAME))))


def test_an_exception_that_follows_from_itself_is_told_once() -> None:
    error = failing(KeyError(USERNAME))
    error.__context__ = failing(RuntimeError("another"), error)
    assert "salt-of-somebody" not in exception_text(error)
