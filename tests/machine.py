"""A machine with a network of its own, in this one: a network namespace of the kernel."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from relay.core.addresses import Family

CLONE_NEWNET = 0x40000000
SIOCETHTOOL, ETHTOOL_SGRO = 0x8946, 0x2C

FLUSH_NANOSECONDS = 100_000
"""For which a link keeps what it has received, in the hope of more."""

_libc = ctypes.CDLL(None, use_errno=True)


class Machine:
    """A network of its own: what is made inside, sockets and processes, stays there."""

    def __init__(self) -> None:
        """Make it.

        Raises:
            OSError: this process may not.
        """
        # A thread that leaves its network and ends, so that no other has to find its way back.
        with ThreadPoolExecutor(1) as pool:
            self.descriptor = pool.submit(self._make).result()

    @staticmethod
    def _make() -> int:
        if _libc.unshare(CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread be there for a while."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert _libc.setns(self.descriptor, CLONE_NEWNET) == 0
            yield
        finally:
            assert _libc.setns(home, CLONE_NEWNET) == 0
            os.close(home)

    def run(self, *command: str, text: str = "") -> None:
        """Run a command there."""
        with self.entered():
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}{text}"

    def configure(self, **addresses: dict[Family, str]) -> None:
        """Give addresses to links, and let them coalesce what they receive."""
        lines = ["link set lo up"]
        for link, hosts in addresses.items():
            lines += [f"addr add {host}/{_length(host)} dev {link}" + " nodad" * (":" in host) for host in hosts.values()]
            lines.append(f"link set {link} up")
        self.run("ip", "-batch", "-", text="\n".join(lines))
        with self.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for link in addresses:
                value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_SGRO, 1))
                fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP16x", link.encode(), ctypes.addressof(value)))
        knobs = "".join(
            f"echo {FLUSH_NANOSECONDS} >/sys/class/net/{link}/gro_flush_timeout; "
            f"echo 1 >/sys/class/net/{link}/napi_defer_hard_irqs; "
            for link in addresses
        )
        # /sys shows the network in which it was mounted.
        self.run("unshare", "--mount", "sh", "-ec", f"mount -t sysfs none /sys; {knobs}")

    def set_mtu(self, link: str, size: int) -> None:
        self.run("ip", "link", "set", link, "mtu", str(size))

    def close(self) -> None:
        """Forget it: it is gone once nothing is there any more."""
        os.close(self.descriptor)


def _length(host: str) -> int:
    return 64 if ":" in host else 24
