"""Run the tests of offload on Debian's kernels, in virtual machines: `make test-kernels`.

Kernels come from Debian's packages. A machine has this machine's files, read-only, below a layer in memory. Network cards of
the machine are connected in pairs, of which one belongs to the relay and one to its clients and peers: see `nics.py`.
"""

import argparse
import contextlib
import lzma
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

ROOT: Final = Path(__file__).parents[2]
GUEST: Final = Path(__file__).with_name("guest.sh")
STORE: Final = Path("/var/tmp/relay-kernels")  # noqa: S108 - downloads of some 1.6 GB, kept for the next run
NEEDED: Final = {"unshare": "util-linux", "ip": "iproute2", "busybox": "busybox-static", "depmod": "kmod"}
SECONDS: Final = 540
"""For one kernel."""

FIRST_MODULES: Final = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""Modules that the machine needs for its files."""

USERLAND: Final = (
    *("busybox-static", "python3", "python3-hypothesis", "iproute2", "kmod", "ethtool"),
    *("dash", "coreutils", "grep", "mount", "util-linux"),
)
"""Packages for a machine of another architecture. All Python packages without compiled parts are this machine's."""


class Kernel(NamedTuple):
    """A kernel of a suite of Debian, and the emulator for its machine."""

    suite: str
    architecture: str = "amd64"

    @property
    def emulator(self) -> str:
        return "qemu-system-x86_64" if self.architecture == "amd64" else "qemu-system-aarch64"

    @property
    def store(self) -> Path:
        return STORE / f"{self.suite}-{self.architecture}"


KERNELS: Final = (Kernel("bookworm"), Kernel("trixie"), Kernel("trixie-backports"), Kernel("bookworm", "arm64"))


class UnavailableError(Exception):
    """A kernel or an emulator that this machine can't get."""


def run(*command: str | Path, **options: object) -> str:
    """Run a command, and return its output.

    Raises:
        UnavailableError: the command failed.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise UnavailableError(f"{' '.join(map(str, command[:3]))}: {done.stderr.strip()[-200:]}")
    return str(done.stdout)


class Packages:
    """Packages of one suite and architecture, apart from this machine's packages."""

    def __init__(self, kernel: Kernel) -> None:
        self._at = kernel.store
        for each in ("lists/partial", "cache/archives/partial"):
            (self._at / each).mkdir(parents=True, exist_ok=True)
        mirrors = run("apt-get", "indextargets", "--format", "$(REPO_URI)").split()
        mirror = next(each for each in mirrors if each.rstrip("/").endswith("/debian"))
        (self._at / "sources.list").write_text(f"deb {mirror} {kernel.suite} main\n")
        (self._at / "status").touch()
        self._options = [
            f"-oDir::Etc::SourceList={self._at}/sources.list",
            *("-oDir::Etc::SourceParts=/dev/null", f"-oDir::State::Lists={self._at}/lists"),
            *(f"-oDir::State::status={self._at}/status", f"-oDir::Cache={self._at}/cache"),
            *(f"-oAPT::Architecture={kernel.architecture}", f"-oAPT::Architectures={kernel.architecture}"),
            *("-oAPT::Sandbox::User=root", "-oAcquire::Languages=none"),
        ]
        run("apt-get", *self._options, "update")

    def kernel(self, name: str) -> None:
        """Get a kernel with its modules."""
        wanted, seen = [name], set()
        while wanted:
            each = wanted.pop()
            seen.add(each)
            shown = run("apt-cache", *self._options, "show", "--no-all-versions", each)
            found = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
            wanted += set(re.findall(r"linux-(?:image|binary|modules|base)-[^\s,|]+", found[1] if found else "")) - seen
        run("apt-get", *self._options, "download", *seen, cwd=self._at / "cache/archives")

    def with_dependencies(self, *names: str) -> None:
        """Get packages and all their dependencies."""
        run("apt-get", *self._options, "install", "-y", "-d", "--no-install-recommends", *names)

    def unpack(self) -> None:
        for each in (self._at / "cache/archives").glob("*.deb"):
            run("dpkg-deb", "-x", each, self._at / "root")


