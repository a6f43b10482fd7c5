"""What is measured is what its name says."""

import pytest

from benchmarks import hostile
from benchmarks.hostile import NOW, Kind, all_kinds, carry_out
from relay.core.counters import Counters

COUNT = 3


@pytest.mark.parametrize("kind", all_kinds(), ids=lambda kind: kind.name)
def test_each_kind_of_datagram_comes_to_what_it_is_called(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostile, "COUNT", COUNT)
    server, arrivals, allocation = kind.load()
    before = total(server.counters)
    assert len(arrivals) == COUNT
    for each in arrivals:
        if allocation is None:
            carry_out(server, each)
        else:
            server.handle_peer_arrival(allocation, each, NOW)
    after = total(server.counters)
    assert {what: count - before[what] for what, count in after.items() if count != before[what]} == {meant(kind): COUNT}


def total(counters: Counters) -> dict[str, int]:
    """Count what came of datagrams, by what matters here."""
    answers = {str(code): 0 for code in (400, 401, 420, 438)}
    for (_, code), count in counters.errors.items():
        answers[str(code)] += count
    return {
        **answers,
        "success": sum(counters.successes.values()),
        "relayed": counters.to_peer_packets + counters.to_client_packets,
        "withheld": sum(counters.withheld.values()),
        "dropped": sum(counters.drops.values()),
    }


def meant(kind: Kind) -> str:
    """Tell what a datagram of a kind should come to."""
    if kind.good:
        return "relayed" if "packet" in kind.name else "success"
    if "withheld" in kind.name:
        return "withheld"
    if kind.name == "Binding":
        return "success"
    if "username" in kind.name or "password" in kind.name or "401" in kind.name:
        return "401"
    return "438" if "438" in kind.name else "dropped"
