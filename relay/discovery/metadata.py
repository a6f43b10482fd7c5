"""Asks the metadata service of a cloud: HTTP, at one address that is the same everywhere, without proxies.

Whoever answers there may be nobody's metadata service: so an answer has a length and all of them together have a time.
"""

import json
import socket
import time
from http import HTTPStatus
from typing import Any, NamedTuple

import h11

from relay.config import BadUseError

AT = ("169.254.169.254", 80)
"""Of all three clouds. Asked by number, since a name server may be away or lie."""

SECONDS = 10.0
"""For all that is asked at one start, with what is tried again."""

ATTEMPT_SECONDS = 3.0
"""For one question."""

LONGEST = 64 * 1024
"""Bytes of an answer. Azure's, which describes all network interfaces, is the longest: half a kilobyte for each address."""

_FIRST_PAUSE = 0.25
"""Seconds before the second attempt; before each further one it is twice that before."""

_SHOWN = 40
"""Characters of an answer that are shown in an error."""

_TRY_AGAIN = frozenset(
    (
        HTTPStatus.GONE,  # Azure: the service is being updated
        HTTPStatus.TOO_MANY_REQUESTS,  # Azure, five a second
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,  # Google: it is not there yet
        HTTPStatus.GATEWAY_TIMEOUT,
    )
)
"""What the services' manuals say will pass."""


class Answer(NamedTuple):
    """What was answered."""

    status: int
    headers: dict[str, str]
    text: str


class Metadata:
    """The metadata service, for a few questions.

    Args:
        method: by which the user asked for it, for errors.
        at: where it is.
        seconds: for all questions, from now on.
    """

    def __init__(self, method: str, at: tuple[str, int] = AT, seconds: float = SECONDS) -> None:
        self.method = method
        self._at = at
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def ask(self, target: str, headers: dict[str, str], verb: str = "GET") -> Answer:
        """Give what it answers, as soon as that is an answer.

        Args:
            target: path and query.
            headers: of the request.
            verb: the method.

        Raises:
            BadUseError: there is no answer in time, or none that is HTTP.
        """
        pause = _FIRST_PAUSE
        while True:
            try:
                answer = self._attempt(target, headers, verb)
            except (OSError, h11.RemoteProtocolError) as fault:
                why = _reason(fault)
            else:
                if answer.status not in _TRY_AGAIN:
                    return answer
                why = f"{answer.status} {_phrase(answer.status)}"
            if time.monotonic() + pause >= self._until:
                raise self.fault(f"{self._at[0]} gave no answer within {self._seconds:g} s ({why}): is this machine there?")
            time.sleep(pause)
            pause *= 2

    def require(self, answer: Answer, what: str) -> str:
        """Give the text of an answer that has to be one.

        Raises:
            BadUseError: the status says that it is none.
        """
        if answer.status != HTTPStatus.OK:
            raise self.fault(f"{self._at[0]} answers {answer.status} to a question for {what}: is this machine there?")
        return answer.text

    def parse(self, answer: Answer, what: str) -> Any:  # noqa: ANN401 - as JSON is
        """Read an answer in JSON.

        Raises:
            BadUseError: it is none.
        """
        try:
            return json.loads(self.require(answer, what))
        except (ValueError, RecursionError) as fault:
            raise self.fault(f"{shown(answer.text)} is no JSON: is this machine there?") from fault

    def fault(self, text: str) -> BadUseError:
        """Give the error that says why there is no public address, and what to do."""
        return BadUseError(f"no public address by {self.method}: {text} Else give --public-ip4-addr or --public-ip6-addr")

    def _attempt(self, target: str, headers: dict[str, str], verb: str) -> Answer:
        until = min(self._until, time.monotonic() + ATTEMPT_SECONDS)
        with socket.create_connection(self._at, timeout=_left(until)) as connection:
            client = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST)
            sent = {"Host": self._at[0], **headers, "Connection": "close"} | (
                {"Content-Length": "0"} if verb == "PUT" else {}
            )
            connection.sendall(client.send(h11.Request(method=verb, target=target, headers=list(sent.items()))))
            client.send(h11.EndOfMessage())
            return _receive(connection, client, until)


def _receive(connection: socket.socket, client: h11.Connection, until: float) -> Answer:
    response, body = None, b""
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            connection.settimeout(_left(until))
            client.receive_data(connection.recv(LONGEST))
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > LONGEST:
                raise h11.RemoteProtocolError("the answer is too long")
        elif response is None:
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("the connection was closed")
        else:
            headers = {name.decode("ascii"): value.decode("latin-1") for name, value in response.headers}
            return Answer(response.status_code, headers, body.decode("utf-8", "replace"))


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reason(fault: Exception) -> str:
    if isinstance(fault, TimeoutError):
        return "timed out"
    # What h11 says may have what was sent in it, behind a colon.
    return (fault.strerror if isinstance(fault, OSError) else str(fault).partition(":")[0]) or "the connection broke"


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def shown(text: str) -> str:
    """Make the beginning of an answer fit for a line of an error."""
    return ascii(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
