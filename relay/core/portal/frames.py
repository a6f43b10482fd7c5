"""The frames of a Phoenix channel (serializer v1): JSON objects with a topic, an event, a payload and a ref."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

RELAY = "relay"
"""The topic of the channel that relays join."""

PHOENIX = "phoenix"
"""The topic of heartbeats."""

EXPIRY = "token_expired"
"""The reason of an error or a disconnect that is final."""

Ref: TypeAlias = int

_LONGEST_REF = 18


class Frame(NamedTuple):
    """A frame from the portal."""

    topic: str
    event: str
    payload: Mapping[str, Any]
    ref: Ref | None
    unknown_keys: tuple[str, ...] = ()

    @property
    def status(self) -> object:
        """Return the status of a reply: ``ok`` or ``error`` in a valid reply."""
        return self.payload.get("status")

    @property
    def reason(self) -> str:
        """Return the reason of an error reply or a ``disconnect`` as text."""
        response = self.payload.get("response", self.payload)
        reason = response.get("reason") if isinstance(response, dict) else response
        return reason if isinstance(reason, str) else json.dumps(response, ensure_ascii=False)


class UnreadableFrameError(Exception):
    """The text is not a valid frame. The message says why."""


_KEYS = frozenset(("topic", "event", "payload", "ref", "join_ref"))
"""``join_ref`` belongs to serializer v2. Some versions of Phoenix send ``join_ref`` with v1 too."""


def decode(text: str) -> Frame:
    """Parse a frame.

    Raises:
        UnreadableFrameError: the text is not a frame.
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
    """Parse a ref. Portals return a ref as a number or as a string."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _LONGEST_REF:
        return int(value)
    return None


def encode(topic: str, event: str, payload: Mapping[str, str], ref: Ref) -> str:
    """Return a frame to the portal."""
    return json.dumps({"topic": topic, "event": event, "payload": payload, "ref": ref})
