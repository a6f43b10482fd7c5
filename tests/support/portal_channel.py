"""A portal channel with a clock advanced by tests, and responsive and unresponsive portals."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, TypeAlias, TypeVar

from relay.core.addresses import Family
from relay.core.credentials import RelaySecret
from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import Close, Connect, Fatal, Note, PortalCommand, SendText
from relay.core.portal.endpoint import PortalConfig, PortalToken, PortalUrl
from relay.core.portal.events import (
    Connected,
    ConnectionEvent,
    ConnectionLost,
    OtherReceived,
    TextReceived,
    UpgradeRefused,
)
from relay.core.timestamp import Timestamp

T = TypeVar("T")
Said: TypeAlias = dict[str, Any]
"""A received or sent frame."""

TOKEN = ".SFMyNTY.g2gDaANtAAAAJDE.the-token-of-the-relay-under-test"
SECRET = "the secret of the relay under test"
START = Timestamp(monotonic=1000.0, unix=1_700_000_000.0)
CONFIG = PortalConfig(
    url=PortalUrl.parse("wss://portal.example"),
    token=PortalToken.parse(TOKEN),
    secret=RelaySecret(SECRET),
    name="relay under test",
    public_hosts={Family.IPV4: "192.0.2.1", Family.IPV6: "2001:db8::1"},
    port=3478,
    user_agent="relay/test",
)

TICK = 2**-10
"""Shorter than any timeout, and exact in sums of seconds."""

MINUTE = 60
HOUR = 3600
DAY = 24 * HOUR


def write(topic: str, event: str, payload: Any = None, ref: Any = None) -> str:  # noqa: ANN401 - portals send any JSON
    return json.dumps({"topic": topic, "event": event, "payload": {} if payload is None else payload, "ref": ref})


def reply(ref: Any, status: Any = "ok", response: Any = None, *, topic: str = "relay") -> str:  # noqa: ANN401
    payload = {"status": status, "response": {} if response is None else response}
    return write(topic, "phx_reply", payload, ref)


INIT = write("relay", "init")
UNMATCHED_TOPIC = reply(0, "error", {"reason": "unmatched topic"})
TOKEN_EXPIRED = write("relay", "disconnect", {"reason": "token_expired"})


def of_kind(kind: type[T], commands: Iterable[PortalCommand]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


def the(kind: type[T], commands: Iterable[PortalCommand]) -> T:
    """Return the only command of a kind."""
    (command,) = of_kind(kind, commands)
    return command


def deeds(commands: Iterable[PortalCommand]) -> list[PortalCommand]:
    """Return the commands without log events."""
    return [command for command in commands if not isinstance(command, Note)]


def said(commands: Iterable[PortalCommand]) -> list[Said]:
    """Parse the frames in commands."""
    return [json.loads(command.text) for command in of_kind(SendText, commands)]


class Driver:
    """A channel, its clock and its portal.

    Args:
        portal: receives each command, and may respond at once by reports to this driver.
    """

    def __init__(self, portal: "Portal | None" = None, *, config: PortalConfig = CONFIG, seed: int = 1) -> None:
        self.channel = PortalChannel(config, Random(seed))
        self.portal = portal or silent
        self.now = START
        self.log: list[tuple[float, PortalCommand]] = []
        """All commands, with the seconds since the start."""

    @property
    def elapsed(self) -> float:
        return self.now.monotonic - START.monotonic

    def is_in(self, *states: State) -> bool:
        return self.channel.state in states

    @property
    def seconds_left(self) -> float:
        """Time until the channel's next deadline; infinite without a deadline."""
        at = self.channel.poll_timeout()
        return float("inf") if at is None else at - self.now.monotonic

    # Inputs. Each returns the resulting commands.

    def start(self) -> list[PortalCommand]:
        return self._give(self.channel.start)

    def leave(self) -> list[PortalCommand]:
        return self._give(self.channel.leave)

    def wake(self) -> list[PortalCommand]:
        return self._give(self.channel.handle_timeout)

    def report_connected(self) -> list[PortalCommand]:
        return self._report(Connected())

    def report_refused(self, status: int, retry_after: str | None = None, body: bytes = b"") -> list[PortalCommand]:
        return self._report(UpgradeRefused(status, retry_after, body))

    def report_lost(self, reason: str = "connection reset") -> list[PortalCommand]:
        return self._report(ConnectionLost(reason))

    def receive(self, text: str) -> list[PortalCommand]:
        return self._report(TextReceived(text))

    def receive_other(self, kind: str) -> list[PortalCommand]:
        return self._report(OtherReceived(is_binary=kind == "binary"))

    def _report(self, event: ConnectionEvent) -> list[PortalCommand]:
        return self._give(lambda now: self.channel.handle_event(event, now))

    # Time.

    def oversleep(self, seconds: float) -> None:
        """Advance the clock without a wake-up of the channel."""
        self.now = Timestamp(self.now.monotonic + seconds, self.now.unix + seconds)

    def pass_time(self, seconds: float) -> list[PortalCommand]:
        """Advance the clock, and wake the channel at each deadline, including the end."""
        mark = len(self.log)
        until = self.now.monotonic + seconds
        while (at := self.channel.poll_timeout()) is not None and at <= until:
            assert at >= self.now.monotonic
            self._move_to(at)
            self.wake()
            assert self.seconds_left > 0, "it would be woken without end"
        # A slow portal may have advanced the clock further.
        self._move_to(max(until, self.now.monotonic))
        return self._since(mark)

    def pass_time_to(self, elapsed: float) -> list[PortalCommand]:
        """Advance the clock to a number of seconds after the start."""
        return self.pass_time(elapsed - self.elapsed)

    # Sequences of inputs.

    def open(self) -> "Driver":
        """Connect, and send a join without a reply."""
        self.start()
        self.report_connected()
        return self

    def join(self) -> "Driver":
        """Connect and join for the first time."""
        self.open()
        self.receive(reply(0))
        self.receive(INIT)
        assert self.channel.is_joined
        return self

    def join_again(self) -> "Driver":
        """Wait for the next attempt, and let the attempt succeed. A pending attempt fails."""
        if not of_kind(Connect, self.pass_time(self.seconds_left)):
            assert of_kind(Connect, self.pass_time(self.seconds_left))
        self.report_connected()
        self.receive(reply(0))
        if not self.channel.has_begun:
            self.receive(INIT)
        assert self.channel.is_joined
        return self

    def answer_heartbeat(self, commands: Iterable[PortalCommand]) -> list[PortalCommand]:
        """Reply to the only heartbeat in commands."""
        (heartbeat,) = said(commands)
        assert heartbeat["event"] == "heartbeat"
        return self.receive(reply(heartbeat["ref"], topic="phoenix"))

    # Results.

    def times_of(self, kind: type[PortalCommand]) -> list[float]:
        return [at for at, command in self.log if isinstance(command, kind)]

    def the_end(self) -> tuple[float, str]:
        """Return the time and the reason of the only fatal error."""
        (end,) = [(at, command.reason) for at, command in self.log if isinstance(command, Fatal)]
        return end

    def _move_to(self, monotonic: float) -> None:
        self.now = Timestamp(monotonic, START.unix + monotonic - START.monotonic)

    def _since(self, mark: int) -> list[PortalCommand]:
        return [command for _, command in self.log[mark:]]

    def _give(self, input_: Callable[[Timestamp], None]) -> list[PortalCommand]:
        mark = len(self.log)
        input_(self.now)
        for command in self.channel.drain():
            self.log.append((self.elapsed, command))
            self.portal(self, command)
        return self._since(mark)


