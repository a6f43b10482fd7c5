"""A relay whose server actor hangs: who asks is told, in time to end it."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pykka
import pytest
from structlog.testing import capture_logs

from relay.actors import pages
from relay.actors.news import Request
from relay.actors.pulse import Pulse
from tests.actors.conftest import Relay
from tests.actors.test_status import ask
from tests.conftest import wait_until

WELL, HANGS = 200, 503


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LIVE_PATIENCE", 0.2)


@contextmanager
def hanging(relay: Relay) -> Iterator[None]:
    """Have the server actor's turn taken, as by a thread that never comes back from the core."""
    assert relay.system._inbox is not None
    with relay.system._inbox.turn:
        yield


def page(relay: Relay, path: str, address: str = "health") -> int:
    return ask(relay.system._http[address], path)[0]


def test_a_relay_that_works_is_alive_at_both_addresses(relay: Relay) -> None:
    for _ in range(3):
        assert page(relay, "/livez") == page(relay, "/livez", "control") == WELL


@pytest.mark.usefixtures("impatient")
def test_one_that_hangs_is_not_though_its_process_works_and_is_again_when_it_goes_on(relay: Relay) -> None:
    with capture_logs() as logs:
        with hanging(relay):
            assert page(relay, "/livez") == HANGS
            assert page(relay, "/healthz") == WELL
            assert page(relay, "/livez") == HANGS
        wait_until(lambda: page(relay, "/livez") == WELL)
    (kind,) = {(entry["event"], entry["log_level"]) for entry in logs}
    assert kind == ("the server actor does not answer", "error")


@pytest.mark.usefixtures("impatient")
def test_what_its_threads_do_is_asked_for_once(relay: Relay) -> None:
    with hanging(relay):
        for _ in range(3):
            assert page(relay, "/livez") == HANGS
    assert relay.system.news.get(timeout=5) is Request.DUMP
    with pytest.raises(queue.Empty):
        relay.system.news.get(block=False)


@pytest.mark.usefixtures("impatient")
def test_however_many_ask_one_question_waits_for_whoever_hangs(relay: Relay) -> None:
    inbox = relay.system._inbox
    assert inbox is not None
    with hanging(relay):
        # Its thread has taken the first message, and waits with it.
        for _ in range(5):
            assert page(relay, "/livez") == HANGS
        assert len(inbox) <= 1


def test_who_floods_the_health_address_has_nobody_told_that_the_relay_hangs(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LIVE_PATIENCE", 60)
    with ThreadPoolExecutor(12) as pool:
        with hanging(relay):
            asked = [pool.submit(page, relay, "/livez") for _ in range(12)]
            wait_until(lambda: sum(each.name == "health-request" for each in threading.enumerate()) == 12)
        assert [each.result(timeout=30) for each in asked] == [WELL] * 12


def test_a_relay_that_ends_does_not_hang(relay: Relay) -> None:
    """The pages are answered until the last, the server actor is not there any more."""
    system = relay.system
    with capture_logs() as logs:
        system.__exit__()
        assert system._is_alive(5)
    assert [entry for entry in logs if entry["log_level"] == "error"] == []


def test_a_relay_that_hangs_ends_all_the_same_when_it_is_asked_to(relay: Relay) -> None:
    ending = threading.Thread(target=relay.system.__exit__, daemon=True)
    with hanging(relay):
        ending.start()
        ending.join(timeout=60)
        assert not ending.is_alive()


@pytest.mark.usefixtures("impatient")
def test_metrics_show_for_how_long_it_hangs(relay: Relay) -> None:
    def age() -> float:
        text = ask(relay.system._http["control"], "/metrics")[1]
        return float(text.partition("\nrelay_inbox_age_seconds ")[2].split()[0])

    with hanging(relay):
        assert page(relay, "/livez") == HANGS
        wait_until(lambda: age() > 0)
    wait_until(lambda: age() == 0, 30)


class Patient(pykka.ThreadingActor):
    """Answers when it may."""

    def __init__(self, may_answer: threading.Semaphore) -> None:
        super().__init__()
        self._may_answer = may_answer

    def on_receive(self, _: object) -> None:
        self._may_answer.acquire()


@pytest.fixture
def asked() -> Iterator[Callable[[threading.Semaphore], Pulse]]:
    refs: list[pykka.ActorRef[Patient]] = []

    def start(may_answer: threading.Semaphore) -> Pulse:
        refs.append(Patient.start(may_answer))
        return Pulse(refs[-1], lambda: None)

    yield start
    for ref in refs:
        ref.stop()


def test_an_answer_to_an_earlier_question_says_nothing_of_now(asked: Callable[[threading.Semaphore], Pulse]) -> None:
    may_answer = threading.Semaphore(0)
    pulse = asked(may_answer)
    assert not pulse.beats(0)
    may_answer.release()
    first = pulse._answer
    assert first is not None
    first.get(timeout=5)
    assert not pulse.beats(0.05)
    may_answer.release()
    assert pulse.beats(5)


def test_who_asks_while_a_question_waits_hears_its_answer(asked: Callable[[threading.Semaphore], Pulse]) -> None:
    may_answer = threading.Semaphore(0)
    pulse = asked(may_answer)
    assert not pulse.beats(0)
    threading.Timer(0.05, may_answer.release).start()
    assert pulse.beats(5)


def test_an_actor_that_is_gone_does_not_answer() -> None:
    gone = Patient.start(threading.Semaphore(0))
    gone.stop()
    missed: list[None] = []
    pulse = Pulse(gone, lambda: missed.append(None))
    assert [pulse.beats(5), pulse.beats(5)] == [False, False]
    assert missed == [None]
