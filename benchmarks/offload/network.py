"""The network of the benchmark: three namespaces in a row, of the client, of the relay and of the peer.

They have no names and belong to no one but this process: whatever becomes of it, they are gone with it.
"""

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from benchmarks.failure import FailedError

RELAY_HOSTS: Final = tuple(f"10.83.1.{number}" for number in range(11, 17))
"""Where relays are, for clients and for peers."""
CLIENT_HOST: Final = "10.83.1.2"
_RELAY_BEFORE_CLIENTS: Final = "10.83.1.1"
PEER_HOST: Final = "10.83.2.2"
_RELAY_BEFORE_PEERS: Final = "10.83.2.1"

_NEW_NETWORK: Final = 0x40000000
_SECONDS: Final = 10
_OWN: Final = Path("/proc/thread-self/ns/net")
_libc = ctypes.CDLL(None, use_errno=True)


class Interface(NamedTuple):
    """One end of a cable."""

    name: str
    ifindex: int
    mac: bytes


class Namespace:
    """A network of its own. Close it to give it up."""

    def __init__(self) -> None:
        before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.unshare(_NEW_NETWORK), "a network namespace can't be made")
            self._fd = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _checked(_libc.setns(before, _NEW_NETWORK), "there is no way back from a network namespace")
            os.close(before)

    @property
    def path(self) -> str:
        """Where other processes find it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Give it up: it goes when nobody is in it and no socket is left."""
        os.close(self._fd)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread in it: sockets made and programs started meanwhile belong to it."""
        before = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.setns(self._fd, _NEW_NETWORK), "a network namespace can't be entered")
            yield
        finally:
            _checked(_libc.setns(before, _NEW_NETWORK), "there is no way back from a network namespace")
            os.close(before)

    def run(self, *command: str) -> str:
        """Run a command in it, and give what it says.

        Raises:
            FailedError: it failed.
        """
        with self.entered():
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise FailedError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
        return done.stdout

    def interface(self, name: str) -> Interface:
        """Describe an interface."""
        found = json.loads(self.run("ip", "-json", "link", "show", "dev", name))[0]
        return Interface(name, found["ifindex"], bytes.fromhex(found["address"].replace(":", "")))


class Network:
    """Client, relay and peer, with a cable between each two. Use it as a context.

    The relay's ends are called ``clients0`` and ``peers0``; those of client and peer ``relay0``. Each end takes packets by
    NAPI, without which XDP frames do not arrive at all.
    """

    RELAY_ENDS: Final = ("clients0", "peers0")
    FAR_END: Final = "relay0"

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.client, self.relay, self.peer = (self._namespace(stack) for _ in range(3))
            self._connect(self.client, CLIENT_HOST, self.RELAY_ENDS[0], _RELAY_BEFORE_CLIENTS)
            self._connect(self.peer, PEER_HOST, self.RELAY_ENDS[1], _RELAY_BEFORE_PEERS)
            for host in RELAY_HOSTS:
                self.relay.run("ip", "address", "add", f"{host}/24", "dev", self.RELAY_ENDS[0])
                self._know(self.client, host, self.relay, self.RELAY_ENDS[0])
            # Only for packets that go from client to peer without any relay.
            self.relay.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _namespace(self, stack: contextlib.ExitStack) -> Namespace:
        made = Namespace()
        stack.callback(made.close)
        made.run("ip", "link", "set", "lo", "up")
        return made

    def _connect(self, far: Namespace, host: str, near_name: str, near_host: str) -> None:
        ends = ((far, self.FAR_END, host), (self.relay, near_name, near_host))
        names = (self.FAR_END, near_name)
        far.run("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1], "netns", self.relay.path)
        for place, name, address in ends:
            place.run("sysctl", "-qw", f"net.ipv6.conf.{name}.disable_ipv6=1")
            place.run("ip", "address", "add", f"{address}/24", "dev", name)
            place.run("ip", "link", "set", name, "up")
        for place, name, _ in ends:
            # Turned on while it is down, frames are still refused.
            place.run("ethtool", "-K", name, "gro", "on")
        far.run("ip", "route", "add", "default", "via", near_host)
        # What a socket sends has all its checksums, as what comes over a network has.
        far.run("ethtool", "-K", names[0], "tx", "off")
        self._know(far, near_host, self.relay, near_name)
        self._know(self.relay, host, far, self.FAR_END, near_name)

    def _know(self, who: Namespace, host: str, place: Namespace, interface: str, through: str = FAR_END) -> None:
        """Have a machine know once and for all which interface has an address: nobody asks while packets are counted."""
        mac = place.interface(interface).mac.hex(":")
        who.run("ip", "neigh", "replace", host, "lladdr", mac, "dev", through, "nud", "permanent")


def _checked(result: int, what: str) -> None:
    if result:
        raise FailedError(f"{what}: {os.strerror(ctypes.get_errno())}")
