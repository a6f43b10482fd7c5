"""The interfaces with the XDP program: attaching, detaching, and errors."""

import array
import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final, NamedTuple

from relay.config import AttachMode, OffloadConfig, UsageError
from relay.offload.bpf import XdpLink, XdpMode
from relay.offload.layout import DEVICES
from relay.offload.network import Link
from relay.offload.program import Device, XdpProgram

_SIOCETHTOOL: Final = 0x8946
_GET_DRIVER: Final = 3
_DRIVER: Final = struct.Struct("=I32s160x")
_GET_FLAGS: Final = 0x25
_FLAGS: Final = struct.Struct("=II")
_STRIPS_TAGS: Final = 1 << 8
"""ETH_FLAG_RXVLAN of linux/ethtool.h."""

_VETH: Final = "veth"
_VIRTIO: Final = "virtio_net"
_VIRTIO_MTU: Final = 4064
_VIRTIO_DETACHES: Final = (6, 3)
"""With a larger MTU, virtio_net of older kernels can't even detach a program: the kernel warns, and the program stays."""

_SETTINGS: Final = Path("/proc/sys/net/ipv4/conf")

NATIVE_DRIVERS: Final = frozenset(
    # As a string, since a tuple would have a line for each driver.
    (  # noqa: SIM905
        "atlantic bnxt_en ena fsl_dpaa2_eth fsl_enetc gve hv_netvsc i40e iavf ice igb igc ixgbe ixgbevf mana mlx4_en "
        "mlx5_core mvneta mvpp2 nfp qede rvu-nicpf sfc st_gmac st_xgmac tsnep virtio_net vmxnet3"
    ).split()
)
"""Names of drivers with native XDP support, as of `ethtool -i`. veth is not among them: its far end receives nothing unless
it polls (NAPI), and the near end can't detect this."""

_ONLY_BACK: Final = frozenset(("ixgbevf", "mlx4_en", "nfp"))
"""Drivers that can send from the receiving interface, but lose redirected packets."""


_SYS: Final = Path("/sys/class/net")
_MERGEABLE_BUFFERS: Final = 15
_LARGE_PACKETS: Final = (7, 8, 9, 10, 54, 55)
"""Features of virtio_net (virtio specification §5.1.3): the host delivers TCP or UDP packets larger than the MTU."""


def driver_of(name: str) -> str:
    """Return the name of an interface's driver, or an empty string if unknown."""
    return _ethtool(name, _DRIVER.pack(_GET_DRIVER, b""))[4:36].split(b"\0")[0].decode(errors="replace")


def _strips_tags(name: str) -> bool:
    """Return whether an interface removes the VLAN tags of received packets."""
    return bool(int.from_bytes(_ethtool(name, _FLAGS.pack(_GET_FLAGS, 0))[4:8], "little") & _STRIPS_TAGS)


def _ethtool(name: str, command: bytes) -> bytes:
    """Return the result of a command, or the command itself after an error."""
    answer = array.array("B", command)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sP", name.encode(), answer.buffer_info()[0]))
    return bytes(answer)


def _receives_large_packets(name: str) -> bool:
    """Return whether virtio_net receives large packets in single buffers, without the program."""
    try:
        features = (_SYS / name / "device/features").read_text()
    except OSError:
        # Without /sys. The watch still detects an idle program.
        return False
    return features[_MERGEABLE_BUFFERS:].startswith("0") and any(features[each:].startswith("1") for each in _LARGE_PACKETS)


def _is_strict(name: str) -> bool:
    """Check whether the kernel accepts IPv4 packets of an interface only if the route to their source is by the interface.

    The larger of two settings applies, and 2 is not as strict as 1 (ip-sysctl).
    """
    try:
        return max((_SETTINGS / each / "rp_filter").read_text() for each in ("all", name)).strip() == "1"
    except OSError:
        # The interface is gone, or a sandbox hides the setting.
        return True


