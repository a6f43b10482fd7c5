"""The interfaces that have the XDP program: how it gets there, and what is said if it can't."""

import array
import contextlib
import errno
import fcntl
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from relay.config import AttachMode, BadUseError, OffloadConfig
from relay.offload import bpf
from relay.offload.layout import DEVICES
from relay.offload.network import Link
from relay.offload.next_hops import Mode
from relay.offload.program import Device, XdpProgram

_SIOCETHTOOL: Final = 0x8946
_GET_DRIVER: Final = 3
_DRIVER: Final = struct.Struct("=I32s160x")

_VETH: Final = "veth"

NATIVE_DRIVERS: Final = frozenset(
    (
        "atlantic",
        "bnxt_en",
        "dpaa2-eth",
        "ena",
        "fsl_enetc",
        "gve",
        "hv_netvsc",
        "i40e",
        "iavf",
        "ice",
        "igb",
        "igc",
        "ixgbe",
        "ixgbevf",
        "mana",
        "mlx4_en",
        "mlx5_core",
        "mvneta",
        "mvpp2",
        "nfp",
        "octeontx2-nicpf",
        "qede",
        "sfc",
        "stmmaceth",
        "tsnep",
        "virtio_net",
        "vmxnet3",
    )
)
"""Drivers that run XDP programs themselves, by the names they give. Not veth, which does too: its other end gets nothing
unless it polls for it (NAPI), and nobody here can tell whether it does."""

_ONLY_BACK: Final = frozenset(("ixgbevf", "mlx4_en", "nfp"))
"""Those of them that send where they received, but lose what is for another interface, or from one."""


@dataclass(frozen=True, slots=True)
class _Attached:
    ifindex: int
    mac: bytes
    mode: Mode
    driver: str
    link: bpf.Link


class Devices:
    """The interfaces that are wanted by name, and those that have the program. One thread at a time may change it."""

    def __init__(self, program: XdpProgram, config: OffloadConfig) -> None:
        self.names = config.interfaces
        self._program = program
        self._mode = config.mode
        self._attached: dict[str, _Attached] = {}
        self._unclear: frozenset[str] = frozenset()
        self.failures: dict[str, str] = {}
        """Why those that could have the program don't."""

    @property
    def modes(self) -> dict[str, str | None]:
        """How each of them has it: `driver`, `generic`, or None."""
        # A copy: whoever asks is another thread than who attaches.
        attached = self._attached.copy()
        return {name: _SPELLING[attached[name].mode] if name in attached else None for name in self.names}

    def by_ifindex(self) -> dict[int, Mode]:
        """Give those that have it."""
        return {each.ifindex: each.mode for each in self._attached.values()}

    def packed(self) -> list[Device]:
        """Give those whose packets the program may take, as it has to know them.

        In generic mode an interface with VLANs on it is none of them: there a packet's tag is not in the packet. The program
        does not see it, and what it sends on would leave with it.
        """
        return [
            Device(each.ifindex, each.mac, each.mode is Mode.NATIVE and each.driver != _VETH)
            for name, each in self._attached.items()
            if name not in self._unclear
        ]

    def attach(self, links: Mapping[int, Link]) -> list[str]:
        """Let those that are there and don't have it have it, and let go of those that are gone.

        Returns:
            What of that is worth a line in the log. `failures` says what went wrong.
        """
        by_name = {each.name: each for each in links.values()}
        notes = self._let_go(by_name)
        before = {name: each.mode for name, each in self._attached.items()}
        for name in self.names:
            link = by_name.get(name)
            if link is not None and name not in self._attached:
                notes += self._take(link, self._modes(driver_of(name)))
        if len({each.mode for each in self._attached.values()}) > 1:
            # What one driver hands to another is lost where that one doesn't expect it: without a program of its own.
            for name, attached in list(self._attached.items()):
                if attached.mode is Mode.NATIVE:
                    attached.link.close()
                    del self._attached[name]
                    notes += self._take(by_name[name], (Mode.GENERIC,))
        return notes + self._changes(before) + self._see_vlans(links.values())

    def detach(self) -> None:
        """Take it from all of them."""
        for each in self._attached.values():
            each.link.close()
        self._attached.clear()

    def _let_go(self, by_name: Mapping[str, Link]) -> list[str]:
        notes = []
        for name, attached in list(self._attached.items()):
            link = by_name.get(name)
            if link is None or link.ifindex != attached.ifindex:
                attached.link.close()
                del self._attached[name]
                notes.append(f"{name} is gone: the sockets relay what came by it")
            elif link.mac != attached.mac:
                self._attached[name] = _Attached(link.ifindex, link.mac, attached.mode, attached.driver, attached.link)
        return notes

    def _modes(self, driver: str) -> tuple[Mode, ...]:
        """Give what is to be tried, in this order."""
        if self._mode is not AttachMode.AUTO:
            return (Mode.NATIVE if self._mode is AttachMode.DRIVER else Mode.GENERIC,)
        known = driver in NATIVE_DRIVERS and (len(self.names) == 1 or driver not in _ONLY_BACK)
        return (Mode.NATIVE, Mode.GENERIC) if known else (Mode.GENERIC,)

    def _take(self, link: Link, modes: tuple[Mode, ...]) -> list[str]:
        """Let an interface have it; give why not, unless that is known."""
        try:
            self._attached[link.name] = self._attach(link, modes)
        except OSError as error:
            reason = _why_not(link, driver_of(link.name), error, self._mode)
            known = self.failures.get(link.name) == reason
            self.failures[link.name] = reason
            return [] if known else [reason]
        self.failures.pop(link.name, None)
        return []

    def _attach(self, link: Link, modes: tuple[Mode, ...]) -> _Attached:
        driver = driver_of(link.name)
        for mode in modes[:-1]:
            # A driver may be able to, and not be now: not with this MTU, nor with so few queues.
            with contextlib.suppress(OSError):
                return self._link(link, driver, mode)
        return self._link(link, driver, modes[-1])

    def _changes(self, before: Mapping[str, Mode]) -> list[str]:
        return [
            f"{name} relays in the kernel ({_SPELLING[each.mode]} mode, driver {each.driver})"
            for name, each in self._attached.items()
            if before.get(name) is not each.mode
        ]

    def _see_vlans(self, links: Iterable[Link]) -> list[str]:
        parents = {each.parent for each in links if each.vlan}
        before = self._unclear
        self._unclear = frozenset(
            name for name, each in self._attached.items() if each.mode is Mode.GENERIC and each.ifindex in parents
        )
        return [
            f"{name} has VLANs on it, which generic mode doesn't show: the sockets relay what comes by it"
            for name in sorted(self._unclear - before)
        ]

    def _link(self, link: Link, driver: str, mode: Mode) -> _Attached:
        at = self._program.attach(link.ifindex, _XDP_MODES[mode])
        return _Attached(link.ifindex, link.mac, mode, driver, at)


