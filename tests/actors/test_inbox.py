"""The server actor's inbox: it is the timer, and no packets pile up in it."""

import threading
import time

from relay.actors.clock import SystemClock
from relay.actors.inbox import ServerInbox
from relay.actors.messages import Failed, FromClients, FromPeers, Tick
from relay.core.addresses import AllocationId
from relay.core.instant import Instant
from relay.core.stun import MessageClass, Method, encode
from relay.core.trains import Arrival
from tests.conftest import PATIENCE, wait_until

PACKET: Arrival = (b"\x40\0\0\0", ("127.0.0.1", 1), 0, 0)
REQUEST = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])


class Letter:
    """An envelope, as pykka would make one."""

    def __init__(self, message: object) -> None:
        self.message = message
        self.reply_to = None


def test_a_tick_comes_at_the_deadline_when_nothing_else_does() -> None:
    inbox = ServerInbox()
    deadline = time.monotonic() + 0.05
    inbox.wake_at(deadline, SystemClock())
    assert inbox.get().message == Tick()
    assert time.monotonic() >= deadline


def test_a_deadline_that_has_passed_ticks_at_once() -> None:
    inbox = ServerInbox()
    inbox.wake_at(time.monotonic() - 1000, SystemClock())
    assert inbox.get().message == Tick()


def test_messages_come_first_and_in_order() -> None:
    inbox = ServerInbox()
    inbox.wake_at(time.monotonic() - 1000, SystemClock())
    for number in range(3):
        inbox.put(Letter(number))
    assert [inbox.get().message for _ in range(3)] == [0, 1, 2]


def test_the_deadline_is_measured_on_the_clock_that_was_handed_in() -> None:
    class Stopped:
        def now(self) -> Instant:
            return Instant(1e9, 0.0)

        def monotonic(self) -> float:
            return 1e9

    inbox = ServerInbox()
    inbox.wake_at(1e9, Stopped())
    assert inbox.get().message == Tick()


def test_a_deadline_that_is_set_while_the_reader_waits_is_kept() -> None:
    """A lone packet is worked on in another thread, which may set a deadline that the actor's own thread has to keep."""
    inbox = ServerInbox()
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.extend(inbox.get().message for _ in range(2)))
    reader.start()
    inbox.wake_at(time.monotonic() + 0.05, SystemClock())
    reader.join(PATIENCE)
    assert got == [Tick(), Tick()]


def test_packets_are_worked_on_by_who_tells_of_them() -> None:
    inbox = ServerInbox()
    threads: list[str] = []
    inbox.work = lambda _: threads.append(threading.current_thread().name)
    for name in ("one", "two"):
        teller = threading.Thread(name=name, target=inbox.put, args=(Letter(FromClients([PACKET])),))
        teller.start()
        teller.join(PATIENCE)
    assert threads == ["one", "two"]
    assert inbox.empty()


def test_one_thread_at_a_time_works_on_packets() -> None:
    inbox = ServerInbox()
    working = 0
    most = 0

    def work(_: object) -> None:
        nonlocal working, most
        working += 1
        most = max(most, working)
        # The interpreter is given up: whoever could work at the same time would.
        time.sleep(0.001)
        working -= 1

    def take_twenty() -> None:
        for _ in range(20):
            inbox.take(FromClients([PACKET]))

    inbox.work = work
    tellers = [threading.Thread(target=take_twenty) for _ in range(5)]
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join(PATIENCE)
    assert most == 1


def test_packets_that_waited_too_long_for_the_turn_are_dropped_and_requests_are_not() -> None:
    inbox = ServerInbox()
    taken: list[object] = []
    inbox.work = taken.append
    batch = [PACKET, (REQUEST, *PACKET[1:]), PACKET]
    messages = [FromClients(batch), FromPeers(AllocationId(1), batch)]
    tellers = [threading.Thread(target=inbox.take, args=(message,)) for message in messages]
    with inbox.turn:
        for teller in tellers:
            teller.start()
        wait_until(lambda: inbox.dropped == 5)
        tellers[1].join(PATIENCE)
        assert not tellers[1].is_alive(), "who has nothing left to tell goes on reading"
        assert taken == []
    tellers[0].join(PATIENCE)
    assert taken == [FromClients([batch[1]])]


def test_work_that_fails_fails_the_actor_in_its_own_thread_and_no_more_is_taken() -> None:
    inbox = ServerInbox()
    error = ZeroDivisionError()
    taken: list[object] = []

    def work(message: object) -> None:
        taken.append(message)
        raise error

    inbox.work = work
    for _ in range(2):
        inbox.put(Letter(FromClients([PACKET])))
    assert inbox.get().message == Failed(error)
    assert len(taken) == 1


def test_a_closed_inbox_drops_packets_and_keeps_the_rest() -> None:
    inbox = ServerInbox()
    taken: list[object] = []
    inbox.work = taken.append
    inbox.close()
    for message in (FromClients([PACKET]), "stop", FromPeers(AllocationId(1), [PACKET]), "and wait"):
        inbox.put(Letter(message))
    assert [inbox.get().message for _ in range(2)] == ["stop", "and wait"]
    assert taken == []


def test_the_age_of_an_inbox_is_how_long_its_oldest_message_has_waited() -> None:
    inbox = ServerInbox()
    assert inbox.age(time.monotonic() + 1000) == 0
    began = time.monotonic()
    inbox.put(Letter("first"))
    inbox.put(Letter("second"))
    ended = time.monotonic()
    assert 1000 - (ended - began) <= inbox.age(began + 1000) <= 1000
    assert inbox.age(began - 1000) == 0
    inbox.get()
    inbox.get()
    assert inbox.age(began + 1000) > 0, "the one in hand counts until another one is asked for"
    inbox.wake_at(began, SystemClock())
    assert inbox.get().message == Tick()
    assert inbox.age(began + 1000) == 0


def test_what_never_waits_in_an_inbox_has_no_age() -> None:
    inbox = ServerInbox()
    inbox.work = lambda _: None
    inbox.put(Letter(FromClients([PACKET])))
    inbox.wake_at(time.monotonic() - 1000, SystemClock())
    assert inbox.get().message == Tick()
    inbox.put(Letter("message"))
    inbox.get()
    assert inbox.get().message == Tick()
    assert inbox.age(time.monotonic() + 1000) == 0
