"""Nonces without a table: each one proves itself.

A nonce is the second in which it was made and a keyed hash over that and the client's address, so a flood of first
requests from spoofed addresses costs the relay no memory. It is as short as is safe, since every byte of it is sent to
whatever address a request claims to come from.
"""

import base64
import binascii
import hashlib
import hmac
import struct

from relay.core.addresses import ClientAddress
from relay.core.counters import NonceOutcome
from relay.core.instant import Instant
from relay.core.randomness import RandomSource

NONCE_LIFETIME = 3600
"""Seconds for which a nonce is taken. RFC 8489 §18.1 suggests an hour at most."""

KEY_LENGTH = 16
_MAC_LENGTH = 8
"""64 bits: a guess succeeds once in 2⁶⁴ requests, and what it wins is a request that still needs a password."""

_SECOND = struct.Struct("!I")
# Base64 of 12 bytes, thus 16 characters without padding.
_NONCE_LENGTH = 16


class Nonces:
    """Makes nonces and recognises its own.

    Args:
        random: draws the key.
        outcomes: counts what came of those that were looked at.
    """

    def __init__(self, random: RandomSource, outcomes: dict[NonceOutcome, int] | None = None) -> None:
        self._key = random.randbytes(KEY_LENGTH)
        self._outcomes = dict.fromkeys(NonceOutcome, 0) if outcomes is None else outcomes

    def issue(self, client: ClientAddress, now: Instant) -> bytes:
        """Make a nonce for one client address and port."""
        second = _SECOND.pack(int(now.monotonic) & 0xFFFFFFFF)
        return base64.b64encode(second + self._mac(second, client))

    def is_valid(self, nonce: bytes, client: ClientAddress, now: Instant) -> bool:
        """Tell whether a nonce was made here, for this client, within the last hour; and count it."""
        outcome = self._judge(nonce, client, now)
        self._outcomes[outcome] += 1
        return outcome is NonceOutcome.OURS

    def _judge(self, nonce: bytes, client: ClientAddress, now: Instant) -> NonceOutcome:
        if len(nonce) != _NONCE_LENGTH:
            return NonceOutcome.FOREIGN
        try:
            decoded = base64.b64decode(nonce, validate=True)
        except binascii.Error:
            return NonceOutcome.FOREIGN
        second, mac = decoded[: _SECOND.size], decoded[_SECOND.size :]
        if not hmac.compare_digest(mac, self._mac(second, client)):
            return NonceOutcome.FOREIGN
        age = (int(now.monotonic) - _SECOND.unpack(second)[0]) & 0xFFFFFFFF
        return NonceOutcome.OURS if age < NONCE_LIFETIME else NonceOutcome.EXPIRED

    def _mac(self, second: bytes, client: ClientAddress) -> bytes:
        about = b"%b %b %d" % (second, client[0].encode(), client[1])
        return hashlib.blake2b(about, key=self._key, digest_size=_MAC_LENGTH).digest()
