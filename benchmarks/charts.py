"""The plots of the suite: which figures are in which chart."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.cases import FLOWS, SIZES, TRAIN
from benchmarks.plot import Group, Panel, svg
from benchmarks.results import Results
from benchmarks.rows import SHOWN
from benchmarks.servers import PLAIN

_WAYS = {"up": "client → peer", "down": "peer → client"}
_RATES = (2000, 20_000)
_QUANTILES = {"p50": "added_p50", "p99": "added_p99", "p99.9": "added_p999"}

_ALLOCATIONS = {
    "CPU, µs": {
        "an allocation": ("allocations", "cpu_us"),
        "one of very many": ("crowd", "cpu_us"),
        "a refresh": ("allocations", "refresh_cpu_us"),
        "a packet to each of all": ("crowd", "burst_cpu_us"),
    },
    "Memory an allocation, kernel included, KB": {
        "in all": ("allocations", "memory_kb"),
        "resident": ("allocations", "resident_kb"),
        "in all, of very many": ("crowd", "memory_kb"),
        "resident, of very many": ("crowd", "resident_kb"),
    },
    "By one client in series, a second (longer is better)": {
        "allocations": ("allocations", "per_second"),
        "refreshes": ("allocations", "refreshes_per_second"),
    },
    "Start and stop, ms": {
        "start to first answer": ("allocations", "start_ms"),
        "SIGTERM to end": ("allocations", "stop_ms"),
    },
    "With as many as there are ports, s": {
        "to make all": ("crowd", "make_s"),
        "SIGTERM to end": ("crowd", "stop_s"),
    },
}


def write_charts(results: Results, directory: Path) -> list[Path]:
    """Write those charts for which there are figures, and give their files."""
    names = [server for server in SHOWN if server in results.servers()]
    allocating = [server for server in names if server != PLAIN]
    charts = {
        "cpu": ("CPU time a packet, µs (shorter is better)", names, _cpu_panels(results, names)),
        "latency": ("Delay added by the server, µs (shorter is better)", names, _delay_panels(results, names)),
        "allocations": (
            "Allocations (shorter is better, unless noted)",
            allocating,
            _allocation_panels(results, allocating),
        ),
    }
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (title, servers, panels) in charts.items():
        known = [panel for panel in panels if panel.groups]
        if known:
            files.append(directory / f"{name}.svg")
            files[-1].write_text(svg(title, servers, known), encoding="utf-8")
    return files


def _cpu_panels(results: Results, names: list[str]) -> list[Panel]:
    panels = []
    for way, title in _WAYS.items():
        bars = {
            f"{size} B, {_counted(flows)}": (f"saturated-{way}-{size}-{flows}", "cpu_us")
            for size in SIZES
            for flows in (1, FLOWS, 500, 1000)
        }
        bars |= {f"{size} B, {rate:,}/s": (f"paced-{way}-{size}-{rate}", "cpu_us") for size in SIZES for rate in _RATES}
        bars |= {f"{TRAIN} × 1200 B, {_counted(flows)}": (f"trains-{way}-{flows}", "cpu_us") for flows in (1, FLOWS)}
        panels.append(Panel(title, _groups(results, names, bars)))
    return panels


def _delay_panels(results: Results, names: list[str]) -> list[Panel]:
    panels = []
    for rate in _RATES:
        for way, title in _WAYS.items():
            bars = {
                f"{size} B, {quantile}": (f"paced-{way}-{size}-{rate}", metric)
                for size in SIZES
                for quantile, metric in _QUANTILES.items()
            }
            panels.append(Panel(f"{title}, {rate:,}/s (logarithmic)", _groups(results, names, bars), logarithmic=True))
    return panels


def _allocation_panels(results: Results, names: list[str]) -> list[Panel]:
    return [Panel(title, _groups(results, names, bars)) for title, bars in _ALLOCATIONS.items()]


def _groups(results: Results, names: Iterable[str], bars: Mapping[str, tuple[str, str]]) -> list[Group]:
    """Give the groups of which there is a figure."""
    groups = [Group(label, [results.figure(case, name, metric) for name in names]) for label, (case, metric) in bars.items()]
    return [group for group in groups if any(group.figures)]


def _counted(flows: int) -> str:
    return "1 flow" if flows == 1 else f"{flows:,} flows"
