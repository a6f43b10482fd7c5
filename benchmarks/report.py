"""Rewrites the table in the README from the results of the last full run: ``python -m benchmarks.report``."""

from pathlib import Path

import click

from benchmarks.charts import write_charts
from benchmarks.command_line import run
from benchmarks.results import Results
from benchmarks.table import markdown

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
LATEST = "latest.json"
OFFLOAD = "offload.json"

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"


@click.command(context_settings={"show_default": True})
@click.option(
    "--results",
    "path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=RESULTS / LATEST,
    help="What a run has written.",
)
@click.option(
    "--readme",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=ROOT / "README.md",
    help="The file with the two marks between which the table goes.",
)
def main(path: Path, readme: Path) -> None:
    """Write the table of the results into the README, between its two marks, and draw the plots anew."""
    results = Results.read(path)
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{readme} has no {BEGIN} with {END} after it: put both where the table is to be")
    readme.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}", encoding="utf-8")
    write_charts(results, path.parent)


if __name__ == "__main__":
    run(main, "python -m benchmarks.report")
