"""Connections by TCP and TLS, through a proxy if configured: to any address of a host, within a bounded time."""

import errno
import itertools
import os
import selectors
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import h11

from relay.net.http import Exchange
from relay.net.names import HostAddress, LookUp, look_up
from relay.net.proxy import Proxy

LOOK_UP_TIMEOUT = 5
"""Seconds for a name look-up. Resolvers try a second server after 5 s by default. The rest of the time is for connecting."""

ATTEMPT_DELAY = 0.25
"""Seconds of an unanswered connect before the next address is tried too (RFC 8305 §5)."""

_LONGEST_ANSWER = 16 * 1024
"""Bytes of a proxy's response."""

LEAST_TIMEOUT = 0.1
"""Seconds for connecting that remain even after a slow look-up."""

Watch = Callable[[socket.socket], None]
"""Receives a socket before each wait, so that another thread can end the wait: it shuts this socket down, and the next call
raises."""


@dataclass(frozen=True, slots=True)
class Dialer:
    """Connects to one host, through the proxy if there is one."""

    host: str
    """A name or an address."""
    port: int
    tls: ssl.SSLContext | None
    """Requires a certificate for the host. None: plain TCP."""
    proxy: Proxy | None = None
    look_up: LookUp = look_up

    def dial(self, timeout: float, watch: Watch) -> socket.socket:
        """Connect within ``timeout`` seconds for the look-up and all addresses. The caller closes the socket.

        If the proxy or TLS fails on a connection, the other addresses have half of the remaining time. So the failure is
        reported in time.

        Raises:
            OSError: no address accepted a connection. A failure of the proxy or of TLS is preferred.
        """
        until = time.monotonic() + timeout
        host, port = (self.proxy.host, self.proxy.port) if self.proxy is not None else (self.host, self.port)
        addresses = interleaved(self.look_up(host, port, min(timeout, LOOK_UP_TIMEOUT)))
        until = max(until, time.monotonic() + LEAST_TIMEOUT)
        error: OSError | None = None
        while addresses:
            try:
                opened = _race(addresses, until, watch)
                left = until - time.monotonic()
                return self._complete(opened, max(left / 2 if addresses else left, LEAST_TIMEOUT), watch)
            except OSError as failure:
                error = error or failure
                until -= (until - time.monotonic()) / 2
        try:
            raise error or OSError(f"{host} has no address")
        finally:
            # The traceback refers to this frame, and this frame to the error: a reference cycle, which would keep a socket
            # open until a garbage collection. In CPython 3.11 this happens after a reset before the TLS handshake.
            del error

    def _complete(self, opened: socket.socket, timeout: float, watch: Watch) -> socket.socket:
        """Return a connection after the proxy and TLS."""
        try:
            opened.settimeout(timeout)
            watch(opened)
            # A heartbeat is one small frame. Nagle's algorithm would delay the frame.
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.proxy is not None:
                _open_tunnel(opened, self.host, self.port, self.proxy, time.monotonic() + timeout)
            if self.tls is not None:
                try:
                    opened = self.tls.wrap_socket(opened, server_hostname=self.host, do_handshake_on_connect=False)
                except ValueError as error:
                    # A proxy looks names up itself, so that this is the first look at the name.
                    raise OSError(f"{self.host} can't be a name") from error
                # Before the handshake, so that another thread can end a handshake that hangs.
                watch(opened)
                opened.do_handshake()
        except BaseException:
            opened.close()
            raise
        return opened


def _open_tunnel(through: socket.socket, host: str, port: int, proxy: Proxy, until: float) -> None:
    """Open a tunnel to a host through a proxy connection (RFC 9110 §9.3.6).

    Raises:
        OSError: the proxy refused or failed.
    """
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = [("Host", authority)]
    if proxy.credentials is not None:
        headers.append(("Proxy-Authorization", proxy.credentials.expose()))
    request = h11.Request(method="CONNECT", target=authority, headers=headers)
    try:
        status = str(Exchange(through, _LONGEST_ANSWER, "the proxy").head(request, until).status_code)
    except h11.RemoteProtocolError as error:
        raise ConnectionError("the proxy's answer is no HTTP") from error
    if not status.startswith("2"):
        raise ConnectionError(f"the proxy answered {status}")


def interleaved(addresses: list[HostAddress]) -> list[HostAddress]:
    """Return the addresses with alternating families, IPv6 first (RFC 8305 §4). Within a family the order is kept."""
    six = [address for address in addresses if address.family == socket.AF_INET6]
    four = [address for address in addresses if address.family != socket.AF_INET6]
    return [address for pair in itertools.zip_longest(six, four) for address in pair if address is not None]


def _race(addresses: list[HostAddress], until: float, watch: Watch) -> socket.socket:
    """Return a connection to the address that accepts first (RFC 8305 §5), and close the other sockets.

    Afterwards the list has the addresses that neither accepted nor failed. After an error it is empty.

    Raises:
        OSError: no address accepted in time. The last error is raised.
    """
    waiting, addresses[:] = addresses.copy(), []
    start_at, last_error = 0.0, errno.ETIMEDOUT
    with selectors.PollSelector() as racing:
        pending = racing.get_map()
        try:
            while (waiting or pending) and (now := time.monotonic()) < until:
                if waiting and now >= start_at:
                    failure = _start(waiting.pop(0), racing, watch)
                    last_error, start_at = (failure, now) if failure else (last_error, now + ATTEMPT_DELAY)
                    continue
                # One socket suffices: when another thread shuts it down, the next call raises.
                watch(_socket_of(next(iter(pending.values()))))
                for key, _ in racing.select(min(until, start_at if waiting else until) - now):
                    opened = _socket_of(key)
                    racing.unregister(opened)
                    last_error = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not last_error:
                        addresses += [other.data for other in pending.values()] + waiting
                        return opened
                    opened.close()
                    start_at = now
            if pending:
                last_error = errno.ETIMEDOUT
        finally:
            for key in pending.values():
                _socket_of(key).close()
    raise OSError(last_error, os.strerror(last_error))


def _socket_of(key: selectors.SelectorKey) -> socket.socket:
    return cast(socket.socket, key.fileobj)


def _start(to: HostAddress, racing: selectors.BaseSelector, watch: Watch) -> int:
    """Begin to connect. Return 0, or the number of the error if the connection has failed at once."""
    try:
        opened = socket.socket(to.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        # The family is not supported, or no descriptor is free.
        return error.errno or errno.EIO
    racing.register(opened, selectors.EVENT_WRITE, to)
    watch(opened)
    failure = opened.connect_ex(to.address)
    if failure in {0, errno.EINPROGRESS}:
        return 0
    racing.unregister(opened)
    opened.close()
    return failure
