"""The portal channel with any sequence of frames, network errors and delays sends only valid frames, and shows no secret."""

import json
from collections.abc import Callable
from random import Random

from relay.core.addresses import Family
from relay.core.credentials import RelaySecret
from relay.core.portal import limits
from relay.core.portal.channel import PortalChannel, State
from relay.core.portal.commands import Abandon, Begin, Close, Connect, Fatal, Left, Note, PortalCommand, SendText
from relay.core.portal.endpoint import PortalConfig, PortalToken, PortalUrl
from relay.core.portal.events import Connected, ConnectionLost, OtherReceived, TextReceived, UpgradeRefused
from relay.core.timestamp import Timestamp
from tests.fuzz.reader import Reader

MODULES = tuple(
    f"relay.core.portal.{name}" for name in ("channel", "frames", "connection", "events", "retry", "reasons", "commands")
)

TOKEN = "t0ken-of-the-relay-that-is-fuzzed"
SECRET = 's3cret\\of"the relay that is fuzzed'
CONFIG = PortalConfig(
    url=PortalUrl.parse("wss://portal.example"),
    token=PortalToken.parse(TOKEN),
    secret=RelaySecret(SECRET),
    name="fuzzed",
    public_hosts={Family.IPV4: "192.0.2.1"},
    port=3478,
)
TOPICS = ("relay", "phoenix", "other", 7)
EVENTS = ("phx_reply", "init", "phx_close", "phx_error", "disconnect", "heartbeat", "other", None)
REASONS = ("unmatched topic", "token_expired", TOKEN, SECRET, "x" * 5000, "a\nb\u202e")
STATUSES = (101, 400, 401, 404, 429, 503, 500, 0, 999)
WAITS = (
    None,
    "0",
    "5",
    "99999999999999999999",
    "Wed, 21 Oct 2015 07:28:00 GMT",
    "-1",
    "\u0661",
    "Fri, 31 Dec 9999 23:59:59 GMT",
)
BODIES = (
    b"",
    b'{"code":"invalid_token","detail":"no"}',
    b'{"code":1}',
    b"[" * 3000,
    b'{"code":"' + TOKEN.encode() + b'"}',
    b"\xff",
)
SECONDS = (0.0, 0.1, 1.0, 5.0, 10.0, 15.0, 30.0, 3600.0, 24 * 3600.0)

SEEDS = (
    bytes((1, 3, 3, 3, 7)),
    bytes((1, 4, 0, 0, 0, 0, 0, 4, 0, 1, 7, 4, 4, 2, 0, 1, 0)) * 3,
    b"\1" + bytes(range(64)) * 4,
    b'\1\5\x20{"topic":"relay","event":"init"}',
)


def run(data: bytes) -> None:
    _Session(data).run()


