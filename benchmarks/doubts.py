"""Reasons to doubt the figures of a run: failures, losses, a busy machine."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from benchmarks.cases import Kind, all_cases
from benchmarks.results import Results

_MOST_LOST = 0.1
_LEAST_IDLE = 0.02
_LEAST_RUNNING = 0.95


class _Check(NamedTuple):
    """A share with a lower limit; a smaller share means a disturbed measurement."""

    metric: str
    least: float
    message: str
    kinds: Collection[Kind]


_SATURATED = (Kind.SATURATED, Kind.BATCHES)
_CHECKS = (
    _Check("server_busy", 0.9, "saturated servers had too little CPU time", _SATURATED),
    _Check("load_running", _LEAST_RUNNING, "the generator had too little CPU time", (*_SATURATED, Kind.PACED, Kind.OFFLOAD)),
    _Check("offered_times", 1.8, "the offered load was below twice the server's best", (Kind.OVERLOAD,)),
    _Check("in_time", 0.99, "too many packets were sent more than 1 ms late", (Kind.PACED,)),
)


def doubts(results: Results) -> Iterator[str]:
    """Return a line for each reason."""
    kinds = {case.name: case.kind for case in all_cases()}
    for failure in results.failures():
        yield f"Failed: {failure}"
    lost = [each for each in results.medians("loss") if each[2] > _MOST_LOST]
    if lost:
        yield "Lost: " + "; ".join(f"{case}, {server}: {loss:.1f} %" for case, server, loss in lost)
    for check in _CHECKS:
        values = [each for each in results.medians(check.metric) if kinds[each[0]] in check.kinds]
        low = [each for each in values if each[2] < check.least]
        if low:
            case, server, share = min(low, key=lambda each: each[2])
            worst = f"worst {share:.0%}, {case}, {server}; limit {check.least:.0%}"
            yield f"Doubtful: {check.message} in {len(low)} of {len(values)} measurements ({worst}): stop other programs"
    running = {(case, server): share for case, server, share in results.medians("load_running")}
    for case, server, idle in results.medians("load_idle"):
        if kinds[case] in _SATURATED and idle < _LEAST_IDLE and running[case, server] > _LEAST_RUNNING:
            yield f"Doubtful: {case}, {server}: the load generator, idle for {idle:.0%} of the time, may be the limit"
