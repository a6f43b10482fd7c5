"""A Debian machine with systemd as process 1, in namespaces of this kernel."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.support.machine import Machine
from tests.support.waiting import wait_until

_COMMAND_SECONDS: Final = 120

_BOOT: Final = """
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
# Settings of the network namespace are the machine's own, other settings are this kernel's.
mount -o bind,ro proc/sys proc/sys
mount --bind /proc/sys/net proc/sys/net
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
# Devices that PrivateDevices= keeps.
for device in null zero full random urandom tty; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/shm dev/pts
mount -t tmpfs tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
# Not chroot: a process in one can't make user namespaces (PrivateUsers).
pivot_root . .
umount --lazy .
# Credentials of services are mounted from another mount namespace.
mount --make-rshared /
exec env --ignore-environment container=test /sbin/init
"""


class Debian:
    """A machine.

    Args:
        root: its file system; an extracted archive of `tests/make-debian-root`.
        network: its network.

    Raises:
        OSError: this process can't make a control group.
    """

    def __init__(self, root: Path, network: Machine) -> None:
        self.root = root
        self._network = network
        self._namespaces: subprocess.Popen[bytes] | None = None
        self._group = _own_group() / f"debian-{os.getpid()}"
        self._group.mkdir()

    def boot(self) -> None:
        """Start systemd, and wait until it has started its services."""
        script = (
            'echo $$ >"$1/cgroup.procs"; '
            'exec unshare --mount --pid --uts --ipc --cgroup --fork --kill-child sh -ec "$3" sh "$2"'
        )
        with self._network.entered():
            self._namespaces = subprocess.Popen(("sh", "-ec", script, "sh", self._group, self.root, _BOOT))
        # A console is missing, which is no matter.
        wait_until(lambda: self._call("systemctl is-system-running --wait").stdout in ("running\n", "degraded\n"), 120)

    def run(self, command: str) -> str:
        """Run a shell command as root, in a chroot if the machine is not booted, and return the output."""
        done = self._call(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def fails(self, command: str) -> bool:
        """Return whether a shell command fails."""
        return self._call(command).returncode != 0

    def close(self) -> None:
        """Kill all processes of the machine, and delete its files."""
        if self._namespaces is not None:
            self._namespaces.kill()
            self._namespaces.wait()
        wait_until(lambda: "populated 0" in (self._group / "cgroup.events").read_text())
        for group, _, _ in os.walk(self._group, topdown=False):
            Path(group).rmdir()
        shutil.rmtree(self.root)

    def _call(self, command: str) -> "subprocess.CompletedProcess[str]":
        if self._namespaces is None:
            enter = ["chroot", str(self.root)]
        else:
            forked = self._namespaces.pid
            children = Path(f"/proc/{forked}/task/{forked}/children").read_text().split()
            enter = ["nsenter", "--all", "--target", children[0] if children else "0"]
        return subprocess.run(
            [*enter, "sh", "-c", command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )


def _own_group() -> Path:
    """Return the folder of this process's control group (version 2)."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    folder = next((mount[1] for mount in mounts if mount[2] == "cgroup2"), None)
    name = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), None)
    if folder is None or name is None:
        raise FileNotFoundError("no cgroup2 is mounted")
    return Path(folder) / name
