"""The probe against coturn."""

from collections.abc import Callable

import pytest

from relay.core.addresses import Family
from relay.core.credentials import Credential
from relay.tools.probe.report import Outcome, Report, StepName
from tests.support.probe import Coturn

Run = Callable[..., Report]
Start = Callable[..., Coturn]


def test_coturn_passes_every_step(start_coturn: Start, run: Run) -> None:
    coturn = start_coturn("--allow-loopback-peers")
    report = run(coturn.port, Credential(coturn.username, coturn.password))
    assert not report.failures
    assert report.realm == coturn.realm
    assert report.allocated is not None
    assert report.allocated.software is not None
    assert "oturn" in report.allocated.software
    assert [tuple(way) for way in report.traffic[Family.IPV4].directions] == [(20, 20)] * 3


@pytest.mark.usefixtures("ipv6")
def test_coturn_relays_for_both_families(start_coturn: Start, run: Run) -> None:
    coturn = start_coturn("--allow-loopback-peers", "-E", "127.0.0.1", "-E", "::1", "-L", "::1")
    report = run(coturn.port, Credential(coturn.username, coturn.password))
    assert not report.failures
    assert list(report.traffic) == [Family.IPV4, Family.IPV6]


def test_coturn_rejects_a_wrong_password(start_coturn: Start, run: Run) -> None:
    coturn = start_coturn()
    report = run(coturn.port, Credential(coturn.username, "wrong"))
    [failed] = report.failures
    assert (failed.name, failed.code) == (StepName.ALLOCATE, 401)


def test_coturn_rejects_loopback_peers_and_loops(start_coturn: Start, run: Run) -> None:
    coturn = start_coturn()
    report = run(coturn.port, Credential(coturn.username, coturn.password))
    assert [(step.name, step.outcome) for step in report.steps[3:]] == [
        (StepName.PEER_PATH, Outcome.SKIPPED),
        (StepName.CHANNEL_BIND, Outcome.FAILED),
        (StepName.PACKETS, Outcome.SKIPPED),
        (StepName.REFRESH, Outcome.OK),
    ]
