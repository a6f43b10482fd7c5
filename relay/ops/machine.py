"""What the relay needs to know of the machine that it runs on, and to have of it."""

import errno
import os
import platform
import resource
import ssl
from pathlib import Path

import psutil

from relay import __version__
from relay.config import BadUseError, Config, Endpoint
from relay.core.addresses import Family
from relay.core.relaying import CHANNEL_DATA_FIRST_BYTES
from relay.net.steering import Steered, open_steered
from relay.net.udp import ADDRESS_FAMILIES, UdpCounters, UdpSocket

_UNSPECIFIED = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104 - a relay serves whoever reaches it

OTHER_DESCRIPTORS = 128
"""Standard streams, the sockets for clients, health and control addresses with their connections, files being read."""


def bind_hosts(config: Config) -> dict[Family, str]:
    """Give the address to bind for each family served."""
    given = {Family.IPV4: config.bind_ip4, Family.IPV6: config.bind_ip6}
    return {
        family: _bindable(family, public) if given[family] is None else str(given[family])
        for family, public in config.public_hosts.items()
    }


def _bindable(family: Family, public: str) -> str:
    """Give the public address if this machine has it, so that answers leave from where requests came; else all addresses.

    Behind a 1:1 NAT, as most clouds have it, the machine does not know its public address.
    """
    try:
        UdpSocket(family, public, 0).close()
    except OSError:
        return _UNSPECIFIED[family]
    return public


def own_addresses() -> frozenset[str]:
    """Give every address that an interface of this machine has."""
    return frozenset(
        address.address.partition("%")[0]
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family in ADDRESS_FAMILIES.values()
    )


def open_service_sockets(family: Family, host: str, port: int, counters: UdpCounters) -> Steered:
    """Open the sockets for clients: some for data, one for requests.

    Raises:
        BadUseError: it is in use, or the machine does not have the address.
    """
    try:
        return open_steered(family, host, port, CHANNEL_DATA_FIRST_BYTES.start, counters)
    except OSError as error:
        at = Endpoint(host, port)
        if error.errno == errno.EADDRINUSE:
            by = holder("udp", port)
            raise BadUseError(f"{at}/udp is in use by {by}: clients know no other port, so stop that") from error
        if error.errno == errno.EADDRNOTAVAIL:
            message = f"this machine does not have the address {host}: give --bind-ip{'46'[family - 1]}-addr one it has"
            raise BadUseError(message) from error
        if error.errno == errno.EAFNOSUPPORT:
            raise BadUseError(f"this machine has no {family}: leave --public-ip{'46'[family - 1]}-addr out") from error
        raise BadUseError(f"can't listen on {at}/udp: {error.strerror}") from error


def holder(kind: str, port: int) -> str:
    """Name the process that has a port, as far as this one may know.

    Args:
        kind: "udp" or "tcp".
        port: which.
    """
    try:
        for connection in psutil.net_connections(kind):
            if connection.laddr and connection.laddr.port == port and connection.pid is not None:
                if connection.pid == os.getpid():
                    return "this relay itself"
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return "another process"


def raise_descriptor_limit(config: Config) -> None:
    """Make sure that every allocation there can be finds descriptors for its sockets.

    Raises:
        BadUseError: this process may not have as many.
    """
    families = len(config.public_hosts)
    needed = config.capacity * families + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        # Beyond the hard limit this works for root only.
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, hard)))
    except (ValueError, OSError) as error:
        fitting = (hard - OTHER_DESCRIPTORS) // families
        advice = f"--max-allocations {fitting} fits" if fitting > 0 else "nothing fits"
        raise BadUseError(
            f"{config.capacity} allocations need {needed} descriptors and this process may have {hard}: "
            f"{advice}; or raise the limit (ulimit -Hn {needed}, or LimitNOFILE={needed} in the unit)"
        ) from error


def trusted_authorities() -> ssl.SSLContext:
    """Give what TLS connections verify certificates with: the system's authorities, or those of SSL_CERT_FILE.

    Raises:
        BadUseError: SSL_CERT_FILE can't be read, or has no certificate in it.
    """
    context = ssl.create_default_context()
    named = os.environ.get("SSL_CERT_FILE")
    if named is not None:
        # OpenSSL has looked there already, but says nothing if it found nothing.
        try:
            context.load_verify_locations(named)
        except ssl.SSLError as error:
            raise BadUseError(f"SSL_CERT_FILE {named} has no certificate in it: give a file of PEM certificates") from error
        except OSError as error:
            raise BadUseError(f"can't read SSL_CERT_FILE {named}: {error.strerror}") from error
    elif not _has_authorities(ssl.get_default_verify_paths()):
        raise BadUseError("this machine has no certificate authorities: install ca-certificates, or set SSL_CERT_FILE")
    return context


def _has_authorities(paths: ssl.DefaultVerifyPaths) -> bool:
    """Tell whether there is anything where OpenSSL looks; it gives no path that does not exist."""
    # typeshed does not know that either may be None.
    return any(path and Path(path).exists() and (Path(path).is_file() or any(Path(path).iterdir())) for path in paths[:2])


def user_agent() -> str:
    """Say what runs here, as ``Debian/12 relay/1.0.0 (x86_64; 6.1.0)``."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    system = _product(release.get("ID", "linux").capitalize())
    version = _product(release.get("VERSION_ID", "") or platform.release())
    return f"{system}/{version} relay/{__version__} ({_product(platform.machine())}; {_product(platform.release())})"


def _product(text: str) -> str:
    """Leave out what may not stand in a product of a User-Agent (RFC 9110 §10.1.5)."""
    kept = "".join(character for character in text if character.isascii() and (character.isalnum() or character in "._+-"))
    return kept or "unknown"
