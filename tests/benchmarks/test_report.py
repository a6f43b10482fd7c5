"""Tables and plots of a run."""

from pathlib import Path

import pytest

from benchmarks.cases import all_cases, chosen
from benchmarks.doubts import doubts
from benchmarks.measure import MeasurementError
from benchmarks.plot import PARTS
from benchmarks.report import LATEST, markdown, write
from benchmarks.results import Figure, Results
from benchmarks.servers import COTURN, PLAIN, RELAY
from benchmarks.tables import tables

CASE = "saturated-up-1200-20"


@pytest.fixture
def results() -> Results:
    machine = dict.fromkeys(("cores", "cpu", "kernel", "python", "coturn", "revision", "date"), "x")
    generator = {"packets_per_second": 1e6, "in_batches_per_second": 1e7}
    found = Results({"machine": machine, "plan": {"rounds": 3}, "places": "CPU 1", "generator": generator})
    for number, (relay, coturn) in enumerate([(9.0, 6.0), (6.0, 8.0), (7.0, 5.0)]):
        found.add(CASE, number, RELAY, {"cpu_us": relay, "loss": 0.0})
        found.add(CASE, number, COTURN, {"cpu_us": coturn, "loss": 5.0})
        found.add(CASE, number, PLAIN, "it ended")
    return found


def test_a_figure_is_a_median_and_a_ratio_the_median_of_ratios(results: Results) -> None:
    assert results.figure(CASE, RELAY, "cpu_us") == Figure(7, 6, 9)
    ratio = results.ratio(CASE, "cpu_us", (RELAY, COTURN))
    assert ratio is not None
    assert ratio.median == pytest.approx(1.4)


def test_a_missed_target_and_a_failure_are_shown(results: Results) -> None:
    (line,) = [line for line in markdown(results).splitlines() if line.startswith("| CPU a packet")]
    assert (
        line
        == "| CPU a packet, client→peer, 1200 B, 20 flows, saturated, µs | 7.00 | 6.00 | failed | 1.4 | ≤ 1 × coturn ✗ |"
    )
    assert list(doubts(results)) == [f"Failed: {CASE}, plain C: it ended", f"Lost: {CASE}, coturn: 5.0 %"]


def test_results_are_the_same_after_writing_and_reading(results: Results, tmp_path: Path) -> None:
    plot = tmp_path / "cpu.svg"
    assert write(results, tmp_path) == [tmp_path / LATEST, plot]
    assert markdown(Results.read(tmp_path / LATEST)) == markdown(results)
    assert ">1200 B, 20 flows<" in plot.read_text()


def test_each_case_has_a_row_and_each_part_of_the_plot_has_bars() -> None:
    assert {row.case for table in tables() for row in table.rows} == {case.name for case in all_cases()}
    titles = [row.title for row in tables()[0].rows]
    assert all(any(title.startswith(beginning) for title in titles) for beginning in PARTS)


def test_a_pattern_without_a_case_is_rejected() -> None:
    with pytest.raises(MeasurementError, match="no case matches 'sideways'"):
        chosen(["sideways"])
