"""What the portal wrote, made fit for the log."""

from collections.abc import Callable

from relay.core.concealed import Concealed
from relay.core.portal.limits import QUOTED_CHARACTERS

Quote = Callable[[str], str]
"""Makes a text of the portal's fit to be shown."""

_REPLACED_WITHIN = 16 * 1024
"""Characters that are searched for what is concealed; longer than any token."""


def quoting(*concealed: Concealed) -> Quote:
    """Make texts short, printable, and free of what must not be in a log even if the portal sends it back."""

    def quote(text: str) -> str:
        shown = text[:_REPLACED_WITHIN]
        for each in concealed:
            shown = shown.replace(each.reveal(), "[concealed]")
        shown = "".join(character if character.isprintable() else "?" for character in shown[: QUOTED_CHARACTERS + 1])
        return shown if len(shown) <= QUOTED_CHARACTERS else shown[:QUOTED_CHARACTERS] + "..."

    return quote
