"""The end of a drain, in fake time."""

from collections.abc import Callable
from typing import Any, cast

import pykka
import pytest

from relay.actors.messages import Drain as DrainMessage
from relay.actors.messages import JoinPortal, LeavePortal, Resume
from relay.actors.server import ServerActor
from relay.core.commands import Drained
from relay.core.portal.commands import Left
from relay.core.timestamp import Timestamp
from relay.ops.systemd import Systemd
from relay.ops.totals import RelayTotals
from relay.system.shutdown import IDLE_LIMIT, Shutdown
from tests.support.status import Kernel, Watched

DRAIN_TIMEOUT = 60.0


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> Timestamp:
        return Timestamp(self.seconds, self.seconds)

    def monotonic(self) -> float:
        return self.seconds


class Told:
    """Stands for an actor, and keeps the messages."""

    def __init__(self) -> None:
        self.messages: list[object] = []

    def tell(self, message: object) -> None:
        self.messages.append(message)


class Status(Systemd):
    """Keeps the messages for systemd."""

    def __init__(self) -> None:
        super().__init__({})
        self.lines: list[str] = []

    def _tell(self, *lines: str) -> None:
        self.lines.append(" ".join(lines))


class Drain:
    """A shutdown by SIGTERM, or a requested drain, and the packets that the relay relays."""

    def __init__(
        self,
        *,
        has_portal: bool = False,
        exit_code: int = 0,
        relayed: Callable[[], object] | None = None,
        is_requested: bool = False,
    ) -> None:
        self.clock = FakeClock()
        self.packets = 7
        self.systemd = Status()
        self.shutdown = Shutdown(self.systemd, self.clock, relayed or (lambda: self.packets))
        self.told_portal, self.told_server = Told(), Told()
        self.portal = cast(pykka.ActorRef[Any], self.told_portal) if has_portal else None
        self.server = cast(pykka.ActorRef[ServerActor], self.told_server)
        self.began_at = self.clock.seconds
        assert (self.request(DRAIN_TIMEOUT) if is_requested else self.terminate(DRAIN_TIMEOUT, exit_code)) is None

    def terminate(self, seconds: float, exit_code: int = 0) -> int | None:
        return self.shutdown.begin(self.portal, self.server, seconds, 3, exit_code)

    def request(self, seconds: float) -> int | None:
        return self.shutdown.drain(self.portal, self.server, seconds, 3)

    def cancel(self) -> str | None:
        return self.shutdown.cancel(self.portal, self.server)

    def relay_on(self) -> bool:
        self.packets += 1
        return False

    def pass_time(self, until: Callable[[], bool] = lambda: False) -> tuple[float, int | None]:
        """Wait like the supervisor until the exit. Return the seconds since the start, and the exit code."""
        code = None
        while code is None and not until():
            timeout = self.shutdown.timeout()
            assert timeout is not None
            self.clock.seconds += timeout
            code = self.shutdown.expire(3)
        return self.clock.seconds - self.began_at, code

    @property
    def elapsed(self) -> float:
        return self.clock.seconds - self.began_at


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_drain_ends_after_5_s_without_a_relayed_packet(exit_code: int) -> None:
    seconds, code = Drain(exit_code=exit_code).pass_time()
    assert seconds == IDLE_LIMIT == 5
    assert code == exit_code


@pytest.mark.parametrize("by_kernel", [False, True], ids=["sockets", "kernel"])
def test_relayed_packets_extend_a_drain(by_kernel: bool) -> None:  # noqa: FBT001
    kernel = Kernel()
    state = Watched(kernel=kernel).state
    drain = Drain(relayed=lambda: RelayTotals(state).traffic) if by_kernel else Drain()

    def relay_until_20_s() -> bool:
        if by_kernel:
            kernel.total = kernel.total.plus((0, 0, drain.elapsed < 20, 0))
        else:
            drain.packets += drain.elapsed < 20
        return False

    seconds, code = drain.pass_time(relay_until_20_s)
    assert 25 <= seconds <= 26
    assert code == 0


def test_rare_packets_extend_a_drain_up_to_its_timeout() -> None:
    drain = Drain()

    def relay_each_4_s() -> bool:
        drain.packets += drain.elapsed % 4 == 0
        return False

    assert drain.pass_time(relay_each_4_s) == (DRAIN_TIMEOUT, 0)


