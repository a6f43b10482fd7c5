"""The types of command line options: text to values, with one line that says what is wrong."""

import re
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

import click

from relay.config import ANY_CPU, Endpoint
from relay.core.credentials import RelaySecret
from relay.core.peers import Network
from relay.core.portal.endpoint import PortalToken, PortalUrl
from relay.ops.logs.filter import LogFilter

_LONGEST_TEXT = 4096
_LONGEST_INTERFACE = 15
_HOSTNAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 0.0001, 10.0


class IpAddressType(click.ParamType[IPv4Address | IPv6Address]):
    """An address of one family."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = f"IPV{version}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> IPv4Address | IPv6Address:  # noqa: ANN401
        """Read an address."""
        try:
            address = ip_address(str(value).strip())
        except ValueError:
            self.fail(f"{str(value)!r} is no IP address", param, ctx)
        if address.version != self.version:
            self.fail(f"{address} is an IPv{address.version} address: give an IPv{self.version} address", param, ctx)
        return address


class EndpointType(click.ParamType[Endpoint]):
    """An address and a port to listen on."""

    name = "HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Endpoint:  # noqa: ANN401
        """Read ``192.0.2.1:80`` or ``[2001:db8::1]:80``."""
        if isinstance(value, Endpoint):
            return value
        host, _, port = str(value).strip().rpartition(":")
        try:
            address = IPv6Address(host[1:-1]) if host.startswith("[") and host.endswith("]") else IPv4Address(host)
            port_number = int(port) if port.isdecimal() and port.isascii() else -1
        except ValueError:
            port_number = -1
        if not 0 <= port_number < 1 << 16:
            self.fail(f"{str(value)!r} is no address with a port: write 127.0.0.1:8080 or [::1]:8080", param, ctx)
        return Endpoint(str(address), port_number)


class CollectorType(click.ParamType[str]):
    """Where an OpenTelemetry collector is."""

    name = "[http[s]://]HOST:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:  # noqa: ANN401
        """Read ``collector.example:4317``, which is without TLS, or a URL, and give it as one."""
        match = re.fullmatch(r"(?:(https?)://)?((?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5}))/?", str(value).strip())
        if match is None or not 0 < int(match[3]) < 1 << 16:
            # It is not repeated: what makes it wrong may be a password in it.
            self.fail("no address of a collector: write 127.0.0.1:4317 or https://collector.example:4317", param, ctx)
        return f"{match[1] or 'http'}://{match[2]}"


class NetworksType(click.ParamType[tuple[Network, ...]]):
    """Networks in CIDR notation, with commas between them."""

    name = "CIDR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Network, ...]:  # noqa: ANN401
        """Read ``10.0.0.0/8,fd00::/8``; a single address is a network of one."""
        if isinstance(value, tuple):
            return value
        networks: list[Network] = []
        for text in filter(None, (part.strip() for part in str(value).split(","))):
            try:
                networks.append(ip_network(text))
            except ValueError as error:
                self.fail(f"{text!r} is no network: write 10.0.0.0/8 or fd00::/8 ({error})", param, ctx)
        return tuple(networks)


class InterfacesType(click.ParamType[tuple[str, ...]]):
    """Names of network interfaces, with commas between them."""

    name = "INTERFACE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:  # noqa: ANN401
        """Read ``eth0,eth1``; nothing is none."""
        if isinstance(value, tuple):
            return value
        names = tuple(filter(None, (part.strip() for part in str(value).split(","))))
        for name in names:
            if len(name) > _LONGEST_INTERFACE or "/" in name or not name.isprintable():
                self.fail(f"{name!r} is no name of an interface: write eth0, or eth0,eth1", param, ctx)
        return names


class HostnamesType(click.ParamType[tuple[str, ...]]):
    """Names of hosts, with commas between them."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:  # noqa: ANN401
        """Read ``relay-1.example,relay-1``; nothing is none."""
        if isinstance(value, tuple):
            return value
        names = tuple(filter(None, (part.strip() for part in str(value).split(","))))
        for name in names:
            if _HOSTNAME.fullmatch(name) is None:
                self.fail(f"{name!r} is no name of a host: write relay-1.example, without scheme or port", param, ctx)
        return names


