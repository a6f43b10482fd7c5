"""Tables and the plot of the last full run, for benchmarks/README.md: ``python -m benchmarks.report``."""

import re
from pathlib import Path

import click

from benchmarks.plot import svg
from benchmarks.results import Results
from benchmarks.tables import tables

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
LATEST, PLOT = "latest.json", "cpu.svg"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def write(results: Results, folder: Path) -> list[Path]:
    """Write the metrics of the tables as JSON, and the plot; return the paths."""
    results.write(folder / LATEST, {row.metric for table in tables() for row in table.rows})
    (folder / PLOT).write_text(svg(results), encoding="utf-8")
    return [folder / LATEST, folder / PLOT]


def description(results: Results) -> str:
    """Return a sentence about machine, rounds and revision."""
    about = results.about
    machine, alone, rounds = about["machine"], about["generator"], about["plan"]["rounds"]
    single, batches = (alone[name] / 1000 for name in ("packets_per_second", "in_batches_per_second"))
    return (
        f"{machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}, CPython {machine['python']}, "
        f"coturn {machine['coturn']}; {about['places']}; {'one round' if rounds == 1 else f'medians of {rounds} rounds'}; "
        f"revision {machine['revision']}, {machine['date']}. The load generator alone: "
        f"{single:,.0f} thousand packets/s, {batches:,.0f} in batches."
    )


def markdown(results: Results) -> str:
    """Return the tables for the README."""
    parts = [f"{table.title}:\n\n{table.markdown(results)}" for table in tables() if table.measured(results)]
    return "\n\n".join([*parts, description(results)])


@click.command()
def main() -> None:
    """Write the tables of benchmarks/results/latest.json into benchmarks/README.md, and the plot next to the results."""
    results = Results.read(FOLDER / LATEST)
    text = README.read_text(encoding="utf-8")
    README.write_text(re.sub(f"(?s)(?<={BEGIN}\n).*(?=\n{END})", lambda _: markdown(results), text), encoding="utf-8")
    (FOLDER / PLOT).write_text(svg(results), encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.report")
