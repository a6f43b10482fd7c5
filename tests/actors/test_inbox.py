"""The server actor's inbox: it is the timer, and it is bounded."""

import time

from relay.actors.clock import SystemClock
from relay.actors.inbox import CAPACITY, OVERHEAD, ServerInbox
from relay.actors.listener import ListenerActor
from relay.actors.messages import FromClients, FromPeers, Tick
from relay.core.addresses import AllocationId, Family
from relay.core.instant import Instant
from relay.net.udp import Receiver, open_socket
from tests.conftest import wait_until
from tests.turn_client import udp_socket


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

    inbox = ServerInbox()
    inbox.wake_at(1e9, Stopped())
    assert inbox.get().message == Tick()


def test_what_arrives_while_the_inbox_is_full_is_dropped_and_counted() -> None:
    inbox = ServerInbox()
    waiting = [(bytes(CAPACITY - OVERHEAD), ("127.0.0.1", 1))]
    assert inbox.admit(waiting)
    with open_socket(Family.IPV4, "127.0.0.1", 0) as listening, udp_socket("127.0.0.1") as client:
        receiver = Receiver((listening,))
        failures: list[object] = []
        # It tells its server actor nothing here, so itself will do for one.
        started = ListenerActor.start("listener", receiver, None, inbox, lambda *failure: failures.append(failure))
        for _ in range(5):
            client.sendto(b"x", listening.getsockname())
        wait_until(lambda: inbox.dropped == 5)
        receiver.stop()
        started.stop(timeout=5)
    assert failures == []
    inbox.release(waiting)
    assert inbox.admit(waiting)


def test_a_closed_inbox_gives_up_its_datagrams_and_keeps_the_rest() -> None:
    inbox = ServerInbox()
    batch = [(b"x", ("127.0.0.1", 1))]
    for message in (FromClients(batch), "stop", FromPeers(AllocationId(1), batch), "and wait"):
        inbox.put(Letter(message))
    inbox.close()
    assert not inbox.admit(batch)
    assert [inbox.get().message for _ in range(2)] == ["stop", "and wait"]