def prepare(kernel: Kernel) -> Path:
    """Get a kernel, write its first files, and return its image."""
    if not list((kernel.store / "root").glob("**/vmlinuz*")):
        packages = Packages(kernel)
        if kernel.architecture != "amd64":
            packages.with_dependencies(*USERLAND)
        packages.kernel(f"linux-image-{kernel.architecture}")
        packages.unpack()
    (image,) = (kernel.store / "root").glob("**/vmlinuz*")
    above = kernel.store / "root/usr" if (kernel.store / "root/usr/lib/modules").exists() else kernel.store / "root"
    (modules,) = (above / "lib/modules").iterdir()
    run("depmod", "-b", above, modules.name)
    files = kernel.store / "initramfs"
    shutil.rmtree(files, ignore_errors=True)
    for each in ("bin", "m", "proc", "sys", "dev", "lower", "rw", "new"):
        (files / each).mkdir(parents=True)
    own = shutil.which("busybox") or ""
    shutil.copy(own if kernel.architecture == "amd64" else kernel.store / "root/bin/busybox", files / "bin/busybox")
    for number, module in enumerate(in_order(modules)):
        data = module.read_bytes()
        data = lzma.decompress(data) if module.suffix == ".xz" else data
        (files / "m" / f"{number:02}.ko").write_bytes(data)
    (files / "init").write_text(INIT)
    (files / "init").chmod(0o755)
    listed = subprocess.run(("busybox", "find", "."), cwd=files, capture_output=True, check=True).stdout
    with (kernel.store / "initramfs.cpio").open("wb") as out:
        subprocess.run(("busybox", "cpio", "-o", "-H", "newc"), cwd=files, input=listed, stdout=out, check=True, stderr=-3)
    return image


