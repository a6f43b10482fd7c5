"""A simulated machine: a network namespace of the kernel."""

import contextlib
import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay.core.addresses import Family
from tests.support.waiting import wait_until

CLONE_NEWNET = 0x40000000
SIOCETHTOOL, ETHTOOL_SGRO = 0x8946, 0x2C

FLUSH_NANOSECONDS = 100_000
"""Nanoseconds a link delays received packets for GRO."""

_libc = ctypes.CDLL(None, use_errno=True)


def put_first(process: int, *, first: bool = True) -> None:
    """Set real-time priority for the threads of a process, if permitted.

    A preempted relay drops packets, so a test without tolerance for loss needs priority for the relay.

    Args:
        process: the process id.
        first: False to restore normal priority.
    """
    policy, priority = (os.SCHED_RR, 1) if first else (os.SCHED_OTHER, 0)
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))


def wait_until_up(*machines: "Machine") -> None:
    """Wait until all links of the machines work."""
    for each in machines:
        wait_until(each.is_up)


@contextlib.contextmanager
def new_machines(count: int, otherwise: str = "no network namespaces here") -> Iterator[list["Machine"]]:
    """Make machines, or skip the test: this process has no permission."""
    with contextlib.ExitStack() as stack:
        try:
            made = [stack.enter_context(contextlib.closing(Machine())) for _ in range(count)]
        except OSError as error:
            pytest.skip(f"{otherwise}: {error.strerror} (run as root)")
        yield made


class Machine:
    """A network namespace. Sockets and processes created inside stay inside."""

    def __init__(self) -> None:
        """Create the namespace.

        Raises:
            OSError: this process has no permission.
        """
        # A temporary thread enters the new namespace and ends, so that no thread has to return.
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
        """Move this thread into the namespace temporarily."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert _libc.setns(self.descriptor, CLONE_NEWNET) == 0
            yield
        finally:
            assert _libc.setns(home, CLONE_NEWNET) == 0
            os.close(home)

    def run(self, *command: str, text: str = "") -> None:
        """Run a command in the namespace."""
        with self.entered():
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}{text}"

    def configure(self, **addresses: dict[Family, str]) -> None:
        """Set addresses of links, and enable GRO."""
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
        # /sys shows the network namespace of its mount.
        self.run("unshare", "--mount", "sh", "-ec", f"mount -t sysfs none /sys; {knobs}")

    def is_up(self) -> bool:
        """Check whether each enabled link with a carrier works.

        The kernel collects changes of carriers for up to a second. Until then a link knows no multicast group, so it
        ignores the first request for its IPv6 address, and the next request comes a second later.
        """
        with self.entered():
            links = json.loads(subprocess.run(("ip", "-json", "link"), capture_output=True, timeout=60, check=True).stdout)
        return not any("LOWER_UP" in each["flags"] and each["operstate"] in ("DOWN", "LOWERLAYERDOWN") for each in links)

    def set_mtu(self, link: str, size: int) -> None:
        self.run("ip", "link", "set", link, "mtu", str(size))

    def close(self) -> None:
        """Release the namespace; the kernel deletes an unused namespace."""
        os.close(self.descriptor)


def _length(host: str) -> int:
    return 64 if ":" in host else 24
