"""Answers to the upgrade request that are none: what they mean for the relay."""

import json
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import NamedTuple

from relay.core.portal.limits import RETRY_AFTER_CAP
from relay.core.portal.quoting import Quote

_ADVICE = {
    "invalid_token": "check that FIREZONE_TOKEN or --token-file holds the token of a relay as the portal gave it, "
    "or make a new one there",
    "missing_token": "check that no proxy takes the header X-Authorization away",
}
_OTHER_ADVICE = "make a new token in the portal and set it as FIREZONE_TOKEN or --token-file"


class Refusal(NamedTuple):
    """An answer to the upgrade request other than 101."""

    status: int
    retry_after: str | None = None
    """The header, as it came."""
    body: bytes = b""


def fatal_reason(refusal: Refusal, quote: Quote) -> str | None:
    """Say why it is no use to try again; None if it may be."""
    if refusal.status != HTTPStatus.UNAUTHORIZED:
        return None
    code, detail = _problem(refusal.body)
    said = ": ".join(quote(part) for part in (code, detail) if part) or "401 without a reason"
    return f"the portal does not accept the token ({said}): {_ADVICE.get(code, _OTHER_ADVICE)}"


def wait_asked_for(refusal: Refusal, unix: float) -> float | None:
    """Give the seconds that the portal asks to wait, at most an hour (RFC 9110 §10.2.3); None if it does not.

    Args:
        refusal: what it answered.
        unix: the wall clock, which a date is held against.
    """
    if refusal.status not in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE} or refusal.retry_after is None:
        return None
    value = refusal.retry_after.strip()
    if value.isascii() and value.isdigit():
        # A number of thousands of digits is one that Python won't read.
        return float(min(int(value[:10]), RETRY_AFTER_CAP))
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(at - unix, 0.0), RETRY_AFTER_CAP)


def _problem(body: bytes) -> tuple[str, str]:
    """Read the code and the detail of a problem document (RFC 9457); empty where there is none."""
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(problem, dict):
        return "", ""
    code, detail = problem.get("code"), problem.get("detail")
    return code if isinstance(code, str) else "", detail if isinstance(detail, str) else ""
