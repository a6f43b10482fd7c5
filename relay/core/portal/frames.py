"""The frames of a Phoenix channel (serializer v1): JSON objects with a topic, an event, a payload and a ref."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from relay.core.credentials import RelaySecret

RELAY = "relay"
"""The topic of the channel that relays join."""

PHOENIX = "phoenix"
"""The topic of heartbeats."""

Ref: TypeAlias = int

_LONGEST_REF = 18


class Frame(NamedTuple):
    """A frame that the portal sent."""

    topic: str
    event: str
    payload: Mapping[str, Any]
    ref: Ref | None
    unknown_keys: tuple[str, ...] = ()

    @property
    def status(self) -> object:
        """Of a reply: ``ok`` or ``error``, if all is well."""
        return self.payload.get("status")

    @property
    def reason(self) -> str:
        """Why, of an error reply or a ``disconnect``: in words, as far as it gives any."""
        response = self.payload.get("response", self.payload)
        reason = response.get("reason") if isinstance(response, dict) else response
        return reason if isinstance(reason, str) else json.dumps(response, ensure_ascii=False)


class UnreadableFrameError(Exception):
    """What the portal sent is no frame of a channel; the message says why not."""


_KEYS = frozenset(("topic", "event", "payload", "ref", "join_ref"))
"""``join_ref`` is of serializer v2, and some versions of Phoenix send it along."""


def decode(text: str) -> Frame:
    """Read a frame.

    Raises:
        UnreadableFrameError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UnreadableFrameError("no JSON") from None
    if not isinstance(value, dict):
        raise UnreadableFrameError("no JSON object")
    topic, event, payload = value.get("topic"), value.get("event"), value.get("payload")
    if not isinstance(topic, str) or not isinstance(event, str):
        raise UnreadableFrameError("topic and event are not both strings")
    if payload is not None and not isinstance(payload, dict):
        raise UnreadableFrameError("the payload is no object")
    return Frame(topic, event, payload or {}, _ref(value.get("ref")), tuple(sorted(value.keys() - _KEYS)))


def _ref(value: object) -> Ref | None:
    """Read a ref, which comes back as the number it was sent as, or as a string."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _LONGEST_REF:
        return int(value)
    return None


def join(secret: RelaySecret, ref: Ref) -> str:
    """Make the frame that joins the channel, and tells the portal what it mints credentials with."""
    return _encode(RELAY, "phx_join", {"stamp_secret": secret.reveal()}, ref)


def heartbeat(ref: Ref) -> str:
    """Make the frame that shows both sides that the other is there."""
    return _encode(PHOENIX, "heartbeat", {}, ref)


def leave(ref: Ref) -> str:
    """Make the frame that leaves the channel."""
    return _encode(RELAY, "phx_leave", {}, ref)


def _encode(topic: str, event: str, payload: Mapping[str, str], ref: Ref) -> str:
    return json.dumps({"topic": topic, "event": event, "payload": payload, "ref": ref})