def _kernel() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))


class _Attached(NamedTuple):
    ifindex: int
    mac: bytes
    mtu: int
    mode: XdpMode
    driver: str
    link: XdpLink

    def __str__(self) -> str:
        return f"{self.spelling} mode, driver {self.driver}"

    @property
    def spelling(self) -> str:
        return self.mode.name.lower()


class InheritedLink(NamedTuple):
    """An interface with the program of another process."""

    name: str
    ifindex: int
    mac: bytes
    mtu: int
    mode: XdpMode
    descriptor: int


class Devices:
    """The configured interfaces, and the interfaces with the program. One thread at a time may change them."""

    def __init__(
        self,
        program: XdpProgram,
        config: OffloadConfig,
        *,
        native_drivers: AbstractSet[str] = NATIVE_DRIVERS,
        driver_of: Callable[[str], str] = driver_of,
    ) -> None:
        self.names = config.interfaces
        self._program = program
        self._mode = config.mode
        self._native_drivers = native_drivers
        self._driver_of = driver_of
        self._attached: dict[str, _Attached] = {}
        self._blind: dict[str, str] = {}
        self._ports: dict[int, list[int]] = {}
        self._strict: frozenset[int] = frozenset()
        self.failures: dict[str, str] = {}
        """Reasons why existing interfaces do not have the program, or the program does not run."""
        self.stalls = 0
        """Times that the program did not run on an interface."""
        self.is_successor = False
        """Whether the interfaces have the program of a predecessor. Other interfaces wait."""
        self._unfit: dict[tuple[int, XdpMode], str] = {}
        """Reasons against modes of interfaces."""

    @property
    def modes(self) -> dict[str, str | None]:
        """The mode of each interface: `driver`, `generic`, or None."""
        # Copied, because another thread may attach meanwhile.
        attached = self._attached.copy()
        return {name: attached[name].spelling if name in attached else None for name in self.names}

    def by_ifindex(self) -> dict[int, XdpMode]:
        """Return the interfaces with the program."""
        return {each.ifindex: each.mode for each in self._attached.values()}

    def packed(self) -> list[Device]:
        """Return the devices whose packets the program may relay.

        A driver of a bond, or of an interface with a faster interface below (hv_netvsc), runs the program for their ports,
        with the MAC address of the named interface in their packets.

        In generic mode, interfaces with VLANs are excluded: the kernel keeps the tag outside the packet, so the program
        can't see the tag, and a relayed packet would leave with the tag.
        """
        return [
            Device(
                ifindex,
                each.mac,
                each.mode is XdpMode.DRIVER and each.driver != _VETH,
                strict=each.ifindex in self._strict,
                upper=each.ifindex,
                name=name,
            )
            for name, each in self._attached.items()
            if each.mode is XdpMode.DRIVER or name not in self._blind
            for ifindex in (each.ifindex, *self._ports.get(each.ifindex, ()))
        ]

    def attach(self, links: Sequence[Link]) -> list[str]:
        """Attach the program to new interfaces, and drop the interfaces that have disappeared.

        Returns:
            Changes to log. `failures` contains the errors.
        """
        by_name = {each.name: each for each in links}
        self._ports = {}
        for each in links:
            self._ports.setdefault(each.master, []).append(each.ifindex)
        notes = self._let_go(by_name)
        before = {name: each.mode for name, each in self._attached.items()}
        for name in self.names:
            link = by_name.get(name)
            if link is not None and name not in self._attached and not self.is_successor:
                notes += self._take(link, self._modes(self._driver_of(name)))
        if len({each.mode for each in self._attached.values()}) > 1:
            # A driver loses redirected packets if it has no program of its own.
            for name, attached in list(self._attached.items()):
                if attached.mode is XdpMode.DRIVER:
                    self._release(name)
                    notes += self._take(by_name[name], (XdpMode.GENERIC,))
        # Packets of a VLAN arrive by its parent.
        ours = self.by_ifindex()
        self._strict = frozenset(
            index for each in links for index in (each.ifindex, each.parent) if index in ours and _is_strict(each.name)
        )
        return notes + self._changes(before) + self._see_vlans(links)

    def links(self) -> list[InheritedLink]:
        """Return the interfaces with the program, for a successor. The descriptors are new."""
        return [
            InheritedLink(name, each.ifindex, each.mac, each.mtu, each.mode, os.dup(each.link.fd))
            for name, each in self._attached.items()
        ]

    def inherit(self, links: Iterable[InheritedLink]) -> None:
        """Prepare to replace the program of a predecessor. Links that do not fit the settings are closed."""
        self.is_successor = True
        for each in links:
            link, driver = XdpLink(each.descriptor), self._driver_of(each.name)
            if each.name in self.names and each.mode in self._modes(driver):
                self._attached[each.name] = _Attached(each.ifindex, each.mac, each.mtu, each.mode, driver, link)
            else:
                link.close()

    def replace(self) -> list[str]:
        """Replace the program of the predecessor on its interfaces, each between two packets. Return changes to log."""
        self.is_successor = False
        notes = []
        for name, each in list(self._attached.items()):
            try:
                self._program.replace(each.link)
            except OSError as error:
                self._release(name)
                notes.append(f"{name} does not take the new program ({error.strerror}): the sockets relay its packets")
            else:
                notes.append(f"{name} goes on relaying in the kernel ({each})")
        return notes

    def detach(self) -> None:
        """Detach the program from all interfaces."""
        for each in self._attached.values():
            each.link.close()
        self._attached.clear()
        self._unfit.clear()

    def stalled(self, name: str) -> str:
        """Note that no packet of an interface reaches the program, and return the reason to log.

        In `auto`, the program is detached from the interface. The next call of `attach` tries the next mode.
        """
        attached = self._attached[name]
        reason = f"no packet of {name} reaches the XDP program ({attached})"
        self.stalls += 1
        if self._mode is AttachMode.AUTO:
            self._unfit[attached.ifindex, attached.mode] = reason
            self._release(name)
        else:
            self.failures[name] = f"{reason}: give --ebpf-attach-mode auto"
        return reason

    def _release(self, name: str) -> None:
        self._attached.pop(name).link.close()

    def _let_go(self, by_name: Mapping[str, Link]) -> list[str]:
        notes = []
        for name, attached in list(self._attached.items()):
            link = by_name.get(name)
            if link is None or link.ifindex != attached.ifindex:
                self._release(name)
                notes.append(f"{name} is gone: the sockets relay its packets")
            elif link.mtu > attached.mtu and attached.mode is XdpMode.DRIVER:
                notes.append(self._adopt_mtu(link, attached))
            elif link.mac != attached.mac:
                self._attached[name] = attached._replace(mac=link.mac)
        return notes

    def _adopt_mtu(self, link: Link, attached: _Attached) -> str:
        """Detach the program, so that it is attached again: some drivers check the MTU only then, and drop longer frames."""
        note = f"{link.name} has an MTU of {link.mtu} now"
        if attached.driver == _VIRTIO and link.mtu > _VIRTIO_MTU and _kernel() < _VIRTIO_DETACHES:
            self._attached[link.name] = attached._replace(mtu=link.mtu)
            note = f"{note}, and this kernel can't detach the program: longer packets than {_VIRTIO_MTU} bytes are lost"
            self.failures[link.name] = note
            return note
        self._release(link.name)
        return f"{note}: the program is attached again"

    def _modes(self, driver: str) -> tuple[XdpMode, ...]:
        """Return the modes to try, in this order."""
        if self._mode is not AttachMode.AUTO:
            return (XdpMode.DRIVER if self._mode is AttachMode.DRIVER else XdpMode.GENERIC,)
        known = driver in self._native_drivers and (len(self.names) == 1 or driver not in _ONLY_BACK)
        return (XdpMode.DRIVER, XdpMode.GENERIC) if known else (XdpMode.GENERIC,)

    def _take(self, link: Link, modes: tuple[XdpMode, ...]) -> list[str]:
        """Attach the program to an interface. Return the reason of a failure, unless it was returned before."""
        driver = self._driver_of(link.name)
        for mode in modes:
            reason = self._unfit.get((link.ifindex, mode)) or _why_never(link, driver, mode)
            if reason:
                continue
            try:
                at = self._program.attach(link.ifindex, mode)
            except OSError as error:
                # A driver with XDP support may reject the program, for example because of the MTU or too few queues.
                reason = _why_not(link, driver, error, self._mode)
            else:
                self._attached[link.name] = _Attached(link.ifindex, link.mac, link.mtu, mode, driver, at)
                self.failures.pop(link.name, None)
                return []
        known = self.failures.get(link.name) == reason
        self.failures[link.name] = reason
        return [] if known else [reason]

    def _changes(self, before: Mapping[str, XdpMode]) -> list[str]:
        return [
            f"{name} relays in the kernel ({each})"
            for name, each in self._attached.items()
            if before.get(name) is not each.mode
        ]

    def _see_vlans(self, links: Iterable[Link]) -> list[str]:
        """Find the interfaces with VLANs and without their tags. Return the change."""
        parents = {each.parent for each in links if each.vlan}
        before, blind = self._blind, {}
        for name, attached in self._attached.items():
            if attached.ifindex not in parents:
                continue
            if attached.mode is XdpMode.GENERIC:
                blind[name] = "which generic mode doesn't show: the sockets relay its packets"
            elif any(_strips_tags(each.name) for each in links if attached.ifindex in (each.ifindex, each.master)):
                blind[name] = f"and removes their tags: the sockets relay their packets until ethtool -K {name} rxvlan off"
        self._blind = blind
        return [f"{name} has VLANs on it, {why}" for name, why in blind.items() if before.get(name) != why]


