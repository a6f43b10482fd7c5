"""Names are looked up within a bounded time, and what hangs is bounded too."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay.net import names
from relay.net.names import PENDING_LOOKUPS, HostAddress, look_up
from tests.conftest import wait_until

SOON = 0.05
"""Seconds after which nobody waits for a look-up that hangs."""

PATIENCE = 30.0

UNKNOWN = "fe80::1%no-such-interface"
"""A name that no name server is asked for."""


def lookup_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "name-lookup"]


class Resolver:
    """A resolver that answers nothing until it is let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._may_answer = threading.Event()

    def __call__(self, host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        may_answer = self._may_answer
        self.asked.append(host)
        assert may_answer.wait(3 * PATIENCE)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"address of {host}", port))]

    def hang(self) -> None:
        self._may_answer = threading.Event()

    def hang_up_on(self, host: str) -> None:
        """Look a name up in vain."""
        with pytest.raises(TimeoutError, match=f"looking up {host} took longer than"):
            look_up(host, 443, SOON)
        # Its thread may not have got there yet.
        wait_until(lambda: host in self.asked)

    def answer(self) -> None:
        """Let go of all that hang, and wait until they have what they asked for."""
        self._may_answer.set()
        wait_until(lambda: not lookup_threads())


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    yield resolver
    resolver.answer()


@pytest.fixture(autouse=True)
def _no_look_up_outlives_its_test() -> Iterator[None]:
    yield
    wait_until(lambda: not lookup_threads())


def test_an_address_is_its_own_answer() -> None:
    assert look_up("127.0.0.1", 8443, PATIENCE) == [HostAddress(socket.AF_INET, ("127.0.0.1", 8443))]
    assert look_up("2001:db8::1", 443, PATIENCE) == [HostAddress(socket.AF_INET6, ("2001:db8::1", 443, 0, 0))]


def test_a_name_of_this_machine_is_found() -> None:
    assert HostAddress(socket.AF_INET, ("127.0.0.1", 443)) in look_up("localhost", 443, PATIENCE)


def test_addresses_keep_their_order_and_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As glibc gives them where /etc/hosts has a name twice."""
    six, four = (socket.AF_INET6, ("::1", 443, 0, 0)), (socket.AF_INET, ("127.0.0.1", 443))
    other = (socket.AF_INET, ("127.0.0.2", 443))
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in (six, other, four, six, other)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert look_up("localhost", 443, PATIENCE) == [HostAddress(*six), HostAddress(*other), HostAddress(*four)]


def test_a_name_that_nobody_knows_is_the_error_that_the_system_gives() -> None:
    with pytest.raises(socket.gaierror) as caught:
        look_up(UNKNOWN, 443, PATIENCE)
    assert caught.value.errno == socket.EAI_NONAME


@pytest.mark.parametrize("name", ["portal..example", ".example", "x" * 64 + ".example"])
def test_what_can_not_be_a_name_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(OSError, match="can't be a name") as caught:
        look_up(name, 443, PATIENCE)
    assert name in str(caught.value)
    assert not isinstance(caught.value, TimeoutError)


def test_a_look_up_that_hangs_is_waited_for_as_long_as_was_said_and_no_longer(resolver: Resolver) -> None:
    began = time.monotonic()
    resolver.hang_up_on("portal.example")
    assert SOON <= time.monotonic() - began < PATIENCE
    assert resolver.asked == ["portal.example"]


@pytest.mark.usefixtures("resolver")
def test_the_error_names_the_host_and_the_seconds() -> None:
    with pytest.raises(TimeoutError, match=r"^looking up portal\.example took longer than 1 s$"):
        look_up("portal.example", 443, 0.6)


def test_so_many_look_ups_may_hang_and_no_more(resolver: Resolver) -> None:
    for number in range(PENDING_LOOKUPS):
        resolver.hang_up_on(f"host{number}")
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=f"{PENDING_LOOKUPS} look-ups of names hang already"):
            look_up("another.example", 443, 3 * PATIENCE)
        assert time.monotonic() - began < PATIENCE
    assert len(lookup_threads()) == PENDING_LOOKUPS
    assert resolver.asked == [f"host{number}" for number in range(PENDING_LOOKUPS)]


def test_names_are_looked_up_again_once_those_that_hung_have_returned(resolver: Resolver) -> None:
    for _ in range(3):
        resolver.hang()
        for number in range(PENDING_LOOKUPS):
            resolver.hang_up_on(f"host{number}")
        resolver.answer()
    # Each gets its own answer, not that of one that came too late.
    for number in range(2 * PENDING_LOOKUPS):
        host = f"other{number}"
        assert look_up(host, 443, PATIENCE) == [HostAddress(socket.AF_INET, (f"address of {host}", 443))]


def test_one_that_returns_makes_room_for_one(resolver: Resolver) -> None:
    for number in range(PENDING_LOOKUPS - 1):
        resolver.hang_up_on(f"host{number}")
    first = resolver.asked.copy()
    still_hanging = lookup_threads()
    # Those that hang wait for the event that they have found: a new one does not concern them.
    hung = resolver._may_answer
    resolver._may_answer = threading.Event()
    resolver._may_answer.set()
    for _ in range(3):
        assert look_up("portal.example", 443, PATIENCE)
        wait_until(lambda: lookup_threads() == still_hanging)
    assert resolver.asked == [*first, *["portal.example"] * 3]
    hung.set()


def test_failures_take_no_room() -> None:
    for _ in range(2 * PENDING_LOOKUPS):
        for name in (UNKNOWN, "portal..example"):
            with pytest.raises(OSError, match=r"^(?!.*hang already)"):
                look_up(name, 443, PATIENCE)
            # It is done once its thread is, right after the answer.
            wait_until(lambda: not lookup_threads())
    assert look_up("127.0.0.1", 443, PATIENCE)


def test_no_thread_to_look_up_with_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand allocations have as many threads: that there is none left for a moment must not be felt for ever."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    # If it is felt, then by this test only.
    monkeypatch.setattr(names, "_pending", threading.BoundedSemaphore(PENDING_LOOKUPS), raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(PENDING_LOOKUPS + 1):
            with pytest.raises((OSError, RuntimeError), match="can't start new thread"):
                look_up("127.0.0.1", 443, PATIENCE)
    assert look_up("127.0.0.1", 443, PATIENCE)


def test_a_look_up_that_hangs_keeps_no_process_from_ending(resolver: Resolver) -> None:
    resolver.hang_up_on("portal.example")
    assert [each.daemon for each in lookup_threads()] == [True]
