"""A portal channel whose time stands still until a test moves it, and portals that answer it, or don't."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from random import Random
from typing import Any, TypeAlias, TypeVar

from relay.core.addresses import Family
from relay.core.credentials import RelaySecret
from relay.core.instant import Instant
from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import Close, Connect, ConnectionId, Fatal, Note, PortalCommand, SendText
from relay.core.portal.endpoint import PortalConfig, PortalToken, PortalUrl
from relay.core.portal.refusal import Refusal

T = TypeVar("T")
Said: TypeAlias = dict[str, Any]
"""A frame, read or to be written."""

TOKEN = ".SFMyNTY.g2gDaANtAAAAJDE.the-token-of-the-relay-under-test"
SECRET = "the secret of the relay under test"
START = Instant(monotonic=1000.0, unix=1_700_000_000.0)
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
"""Less than anything that the rules measure, and exact in sums of seconds."""

MINUTE = 60
HOUR = 3600
DAY = 24 * HOUR


def write(topic: str, event: str, payload: Any = None, ref: Any = None) -> str:  # noqa: ANN401 - portals write what they like
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
    """Give the only command of a kind."""
    (command,) = of_kind(kind, commands)
    return command


def deeds(commands: Iterable[PortalCommand]) -> list[PortalCommand]:
    """Give the commands that are more than a line in the log."""
    return [command for command in commands if not isinstance(command, Note)]


def said(commands: Iterable[PortalCommand]) -> list[Said]:
    """Read the frames among commands."""
    return [json.loads(command.text) for command in of_kind(SendText, commands)]


class Driver:
    """A channel, its time, and the portal that it is to do with.

    Args:
        portal: is told each command as it comes, and may answer at once by reports on this driver.
    """

    def __init__(self, portal: "Portal | None" = None, *, config: PortalConfig = CONFIG, seed: int = 1) -> None:
        self.channel = PortalChannel(config, Random(seed))
        self.portal = portal or silent
        self.now = START
        self.connection = ConnectionId(0)
        """The last one that was asked for."""
        self.log: list[tuple[float, PortalCommand]] = []
        """All commands, with the seconds from the start to each."""

    @property
    def elapsed(self) -> float:
        return self.now.monotonic - START.monotonic

    def is_in(self, *states: State) -> bool:
        return self.channel.state in states

    @property
    def seconds_left(self) -> float:
        """Time until the channel wants to be woken; without end if it does not."""
        at = self.channel.poll_timeout()
        return float("inf") if at is None else at - self.now.monotonic

    # Inputs. Each gives the commands that followed at once.

    def start(self) -> list[PortalCommand]:
        return self._give(self.channel.start)

    def leave(self) -> list[PortalCommand]:
        return self._give(self.channel.leave)

    def wake(self) -> list[PortalCommand]:
        return self._give(self.channel.handle_timeout)

    def report_connected(self, connection: int | None = None) -> list[PortalCommand]:
        return self._give(lambda now: self.channel.handle_connected(self._id(connection), now))

    def report_refused(
        self, status: int, retry_after: str | None = None, body: bytes = b"", *, connection: int | None = None
    ) -> list[PortalCommand]:
        refusal = Refusal(status, retry_after, body)
        return self._give(lambda now: self.channel.handle_refused(self._id(connection), refusal, now))

    def report_lost(self, reason: str = "connection reset", *, connection: int | None = None) -> list[PortalCommand]:
        return self._give(lambda now: self.channel.handle_lost(self._id(connection), reason, now))

    def receive(self, text: str, *, connection: int | None = None) -> list[PortalCommand]:
        return self._give(lambda now: self.channel.handle_text(self._id(connection), text, now))

    def receive_other(self, kind: str, *, connection: int | None = None) -> list[PortalCommand]:
        return self._give(lambda now: self.channel.handle_other_frame(self._id(connection), kind, now))

    # Time.

    def oversleep(self, seconds: float) -> None:
        """Let time pass without telling the channel."""
        self.now = Instant(self.now.monotonic + seconds, self.now.unix + seconds)

    def pass_time(self, seconds: float) -> list[PortalCommand]:
        """Let time pass, and wake the channel at each moment that it names, the last one included."""
        mark = len(self.log)
        until = self.now.monotonic + seconds
        while (at := self.channel.poll_timeout()) is not None and at <= until:
            assert at >= self.now.monotonic
            self._move_to(at)
            self.wake()
            assert self.seconds_left > 0, "it would be woken without end"
        # A slow portal may have taken longer.
        self._move_to(max(until, self.now.monotonic))
        return self._since(mark)

    def pass_time_to(self, elapsed: float) -> list[PortalCommand]:
        """Let time pass until so many seconds after the start."""
        return self.pass_time(elapsed - self.elapsed)

    # Several of these at once.

    def open(self) -> "Driver":
        """Come as far as a join that is not answered yet."""
        self.start()
        self.report_connected()
        return self

    def join(self) -> "Driver":
        """Come as far as a channel that is joined for the first time."""
        self.open()
        self.receive(reply(0))
        self.receive(INIT)
        assert self.channel.is_joined
        return self

    def join_again(self) -> "Driver":
        """Wait for the next attempt, and let it succeed: one that was made already comes to nothing."""
        if not of_kind(Connect, self.pass_time(self.seconds_left)):
            assert of_kind(Connect, self.pass_time(self.seconds_left))
        self.report_connected()
        self.receive(reply(0))
        if not self.channel.has_begun:
            self.receive(INIT)
        assert self.channel.is_joined
        return self

    def answer_heartbeat(self, commands: Iterable[PortalCommand]) -> list[PortalCommand]:
        """Answer the only heartbeat among commands."""
        (heartbeat,) = said(commands)
        assert heartbeat["event"] == "heartbeat"
        return self.receive(reply(heartbeat["ref"], topic="phoenix"))

    # What came of it.

    def times_of(self, kind: type[PortalCommand]) -> list[float]:
        return [at for at, command in self.log if isinstance(command, kind)]

    def the_end(self) -> tuple[float, str]:
        """Give the time and the reason of the only fatal error."""
        (end,) = [(at, command.reason) for at, command in self.log if isinstance(command, Fatal)]
        return end

    def _id(self, connection: int | None) -> ConnectionId:
        return self.connection if connection is None else ConnectionId(connection)

    def _move_to(self, monotonic: float) -> None:
        self.now = Instant(monotonic, START.unix + monotonic - START.monotonic)

    def _since(self, mark: int) -> list[PortalCommand]:
        return [command for _, command in self.log[mark:]]

    def _give(self, input_: Callable[[Instant], None]) -> list[PortalCommand]:
        mark = len(self.log)
        input_(self.now)
        for command in self.channel.drain():
            self.log.append((self.elapsed, command))
            if isinstance(command, Connect):
                self.connection = command.connection
            self.portal(self, command)
        return self._since(mark)


Portal: TypeAlias = Callable[[Driver, PortalCommand], None]


def silent(_: Driver, __: PortalCommand) -> None:
    """Swallow everything, as a firewall does."""


def unreachable(driver: Driver, command: PortalCommand) -> None:
    """Refuse connections."""
    if isinstance(command, Connect):
        driver.report_lost("connection refused")


def broken(driver: Driver, command: PortalCommand) -> None:
    """Answer as a load balancer with nothing behind it."""
    if isinstance(command, Connect):
        driver.report_refused(502)


def mute(driver: Driver, command: PortalCommand) -> None:
    """Take connections, and say nothing on them."""
    if isinstance(command, Connect):
        driver.report_connected()


def slow_and_mute(driver: Driver, command: PortalCommand) -> None:
    """Take connections at the last moment, and say nothing on them."""
    if isinstance(command, Connect):
        driver.oversleep(15 - TICK)
        driver.report_connected()


def well(driver: Driver, command: PortalCommand) -> None:
    """Do all that a portal does."""
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
    """Make a driver whose settings differ from `CONFIG`."""
    return Driver(portal, config=dataclasses.replace(CONFIG, **changes))
