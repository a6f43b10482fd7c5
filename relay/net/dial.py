"""Connecting to a host by TCP and TLS, through a proxy if need be: every address of it, within a bounded time."""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from relay.net.names import HostAddress, LookUp, look_up
from relay.net.proxy import Proxy, open_tunnel

LOOK_UP_TIMEOUT = 5
"""Seconds. Resolvers ask a second server after that, by default; and time has to be left to connect."""

Watch = Callable[[socket.socket], None]
"""Is shown each socket before it is waited for, so that someone else can shut it down; raises if nobody wants one."""


@dataclass(frozen=True, slots=True)
class Dialer:
    """Connects to one host.

    Args:
        host: a name or an address.
        port: the TCP port.
        tls: with which a certificate for ``host`` is demanded; None for plain TCP.
        proxy: to go through.
        look_up: gives the addresses of a host.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None
    proxy: Proxy | None = None
    look_up: LookUp = look_up

    def dial(self, timeout: float, watch: Watch) -> socket.socket:
        """Connect; the socket is the caller's to close.

        Each address gets its share of the time that is left, so that one which swallows packets does not cost the others
        theirs.

        Args:
            timeout: seconds for everything.
            watch: sees each socket that is made.

        Raises:
            OSError: none of the addresses could be connected to; the error is that of the last one.
        """
        until = time.monotonic() + timeout
        host, port = (self.proxy.host, self.proxy.port) if self.proxy is not None else (self.host, self.port)
        addresses = self.look_up(host, port, min(timeout, LOOK_UP_TIMEOUT))
        error: OSError = OSError(f"{host} has no address")
        for number, address in enumerate(addresses):
            share = (until - time.monotonic()) / (len(addresses) - number)
            try:
                return self._connect(address, max(share, 0.1), watch)
            except OSError as failure:
                error = failure
        try:
            raise error
        finally:
            # Its traceback has this frame, and this frame has it: a ring, which would keep what hangs on it until it is
            # collected. CPython 3.11 leaves a socket there if the other side resets the connection before TLS begins.
            del error

    def _connect(self, to: HostAddress, timeout: float, watch: Watch) -> socket.socket:
        with contextlib.ExitStack() as on_failure:
            opened = on_failure.enter_context(socket.socket(to.family, socket.SOCK_STREAM))
            opened.settimeout(timeout)
            watch(opened)
            opened.connect(to.address)
            # A heartbeat is one small frame: it should not wait for another.
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.proxy is not None:
                open_tunnel(opened, self.host, self.port, self.proxy)
            if self.tls is not None:
                # Shown before the handshake, not after: else nobody could end one that hangs.
                opened = on_failure.enter_context(_wrap(opened, self.tls, self.host))
                watch(opened)
                opened.do_handshake()
            on_failure.pop_all()
        return opened


def _wrap(opened: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    """Prepare a connection for TLS.

    Raises:
        OSError: it is closed by now, or the host can't be a name: one that goes through a proxy was not looked up here.
    """
    try:
        return tls.wrap_socket(opened, server_hostname=host, do_handshake_on_connect=False)
    except ValueError as error:
        raise OSError(f"{host} can't be a name") from error