def check(config: OffloadConfig, links: Iterable[Link]) -> None:
    """Check that the interfaces exist and support the program.

    Raises:
        UsageError: an interface is unsuitable.
    """
    by_name = {each.name: each for each in links}
    if len(config.interfaces) > DEVICES:
        raise UsageError(f"--ebpf-offloading names {len(config.interfaces)} interfaces: {DEVICES} are the most")
    for name in config.interfaces:
        if name not in by_name:
            raise UsageError(
                f"--ebpf-offloading {name}: there is no such interface, only {', '.join(sorted(by_name))}: name one of them"
            )
        if not by_name[name].ethernet:
            raise UsageError(
                f"--ebpf-offloading {name}: that is no Ethernet interface: name one that packets from outside come by"
            )


def _why_never(link: Link, driver: str, mode: XdpMode) -> str:
    """Return the reason if a driver would accept the program and never run it, else an empty string."""
    if mode is not XdpMode.DRIVER or driver != _VIRTIO or not _receives_large_packets(link.name):
        return ""
    return f"{link.name} would never run the program (virtio_net without mergeable buffers): give --ebpf-attach-mode generic"


def _why_not(link: Link, driver: str, error: OSError, mode: AttachMode) -> str:
    if error.errno in (errno.EBUSY, errno.EEXIST):
        return f"{link.name} has another XDP program: take that away first (ip link set dev {link.name} xdp off)"
    instead = "" if mode is AttachMode.GENERIC else ": give --ebpf-attach-mode generic"
    if error.errno == errno.EOPNOTSUPP:
        return f"{link.name} can't have an XDP program, its driver ({driver or 'unknown'}) does not support it{instead}"
    reason = errno.errorcode.get(error.errno or 0, "an error")
    return f"{link.name} does not take the XDP program ({reason}; driver {driver or 'unknown'}, MTU {link.mtu}){instead}"
