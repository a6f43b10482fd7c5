"""The figures in the README match the page about benchmarks."""

import re
from pathlib import Path

TOP = Path(__file__).parents[2]
README = (TOP / "README.md").read_text()
TABLES = (TOP / "benchmarks" / "README.md").read_text()


def rows(text: str) -> list[list[str]]:
    """Return the cells of all rows of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_each_row_of_the_small_table_is_a_row_of_the_large_ones() -> None:
    section = README.partition("## Cost")[2].partition("\n## ")[0]
    figures = [cells[1:] for cells in rows(section) if re.match(r"[\d.,]+$", cells[1])]
    assert len(figures) > 5
    for relay, coturn, plain in figures:
        # The offload table has more columns: generic mode, and the relay's sockets.
        assert any(cells[1] == relay and coturn in cells[2:5] and plain in cells[3:6] for cells in rows(TABLES)), relay


def test_the_readme_has_the_two_commands_to_try() -> None:
    assert {"make run", "make test"} <= {line.partition("#")[0].strip() for line in README.splitlines()}
