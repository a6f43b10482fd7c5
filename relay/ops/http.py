"""The pages of the health and the control address.

They are served by waitress, in threads of its own: it limits how many connect, how much they send and how long they take,
so that a slow or hostile client costs the relay some descriptors, and never a packet. Enough of them, trickling a byte now
and then, do keep others from these pages: so whoever can reach the address should be trusted with that.
"""

import errno
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qsl
from wsgiref.types import StartResponse, WSGIEnvironment

import waitress.server
import waitress.wasyncore

from relay.config import BadUseError, Endpoint
from relay.ops.machine import holder

CONNECTIONS = 64
"""At once, for each address; further ones wait to be accepted."""

IDLE_SECONDS = 10
"""After which a connection without a complete request is closed."""

REQUEST_BYTES = 4096
"""Longest head, and longest body, of a request."""

STOP_TIMEOUT = 1
"""Seconds to wait for the threads at the end."""


QUERY_PARAMETERS = 16
"""Most of them in one request."""

Query: TypeAlias = Mapping[str, str]
"""The first value of each parameter of a request."""


class Page(NamedTuple):
    """What is answered: a status, and an object that becomes JSON, or a text as it is."""

    status: HTTPStatus
    body: Mapping[str, object] | str
    content_type: str = "application/json"


Pages: TypeAlias = dict[str, Callable[[Query], Page]]
"""What is answered to a request of each path. Such a callable runs in a thread of the address that was asked."""


def read_query(text: str) -> Query:
    """Read what stands behind the question mark of a URL.

    Raises:
        ValueError: there are more than `QUERY_PARAMETERS`, or it is no UTF-8.
    """
    pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=QUERY_PARAMETERS)
    return MappingProxyType(dict(reversed(pairs)))


class HttpEndpoint:
    """Serves pages at one address, from its making until it is stopped.

    Args:
        name: of the option that says where.
        at: where.
        pages: what is answered to GET.
        actions: what is done and answered upon POST.

    Raises:
        BadUseError: the address is in use, or this machine does not have it.
    """

    def __init__(self, name: str, at: Endpoint, pages: Pages, actions: Pages | None = None) -> None:
        listening = _listen(name, at)
        self.port: int = listening.getsockname()[1]
        self._by_method = {"GET": pages, "HEAD": pages, "POST": actions or {}}
        # Typed as Any: what ends its loop is not part of its public face.
        self._server: Any = waitress.server.create_server(
            self._answer,
            sockets=[listening],
            threads=2,
            connection_limit=CONNECTIONS,
            channel_timeout=IDLE_SECONDS,
            cleanup_interval=IDLE_SECONDS,
            max_request_header_size=REQUEST_BYTES,
            max_request_body_size=REQUEST_BYTES,
            # select() takes no descriptor above 1023, and allocations take thousands.
            asyncore_use_poll=True,
            ident=None,
        )
        self._thread = threading.Thread(target=self._server.run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the address and all connections."""
        # Only the thread that runs the loop may close what the loop looks at.
        self._server.trigger.pull_trigger(self._close_all)
        self._thread.join(STOP_TIMEOUT)
        self._server.task_dispatcher.shutdown(timeout=STOP_TIMEOUT)

    def _close_all(self) -> None:
        waitress.wasyncore.close_all(self._server._map)  # noqa: SLF001 - see above

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        page = self._by_method.get(method, {}).get(path)
        headers = []
        if page is not None:
            answer = _called(page, environ["QUERY_STRING"])
        elif allowed := [each for each, pages in self._by_method.items() if path in pages]:
            answer = Page(HTTPStatus.METHOD_NOT_ALLOWED, {"error": f"{' and '.join(allowed)} is all there is"})
            headers = [("Allow", ", ".join(allowed))]
        else:
            known = sorted(set().union(*self._by_method.values()))
            answer = Page(HTTPStatus.NOT_FOUND, {"error": "no such page", "pages": known})
        body = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body) + "\n").encode()
        headers += [("Content-Type", answer.content_type), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        start_response(f"{answer.status.value} {answer.status.phrase}", headers)
        return [] if method == "HEAD" else [body]


def _called(page: Callable[[Query], Page], text: str) -> Page:
    try:
        query = read_query(text)
    except ValueError:
        return Page(HTTPStatus.BAD_REQUEST, {"error": f"give at most {QUERY_PARAMETERS} parameters, in UTF-8"})
    return page(query)


def _listen(name: str, at: Endpoint) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
        return socket.create_server((at.host, at.port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            by = holder("tcp", at.port)
            message = f"{at}/tcp is in use by {by}: stop that, or give --{name}-address another port"
        else:
            message = f"can't listen on {at}/tcp ({error.strerror}): give --{name}-address an address of this machine"
        raise BadUseError(message) from error
