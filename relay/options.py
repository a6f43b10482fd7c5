"""Types of command line options: functions that parse a text, and errors that state the accepted values."""

import contextlib
import re
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Any, TypeVar

import click

from relay.config import ANY_CPU, SERVICE_PORT
from relay.core.credentials import RelaySecret
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.net.endpoint import Endpoint
from relay.ops.logs.filter import LogFilter

T = TypeVar("T")

_LONGEST_TEXT = 4096
_LONGEST_INTERFACE = 15
_HOSTNAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.0001, 10.0
_NEW_TOKEN = "copy the token from the portal's console again"  # noqa: S105 - advice
NEW_SECRET = "create a secret with openssl rand -hex 32"  # noqa: S105 - advice


class Parsed(click.ParamType[T]):
    """An option type whose text a function parses.

    Args:
        name: the placeholder in the help.
        parse: parses a text without surrounding white space. Raises ValueError if the text is invalid.
        message: the error message, with the ``text`` and the ``error`` of the function.
    """

    def __init__(self, name: str, parse: Callable[[str], T], message: str = "{error}") -> None:
        self.name = name
        self._parse = parse
        self._message = message

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:  # noqa: ANN401
        """Return the parsed text. Return a default value of another type unchanged."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        text = value.strip()
        try:
            return self._parse(text)
        except ValueError as error:
            self.fail(self._message.format(text=text, error=error), param, ctx)


def _parse_endpoint(text: str) -> Endpoint:
    """Parse ``192.0.2.1:80``, ``[2001:db8::1]:80`` or ``localhost:80``."""
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host.lower() == "localhost" else host
    address = IPv6Address(host[1:-1]) if host.startswith("[") and host.endswith("]") else IPv4Address(host)
    if re.fullmatch("[0-9]+", port) is None or int(port) >= 1 << 16:
        raise ValueError("not a port")
    return Endpoint(str(address), int(port))


def _parse_local_endpoint(text: str) -> Endpoint:
    """Parse an address on which a relay listens; return an address at which this machine reaches the relay."""
    at = _parse_endpoint(text)
    any_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - the relay listens there, this program does not
    return Endpoint(any_host.get(at.host, at.host), at.port)


def _parse_service_port(text: str) -> None:
    """Check that the port for clients is `SERVICE_PORT`."""
    if text != str(SERVICE_PORT):
        raise ValueError(
            f"{text!r} can't work, because clients drop packets from any port but {SERVICE_PORT}: unset it, and give a "
            "second relay on this machine its own address (--bind-ip4-addr)"
        )


def _parse_collector(text: str) -> str:
    """Parse ``collector.example:4317`` (no TLS) or a URL, and return a URL."""
    match = re.fullmatch(r"(?:(https?)://)?((?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5}))/?", text)
    if match is None or not 0 < int(match[3]) < 1 << 16:
        raise ValueError("use 127.0.0.1:4317 or https://collector.example:4317")
    return f"{match[1] or 'http'}://{match[2]}"


def _parse_networks(text: str) -> tuple[Network, ...]:
    """Parse ``10.0.0.0/8,fd00::/8``. An address without prefix length is a network of one address."""
    return tuple(map(ip_network, _items(text)))


def _parse_interfaces(text: str) -> tuple[str, ...]:
    """Parse ``eth0,eth1``."""
    for name in _items(text):
        if len(name) > _LONGEST_INTERFACE or "/" in name or not name.isprintable():
            raise ValueError(f"{name!r} is not a valid interface name: use eth0 or eth0,eth1")
    return _items(text)


def _parse_hostnames(text: str) -> tuple[str, ...]:
    """Parse ``relay-1.example,relay-1``."""
    for name in _items(text):
        if _HOSTNAME.fullmatch(name) is None:
            raise ValueError(f"{name!r} is not a valid hostname: use relay-1.example, without scheme and port")
    return _items(text)


def parse_timeout(text: str) -> int:
    """Parse ``0``, ``90``, ``90s``, ``15m``, ``12h``, ``1d`` or ``2w``, and return seconds."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a valid duration: use 90s, 15m, 12h, 1d or 2w")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _parse_lifetime(text: str) -> int:
    """Parse a duration of at least one second."""
    seconds = parse_timeout(text)
    if not seconds:
        raise ValueError(f"{text!r} is too short: use 90s, 15m, 12h, 1d or 2w")
    return seconds


def _parse_cpu(text: str) -> int | None:
    """Parse a CPU number, ``auto`` (any CPU) or ``off`` (None)."""
    if text.lower() == "off":
        return None
    if text.lower() == "auto":
        return ANY_CPU
    # At most 5 digits: sched_setaffinity takes a bit mask, which would need gigabytes for a large number.
    if re.fullmatch("[0-9]{1,5}", text) is None:
        raise ValueError(f"{text!r} is not a CPU: use auto, off or a CPU number")
    return int(text)


