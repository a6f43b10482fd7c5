"""Reasons of failures in words that are safe for the log. A reason of a fatal error says how to fix the cause."""

import json
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from relay.core.portal.events import UpgradeRefused
from relay.core.portal.limits import QUOTED_CHARACTERS, RETRY_AFTER_CAP
from relay.core.secret import Secret

EXPIRED = "the token has expired: make a new one in the portal's console and set it as FIREZONE_TOKEN or --token-file"

_ADVICE = {
    "invalid_token": "check that FIREZONE_TOKEN or --token-file holds the token of a relay as the portal gave it, "
    "or make a new one in its console",
    "missing_token": "check that no proxy takes the header X-Authorization away",
}
_OTHER_ADVICE = "make a new token in the portal's console and set it as FIREZONE_TOKEN or --token-file"

Redact = Callable[[str], str]
"""Makes text from the portal safe for the log."""


def redactor(*secrets: Secret) -> Redact:
    """Return a function that shortens text, replaces unprintable characters and removes secrets.

    The portal may send the token or the secret back.
    """
    spellings = [spelling for each in secrets for spelling in _spellings(each.expose())]

    def redact(text: str) -> str:
        # Replace before cutting: a cut in the middle of a secret would leave its beginning. Messages are short enough.
        for spelling in spellings:
            text = text.replace(spelling, "[concealed]")
        shown = "".join(character if character.isprintable() else "?" for character in text[: QUOTED_CHARACTERS + 1])
        return shown if len(shown) <= QUOTED_CHARACTERS else shown[:QUOTED_CHARACTERS] + "..."

    return redact


def _spellings(text: str) -> tuple[str, ...]:
    """Return a text as plain text and as JSON, in which other values are quoted."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def join_refused(reason: str) -> str:
    """Return the error after a refused join."""
    return (
        f"the portal refused this relay ({reason}): check its public addresses, its name and its version, and that the "
        "portal is the one that the token was made in"
    )


def retries_spent(host: str, patience: str, last_failure: str | None) -> str:
    """Return the error after the last retry."""
    last = last_failure or "no attempt was made"
    return (
        f"no channel of the portal {host} could be joined for {patience} (last: {last}): check FIREZONE_API_URL, "
        "the network, and whether the portal is up"
    )


def fatal_reason(refusal: UpgradeRefused, redact: Redact) -> str | None:
    """Return why a retry is useless and how to fix the cause. Return None if a retry may succeed."""
    if refusal.status != HTTPStatus.UNAUTHORIZED:
        return None
    said = _said(refusal, redact) or "401 without a reason"
    return f"the portal does not accept the token ({said}): {_ADVICE.get(_problem(refusal.body)[0], _OTHER_ADVICE)}"


def shown(refusal: UpgradeRefused, redact: Redact) -> str:
    """Return a refusal in words, with the code and the detail of a problem document."""
    said = _said(refusal, redact)
    return f"it answered {refusal.status} to the upgrade" + (f" ({said})" if said else "")


def wait_asked_for(refusal: UpgradeRefused, unix: float) -> float | None:
    """Return the seconds of Retry-After, at most an hour (RFC 9110 §10.2.3). Return None without a valid Retry-After.

    A date is compared with ``unix``, the wall clock.
    """
    if refusal.status not in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE} or refusal.retry_after is None:
        return None
    value = refusal.retry_after.strip()
    if value.isascii() and value.isdigit():
        # Python refuses to parse numbers with thousands of digits.
        return float(min(int(value[:10]), RETRY_AFTER_CAP))
    try:
        date = parsedate_to_datetime(value)
        at = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(at - unix, 0.0), RETRY_AFTER_CAP)


def _said(refusal: UpgradeRefused, redact: Redact) -> str:
    return ": ".join(redact(part) for part in _problem(refusal.body) if part)


def _problem(body: bytes) -> tuple[str, str]:
    """Return the code and the detail of a problem document (RFC 9457). Missing members are empty."""
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(problem, dict):
        return "", ""
    code, detail = problem.get("code"), problem.get("detail")
    return code if isinstance(code, str) else "", detail if isinstance(detail, str) else ""
