"""Liveness checks while the server actor hangs: the response comes before a supervisor gives up."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pykka
import pytest

from relay.config import Timeouts
from relay.system.events import SystemRequest
from relay.system.liveness import Liveness
from tests.support.log_lines import capture_logs
from tests.support.system import Relay, RelayMaker, ask, hanging, mailbox_of
from tests.support.waiting import PATIENCE, wait_until

WELL, HANGS = 200, 503


@pytest.fixture
def impatient(make_relay: RelayMaker) -> Relay:
    """A relay with a short liveness timeout."""
    return make_relay(timeouts=Timeouts(live=0.02, release_core=0.02))


def page(relay: Relay, path: str, address: str = "health") -> int:
    return ask(relay.system.http[address], path)[0]


def test_livez_returns_200_at_both_addresses(relay: Relay) -> None:
    for _ in range(3):
        assert page(relay, "/livez") == page(relay, "/livez", "control") == WELL


def test_livez_fails_only_while_the_server_actor_hangs(impatient: Relay) -> None:
    with capture_logs() as logs:
        with hanging(impatient):
            assert page(impatient, "/livez") == page(impatient, "/livez", "control") == HANGS
            assert page(impatient, "/healthz") == WELL
            assert page(impatient, "/livez") == HANGS
        wait_until(lambda: page(impatient, "/livez") == WELL)
    (kind,) = {(entry["event"], entry["log_level"], entry["seconds"]) for entry in logs}
    assert kind == ("the server actor does not answer", "error", 0.02)


def test_a_hang_requests_one_dump(impatient: Relay) -> None:
    with hanging(impatient):
        for _ in range(3):
            assert page(impatient, "/livez") == HANGS
    assert impatient.system.events.get(timeout=5) is SystemRequest.DUMP
    with pytest.raises(queue.Empty):
        impatient.system.events.get(block=False)


def test_repeated_checks_queue_one_ping_for_a_hanging_actor(impatient: Relay) -> None:
    with hanging(impatient):
        # The actor's thread has taken the first message and waits.
        for _ in range(5):
            assert page(impatient, "/livez") == HANGS
        assert len(mailbox_of(impatient)) <= 1


def test_concurrent_health_requests_are_not_reported_as_a_hang(make_relay: RelayMaker) -> None:
    relay = make_relay(timeouts=Timeouts(live=60))
    with ThreadPoolExecutor(12) as pool:
        with hanging(relay):
            asked = [pool.submit(page, relay, "/livez") for _ in range(12)]
            wait_until(lambda: sum(each.name == "health-request" for each in threading.enumerate()) == 12)
        assert [each.result(timeout=30) for each in asked] == [WELL] * 12


def test_a_stopped_relay_is_not_reported_as_a_hang(relay: Relay) -> None:
    """The HTTP server outlives the server actor."""
    system = relay.system
    with capture_logs() as logs:
        system.__exit__()
        assert system.is_alive(5)
    assert [entry for entry in logs if entry["log_level"] == "error"] == []


def test_a_hanging_relay_stops_on_request(impatient: Relay) -> None:
    ending = threading.Thread(target=impatient.system.__exit__, daemon=True)
    with hanging(impatient):
        ending.start()
        ending.join(timeout=60)
        assert not ending.is_alive()


def test_metrics_report_the_duration_of_a_hang(impatient: Relay) -> None:
    def age() -> float:
        text = ask(impatient.system.http["control"], "/metrics")[1]
        return float(text.partition("\nrelay_inbox_age_seconds ")[2].split()[0])

    with hanging(impatient):
        assert page(impatient, "/livez") == HANGS
        wait_until(lambda: age() > 0)
    wait_until(lambda: age() == 0)


NOTED = "noted"
"""A message that is processed at once."""


class Patient(pykka.ThreadingActor):
    """Responds once a test allows it."""

    def __init__(self, may_answer: threading.Semaphore) -> None:
        super().__init__()
        self._may_answer = may_answer

    def on_receive(self, message: object) -> None:
        if message != NOTED:
            self._may_answer.acquire()


Asked = tuple[pykka.ActorRef[Patient], Liveness]


@pytest.fixture
def asked() -> Iterator[Callable[[threading.Semaphore], Asked]]:
    refs: list[pykka.ActorRef[Patient]] = []

    def start(may_answer: threading.Semaphore) -> Asked:
        refs.append(Patient.start(may_answer))
        return refs[-1], Liveness(refs[-1], lambda: None)

    yield start
    for ref in refs:
        ref.stop()


def test_a_late_pong_does_not_count_for_a_new_check(asked: Callable[[threading.Semaphore], Asked]) -> None:
    may_answer = threading.Semaphore(0)
    actor, liveness = asked(may_answer)
    assert not liveness.check(0)
    may_answer.release()
    # Queued behind the first ping, so the first ping has been processed.
    actor.ask(NOTED, timeout=PATIENCE)
    assert not liveness.check(0.05)
    may_answer.release()
    assert liveness.check(PATIENCE)


def test_a_check_shares_the_pending_ping(asked: Callable[[threading.Semaphore], Asked]) -> None:
    may_answer = threading.Semaphore(0)
    _, liveness = asked(may_answer)
    assert not liveness.check(0)
    # A second ping would wait for a second release.
    threading.Timer(0.05, may_answer.release).start()
    assert liveness.check(PATIENCE)


def test_a_stopped_actor_is_not_alive() -> None:
    gone = Patient.start(threading.Semaphore(0))
    gone.stop()
    missed: list[None] = []
    liveness = Liveness(gone, lambda: missed.append(None))
    assert [liveness.check(5), liveness.check(5)] == [False, False]
    assert missed == [None]
