"""Columns of blocks: how something went over time."""

from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.:-=+*#"
"""Where the terminal has no blocks."""


def chart(values: Sequence[float | None], width: int, height: int, peak: float, levels: str = BLOCKS) -> list[str]:
    """Draw the last values, the newest at the right.

    Args:
        values: oldest first; None where nothing is known, which stays empty.
        width: columns; one for each value.
        height: lines.
        peak: what fills all of the height.
        levels: characters from nearly empty to full.
    """
    drawn = [None] * (width - len(values)) + list(values[max(0, len(values) - width) :])
    steps = len(levels)
    filled = [None if value is None else round(height * steps * min(1.0, value / (peak or 1.0))) for value in drawn]
    lines = []
    for below in range((height - 1) * steps, -1, -steps):
        line = ""
        for full in filled:
            if full is None:
                line += " "
            elif full > below:
                line += levels[min(full - below, steps) - 1]
            else:
                # The lowest line is where nothing goes on, too: so one sees from when on it was watched.
                line += " " if below else levels[0]
        lines.append(line)
    return lines
