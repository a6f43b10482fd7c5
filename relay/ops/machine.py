"""Sockets and descriptors of this machine."""

import contextlib
import errno
import os
import resource
from pathlib import Path

from relay.config import Config, UsageError
from relay.core.addresses import Family
from relay.core.data import CHANNEL_DATA_FIRST_BYTES
from relay.net.endpoint import Endpoint
from relay.net.reuseport import ReuseportGroup, open_group
from relay.net.udp import UdpCounters, UdpSocket

UNSPECIFIED = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}  # noqa: S104 - a relay serves whoever reaches it

OTHER_DESCRIPTORS = 128
"""Descriptors besides allocations: standard streams, sockets for clients, HTTP addresses and connections, open files."""


def bind_hosts(config: Config) -> dict[Family, str]:
    """Return the address to bind for each family served."""
    given = {Family.IPV4: config.bind_ip4, Family.IPV6: config.bind_ip6}
    return {
        family: _bindable(family, public) if given[family] is None else str(given[family])
        for family, public in config.public_hosts.items()
    }


def _bindable(family: Family, public: str) -> str:
    """Return the public address if this machine has it, else all addresses.

    With the public address, responses leave from the address of the request. Behind the 1:1 NAT of most clouds, the machine
    does not have its public address.
    """
    try:
        UdpSocket(family, public, 0).close()
    except OSError:
        return UNSPECIFIED[family]
    return public


def open_service_sockets(family: Family, host: str, port: int, counters: UdpCounters) -> ReuseportGroup:
    """Open the sockets for clients: some for data, one for requests.

    Raises:
        UsageError: the port is in use, or the machine does not have the address.
    """
    try:
        return open_group(family, host, port, CHANNEL_DATA_FIRST_BYTES.start, counters)
    except OSError as error:
        at = Endpoint(host, port)
        if error.errno == errno.EADDRINUSE:
            by = holder("udp", port)
            raise UsageError(f"{at}/udp is in use by {by}: stop that process, since clients know no other port") from error
        if error.errno == errno.EADDRNOTAVAIL:
            message = f"this machine does not have the address {host}: give --bind-ip{'46'[family - 1]}-addr one it has"
            raise UsageError(message) from error
        if error.errno == errno.EAFNOSUPPORT:
            raise UsageError(f"this machine has no {family}: leave --public-ip{'46'[family - 1]}-addr out") from error
        raise UsageError(f"can't listen on {at}/udp: {error.strerror}") from error


def holder(kind: str, port: int) -> str:
    """Return the name of the process that uses a port of "udp" or "tcp", as far as this process may see."""
    links = set[str]()
    for path in (Path(f"/proc/net/{kind}"), Path(f"/proc/net/{kind}6")):
        with contextlib.suppress(OSError):
            # Field 1 of a line is the local address and port in hexadecimal digits, field 9 the inode.
            sockets = [line.split() for line in path.read_text(encoding="ascii").splitlines()[1:]]
            links |= {f"socket:[{fields[9]}]" for fields in sockets if int(fields[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        # Descriptors of other users' processes are invisible, and any process may end meanwhile.
        with contextlib.suppress(OSError):
            if any(str(each.readlink()) in links for each in (process / "fd").iterdir()):
                name = (process / "comm").read_text(errors="replace").strip()
                return "this relay itself" if process.name == str(os.getpid()) else f"{name} (pid {process.name})"
    return "another process"


def raise_descriptor_limit(config: Config) -> None:
    """Raise the limit on descriptors so that the maximum of allocations has sockets.

    Raises:
        UsageError: the hard limit is too low.
    """
    families = len(config.public_hosts)
    needed = config.capacity * families + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        # Only root may exceed the hard limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, hard)))
    except (ValueError, OSError) as error:
        fitting = (hard - OTHER_DESCRIPTORS) // families
        advice = f"--max-allocations {fitting} fits" if fitting > 0 else "nothing fits"
        raise UsageError(
            f"{config.capacity} allocations need {needed} descriptors and this process may have {hard}: "
            f"{advice}; or raise the limit (ulimit -Hn {needed}, or LimitNOFILE={needed} in the unit)"
        ) from error