class DurationType(click.ParamType[int]):
    """A time in seconds, or with a unit.

    Args:
        name: how it is called in the help.
        least: seconds that it has to be, at least.
    """

    def __init__(self, name: str = "DURATION", least: int = 1) -> None:
        self.name = name
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ANN401
        """Read ``90``, ``90s``, ``15m``, ``12h``, ``1d`` or ``2w`` as seconds."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", str(value).strip())
        if match is None or int(match[1]) < self._least:
            self.fail(f"{str(value)!r} is no duration: write 90s, 15m, 12h, 1d or 2w", param, ctx)
        return int(match[1]) * _UNITS[match[2] or "s"]


class CpuType(click.ParamType[int | None]):
    """The CPU for all threads."""

    name = "auto|off|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:  # noqa: ANN401
        """Read ``auto`` as any CPU, ``off`` as none, and ``2`` as that one."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        if text == "off":
            return None
        if text == "auto":
            return ANY_CPU
        # No machine has more digits, and what takes any number would take gigabytes to look for a large one.
        if re.fullmatch("[0-9]{1,5}", text) is None:
            self.fail(f"{str(value)!r} is no CPU: write auto, off, or the number of one", param, ctx)
        return int(text)


class IntervalType(click.ParamType[float]):
    """How long a thread may keep the interpreter, in seconds."""

    name = "SECONDS|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Read ``0.5``; ``off`` is what the interpreter has without being told."""
        if isinstance(value, float):
            return value
        text = str(value).strip().lower()
        if text == "off":
            return sys.getswitchinterval()
        match = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text)
        if match is None or not _SHORTEST_INTERVAL <= float(text) <= _LONGEST_INTERVAL:
            bounds = f"{_SHORTEST_INTERVAL} to {_LONGEST_INTERVAL:g}"
            self.fail(f"{str(value)!r} is no such interval: write seconds, {bounds}, or off", param, ctx)
        return float(text)


class LogFilterType(click.ParamType[LogFilter]):
    """What is logged."""

    name = "DIRECTIVES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> LogFilter:  # noqa: ANN401
        """Read ``info,relay.core=debug``."""
        if isinstance(value, LogFilter):
            return value
        try:
            return LogFilter.parse(str(value))
        except ValueError as error:
            self.fail(f"no filter for the log: {error}", param, ctx)


class PortalUrlType(click.ParamType[PortalUrl]):
    """Where the portal is."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PortalUrl:  # noqa: ANN401
        """Read ``wss://api.example.com``."""
        if isinstance(value, PortalUrl):
            return value
        try:
            return PortalUrl.parse(str(value))
        except ValueError as error:
            # The URL is not repeated: what makes it wrong may be a password in it.
            self.fail(f"no URL of a portal: {error}", param, ctx)


def read_token(text: str) -> PortalToken:
    """Read the portal's token from what FIREZONE_TOKEN has: the token, or the path of a file with it.

    Raises:
        click.UsageError: it is none, or the file can't be read. The message shows no token.
    """
    stripped = text.strip()
    if stripped.startswith(("/", "./", "../")) or ("\0" not in stripped and _is_file(stripped)):
        return read_token_file(Path(stripped))
    try:
        return PortalToken.parse(stripped)
    except ValueError as error:
        raise click.UsageError(f"FIREZONE_TOKEN is no token: {error}; copy it from the portal again") from error


def read_token_file(path: Path) -> PortalToken:
    """Read the portal's token from a file.

    Raises:
        click.UsageError: the file can't be read, or there is no token in it.
    """
    text = _read_text(path, "token", "copy it from the portal again")
    try:
        return PortalToken.parse(text)
    except ValueError as error:
        raise click.UsageError(f"{path} holds no token: {error}; copy it from the portal again") from error


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:
        # Longer than a name may be, for instance.
        return False


def read_secret(path: Path) -> RelaySecret:
    """Read a relay secret from a file, white space around it left out.

    Raises:
        click.UsageError: the file can't be read, or there is no text in it.
    """
    return RelaySecret(_read_text(path, "relay secret", "openssl rand -hex 32 makes one"))


def _read_text(path: Path, what: str, advice: str) -> str:
    """Read a short text from a file, white space around it left out.

    Raises:
        click.UsageError: the file can't be read, or there is no such text in it. The message does not show it.
    """
    try:
        if not path.is_file() and path.exists():
            raise click.UsageError(f"can't read the {what} from {path}: it is no regular file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST_TEXT + 1).strip()
    except OSError as error:
        raise click.UsageError(f"can't read the {what} from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the {what} in {path} is no text ({advice})") from error
    if len(text) > _LONGEST_TEXT:
        raise click.UsageError(f"{path} is no {what}: it is longer than {_LONGEST_TEXT} characters")
    if not text:
        raise click.UsageError(f"{path} is empty: put the {what} into it ({advice})")
    return text