class _Session:
    """A channel and its inputs."""

    def __init__(self, data: bytes) -> None:
        self.reader = Reader(data)
        self.channel = PortalChannel(CONFIG, Random(1))
        self.now = Timestamp(1000.0, 1_700_000_000.0)
        self.has_connection = False
        self.has_lost = False
        """Whether the last report was the end of a connection: commands due before the report may still concern it."""
        self.is_connected = False
        self.frames = 0
        self.notes = 0
        self.begun = 0
        self.is_over = False
        self.has_started = False
        self._deeds: tuple[Callable[[], None], ...] = (
            self._pass_time, self._start, self._report_connected, self._report_connected, self._say, self._say_raw,
            self._report_refused, self._report_lost, self._report_other, self._pass_time, self._leave, self._wait,
        )  # fmt: skip

    def run(self) -> None:
        self._start()
        self._carry_out()
        deeds = 0
        while self.reader and deeds < 300:
            deeds += 1
            self.reader.choose(self._deeds)()
            self._carry_out()

    def _start(self) -> None:
        if not self.has_started:
            self.has_started = True
            self.channel.start(self.now)

    def _leave(self) -> None:
        if self.reader.byte() == 0x55:
            self.channel.leave(self.now)

    def _pass_time(self) -> None:
        seconds = self.reader.choose(SECONDS)
        self.now = Timestamp(self.now.monotonic + seconds, self.now.unix + seconds)
        if self.reader.flag():
            self.channel.handle_timeout(self.now)

    def _wait(self) -> None:
        """Let time pass until the next wake-up."""
        at = self.channel.poll_timeout()
        if at is not None:
            late = max(at - self.now.monotonic, 0.0)
            self.now = Timestamp(self.now.monotonic + late, self.now.unix + late)
            self.channel.handle_timeout(self.now)
            again = self.channel.poll_timeout()
            assert again is None or again > self.now.monotonic, "it would be woken without end"

    def _report_connected(self) -> None:
        if not self.is_connected:
            self.is_connected = self.has_connection
            self.channel.handle_event(Connected(), self.now)

    def _report_refused(self) -> None:
        reader = self.reader
        body = reader.choose(BODIES) if reader.flag() else reader.blob()
        wait = reader.choose(WAITS) if reader.flag() else reader.text()
        if not self.is_connected:
            self.channel.handle_event(UpgradeRefused(reader.choose(STATUSES), wait, body), self.now)
            self._forget()

    def _report_lost(self) -> None:
        self.channel.handle_event(ConnectionLost(self.reader.text()), self.now)
        self._forget()

    def _report_other(self) -> None:
        self.channel.handle_event(OtherReceived(self.reader.choose((True, False, False))), self.now)

    def _say(self) -> None:
        reader = self.reader
        frame: dict[str, object] = {"topic": reader.choose(TOPICS), "event": reader.choose(EVENTS)}
        frame["ref"] = reader.choose((0, 1, 2, 3, None, "0", "1", -1, True, 1.5, "9" * 30, reader.byte()))
        reason = reader.choose(REASONS)
        frame["payload"] = reader.choose(
            (
                {"status": "ok", "response": {}},
                {"status": "error", "response": {"reason": reason}},
                {"status": "error", "response": reason},
                {"reason": reason},
                {},
                None,
                [],
                {"status": {}},
            )
        )
        if reader.byte() > 0xF0:
            frame[reason] = 1
        self._hear(json.dumps(frame))

    def _say_raw(self) -> None:
        self._hear(self.reader.text())

    def _hear(self, text: str) -> None:
        self.channel.handle_event(TextReceived(text), self.now)

    def _forget(self) -> None:
        self.has_lost, self.has_connection, self.is_connected = self.has_connection, False, False

    # Invariants.

    def _carry_out(self) -> None:
        commands = self.channel.drain()
        for command in commands:
            assert TOKEN not in repr(command)
            assert not self.is_over or isinstance(command, Note), "it goes on after its end"
            self._check(command)
        if not self.has_started:
            return
        assert self.channel.is_joined == (self.channel.state is State.JOINED and bool(self.begun))
        at = self.channel.poll_timeout()
        assert (at is None) == (self.channel.state is State.OVER or not self._waits())

    def _waits(self) -> bool:
        return self.channel.state is not State.IDLE

    def _check(self, command: PortalCommand) -> None:
        match command:
            case Connect(_, _, timeout):
                assert not self.has_connection
                assert timeout == limits.ATTEMPT_TIMEOUT
                self.has_connection = True
                self.is_connected = False
                self.notes = 0
            case SendText(text):
                assert self.has_connection
                frame = json.loads(text)
                assert frame["event"] in ("phx_join", "heartbeat", "phx_leave")
            case Close():
                assert self.has_connection
            case Abandon():
                assert self.has_connection or self.has_lost
                self.has_connection = self.is_connected = False
            case Begin():
                self.begun += 1
                assert self.begun == 1
            case Fatal(reason):
                self.is_over = True
                self._check_words(reason)
            case Left():
                self.is_over = True
            case Note(event, fields):
                self.notes += event.startswith("the portal sent")
                assert self.notes <= limits.LOGS_PER_CONNECTION + 1
                self._check_words(event, *(str(each) for each in fields.values()))

    @staticmethod
    def _check_words(*texts: str) -> None:
        for text in texts:
            assert text.isprintable()
            assert TOKEN not in text
            assert SECRET not in text
            assert json.dumps(SECRET)[1:-1] not in text
            assert len(text) < 1000
