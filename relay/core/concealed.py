"""Texts that must not be seen by accident."""


class Concealed:
    """A text that only `reveal` shows, so that no repr, log or traceback does."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Give the text."""
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"
