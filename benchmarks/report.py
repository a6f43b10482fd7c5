"""Rewrites the tables in the README from the results of the last full runs: ``python -m benchmarks.report``."""

from pathlib import Path

import click

from benchmarks.charts import write_charts
from benchmarks.command_line import RESULTS, run
from benchmarks.offload.table import markdown as offload_markdown
from benchmarks.offload.table import write_chart as write_offload_chart
from benchmarks.results import Results
from benchmarks.table import markdown

ROOT = Path(__file__).parent.parent
LATEST = "latest.json"
OFFLOAD = "offload.json"

BEGIN = "<!-- benchmarks: begin -->"
END = "<!-- benchmarks: end -->"

_BETWEEN = (
    "Relaying in the kernel (`--ebpf-offloading`), beside the same relay without, coturn and plain C, between three network "
    "namespaces:"
)


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
    """Write the tables of the results into the README, between its two marks, and draw the plots anew."""
    results = Results.read(path)
    tables = markdown(results)
    if path.with_name(OFFLOAD).exists():
        offload = Results.read(path.with_name(OFFLOAD))
        tables += f"\n\n{_BETWEEN}\n\n{offload_markdown(offload)}"
        write_offload_chart(offload, path.parent)
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{readme} has no {BEGIN} with {END} after it: put both where the table is to be")
    readme.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")
    write_charts(results, path.parent)


if __name__ == "__main__":
    run(main, "python -m benchmarks.report")
