"""Error codes of responses, and the reasons for the log."""

from enum import IntEnum, StrEnum


class ErrorCode(IntEnum):
    """The error codes that the relay sends (RFC 8489 §14.8, RFC 8656 §19)."""

    BAD_REQUEST = 400
    UNAUTHENTICATED = 401
    FORBIDDEN = 403
    UNKNOWN_ATTRIBUTE = 420
    ALLOCATION_MISMATCH = 437
    STALE_NONCE = 438
    ADDRESS_FAMILY_NOT_SUPPORTED = 440
    WRONG_CREDENTIALS = 441
    UNSUPPORTED_TRANSPORT_PROTOCOL = 442
    PEER_ADDRESS_FAMILY_MISMATCH = 443
    ALLOCATION_QUOTA_REACHED = 486
    INSUFFICIENT_CAPACITY = 508

    @property
    def phrase(self) -> str:
        """Return the reason phrase."""
        return self.name.replace("_", " ").capitalize()

    @property
    def is_challenge(self) -> bool:
        """Return whether the response carries REALM and NONCE (RFC 8489 §9.2.4)."""
        return self in (ErrorCode.UNAUTHENTICATED, ErrorCode.STALE_NONCE)


class Reason(StrEnum):
    """Reasons for codes that have several. They are logged and never sent to a client."""

    NO_CREDENTIALS = "no_credentials"
    """401: no MESSAGE-INTEGRITY, as in the first request of most clients."""
    NO_NONCE = "no_nonce"
    """401: no NONCE, as in the first request of a Firezone client."""
    NO_CREDENTIAL_OF_OURS = "no_credential_of_ours"
    """401: the username lacks the portal's form."""
    CREDENTIAL_EXPIRED = "credential_expired"
    """401: the credential is expired by this machine's clock."""
    WRONG_PASSWORD = "wrong_password"  # noqa: S105
    """401: MESSAGE-INTEGRITY does not match. The credential is for another relay, or for an earlier run of this one."""
    OLD_NONCE = "old_nonce"
    """438: the relay has issued the nonce to this client, but too long ago. All other nonces get 438 without a reason."""
    INCOMPLETE_CREDENTIALS = "incomplete_credentials"
    """400: MESSAGE-INTEGRITY and NONCE without USERNAME or REALM."""
    MALFORMED_ATTRIBUTE = "malformed_attribute"
    """400."""
    NO_TRANSPORT = "no_transport"
    """400: no REQUESTED-TRANSPORT."""
    CONTRADICTING_FAMILIES = "contradicting_families"
    """400: ADDITIONAL-ADDRESS-FAMILY together with REQUESTED-ADDRESS-FAMILY, or with the value IPv4."""
    NO_PEER = "no_peer"
    """400: no XOR-PEER-ADDRESS, or port 0."""
    NO_CHANNEL_NUMBER = "no_channel_number"
    """400: no CHANNEL-NUMBER, or a number out of range."""
    CHANNEL_TAKEN = "channel_taken"
    """400: the channel is bound to another peer, or is in its grace period."""
    PEER_TAKEN = "peer_taken"
    """400: the peer is bound to another channel, or is in its grace period."""
    RESERVATION = "reservation"
    """508: EVEN-PORT or RESERVATION-TOKEN asks for a reserved port. This relay does not reserve ports."""
