"""A portal that sometimes restarts or is unreachable, and the relay's connection to the portal."""

import json
from random import Random
from typing import Any, NamedTuple

from relay.core.addresses import Family
from relay.core.portal.channel import PortalChannel
from relay.core.portal.commands import Abandon, Begin, Close, Connect, Fatal, Left, PortalCommand, SendText
from relay.core.portal.endpoint import PortalConfig, PortalToken, PortalUrl
from relay.core.portal.events import Connected, ConnectionEvent, ConnectionLost, TextReceived, UpgradeRefused
from relay.core.timestamp import Timestamp
from tests.simulation import wire
from tests.simulation.clock import BrokenError, Scheduler
from tests.simulation.machine import HOSTS, UNIX_AT_ZERO, Machine

LONGEST_ABSENCE = 110.0
"""Maximum seconds from the portal's recovery to the relay's join: a wait of 30 s, a hanging attempt of 15 s and another
wait, plus a margin."""

LONGEST_SILENCE = 10.5
"""Maximum seconds between two frames of a relay."""

PORTALS_PATIENCE = 41.0
"""Seconds without a frame of the relay after which the portal closes a connection. The relay must replace it earlier."""

NEVER_JOINED_LIMIT = 14
LOST_LIMIT = 24 * 3600 - 60
"""Seconds for which a relay must try to join at its start, and later."""


class Credential(NamedTuple):
    """A client's credential for the relay."""

    username: str
    key: bytes
    relay: int
    """The relay that accepts the credential."""


class Connection:
    """Both ends of a connection."""

    def __init__(self, link: "PortalLink") -> None:
        self.link = link
        self.is_open = False
        self.is_over = False
        self.has_joined = False
        self.heard_at = 0.0
        """Time of the last frame sent by the relay."""
        self.received_at = 0.0
        """Time of the last frame received by the portal."""


class Portal:
    """The portal: knows the online relay, and creates credentials."""

    def __init__(self, seed: str, scheduler: Scheduler) -> None:
        self.random = Random(f"{seed} portal")
        self.is_up = True
        self.is_reachable = True
        self.well_since = scheduler.now
        self.heard_at = scheduler.now
        """Time of the last frame received from the relay."""
        self.joins = 0
        self._connection: Connection | None = None
        self._secrets: dict[int, str] = {}
        self._salt = 0
        self._scheduler = scheduler

    @property
    def has_relay(self) -> bool:
        return self._connection is not None and self._connection.has_joined

    def mint(self, seconds: float, username: str | None = None) -> Credential | None:
        """Return a client's new credential, or a credential with its old username; None without an online relay."""
        if self._connection is None or not self._connection.has_joined or not self.is_up:
            return None
        self._salt += 1
        name = username or f"{int(UNIX_AT_ZERO + self._scheduler.now + seconds)}:salt{self._salt}"
        relay = self._connection.link.machine_number
        return Credential(name, wire.long_term_key(name, self._secrets[relay]), relay)

    # Faults.

    def crash(self, seconds: float) -> None:
        """Restart: all connections are lost, and new connections are refused for a while."""
        self.is_up = False
        self._lose("connection reset")
        self._scheduler.after(seconds, self._be_well)

    def cut_off(self, seconds: float) -> None:
        """Become unreachable: frames are lost silently."""
        self.is_reachable = False
        self._scheduler.after(seconds, self._be_well)

    def forget_channel(self) -> None:
        """Lose the channel but keep the connection."""
        connection = self._connection
        # TCP would deliver the close once the portal is reachable again; here it would be lost.
        if connection is not None and connection.has_joined and self.is_reachable:
            connection.has_joined = False
            self.well_since = self._scheduler.now
            self._say(connection, "relay", "phx_reply", {"status": "error", "response": {"reason": "unmatched topic"}})

    def close_channel(self) -> None:
        """End the connection as a load balancer does."""
        self.well_since = self._scheduler.now
        self._lose("closed by the portal")

    # Actions of the relay.

    def take_connection(self, connection: Connection) -> None:
        if not self.is_reachable:
            return
        link = connection.link
        draw = self.random.random()
        if not self.is_up:
            if draw < 0.3:
                link.report_lost(connection, "connection refused")
            else:
                link.report_refused(connection, UpgradeRefused(503, "5") if draw < 0.6 else UpgradeRefused(502))
            return
        self._connection = connection
        connection.is_open = True
        connection.heard_at = connection.received_at = self._scheduler.now
        link.report_connected(connection)

    def take_text(self, connection: Connection, text: str) -> None:
        silence = self._scheduler.now - connection.heard_at
        if connection.is_open and silence > LONGEST_SILENCE:
            raise BrokenError(f"the portal was told nothing for {silence:.1f} s")
        connection.heard_at = self._scheduler.now
        if not self.is_reachable or connection is not self._connection:
            return
        self.heard_at = connection.received_at = self._scheduler.now
        frame = json.loads(text)
        match frame["topic"], frame["event"]:
            case "relay", "phx_join":
                self._take_join(connection, frame)
            case "phoenix", "heartbeat":
                self._say(connection, "phoenix", "phx_reply", {"status": "ok", "response": {}}, frame["ref"])
            case "relay", "phx_leave":
                connection.has_joined = False
                self._say(connection, "relay", "phx_reply", {"status": "ok", "response": {}}, frame["ref"])
            case _:
                raise BrokenError(f"the relay said {text} to the portal")

    def take_close(self, connection: Connection) -> None:
        if connection is self._connection and self.is_reachable:
            self._lose("closed by both sides")

    def _take_join(self, connection: Connection, frame: dict[str, Any]) -> None:
        secret, number = frame["payload"]["stamp_secret"], connection.link.machine_number
        if self._secrets.setdefault(number, secret) != secret:
            raise BrokenError("the relay told the portal another secret than before")
        self._secrets = {number: secret}
        connection.has_joined = True
        self.joins += 1
        self._say(connection, "relay", "phx_reply", {"status": "ok", "response": {}}, frame["ref"])
        self._say(connection, "relay", "init", {})

    def _say(self, connection: Connection, topic: str, event: str, payload: object, ref: object = None) -> None:
        if self.is_reachable:
            text = json.dumps({"topic": topic, "event": event, "payload": payload, "ref": ref})
            connection.link.report_text(connection, text)

    def _lose(self, reason: str) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self.is_reachable:
            connection.link.report_lost(connection, reason)

    def _be_well(self) -> None:
        self.is_up = self.is_reachable = True
        self.well_since = self._scheduler.now


