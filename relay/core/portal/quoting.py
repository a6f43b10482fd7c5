"""What the portal wrote, made fit for the log."""

import json
from collections.abc import Callable

from relay.core.concealed import Concealed
from relay.core.portal.limits import QUOTED_CHARACTERS

Quote = Callable[[str], str]
"""Makes a text of the portal's fit to be shown."""


def quoting(*concealed: Concealed) -> Quote:
    """Make texts short, printable, and free of what must not be in a log even if the portal sends it back."""
    spellings = [spelling for each in concealed for spelling in _spellings(each.reveal())]

    def quote(text: str) -> str:
        # Before it is cut, or the beginning of what is cut in the middle would be shown. Messages are short enough for that.
        for spelling in spellings:
            text = text.replace(spelling, "[concealed]")
        shown = "".join(character if character.isprintable() else "?" for character in text[: QUOTED_CHARACTERS + 1])
        return shown if len(shown) <= QUOTED_CHARACTERS else shown[:QUOTED_CHARACTERS] + "..."

    return quote


def _spellings(text: str) -> tuple[str, ...]:
    """Give a text as it is, and as JSON has it, in which what is no text is quoted."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]
