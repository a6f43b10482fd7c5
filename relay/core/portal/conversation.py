"""What belongs to one connection, and is void with it."""

from relay.core.portal.commands import ConnectionId
from relay.core.portal.frames import Ref
from relay.core.portal.limits import FRAMES_PER_HEARTBEAT, NOTES_PER_CONNECTION, UNANSWERED_HEARTBEATS


class Conversation:
    """The refs, heartbeats and frames of one connection.

    Args:
        connection: which.
    """

    def __init__(self, connection: ConnectionId) -> None:
        self.connection = connection
        self._next_ref = 0
        self._unanswered: list[Ref] = []
        self._frames = 0
        self._notes_left = NOTES_PER_CONNECTION

    @property
    def unanswered(self) -> int:
        """Heartbeats that wait for their answers."""
        return len(self._unanswered)

    @property
    def is_dead(self) -> bool:
        """Whether too many heartbeats wait for their answers to send another."""
        return len(self._unanswered) > UNANSWERED_HEARTBEATS

    def take_ref(self) -> Ref:
        """Give the next ref; they count up from 0."""
        ref = self._next_ref
        self._next_ref += 1
        return ref

    def note_beat(self, ref: Ref) -> None:
        """A heartbeat was sent."""
        self._unanswered.append(ref)
        self._frames = 0

    def answer_beat(self, ref: Ref | None) -> bool:
        """Take the answer to a heartbeat; False if there was none with that ref.

        Those before it will not be answered any more; that this one is shows that both sides are well.
        """
        if ref is None or ref not in self._unanswered:
            return False
        del self._unanswered[: self._unanswered.index(ref) + 1]
        return True

    def count_frame(self) -> bool:
        """Count a frame of the portal's; False if there were too many since the last heartbeat."""
        self._frames += 1
        return self._frames <= FRAMES_PER_HEARTBEAT

    def take_note(self) -> int:
        """Ask whether an oddity may be noted; give how many notes are left with this one, 0 for no."""
        left = self._notes_left
        self._notes_left = max(0, left - 1)
        return left
