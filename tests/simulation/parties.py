"""Senders of payloads, the content of a payload, and the checks of each received payload."""

import struct
from typing import NamedTuple

from tests.simulation.clock import BrokenError

_HEAD = struct.Struct("!QII")
_NOISE = bytes((n * n >> 3) * 167 & 0xFF for n in range(8192))
_SIZES = (0, 0, 1, 7, 32, 60, 156, 156, 156, 700, 1180)


class Letter(NamedTuple):
    """The content of a payload."""

    number: int
    sender: int
    receiver: int


class Post:
    """Numbers payloads, and parses received payloads."""

    def __init__(self) -> None:
        self.written = 0
        self.read = 0
        self.read_by_others = 0
        self._misdirected: dict[int, None] = {}

    def write(self, sender: int, receiver: int) -> bytes:
        self.written += 1
        return _compose(self.written, sender, receiver)

    def note_receiver(self, payload: bytes, receiver: int | None) -> None:
        """Determine the receiver of a correctly relayed payload.

        If the relayed address or the channel has a new owner, the new owner gets the payload. No relay can prevent this.
        """
        if receiver is not None and payload:
            number, _, meant = _HEAD.unpack_from(payload)
            if meant != receiver:
                self._misdirected[number] = None
                if len(self._misdirected) > 4096:
                    del self._misdirected[next(iter(self._misdirected))]

    def open(self, payload: bytes, receiver: int) -> Letter | None:
        """Parse a received payload; return None for an empty payload.

        Raises:
            BrokenError: the payload was changed, or is for another receiver.
        """
        if not payload:
            return None
        if len(payload) < _HEAD.size:
            raise BrokenError(f"party {receiver} got {len(payload)} bytes, which nobody wrote")
        letter = Letter(*_HEAD.unpack_from(payload))
        if letter.number > self.written or payload != _compose(*letter):
            raise BrokenError(f"party {receiver} got a payload that was altered: {payload[:40].hex()}")
        self.read += 1
        if letter.receiver != receiver:
            if letter.number not in self._misdirected:
                raise BrokenError(f"party {receiver} got what party {letter.sender} wrote to party {letter.receiver}")
            self.read_by_others += 1
        return letter


def _compose(number: int, sender: int, receiver: int) -> bytes:
    at = number * 31 & 0xFFF
    return _HEAD.pack(number, sender, receiver) + _NOISE[at : at + _SIZES[number % 11]]