Portal: TypeAlias = Callable[[Driver, PortalCommand], None]


def silent(_: Driver, __: PortalCommand) -> None:
    """Drop everything, like a firewall."""


def unreachable(driver: Driver, command: PortalCommand) -> None:
    """Refuse connections."""
    if isinstance(command, Connect):
        driver.report_lost("connection refused")


def broken(driver: Driver, command: PortalCommand) -> None:
    """Respond like a load balancer without backends."""
    if isinstance(command, Connect):
        driver.report_refused(502)


def mute(driver: Driver, command: PortalCommand) -> None:
    """Accept connections, and send nothing."""
    if isinstance(command, Connect):
        driver.report_connected()


def slow_and_mute(driver: Driver, command: PortalCommand) -> None:
    """Accept connections just before the timeout, and send nothing."""
    if isinstance(command, Connect):
        driver.oversleep(15 - TICK)
        driver.report_connected()


def well(driver: Driver, command: PortalCommand) -> None:
    """Behave like a portal."""
    if isinstance(command, Connect):
        driver.report_connected()
    elif isinstance(command, Close):
        driver.report_lost("closed by both sides")
    elif isinstance(command, SendText):
        frame = json.loads(command.text)
        driver.receive(reply(frame["ref"], topic=frame["topic"]))
        if frame["event"] == "phx_join":
            driver.receive(INIT)


def driver_with(portal: Portal | None = None, **changes: Any) -> Driver:  # noqa: ANN401 - the fields of PortalConfig
    """Create a driver with changes of `CONFIG`."""
    return Driver(portal, config=dataclasses.replace(CONFIG, **changes))