def check(config: OffloadConfig, links: Iterable[Link]) -> None:
    """See whether the interfaces are there, and of a kind that can have the program.

    Raises:
        BadUseError: they are not.
    """
    by_name = {each.name: each for each in links}
    if len(config.interfaces) > DEVICES:
        raise BadUseError(f"--ebpf-offloading names {len(config.interfaces)} interfaces: {DEVICES} are the most")
    for name in config.interfaces:
        if name not in by_name:
            raise BadUseError(
                f"--ebpf-offloading {name}: there is no such interface, only {', '.join(sorted(by_name))}: name one of them"
            )
        if not by_name[name].ethernet:
            raise BadUseError(
                f"--ebpf-offloading {name}: that is no Ethernet interface: name one that packets from outside come by"
            )


def driver_of(name: str) -> str:
    """Give the name of an interface's driver as the driver gives it; empty if it gives none."""
    answer = array.array("B", _DRIVER.pack(_GET_DRIVER, b""))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sP", name.encode(), answer.buffer_info()[0]))
        except OSError:
            return ""
    return bytes(_DRIVER.unpack(answer)[1]).split(b"\0")[0].decode(errors="replace")


def _why_not(link: Link, driver: str, error: OSError, mode: AttachMode) -> str:
    if error.errno in (errno.EBUSY, errno.EEXIST):
        return f"{link.name} has another XDP program: take that away first (ip link set dev {link.name} xdp off)"
    instead = "" if mode is AttachMode.GENERIC else ": give --ebpf-attach-mode generic"
    if error.errno == errno.EOPNOTSUPP:
        return f"{link.name} can't have an XDP program, its driver ({driver or 'unknown'}) does not support it{instead}"
    reason = errno.errorcode.get(error.errno or 0, "an error")
    return f"{link.name} does not take the XDP program ({reason}; driver {driver or 'unknown'}, MTU {link.mtu}){instead}"


_SPELLING: Final = {Mode.NATIVE: AttachMode.DRIVER.value, Mode.GENERIC: AttachMode.GENERIC.value}
_XDP_MODES: Final = {Mode.NATIVE: bpf.XdpMode.DRIVER, Mode.GENERIC: bpf.XdpMode.GENERIC}
