"""State that belongs to one connection and ends with the connection."""

from relay.core.portal.frames import Ref
from relay.core.portal.limits import FRAMES_PER_HEARTBEAT, HEARTBEAT_INTERVAL, LOGS_PER_CONNECTION, SILENCE_LIMIT


class ConnectionState:
    """The refs, heartbeats and frames of one connection."""

    def __init__(self) -> None:
        self.answered_at = 0.0
        """Monotonic time of the upgrade, then of the sending of the last answered heartbeat."""
        self._next_ref = 0
        self.unanswered: dict[Ref, float] = {}
        """The time at which each unanswered heartbeat was sent."""
        self._frames = 0
        self._logs_left = LOGS_PER_CONNECTION

    def next_heartbeat(self, now: float) -> float | None:
        """Return the time of the next heartbeat, or None if the portal has answered nothing for too long.

        After a late heartbeat the time may be the end of the silence, where None follows.
        """
        silent_at = self.answered_at + SILENCE_LIMIT
        return None if now >= silent_at else min(now + HEARTBEAT_INTERVAL, silent_at)

    def take_ref(self) -> Ref:
        """Return the next ref. Refs count up from 0."""
        ref = self._next_ref
        self._next_ref += 1
        return ref

    def heartbeat_sent(self, ref: Ref, now: float) -> None:
        """Expect a reply to a heartbeat."""
        self.unanswered[ref] = now
        self._frames = 0

    def heartbeat_answered(self, ref: Ref | None) -> bool:
        """Accept the reply to a heartbeat. Return False for an unknown ref.

        Earlier heartbeats count as answered too: one reply shows that both sides are alive.
        """
        if ref is None or ref not in self.unanswered:
            return False
        self.answered_at = self.unanswered[ref]
        self.unanswered = {later: sent_at for later, sent_at in self.unanswered.items() if later > ref}
        return True

    def count_frame(self) -> bool:
        """Count a frame. Return False if too many frames arrived since the last heartbeat."""
        self._frames += 1
        return self._frames <= FRAMES_PER_HEARTBEAT

    def allow_log(self) -> int:
        """Return how many log entries this connection may still write, including this entry. 0: do not log."""
        left = self._logs_left
        self._logs_left = max(0, left - 1)
        return left
