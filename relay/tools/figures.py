"""Short forms of numbers and texts for a terminal, without control characters; and sparklines."""

from collections.abc import Sequence

from relay.status.model import DrainStatus

BLOCKS = "▁▂▃▄▅▆▇█"

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_THOUSAND = 999.5
"""Smallest number that would be written as 1000."""

_DAY = 86400
_UNITS = ((_DAY, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s"))
_MAX_SPAN = 1e5 * _DAY - 1
"""Seconds: 99,999 days have room in a column."""


def short(number: float) -> str:
    """Return a number with three digits: 0, 7, 999, 1.23k, 12.3k, 123k, 1.23M."""
    value, prefix = max(0.0, number), 0
    while value >= _THOUSAND and prefix < len(_PREFIXES) - 1:
        value /= 1000
        prefix += 1
    return f"{value:#.3g}".rstrip(".") + _PREFIXES[prefix] if prefix else f"{value:.0f}"


def size(count: float) -> str:
    """Return a number of bytes."""
    return f"{short(count)}B"


def bit_rate(bytes_per_second: float | None) -> str:
    """Return a rate in bits per second; a dash if it is unknown."""
    return "-" if bytes_per_second is None else f"{short(bytes_per_second * 8)}b/s"


def span(seconds: float) -> str:
    """Return a time in its two largest units: 59s, 4m05s, 3h02m, 12d4h."""
    left = int(min(max(0.0, seconds), _MAX_SPAN))
    for unit, name, next_unit, next_name in _UNITS:
        if left >= unit:
            rest = left % unit // next_unit
            return f"{left // unit}{name}{rest if unit == _DAY else f'{rest:02}'}{next_name}"
    return f"{left}s"


def drain_words(drain: DrainStatus) -> str:
    """Return a summary of a drain."""
    return f"draining for at most {span(drain['time_left'])}, allocations left: {drain['allocations']}"


def printable(text: str) -> str:
    """Return a text without escapes, line breaks and changes of direction."""
    return "".join(each if each.isprintable() else "?" for each in text)


def shortened(text: str, width: int) -> str:
    """Return a text of at most some characters. The middle is omitted, since the end of an address is its port."""
    if len(text) <= width:
        return text
    tail = max(0, width - 1) // 2
    return (text[: max(0, width - 1) - tail] + "~" + text[len(text) - tail :])[: max(0, width)]


def sparkline(values: Sequence[float | None], width: int, peak: float) -> str:
    """Return a bar for each value of at most ``peak``, aligned right. None is a gap; 0 has the lowest bar."""
    step = max(peak, 1e-9) / (len(BLOCKS) - 1)
    bars = (" " if value is None else BLOCKS[round(max(0.0, value) / step)] for value in values)
    return "".join(bars).rjust(width)