INIT: Final = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for each in /m/*.ko; do insmod $each; done
set -e
options=trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro
mount -t 9p -o $options root /lower
mount -t tmpfs -o size=70% rw /rw; mkdir /rw/up /rw/work
mount -t overlay -o lowerdir=/lower,upperdir=/rw/up,workdir=/rw/work root /new
mkdir -p /new/lib/modules /new/proc /new/sys /new/dev /new/tmp /new/run /new/root /new$host
mount -t 9p -o $options modules /new/lib/modules
[ -z "$host" ] || { mkdir -p $host; mount -t 9p -o $options host /new$host; }
for each in proc sys dev; do mount --move /$each /new/$each; done
# The kernel passes its unknown parameters as variables.
exec switch_root /new /bin/sh $guest
"""


def in_order(modules: Path) -> Iterator[Path]:
    """Return the first modules and their dependencies, in the order of loading."""
    lines = (line.partition(":") for line in (modules / "modules.dep").read_text().splitlines())
    needs = {name: needed.split() for name, _, needed in lines}
    by_name = {Path(name).name.partition(".")[0].replace("-", "_"): name for name in needs}
    found: dict[str, None] = {}
    for each in FIRST_MODULES:
        # Built into the kernel otherwise.
        if each in by_name:
            found.update(dict.fromkeys([*reversed(needs[by_name[each]]), by_name[each]]))
    return (modules / each for each in found)


def cards(model: str, number: int, count: int = 1) -> list[str]:
    """Return the options of cards of a model for the relay, and of a card for its clients and peers, on the same wire.

    The address of a card has the number of the wire, and the number of the card: 0 for clients and peers.
    """
    options = []
    for place, each in enumerate(("virtio-net-pci", *[model] * count)):
        name = f"n{number}_{place}"
        options += ["-netdev", f"hubport,id={name},hubid={number}"]
        options += ["-device", f"{each},romfile=,netdev={name},mac=52:54:00:00:{number:02x}:{place:02x}"]
    return options


def shared(tag: str, at: Path) -> tuple[str, str]:
    """Return the option for a directory of this machine, which the machine sees read-only."""
    return "-virtfs", f"local,path={at},mount_tag={tag},security_model=none,readonly=on,multidevs=remap"


def fastest(kernel: Kernel, image: Path) -> tuple[str, ...]:
    """Return the options for the processor: KVM if a kernel starts with it and ends, for want of files, else emulation."""
    board = ("-machine", "virt" if kernel.architecture == "arm64" else "q35")
    quick = (*board, "-enable-kvm", "-cpu", "host")
    probe = (kernel.emulator, *quick, *("-m", "1024", "-nographic", "-nodefaults", "-no-reboot", "-append", "panic=-1"))
    files = ("-kernel", str(image), "-initrd", str(kernel.store / "initramfs.cpio"))
    with contextlib.suppress(subprocess.TimeoutExpired):
        if not subprocess.run((*probe, *files), capture_output=True, timeout=20, check=False).returncode:
            return quick
    return (*board, "-cpu", "max" if kernel.architecture == "amd64" else "cortex-a72")


def machine(kernel: Kernel, steps: str) -> tuple[list[str], list[str]]:
    """Return the emulator's options for the kernel's machine, and the models of cards that it lacks."""
    image = prepare(kernel)
    processor = fastest(kernel, image)
    devices = run(kernel.emulator, "-machine", "virt" if kernel.architecture == "arm64" else "q35", "-device", "help")
    models = ("virtio-net-pci", "vmxnet3", "igb", "e1000e")
    missing = [each for each in models if f'name "{each}"' not in devices]
    host = "" if kernel.architecture == "amd64" else "/host"
    (modules,) = (kernel.store / "root").glob("**/lib/modules")
    console = "ttyS0" if kernel.architecture == "amd64" else "ttyAMA0"
    python = f"{ROOT}/.venv/bin/python" if not host else "/usr/bin/python3"
    (site,) = (ROOT / ".venv/lib").resolve().glob("*/site-packages")
    parameters = f"console={console} quiet panic=-1 guest={host}{GUEST} project={host}{ROOT} python={python}{steps}"
    parameters += f" host={host} site=/usr/lib/python3/dist-packages:{host}{site}" if host else ""
    options = [
        *processor,
        *("-m", "2048", "-smp", "2", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"),
        *("-kernel", str(image), "-initrd", str(kernel.store / "initramfs.cpio"), "-append", parameters),
        *shared("root", kernel.store / "root" if host else Path("/")),
        *(shared("host", Path("/")) if host else ()),
        *shared("modules", modules),
    ]
    for number, model in enumerate(models, 1):
        options += [] if model in missing else cards(model, number)
    options += cards("virtio-net-pci", 8, 2)
    # A tap, unlike a hub, offers TSO: here to a card without mergeable buffers.
    options += ["-netdev", "tap,id=tap,ifname=tap0,script=no,downscript=no", "-netdev", "tap,id=far,ifname=tap1,script=no"]
    options += ["-device", "virtio-net-pci,romfile=,netdev=tap,mrg_rxbuf=off,mac=52:54:00:00:09:01"]
    options += ["-device", "virtio-net-pci,romfile=,netdev=far,mac=52:54:00:00:09:00"]
    return options, missing


NETWORK: Final = """
ip link add br0 type bridge && ip link set br0 up
for each in tap0 tap1; do ip tuntap add $each mode tap vnet_hdr && ip link set $each master br0 up; done
exec "$@"
"""


def tried(kernel: Kernel, steps: str) -> tuple[str, list[str]]:
    """Run the tests on a kernel, and return a row of the table, and the lines about failures."""
    began = time.monotonic()
    options, missing = machine(kernel, steps)
    command = ("unshare", "-n", "sh", "-c", NETWORK, "sh", kernel.emulator, *options)
    log = kernel.store / "log"
    with log.open("wb") as out:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=SECONDS, check=False)
    said = log.read_text(errors="replace")
    release = re.search(r"^KERNEL (\S+)", said, re.MULTILINE)
    results = dict(re.findall(r"^RESULT (\w+) (.*?)\r?$", said, re.MULTILINE))
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", said, re.MULTILINE) + [f"no card {each}" for each in missing]
    cells = [
        release[1] if release else kernel.suite,
        kernel.architecture,
        *(results.get(each, "no result") for each in STEPS),
    ]
    return f"| {' | '.join(cells)} | {time.monotonic() - began:.0f} s |", failures


STEPS: Final = ("vectors", "cards")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="suites or architectures that contain NAME")
    parser.add_argument("--steps", metavar="NAMES", help=f"some of {','.join(STEPS)}")
    chosen = parser.parse_args()
    for tool, package in NEEDED.items():
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is NOT INSTALLED (apt-get install {package})")
    for kernel in KERNELS:
        if chosen.only and chosen.only not in f"{kernel.suite}-{kernel.architecture}":
            continue
        try:
            row, notes = tried(kernel, f" steps={chosen.steps}" if chosen.steps else "")
            click.echo(row)
        except (UnavailableError, subprocess.TimeoutExpired, OSError) as error:
            notes = [f"{kernel.suite} {kernel.architecture}: NOT TRIED: {error}"]
        for each in notes:
            click.echo(f"  {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
