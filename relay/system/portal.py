"""Start the portal's side of a relay. A standalone relay does not import this module."""

import functools
import os
import platform
import ssl
from pathlib import Path

import click
import pykka

from relay import __version__
from relay.actors.portal import PortalActor
from relay.config import Config, PortalAccess, UsageError
from relay.core.credentials import RelaySecret
from relay.core.portal.channel import PortalChannel
from relay.core.portal.endpoint import PortalConfig, PortalToken
from relay.logger import Logger
from relay.net.dial import Dialer
from relay.net.websocket import WebSocketLink
from relay.ops.clock import Clock
from relay.options import read_token_file
from relay.system.core import random_source
from relay.system.events import EventQueue, Failure

_log = Logger("relay.actors.system")


def start_portal(
    config: Config, access: PortalAccess, secret: RelaySecret, port: int, clock: Clock, events: EventQueue
) -> tuple[PortalChannel, pykka.ActorRef[PortalActor]]:
    """Start to join the portal. `events` get `Begin` as soon as the relay may respond to clients at its port."""
    portal = PortalConfig(access.url, access.token, secret, config.name or None, config.public_hosts, port, user_agent())
    # A random source of its own, because the server actor uses the other source in another thread.
    channel = PortalChannel(portal, random_source(config.rng_seed))
    tls = trusted_authorities() if access.url.is_tls else None
    if tls is None:
        _log.warning("the portal is talked to without TLS: whoever listens sees the token and the secret")
    proxy = access.proxy and f"{access.proxy.host}:{access.proxy.port}"
    _log.info("joining the portal", url=access.url.text, proxy=proxy)
    dialer = Dialer(access.url.host, access.url.port, tls, access.proxy)
    actor = PortalActor.start(
        channel,
        clock,
        functools.partial(_read_token, access.token_file),
        events.put,
        lambda *failure: events.put(Failure(*failure)),
        functools.partial(WebSocketLink, dialer),
    )
    return channel, actor


def _read_token(path: Path | None) -> PortalToken | None:
    # Read again, so that a rotated token needs no restart.
    try:
        return None if path is None else read_token_file(path)
    except click.UsageError as error:
        _log.warning("no new token: the last token is used", reason=error.message)
        return None


def trusted_authorities() -> ssl.SSLContext:
    """Return a TLS context with the system's certificate authorities, or the authorities in SSL_CERT_FILE.

    Raises:
        UsageError: SSL_CERT_FILE is unreadable or has no certificate, or the system has no authorities.
    """
    context = ssl.create_default_context()
    named = os.environ.get("SSL_CERT_FILE")
    if named is not None:
        # OpenSSL has read the file already, but reports no error.
        try:
            context.load_verify_locations(named)
        except ssl.SSLError as error:
            raise UsageError(f"SSL_CERT_FILE {named} has no certificate in it: give a file of PEM certificates") from error
        except OSError as error:
            raise UsageError(f"can't read SSL_CERT_FILE {named}: {error.strerror}") from error
    elif not _has_authorities(ssl.get_default_verify_paths()):
        raise UsageError("this machine has no certificate authorities: install ca-certificates, or set SSL_CERT_FILE")
    return context


def _has_authorities(paths: ssl.DefaultVerifyPaths) -> bool:
    """Return whether OpenSSL's default file or directory has any content."""
    # Either path may be None, unlike in typeshed.
    return any(path and Path(path).exists() and (Path(path).is_file() or any(Path(path).iterdir())) for path in paths[:2])


def user_agent() -> str:
    """Return the User-Agent header, such as ``Debian/12 relay/1.0.0 (x86_64; 6.1.0)``."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    system = _product(release.get("ID", "linux").capitalize())
    version = _product(release.get("VERSION_ID", "") or platform.release())
    return f"{system}/{version} relay/{__version__} ({_product(platform.machine())}; {_product(platform.release())})"


def _product(text: str) -> str:
    """Remove characters that are invalid in a product of a User-Agent (RFC 9110 §10.1.5)."""
    kept = "".join(character for character in text if character.isascii() and (character.isalnum() or character in "._+-"))
    return kept or "unknown"
