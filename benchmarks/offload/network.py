"""The network of the offload suite: three namespaces in a row, for client, relay and peer.

The namespaces have no names. Only this process and its children hold them, so they disappear when the suite ends.
"""

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.measure import MeasurementError

RELAY_HOSTS: Final = tuple(f"10.83.1.{number}" for number in range(11, 17))
"""Addresses of the relays, for clients and for peers."""
CLIENT_HOST: Final = "10.83.1.2"
PEER_HOST: Final = "10.83.2.2"
_NEAR_HOSTS: Final = ("10.83.1.1", "10.83.2.1")
RELAY_ENDS: Final = ("clients0", "peers0")
"""The relay's interfaces toward client and peer."""
FAR_END: Final = "relay0"
"""The interface of client and peer."""

_CLONE_NEWNET: Final = 0x40000000
_SECONDS: Final = 10
_OWN: Final = Path("/proc/thread-self/ns/net")
_libc = ctypes.CDLL(None, use_errno=True)


class Interface(NamedTuple):
    """An end of a veth pair."""

    ifindex: int
    mac: bytes


class Namespace:
    """A network namespace, until `close`."""

    def __init__(self) -> None:
        with _restored():
            _check(_libc.unshare(_CLONE_NEWNET), "cannot create a network namespace")
            self._fd = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """Return a path for other processes."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Release the namespace; it disappears with its last process and socket."""
        os.close(self._fd)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the namespace with this thread: sockets and processes made meanwhile belong to it."""
        with _restored():
            _check(_libc.setns(self._fd, _CLONE_NEWNET), "cannot enter a network namespace")
            yield

    def run(self, *command: str) -> str:
        """Run a command in the namespace, and return its output."""
        with self.entered():
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise MeasurementError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
        return done.stdout

    def interface(self, name: str) -> Interface:
        """Return index and MAC address of an interface."""
        found = json.loads(self.run("ip", "-json", "link", "show", "dev", name))[0]
        return Interface(found["ifindex"], bytes.fromhex(found["address"].replace(":", "")))


class Network:
    """Client, relay and peer, connected by veth pairs.

    NAPI is on at each end, because XDP frames arrive only with NAPI.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self.client, self.relay, self.peer = (self._namespace(stack) for _ in range(3))
            for each in zip((self.client, self.peer), (CLIENT_HOST, PEER_HOST), RELAY_ENDS, _NEAR_HOSTS, strict=True):
                self._connect(*each)
            for host in RELAY_HOSTS:
                self.relay.run("ip", "address", "add", f"{host}/24", "dev", RELAY_ENDS[0])
                self._add_neighbour(self.client, host, self.relay, RELAY_ENDS[0], FAR_END)
            # Forwarding is for the baseline only: packets from client to peer without a relay.
            self.relay.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close all namespaces."""
        self._stack.close()

    def _namespace(self, stack: contextlib.ExitStack) -> Namespace:
        made = Namespace()
        stack.callback(made.close)
        made.run("ip", "link", "set", "lo", "up")
        return made

    def _connect(self, far: Namespace, host: str, near_end: str, near_host: str) -> None:
        ends = ((far, FAR_END, host), (self.relay, near_end, near_host))
        far.run("ip", "link", "add", FAR_END, "type", "veth", "peer", "name", near_end, "netns", self.relay.path)
        for place, name, address in ends:
            place.run("sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
            place.run("ip", "address", "add", f"{address}/24", "dev", name)
            place.run("ip", "link", "set", name, "up")
        for place, name, _ in ends:
            # GRO turns on NAPI, but only for an interface that is up.
            place.run("ethtool", "-K", name, "gro", "on")
        far.run("ip", "route", "add", "default", "via", near_host)
        # Packets of sockets get their checksums, as on a physical network.
        far.run("ethtool", "-K", FAR_END, "tx", "off")
        self._add_neighbour(far, near_host, self.relay, near_end, FAR_END)
        self._add_neighbour(self.relay, host, far, FAR_END, near_end)

    def _add_neighbour(self, where: Namespace, host: str, place: Namespace, interface: str, through: str) -> None:
        """Add a permanent neighbour entry, so that no ARP disturbs the counting."""
        mac = place.interface(interface).mac.hex(":")
        where.run("ip", "neigh", "replace", host, "lladdr", mac, "dev", through, "nud", "permanent")


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Return to the current namespace at the end."""
    before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _check(_libc.setns(before, _CLONE_NEWNET), "cannot return from a network namespace")
        os.close(before)


def _check(result: int, message: str) -> None:
    if result:
        raise MeasurementError(f"{message}: {os.strerror(ctypes.get_errno())}")
