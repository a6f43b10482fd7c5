"""What the core counts: plain integers that anyone may read at any time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from relay.core.stun import Malformed, Method

SIZE_SHIFT: Final = 7
"""Sizes are counted in steps of this power of two: of 128 bytes."""

SIZE_STEPS: Final = 16
"""Of a histogram of sizes, as the kernel's program has them: the last one is open."""

_ALL_SIZES: Final = 1 << 16 >> SIZE_SHIFT


class DropReason(StrEnum):
    """Why a datagram was neither relayed nor answered."""

    EMPTY = "empty"
    UNKNOWN_PROTOCOL = "unknown_protocol"
    """The first byte is neither STUN's nor ChannelData's."""
    SOURCE_PORT_ZERO = "source_port_zero"
    STUN_TOO_LONG = "stun_too_long"
    MALFORMED_HEADER = "malformed_header"
    MALFORMED_COOKIE = "malformed_cookie"
    MALFORMED_LENGTH = "malformed_length"
    MALFORMED_ATTRIBUTE = "malformed_attribute"
    MALFORMED_FINGERPRINT = "malformed_fingerprint"
    TOO_MANY_ATTRIBUTES = "too_many_attributes"
    UNKNOWN_METHOD = "unknown_method"
    RESPONSE = "response"
    """A success or error response: the relay asks nobody anything."""
    SEND_INDICATION = "send_indication"
    DATA_INDICATION = "data_indication"
    INDICATION = "indication"
    """An indication of a method that has none."""
    ALLOCATE_UNDER_WAY = "allocate_under_way"
    """A repeated Allocate whose first copy is still waiting for its sockets."""
    FLOOD = "flood"
    """A request from an address without an allocation, while more requests arrive than can be answered."""
    SHORT_CHANNEL_DATA = "short_channel_data"
    """A header cut off, or a length beyond the datagram."""
    UNBOUND_CHANNEL = "unbound_channel"
    UNBOUND_PEER = "unbound_peer"
    """From a peer that no live channel of the allocation is bound to."""

    # As its text has, in C: floods are counted here.
    __hash__ = str.__hash__


MALFORMED_DROPS = {
    Malformed.HEADER: DropReason.MALFORMED_HEADER,
    Malformed.COOKIE: DropReason.MALFORMED_COOKIE,
    Malformed.LENGTH: DropReason.MALFORMED_LENGTH,
    Malformed.ATTRIBUTE: DropReason.MALFORMED_ATTRIBUTE,
    Malformed.FINGERPRINT: DropReason.MALFORMED_FINGERPRINT,
    Malformed.TOO_MANY_ATTRIBUTES: DropReason.TOO_MANY_ATTRIBUTES,
}


class FreeReason(StrEnum):
    """Why an allocation came to its end."""

    EXPIRED = "expired"
    DELETED = "deleted"
    """A Refresh with LIFETIME 0."""
    REPLACED = "replaced"
    """Its username came back from another address."""
    REFUSED = "refused"
    """It never was: no socket could be bound for it."""
    FAILED = "failed"
    """What served it failed."""


class NonceOutcome(StrEnum):
    """What came of the nonce that a request bore."""

    OURS = "ours"
    EXPIRED = "expired"
    """Made here for this client, and not within the last hour."""
    FOREIGN = "foreign"
    """Made for another client, by another relay, by this one before it was started again, or by somebody who guesses."""

    __hash__ = str.__hash__


@dataclass(slots=True)
class Counters:
    """Counts since the start. Packets and bytes are those handed out for sending; bytes are payload without headers."""

    to_peer_bytes: int = 0
    to_client_bytes: int = 0
    to_peer_sizes: list[int] = field(default_factory=lambda: [0] * _ALL_SIZES)
    """Packets by their payload's size, in steps up to the largest there can be: so that nothing is compared for a packet.
    `histogram` makes it shorter."""
    to_client_sizes: list[int] = field(default_factory=lambda: [0] * _ALL_SIZES)
    binding_indications: int = 0
    allocations_made: int = 0
    allocations_freed: dict[FreeReason, int] = field(default_factory=lambda: dict.fromkeys(FreeReason, 0))
    channels_bound: int = 0
    """With those that were refreshed."""
    ports_refused: int = 0
    successes: dict[Method, int] = field(default_factory=dict)
    errors: dict[tuple[Method, int], int] = field(default_factory=dict)
    """Error answers by method and code."""
    withheld: dict[tuple[Method, int | None], int] = field(default_factory=dict)
    """Answers that were not given, as their address had had enough (`relay.core.limiter`), by method and code, None for a
    success. Their requests are counted nowhere else."""
    nonces: dict[NonceOutcome, int] = field(default_factory=lambda: dict.fromkeys(NonceOutcome, 0))
    """Those of requests that got as far as that."""
    drops: dict[DropReason, int] = field(default_factory=lambda: dict.fromkeys(DropReason, 0))

    @property
    def to_peer_packets(self) -> int:
        """All of them, whatever their size."""
        return sum(self.to_peer_sizes)

    @property
    def to_client_packets(self) -> int:
        """All of them, whatever their size."""
        return sum(self.to_client_sizes)

    def count_withheld(self, method: Method, code: int | None) -> None:
        """Count an answer that was not given; ``code`` is None for a success."""
        self.withheld[method, code] = self.withheld.get((method, code), 0) + 1

    def count_answer(self, method: Method, code: int | None) -> None:
        """Count an answer; ``code`` is None for a success."""
        if code is None:
            self.successes[method] = self.successes.get(method, 0) + 1
        else:
            self.errors[method, code] = self.errors.get((method, code), 0) + 1


def histogram(sizes: Sequence[int]) -> list[int]:
    """Give counts by size in `SIZE_STEPS` steps, the last of which has all that is larger."""
    return [*sizes[: SIZE_STEPS - 1], sum(sizes[SIZE_STEPS - 1 :])]