def test_the_end_of_an_idle_drain_waits_for_the_leave() -> None:
    drain = Drain(has_portal=True)
    seconds, code = drain.pass_time(lambda: drain.elapsed >= 2)
    assert (seconds, code) == (2, None)
    assert drain.shutdown.complete(Left()) is None
    assert drain.pass_time() == (5, 0)


def test_the_end_of_the_last_allocation_ends_a_drain_at_once() -> None:
    assert Drain(exit_code=1).shutdown.complete(Drained()) == 1


def test_a_requested_drain_ends_like_that_of_sigterm() -> None:
    assert Drain(is_requested=True).pass_time() == (IDLE_LIMIT, 0)
    assert Drain(is_requested=True).shutdown.complete(Drained()) == 0


@pytest.mark.parametrize("is_requested", [False, True])
@pytest.mark.parametrize("seconds", [10, 600])
def test_a_repeated_request_changes_the_time(seconds: float, *, is_requested: bool) -> None:
    drain = Drain(is_requested=is_requested)
    drain.pass_time(lambda: drain.relay_on() or drain.elapsed >= 20)
    assert drain.request(seconds) is None
    assert drain.shutdown.ends == drain.clock.seconds + seconds
    assert drain.pass_time(drain.relay_on) == (20 + seconds, 0)


def test_a_request_of_0_seconds_ends_a_drain_at_once() -> None:
    assert Drain(is_requested=True).request(0) == 0


def test_a_cancelled_drain_goes_on_as_before() -> None:
    drain = Drain(is_requested=True)
    assert drain.cancel() is None
    assert drain.told_server.messages == [DrainMessage(), Resume()]
    assert (drain.shutdown.has_begun, drain.shutdown.ends, drain.shutdown.timeout()) == (False, None, None)
    assert drain.cancel() == "the relay is not draining"
    assert drain.request(10) is None
    assert drain.pass_time(drain.relay_on)[1] == 0


def test_the_end_of_a_cancelled_drain_does_not_end_a_later_drain() -> None:
    """The event was on its way."""
    drain = Drain(is_requested=True)
    drain.cancel()
    drain.request(10)
    assert drain.shutdown.complete(Drained(), allocations=1) is None
    assert drain.shutdown.is_draining
    assert drain.shutdown.complete(Drained()) == 0


@pytest.mark.parametrize("is_leaving", [False, True])
def test_a_cancelled_drain_joins_the_portal_again_as_soon_as_the_relay_has_left(*, is_leaving: bool) -> None:
    drain = Drain(is_requested=True, has_portal=True)
    if not is_leaving:
        drain.shutdown.complete(Left())
    drain.cancel()
    if is_leaving:
        drain.shutdown.complete(Left())
    leave, *join = drain.told_portal.messages
    assert leave == LeavePortal()
    # A portal actor that is still leaving ignores the first.
    assert join == [JoinPortal()] * (1 + is_leaving)


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_drain_by_sigterm_or_a_rejection_is_not_cancelled(exit_code: int) -> None:
    drain = Drain(exit_code=exit_code)
    assert drain.cancel() == "the relay is stopping, after SIGTERM or a rejection by the portal"
    assert drain.pass_time() == (IDLE_LIMIT, exit_code)


def test_sigterm_during_a_requested_drain_gives_it_the_time_of_sigterm() -> None:
    drain = Drain(is_requested=True)
    assert drain.terminate(20) is None
    assert drain.cancel() is not None
    assert drain.pass_time(drain.relay_on) == (20, 0)
    assert drain.terminate(20) == 0


def test_sigterm_without_a_drain_timeout_ends_a_requested_drain() -> None:
    assert Drain(is_requested=True).terminate(0) == 0


def test_systemd_is_told_the_end_and_the_allocations_left_of_a_drain() -> None:
    drain = Drain(is_requested=True)
    assert drain.systemd.lines == ["STATUS=draining until 1970-01-01 00:17:40 UTC, allocations left: 3"]
    drain.clock.seconds += 1
    drain.shutdown.expire(2)
    assert drain.systemd.lines[1:] == ["STATUS=draining until 1970-01-01 00:17:40 UTC, allocations left: 2"]
    drain.cancel()
    assert drain.systemd.lines[2:] == ["STATUS=answering clients"]


def test_systemd_is_told_of_the_stop_only_by_sigterm() -> None:
    drain = Drain(is_requested=True)
    assert not any("STOPPING" in line for line in drain.systemd.lines)
    drain.terminate(20)
    assert "STOPPING=1" in drain.systemd.lines[-2]
    assert drain.systemd.lines[-1].startswith("STATUS=draining")
