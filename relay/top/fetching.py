"""Asks a relay for its status."""

import http.client
import json
import time
from typing import NamedTuple
from urllib.parse import urlencode

from relay.status.model import Status
from relay.top.figures import printable, shortened
from relay.top.reading import UnreadableError, read

TIMEOUT = 5.0
"""Seconds for a whole answer. With 16,384 allocations on a busy relay it takes one."""

_MOST_BYTES = 4 << 20
_PIECE = 1 << 16
_LONGEST_QUOTE = 120


class UnreachableError(Exception):
    """There is no status to be had; the message is one line that says why."""


class Query(NamedTuple):
    """Which allocations are wanted."""

    sort: str = "rate"
    descending: bool | None = None
    """None is as is usual for the sort."""
    limit: int = 0
    offset: int = 0
    channels: int = 0


class Address(NamedTuple):
    """Where a relay is asked."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def fetch(at: Address, query: Query, timeout: float = TIMEOUT) -> Status:
    """Ask once.

    Raises:
        UnreachableError: nobody answers in time, or not with a status.
    """
    until = time.monotonic() + timeout
    connection = http.client.HTTPConnection(at.host, at.port, timeout=timeout)
    try:
        connection.request("GET", f"/status?{_written(query)}", headers={"Connection": "close"})
        with connection.getresponse() as answer:
            body = _read(answer, until)
        if answer.status != http.HTTPStatus.OK:
            raise UnreachableError(f"it answered {answer.status} ({_reason(body)})")
        return read(Status, json.loads(body))
    except TimeoutError as error:
        raise UnreachableError(f"no answer within {timeout:g} s") from error
    except OSError as error:
        raise UnreachableError((error.strerror or str(error)).lower()) from error
    except http.client.HTTPException as error:
        raise UnreachableError("what answers there speaks no HTTP") from error
    except (ValueError, RecursionError, UnreadableError) as error:
        raise UnreachableError("what answers there is no relay of this version") from error
    finally:
        connection.close()


def _written(query: Query) -> str:
    given = {name: value for name, value in query._asdict().items() if name != "descending"}
    order = {} if query.descending is None else {"order": "desc" if query.descending else "asc"}
    return urlencode(given | order)


def _read(answer: http.client.HTTPResponse, until: float) -> bytes:
    body = bytearray()
    while piece := answer.read1(_PIECE):
        body += piece
        if time.monotonic() >= until:
            # Each piece came in time, and all of them together do not.
            raise TimeoutError
        if len(body) > _MOST_BYTES:
            raise UnreachableError("what answers there is no relay: it does not end")
    return bytes(body)


def _reason(body: bytes) -> str:
    """Give what an error says of itself."""
    try:
        text = json.loads(body)["error"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = body.decode(errors="replace")
    return shortened(printable(str(text).strip()), _LONGEST_QUOTE, "...") or "without a word"