class PortalLink:
    """The relay's side: drives the portal channel, and opens the gate of its machine."""

    def __init__(self, machine: Machine, number: int, portal: Portal, scheduler: Scheduler) -> None:
        config = PortalConfig(
            url=PortalUrl.parse("wss://portal.example"),
            token=PortalToken.parse("the-token-of-the-relay-under-simulation"),
            secret=machine.config.secret,
            name="simulated",
            public_hosts={Family(family): HOSTS[family] for family in machine.setting.families},
            port=3478,
        )
        self.machine_number = number
        self.fatal: str | None = None
        self.is_leaving = False
        self.channel = PortalChannel(config, Random(f"{number} channel"))
        self._machine = machine
        self._portal = portal
        self._scheduler = scheduler
        self._started_at = scheduler.now
        self._current: Connection | None = None
        self._wake_at: float | None = None
        self.channel.start(self._now())
        self._carry_out()

    def leave(self) -> None:
        self.is_leaving = True
        self.channel.leave(self._now())
        self._carry_out()

    def check(self) -> None:
        """Check whether the relay has joined in time.

        Raises:
            BrokenError: the portal has been reachable long enough, and has no relay.
        """
        well_for = self._scheduler.now - max(self._portal.well_since, self._started_at)
        is_well = self._portal.is_up and self._portal.is_reachable
        # A relay that has correctly given up stays offline until the world replaces it.
        is_to_be_there = not self.is_leaving and self.fatal is None
        if is_well and well_for > LONGEST_ABSENCE and not self._portal.has_relay and is_to_be_there:
            raise BrokenError(f"the portal has been well for {well_for:.0f} s, and the relay is {self.channel.state}")

    # Reports, each some milliseconds after its cause; some are late.

    def report_connected(self, connection: Connection) -> None:
        self._later(connection, Connected())

    def report_refused(self, connection: Connection, refusal: UpgradeRefused) -> None:
        connection.is_over = True
        self._later(connection, refusal)

    def report_lost(self, connection: Connection, reason: str) -> None:
        connection.is_over = True
        self._later(connection, ConnectionLost(reason))

    def report_text(self, connection: Connection, text: str) -> None:
        self._later(connection, TextReceived(text))

    def _later(self, connection: Connection, event: ConnectionEvent) -> None:
        self._scheduler.after(0.02, self._report, connection, event)

    def _report(self, connection: Connection, event: ConnectionEvent) -> None:
        if connection is not self._current:
            return
        if connection.is_over:
            self._current = None
        if not self._machine.is_over:
            self.channel.handle_event(event, self._now())
            self._carry_out()

    # Commands.

    def _carry_out(self) -> None:
        current = self._current
        if current is not None and current.is_open and self._scheduler.now > current.received_at + PORTALS_PATIENCE:
            raise BrokenError("the relay has kept a connection that the portal has closed for its silence")
        while commands := self.channel.drain():
            for command in commands:
                self._do(command)
        at = self.channel.poll_timeout()
        if at is not None and at != self._wake_at:
            self._wake_at = at
            self._scheduler.at(at, self._wake, at)

    def _do(self, command: PortalCommand) -> None:
        match command:
            case Connect():
                if self._current is not None:
                    raise BrokenError("the relay connects a second time")
                self._current = Connection(self)
                self._scheduler.after(0.03, self._portal.take_connection, self._current)
            case SendText(text):
                self._scheduler.after(0.02, self._portal.take_text, self._connection(), text)
            case Close():
                self._scheduler.after(0.02, self._portal.take_close, self._connection())
            case Abandon():
                self._connection()
                self._current = None
            case Begin():
                self._machine.is_serving = True
            case Left() if not self.is_leaving:
                raise BrokenError("the relay has left its portal, and nobody asked it to")
            case Fatal(reason):
                self._take_fatal(reason)
            case _:
                pass

    def _take_fatal(self, reason: str) -> None:
        now, portal = self._scheduler.now, self._portal
        well_for = now - max(portal.well_since, self._started_at) if portal.is_up and portal.is_reachable else 0.0
        too_early = self.channel.joins and now - portal.heard_at < LOST_LIMIT
        if too_early or well_for > (LONGEST_ABSENCE if self.channel.joins else NEVER_JOINED_LIMIT):
            raise BrokenError(f"the relay gave its portal up, which has been well for {well_for:.0f} s: {reason}")
        self.fatal = reason

    def _connection(self) -> Connection:
        if self._current is None:
            raise BrokenError("a command for a connection, and none is open")
        return self._current

    def _wake(self, at: float) -> None:
        if at == self._wake_at and not self._machine.is_over:
            self._wake_at = None
            self.channel.handle_timeout(self._now())
            self._carry_out()

    def _now(self) -> Timestamp:
        return Timestamp(self._scheduler.now, self._machine.unix)
