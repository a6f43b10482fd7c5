"""The server actor's mailbox: timer, messages, and packets, which are never queued."""

import threading
import time
from collections.abc import Callable

from relay.actors.mailbox import Mailbox
from relay.actors.messages import ClientDatagrams, Failed, PeerDatagrams, Tick
from relay.core.addresses import AllocationId
from relay.core.data import Datagram
from relay.core.stun import MessageClass, Method, encode
from relay.core.timestamp import Timestamp
from relay.ops.clock import SystemClock
from tests.support.waiting import PATIENCE, wait_until

PACKET: Datagram = (b"\x40\0\0\0", ("127.0.0.1", 1), 0, 0)
REQUEST = encode(MessageClass.REQUEST, Method.BINDING, bytes(12), [])


def mailbox_of(handle: Callable[[object], None]) -> Mailbox:
    return Mailbox({ClientDatagrams: handle, PeerDatagrams: handle})


class Envelope:
    """An envelope of pykka."""

    def __init__(self, message: object) -> None:
        self.message = message
        self.reply_to = None


def test_a_tick_arrives_at_the_deadline() -> None:
    mailbox = Mailbox({})
    deadline = time.monotonic() + 0.05
    mailbox.wake_at(deadline, SystemClock())
    assert mailbox.get().message == Tick()
    assert time.monotonic() >= deadline


def test_a_past_deadline_ticks_at_once() -> None:
    mailbox = Mailbox({})
    mailbox.wake_at(time.monotonic() - 1000, SystemClock())
    assert mailbox.get().message == Tick()


def test_messages_come_first_and_in_order() -> None:
    mailbox = Mailbox({})
    mailbox.wake_at(time.monotonic() - 1000, SystemClock())
    for number in range(3):
        mailbox.put(Envelope(number))
    assert [mailbox.get().message for _ in range(3)] == [0, 1, 2]


def test_the_deadline_uses_the_clock_of_the_caller() -> None:
    class Stopped:
        def now(self) -> Timestamp:
            return Timestamp(1e9, 0.0)

        def monotonic(self) -> float:
            return 1e9

    mailbox = Mailbox({})
    mailbox.wake_at(1e9, Stopped())
    assert mailbox.get().message == Tick()


def test_a_deadline_set_during_a_wait_is_met() -> None:
    """Reader threads handle packets and may set a deadline, which the actor's thread has to meet."""
    mailbox = Mailbox({})
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.extend(mailbox.get().message for _ in range(2)))
    reader.start()
    mailbox.wake_at(time.monotonic() + 0.05, SystemClock())
    reader.join(PATIENCE)
    assert got == [Tick(), Tick()]


def test_packets_are_handled_in_the_sending_thread() -> None:
    threads: list[str] = []
    mailbox = mailbox_of(lambda _: threads.append(threading.current_thread().name))
    for name in ("one", "two"):
        teller = threading.Thread(name=name, target=mailbox.put, args=(Envelope(ClientDatagrams([PACKET])),))
        teller.start()
        teller.join(PATIENCE)
    assert threads == ["one", "two"]
    assert mailbox.empty()


def test_one_thread_at_a_time_handles_packets() -> None:
    working = 0
    most = 0

    def work(_: object) -> None:
        nonlocal working, most
        working += 1
        most = max(most, working)
        # This releases the GIL, so other threads could run concurrently.
        time.sleep(0.001)
        working -= 1

    def take_twenty() -> None:
        for _ in range(20):
            mailbox.put(Envelope(ClientDatagrams([PACKET])))

    mailbox = mailbox_of(work)
    tellers = [threading.Thread(target=take_twenty) for _ in range(5)]
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join(PATIENCE)
    assert most == 1


def test_the_rest_of_a_message_lets_another_thread_have_the_core() -> None:
    is_done = threading.Event()
    until = time.monotonic() + PATIENCE

    def work(message: ClientDatagrams) -> ClientDatagrams | None:
        if message.is_flood:
            is_done.set()
            return None
        return None if is_done.is_set() or time.monotonic() > until else message

    mailbox = mailbox_of(work)  # type: ignore[arg-type] # the type of the message
    request: Datagram = (REQUEST, ("127.0.0.1", 1), 0, 0)
    long = threading.Thread(target=mailbox.put, args=(Envelope(ClientDatagrams([request])),))
    long.start()
    mailbox.put(Envelope(ClientDatagrams([request], is_flood=True)))
    long.join(2 * PATIENCE)
    assert is_done.is_set()
    assert time.monotonic() < until


def test_late_packets_are_dropped_and_late_requests_are_kept() -> None:
    taken: list[object] = []
    mailbox = mailbox_of(taken.append)
    batch = [PACKET, (REQUEST, *PACKET[1:]), PACKET]
    messages = [ClientDatagrams(batch), PeerDatagrams(batch, AllocationId(1))]
    tellers = [threading.Thread(target=mailbox.put, args=(Envelope(message),)) for message in messages]
    with mailbox.core_lock:
        for teller in tellers:
            teller.start()
        wait_until(lambda: mailbox.dropped == 5)
        tellers[1].join(PATIENCE)
        assert not tellers[1].is_alive(), "a thread without remaining messages continues to read"
        assert taken == []
    tellers[0].join(PATIENCE)
    assert taken == [ClientDatagrams([batch[1]])]


def test_an_exception_fails_the_actor_in_its_own_thread() -> None:
    error = ZeroDivisionError()
    taken: list[object] = []

    def work(message: object) -> None:
        taken.append(message)
        raise error

    mailbox = mailbox_of(work)
    for _ in range(2):
        mailbox.put(Envelope(ClientDatagrams([PACKET])))
    assert mailbox.get().message == Failed(error)
    assert len(taken) == 1


def test_a_closed_mailbox_drops_packets_only() -> None:
    taken: list[object] = []
    mailbox = mailbox_of(taken.append)
    mailbox.close(PATIENCE)
    for message in (ClientDatagrams([PACKET]), "stop", PeerDatagrams([PACKET], AllocationId(1)), "and wait"):
        mailbox.put(Envelope(message))
    assert [mailbox.get().message for _ in range(2)] == ["stop", "and wait"]
    assert taken == []


def test_the_age_of_a_mailbox_is_the_wait_of_its_oldest_message() -> None:
    mailbox = Mailbox({})
    assert mailbox.age(time.monotonic() + 1000) == 0
    began = time.monotonic()
    mailbox.put(Envelope("first"))
    mailbox.put(Envelope("second"))
    ended = time.monotonic()
    assert 1000 - (ended - began) <= mailbox.age(began + 1000) <= 1000
    assert mailbox.age(began - 1000) == 0
    mailbox.get()
    mailbox.get()
    assert mailbox.age(began + 1000) > 0, "the current message counts until the next get()"
    mailbox.wake_at(began, SystemClock())
    assert mailbox.get().message == Tick()
    assert mailbox.age(began + 1000) == 0


def test_packets_have_no_age_in_the_mailbox() -> None:
    mailbox = mailbox_of(lambda _: None)
    mailbox.put(Envelope(ClientDatagrams([PACKET])))
    mailbox.wake_at(time.monotonic() - 1000, SystemClock())
    assert mailbox.get().message == Tick()
    mailbox.put(Envelope("message"))
    mailbox.get()
    assert mailbox.get().message == Tick()
    assert mailbox.age(time.monotonic() + 1000) == 0