def _parse_interval(text: str) -> float:
    """Parse seconds, or ``off`` for the interpreter's default."""
    if text.lower() == "off":
        return sys.getswitchinterval()
    match = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text)
    if match is None or not _SHORTEST_INTERVAL <= float(text) <= _LONGEST_INTERVAL:
        bounds = f"{_SHORTEST_INTERVAL} to {_LONGEST_INTERVAL:g}"
        raise ValueError(f"{text!r} is not a valid interval: use {bounds} seconds, or off")
    return float(text)


def _items(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list without empty parts."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


FILE = click.Path(path_type=Path)
IPV4 = Parsed("IPV4", IPv4Address, "{text!r} is not an IPv4 address: use 203.0.113.7")
IPV6 = Parsed("IPV6", IPv6Address, "{text!r} is not an IPv6 address: use 2001:db8::7")
_NO_ENDPOINT = "{text!r} is not an address and port: use 127.0.0.1:8080, [::1]:8080 or localhost:8080"
ENDPOINT = Parsed("HOST:PORT", _parse_endpoint, _NO_ENDPOINT)
LOCAL_ENDPOINT = Parsed("HOST:PORT", _parse_local_endpoint, _NO_ENDPOINT)
CLIENT_PORT = Parsed("PORT", _parse_service_port)
# Without the value, which may contain a password.
COLLECTOR = Parsed("[http[s]://]HOST:PORT", _parse_collector, "not a valid collector address: {error}")
PORTAL_URL = Parsed("URL", PortalUrl.parse, "not a valid portal URL: {error}")
NETWORK = Parsed(
    "CIDR",
    lambda text: str(ip_network(text, strict=False)),
    "{text!r} is not an address or a network: use 203.0.113.5 or 203.0.113.0/24",
)
"""The type of arguments that are an address or a network."""
NETWORKS = Parsed("CIDR", _parse_networks, "{error}: use 10.0.0.0/8 or fd00::/8")
INTERFACES = Parsed("INTERFACE", _parse_interfaces)
HOSTNAMES = Parsed("NAME", _parse_hostnames)
SECONDS = Parsed("SECONDS", parse_timeout)
DURATION = Parsed("DURATION", parse_timeout)
LIFETIME = Parsed("DURATION", _parse_lifetime)
CPU = Parsed("auto|off|N", _parse_cpu)
INTERVAL = Parsed("SECONDS|off", _parse_interval)
LOG_FILTER = Parsed("DIRECTIVES", LogFilter.parse, "invalid log filter: {error}")


def token_path(text: str) -> Path | None:
    """Return the path in FIREZONE_TOKEN, or None if FIREZONE_TOKEN is the token itself."""
    stripped = text.strip()
    is_path = stripped.startswith(("/", "./", "../"))
    # A token may be too long for a file name.
    with contextlib.suppress(OSError):
        is_path = is_path or Path(stripped).is_file()
    return Path(stripped) if is_path else None


def parse_token(text: str, source: str = "FIREZONE_TOKEN") -> PortalToken:
    """Parse the portal's token.

    Raises:
        click.UsageError: the token is invalid. The message does not contain the token.
    """
    try:
        return PortalToken.parse(text)
    except ValueError as error:
        raise click.UsageError(f"{source} has no valid token: {error}; {_NEW_TOKEN}") from error


def read_token_file(path: Path) -> PortalToken:
    """Read the portal's token from a file.

    Raises:
        click.UsageError: the file can't be read, or has no valid token.
    """
    return parse_token(_read_text(path, "token", _NEW_TOKEN), str(path))


def read_secret(path: Path) -> RelaySecret:
    """Read a relay secret from a file, without surrounding white space.

    Raises:
        click.UsageError: the file can't be read, or is empty.
    """
    return RelaySecret(_read_text(path, "relay secret", NEW_SECRET))


def _read_text(path: Path, content: str, advice: str) -> str:
    """Read a short text from a file, without surrounding white space.

    Raises:
        click.UsageError: the file can't be read, is empty or is too long. The message does not contain the text.
    """
    try:
        if not path.is_file() and path.exists():
            raise click.UsageError(f"can't read the {content} from {path}: not a regular file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_TEXT + 1).strip()
    except OSError as error:
        # Without a name that may be the text itself.
        shown = path if "/" in str(path) else "the given file"
        raise click.UsageError(f"can't read the {content} from {shown}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the {content} in {path} is not UTF-8 text: {advice}") from error
    if len(text) > _LONGEST_TEXT:
        raise click.UsageError(f"the {content} in {path} is longer than {_LONGEST_TEXT} characters: {advice}")
    if not text:
        raise click.UsageError(f"{path} is empty: {advice}")
    return text
