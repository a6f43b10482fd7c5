"""Secrets that must not be logged by accident."""


class Secret:
    """A secret text. Only `expose` returns the text; reprs, logs and tracebacks hide it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def expose(self) -> str:
        """Return the text."""
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"
