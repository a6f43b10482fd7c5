"""Lookups end within a timeout, and the number of hanging lookups is limited."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay.net.names import PENDING_LOOKUPS, HostAddress, look_up
from tests.support.waiting import wait_until

SOON = 0.01
"""Timeout in seconds of a hanging lookup."""

PATIENCE = 30.0

UNKNOWN = "fe80::1%no-such-interface"
"""A name that is resolved without a name server."""


def lookup_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "name-lookup"]


class Hanging:
    """A hanging system resolver, and its callers."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._may_answer = threading.Event()

    def hang(self) -> None:
        """Block lookups from now on."""
        self._may_answer = threading.Event()

    def hang_up_on(self, host: str) -> None:
        """Look a name up until the timeout."""
        with pytest.raises(TimeoutError, match=f"looking up {host} took longer than"):
            look_up(host, 443, SOON)
        # The thread may not have called the resolver yet.
        wait_until(lambda: host in self.asked)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Answer new lookups; lookups that already hang continue to hang."""
        hung, self._may_answer = self._may_answer, threading.Event()
        self._may_answer.set()
        yield
        self._may_answer = hung

    def answer(self) -> None:
        """Release all hanging lookups, and wait for their results."""
        self._may_answer.set()
        wait_until(lambda: not lookup_threads())

    def getaddrinfo(self, host: str, port: int, **_: object) -> list[tuple[Any, ...]]:
        # A hanging lookup keeps its event: a new event does not release it.
        may_answer = self._may_answer
        self.asked.append(host)
        assert may_answer.wait(3 * PATIENCE)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"address of {host}", port))]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    resolver = Hanging()
    monkeypatch.setattr(socket, "getaddrinfo", resolver.getaddrinfo)
    yield resolver
    resolver.answer()


@pytest.fixture(autouse=True)
def _no_look_up_outlives_its_test() -> Iterator[None]:
    yield
    wait_until(lambda: not lookup_threads())


def test_an_address_resolves_to_itself() -> None:
    assert look_up("127.0.0.1", 8443, PATIENCE) == [HostAddress(socket.AF_INET, ("127.0.0.1", 8443))]
    assert look_up("2001:db8::1", 443, PATIENCE) == [HostAddress(socket.AF_INET6, ("2001:db8::1", 443, 0, 0))]


def test_a_name_in_etc_hosts_is_resolved() -> None:
    assert HostAddress(socket.AF_INET, ("127.0.0.1", 443)) in look_up("localhost", 443, PATIENCE)


def test_addresses_keep_their_order_without_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of glibc for a name with two entries in /etc/hosts."""
    six, four = (socket.AF_INET6, ("::1", 443, 0, 0)), (socket.AF_INET, ("127.0.0.1", 443))
    other = (socket.AF_INET, ("127.0.0.2", 443))
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in (six, other, four, six, other)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert look_up("localhost", 443, PATIENCE) == [HostAddress(*six), HostAddress(*other), HostAddress(*four)]


def test_an_unknown_name_raises_the_error_of_the_system() -> None:
    with pytest.raises(socket.gaierror) as caught:
        look_up(UNKNOWN, 443, PATIENCE)
    assert caught.value.errno == socket.EAI_NONAME


@pytest.mark.parametrize("name", ["portal..example", ".example", "x" * 64 + ".example"])
def test_an_invalid_name_is_an_error_with_a_reason(name: str) -> None:
    with pytest.raises(OSError, match="can't be a name") as caught:
        look_up(name, 443, PATIENCE)
    assert name in str(caught.value)
    assert not isinstance(caught.value, TimeoutError)


def test_a_hanging_lookup_ends_after_its_timeout(resolver: Hanging) -> None:
    began = time.monotonic()
    resolver.hang_up_on("portal.example")
    assert SOON <= time.monotonic() - began < PATIENCE
    assert resolver.asked == ["portal.example"]


@pytest.mark.usefixtures("resolver")
def test_the_timeout_error_has_the_host_and_the_seconds() -> None:
    with pytest.raises(TimeoutError, match=r"^looking up portal\.example took longer than 1 s$"):
        look_up("portal.example", 443, 0.51)


def test_the_number_of_hanging_lookups_is_limited(resolver: Hanging) -> None:
    for number in range(PENDING_LOOKUPS):
        resolver.hang_up_on(f"host{number}")
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=f"{PENDING_LOOKUPS} look-ups of names hang already"):
            look_up("another.example", 443, 3 * PATIENCE)
        assert time.monotonic() - began < PATIENCE
    assert len(lookup_threads()) == PENDING_LOOKUPS
    assert resolver.asked == [f"host{number}" for number in range(PENDING_LOOKUPS)]


def test_lookups_resume_once_hanging_lookups_have_returned(resolver: Hanging) -> None:
    for _ in range(3):
        resolver.hang()
        for number in range(PENDING_LOOKUPS):
            resolver.hang_up_on(f"host{number}")
        resolver.answer()
    # Each lookup gets its own result, not the late result of another lookup.
    for number in range(2 * PENDING_LOOKUPS):
        host = f"other{number}"
        assert look_up(host, 443, PATIENCE) == [HostAddress(socket.AF_INET, (f"address of {host}", 443))]


def test_each_returned_lookup_makes_room_for_a_new_lookup(resolver: Hanging) -> None:
    for number in range(PENDING_LOOKUPS - 1):
        resolver.hang_up_on(f"host{number}")
    first = resolver.asked.copy()
    still_hanging = lookup_threads()
    with resolver.answering():
        for _ in range(3):
            assert look_up("portal.example", 443, PATIENCE)
            wait_until(lambda: lookup_threads() == still_hanging)
    assert resolver.asked == [*first, *["portal.example"] * 3]


def test_failed_lookups_do_not_count_toward_the_limit() -> None:
    for _ in range(2 * PENDING_LOOKUPS):
        for name in (UNKNOWN, "portal..example"):
            with pytest.raises(OSError, match=r"^(?!.*hang already)"):
                look_up(name, 443, PATIENCE)
            # The lookup ends with its thread, right after the result.
            wait_until(lambda: not lookup_threads())
    assert look_up("127.0.0.1", 443, PATIENCE)


def test_a_failed_thread_start_does_not_count_toward_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a thousand allocations, threads may run out temporarily. The limit must not count failed starts."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        for _ in range(PENDING_LOOKUPS + 1):
            with pytest.raises((OSError, RuntimeError), match="can't start new thread"):
                look_up("127.0.0.1", 443, PATIENCE)
    assert look_up("127.0.0.1", 443, PATIENCE)


def test_a_hanging_lookup_does_not_block_the_exit_of_the_process(resolver: Hanging) -> None:
    resolver.hang_up_on("portal.example")
    assert [each.daemon for each in lookup_threads()] == [True]
