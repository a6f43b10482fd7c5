"""The counters of the core: plain integers that any thread may read at any time."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from relay.core.stun import Method

SIZE_SHIFT: Final = 7
"""Sizes are counted in steps of 128 bytes, this power of two."""

SIZE_STEPS: Final = 16
"""Steps of a histogram of sizes, as in the kernel's program: the last step is open."""

_ALL_SIZES: Final = 1 << 16 >> SIZE_SHIFT


class DropReason(StrEnum):
    """Why a datagram was neither relayed nor answered."""

    EMPTY = "empty"
    UNKNOWN_PROTOCOL = "unknown_protocol"
    """The first byte is neither that of STUN nor of ChannelData."""
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
    """A success or error response: the relay sends no requests."""
    SEND_INDICATION = "send_indication"
    DATA_INDICATION = "data_indication"
    INDICATION = "indication"
    """An indication of a method without indications."""
    ALLOCATE_UNDER_WAY = "allocate_under_way"
    """A repeated Allocate while the first copy waits for sockets."""
    REPEATED = "repeated"
    """An Allocate that was handled before, and that would have another effect now."""
    FLOOD = "flood"
    """A request during a flood of requests: from an address without an allocation, or of a client with many requests."""
    MIXED = "mixed"
    """ChannelData of several channels in one GRO batch, beyond the share of a client."""
    SHORT_CHANNEL_DATA = "short_channel_data"
    """A truncated header, or a length beyond the datagram."""
    UNBOUND_CHANNEL = "unbound_channel"
    """Data of a channel that is not live and that no ChannelBind followed in time (`relay.core.early`)."""
    EARLY_LIMIT = "early_limit"
    """Data of an unbound channel, of a client with an allocation, beyond the limits of `relay.core.early`."""
    UNBOUND_PEER = "unbound_peer"
    """A datagram of a peer without a live channel in the allocation."""


class FreeReason(StrEnum):
    """Why an allocation ended."""

    EXPIRED = "expired"
    DELETED = "deleted"
    """A Refresh with LIFETIME 0."""
    REPLACED = "replaced"
    """Its username made an allocation from another address."""
    REFUSED = "refused"
    """No socket could be bound, so the allocation never existed for its client."""
    FAILED = "failed"
    """A socket or the reader of the allocation failed."""
    KICKED = "kicked"
    """An operator ended it."""


class NonceOutcome(StrEnum):
    """The result of the check of a request's nonce."""

    OURS = "ours"
    EXPIRED = "expired"
    """Made by this relay for this client, but more than an hour ago."""
    FOREIGN = "foreign"
    """Made for another client, by another relay, by this relay before a restart, or guessed."""


@dataclass(slots=True)
class Counters:
    """Counts since the start. Packets count when they are passed on for sending; bytes are payload without headers."""

    to_peer_bytes: int = 0
    to_client_bytes: int = 0
    to_peer_sizes: list[int] = field(default_factory=lambda: [0] * _ALL_SIZES)
    """Packets by payload size, in steps up to the largest possible size, so that no comparison is needed for a packet.
    `histogram` shortens the list."""
    to_client_sizes: list[int] = field(default_factory=lambda: [0] * _ALL_SIZES)
    early_held: int = 0
    """Datagrams that were held for their ChannelBind (`relay.core.early`)."""
    early_relayed: int = 0
    """Held datagrams that were relayed when the ChannelBind succeeded."""
    binding_indications: int = 0
    allocations_made: int = 0
    allocations_freed: dict[FreeReason, int] = field(default_factory=lambda: dict.fromkeys(FreeReason, 0))
    channels_bound: int = 0
    """Including refreshed channels."""
    ports_refused: int = 0
    successes: dict[Method, int] = field(default_factory=lambda: defaultdict(int))
    errors: dict[tuple[Method, int], int] = field(default_factory=lambda: defaultdict(int))
    """Error responses by method and code."""
    refusals: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Valid requests that got 486 or 508, by the limit or the reason."""
    withheld: dict[tuple[Method, int | None], int] = field(default_factory=lambda: defaultdict(int))
    """Responses that the limiter withheld (`relay.core.limiter`), by method and code; None stands for a success. Their
    requests are counted nowhere else."""
    nonces: dict[NonceOutcome, int] = field(default_factory=lambda: dict.fromkeys(NonceOutcome, 0))
    """Checked nonces by result."""
    drops: dict[DropReason, int] = field(default_factory=lambda: dict.fromkeys(DropReason, 0))

    @property
    def to_peer_packets(self) -> int:
        """Packets of all sizes."""
        return sum(self.to_peer_sizes)

    @property
    def to_client_packets(self) -> int:
        """Packets of all sizes."""
        return sum(self.to_client_sizes)


def histogram(sizes: Sequence[int]) -> list[int]:
    """Return counts by size in `SIZE_STEPS` steps; the last step includes all larger sizes."""
    return [*sizes[: SIZE_STEPS - 1], sum(sizes[SIZE_STEPS - 1 :])]
