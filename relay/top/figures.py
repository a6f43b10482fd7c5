"""Figures and texts as a terminal shows them: short, and with nothing in them that a terminal would obey."""

import itertools
from datetime import timedelta

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_THOUSAND = 1000
_TEN, _HUNDRED = 9.995, 99.95
"""From where on a second digit before the point leaves room for one behind it less."""

_LONGEST = 1e5 * 86400 - 1
"""Seconds: as many days as have room."""

_UNITS = ((timedelta(days=1), "d"), (timedelta(hours=1), "h"), (timedelta(minutes=1), "m"), (timedelta(seconds=1), "s"))


def short(number: float) -> str:
    """Write a number of any size with three digits: 0, 7, 999, 1.23k, 12.3k, 123k, 1.23M."""
    value, prefix = max(0.0, number), 0
    while value >= _THOUSAND - 0.5 and prefix < len(_PREFIXES) - 1:
        value /= _THOUSAND
        prefix += 1
    if prefix == 0 or value >= _HUNDRED:
        return f"{value:.0f}{_PREFIXES[prefix]}"
    return f"{value:.2f}{_PREFIXES[prefix]}" if value < _TEN else f"{value:.1f}{_PREFIXES[prefix]}"


def size(count: float) -> str:
    """Write a number of bytes."""
    return f"{short(count)}B"


def bit_rate(bytes_a_second: float | None) -> str:
    """Write bytes a second as bits a second, as links are measured; a dash if it is not known."""
    return "-" if bytes_a_second is None else f"{short(bytes_a_second * 8)}b/s"


def span(seconds: float) -> str:
    """Write a time in its two largest units: 59s, 4m05s, 3h02m, 12d4h."""
    left = timedelta(seconds=int(min(max(0.0, seconds), _LONGEST)))
    for (unit, name), (next_unit, next_name) in itertools.pairwise(_UNITS):
        if left >= unit:
            rest = left % unit // next_unit
            return f"{left // unit}{name}{rest if unit.days else f'{rest:02}'}{next_name}"
    return f"{left.seconds}s"


def printable(text: str) -> str:
    """Give a text without what a terminal may obey: escapes, line breaks, changes of direction."""
    return "".join(each if each.isprintable() else "?" for each in text)


def shortened(text: str, width: int, ellipsis: str) -> str:
    """Give a text in at most so many characters: its middle is left out, since a port is at the end of an address."""
    if len(text) <= width:
        return text
    kept = max(0, width - len(ellipsis))
    tail = kept // 2
    return (text[: kept - tail] + ellipsis + text[len(text) - tail :])[: max(0, width)]
