"""Stateless nonces.

A nonce is the second of its creation and a keyed hash over the second and the client's address. So a flood of first requests
from forged addresses takes no memory. A nonce is as short as is safe, because a forger can direct its bytes at a victim.
"""

import base64
import binascii
import hashlib
import hmac
import struct

from relay.core.addresses import ClientAddress
from relay.core.counters import NonceOutcome
from relay.core.randomness import RandomSource

NONCE_LIFETIME = 3600
"""Seconds for which a nonce is valid. RFC 8489 §18.1 suggests an hour at most."""

KEY_LENGTH = 16
_MAC_LENGTH = 8
"""64 bits: a guess succeeds once in 2⁶⁴ requests, and the request still needs a password."""

_SECOND = struct.Struct("!I")
# Base64 of 12 bytes: 16 characters without padding.
_NONCE_LENGTH = 16


def second_of(nonce: bytes) -> int:
    """Return the second in which a valid nonce was issued."""
    second: int = _SECOND.unpack_from(base64.b64decode(nonce))[0]
    return second


class Nonces:
    """Creates and checks nonces.

    Args:
        random: draws the key.
        outcomes: counts the results of checks.
    """

    def __init__(self, random: RandomSource, outcomes: dict[NonceOutcome, int]) -> None:
        self.key = random.randbytes(KEY_LENGTH)
        self._outcomes = outcomes

    def issue(self, client: ClientAddress, now: float) -> bytes:
        """Return a new nonce for one client address and port. ``now`` is monotonic."""
        second = _SECOND.pack(int(now) & 0xFFFFFFFF)
        return base64.b64encode(second + self._mac(second, client))

    def check(self, nonce: bytes, client: ClientAddress, now: float) -> NonceOutcome:
        """Return whether this relay issued a nonce to this client, and within the last hour. Count the result."""
        outcome = self._judge(nonce, client, now)
        self._outcomes[outcome] += 1
        return outcome

    def _judge(self, nonce: bytes, client: ClientAddress, now: float) -> NonceOutcome:
        if len(nonce) != _NONCE_LENGTH:
            return NonceOutcome.FOREIGN
        try:
            decoded = base64.b64decode(nonce, validate=True)
        except binascii.Error:
            return NonceOutcome.FOREIGN
        second, mac = decoded[: _SECOND.size], decoded[_SECOND.size :]
        if not hmac.compare_digest(mac, self._mac(second, client)):
            return NonceOutcome.FOREIGN
        age = (int(now) - _SECOND.unpack(second)[0]) & 0xFFFFFFFF
        return NonceOutcome.OURS if age < NONCE_LIFETIME else NonceOutcome.EXPIRED

    def _mac(self, second: bytes, client: ClientAddress) -> bytes:
        about = b"%b %b %d" % (second, client[0].encode(), client[1])
        return hashlib.blake2b(about, key=self.key, digest_size=_MAC_LENGTH).digest()
