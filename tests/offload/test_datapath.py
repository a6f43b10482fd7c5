"""Opening the kernel's data path: completely, or with an error of one line."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias, cast

import pytest

from relay.config import AttachMode, Config, OffloadConfig, UsageError
from relay.core.addresses import ChannelNumber, ClientAddress, PeerAddress, RelayedPort
from relay.core.commands import InstallChannel
from relay.offload import bpf, capabilities, elf
from relay.offload.bpf import XdpMode
from relay.offload.datapath import ChannelUsage, Datapath, open_datapath
from relay.offload.devices import Devices, driver_of
from relay.offload.elf import NotBuiltError
from relay.offload.netlink import Network
from relay.offload.network import Link
from relay.offload.program import Usage, XdpProgram
from tests.support.machine import Machine
from tests.support.offload.fixtures import needs_bpf
from tests.support.privileges import in_a_thread

CONFIG = Config(public_ip4=IPv4Address("192.0.2.1"), max_allocations=10)
CLIENT = ClientAddress(("198.51.100.7", 40001))


@pytest.fixture
def here(machine: Machine) -> Iterator[Machine]:
    """A network with an Ethernet interface, entered by this thread."""
    machine.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    machine.run("ip", "link", "set", "near", "up")
    machine.run("ip", "link", "set", "lo", "up")
    with machine.entered():
        yield machine


def refusal(*interfaces: str, packaged: Callable[[], bytes] = elf.packaged) -> str:
    with pytest.raises(UsageError) as caught:
        open_datapath(CONFIG, OffloadConfig(interfaces, AttachMode.AUTO), packaged)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("release", ["5.18.19-generic", "4.19.0", "5.4", "strange"])
def test_an_older_kernel_is_rejected(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert refusal("lo") == f"--ebpf-offloading needs Linux 5.19, this is {release}: relay without it"


@pytest.mark.parametrize("release", ["5.19.0-rc1", "6.0", "6.18.5+deb13-amd64", "10.1.0"])
def test_a_newer_kernel_is_accepted(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert "no Ethernet interface" in refusal("lo")


def test_an_unknown_interface_is_rejected_with_a_list_of_interfaces() -> None:
    assert "nowhere0: there is no such interface, only " in refusal("nowhere0")
    assert ", lo" in refusal("nowhere0") or "only lo" in refusal("nowhere0")


def test_an_interface_without_ethernet_is_rejected() -> None:
    assert refusal("lo").startswith("--ebpf-offloading lo: that is no Ethernet interface")


def test_too_many_interfaces_are_rejected() -> None:
    assert "names 17 interfaces: 16 are the most" in refusal(*(f"eth{i}" for i in range(17)))


@needs_bpf
@pytest.mark.usefixtures("here")
def test_missing_capabilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "missing", lambda: ("CAP_PERFMON", "CAP_BPF"))
    assert refusal("near") == (
        "--ebpf-offloading needs CAP_PERFMON, CAP_BPF: run as root, or with AmbientCapabilities= of the unit file"
    )


@needs_bpf
@pytest.mark.usefixtures("here")
def test_a_package_without_the_object_reports_the_missing_compiler() -> None:
    def packaged() -> bytes:
        raise NotBuiltError("built without clang")

    assert (
        refusal("near", packaged=packaged)
        == "--ebpf-offloading: this package was built without clang: install clang and build it again"
    )


@needs_bpf
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("cut", [0, 10, 500])
def test_a_broken_object_is_rejected(object_file: bytes, cut: int) -> None:
    cut_off = object_file[:cut]
    assert refusal("near", packaged=lambda: cut_off).endswith(": install this package again")
    assert refusal("near", packaged=lambda: cut_off.ljust(1000, b"\0")).endswith(": install this package again")


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_a_machine_without_sys_is_told_to_mount_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/sys/devices/system/cpu/possible")

    monkeypatch.setattr(bpf, "possible_cpus", missing)
    assert refusal("near") == "--ebpf-offloading: /sys/devices/system/cpu/possible is not readable: mount /sys"


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_a_rejection_by_the_verifier_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user namespace, where capabilities are reported but not effective."""

    def without_any() -> str:
        capabilities.drop()
        monkeypatch.setattr(capabilities, "missing", lambda: ())
        return refusal("near")

    said = in_a_thread(without_any)
    assert said == (
        "--ebpf-offloading: the kernel does not take the program (BPF_MAP_CREATE of map clients: Operation not permitted): "
        "relay without it"
    )


@needs_bpf
@pytest.mark.usefixtures("here")
def test_an_interface_with_another_program_is_rejected_and_unchanged(object_file: bytes) -> None:
    other = XdpProgram(4, object_file)
    with other.attach(socket.if_nametoindex("near"), XdpMode.GENERIC):
        assert refusal("near").startswith("--ebpf-offloading: near has another XDP program: take that away first")
    other.close()


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_an_open_datapath_is_attached_and_has_dropped_its_capabilities() -> None:
    def open_and_look() -> tuple[Datapath, tuple[str, ...]]:
        opened = open_datapath(CONFIG, OffloadConfig(("near",)))
        return opened, capabilities.missing()

    datapath, missing = in_a_thread(open_and_look)
    try:
        assert missing == ("CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF")
        assert datapath.notes == ("near relays in the kernel (generic mode, driver veth)",)
        assert datapath.devices.modes == {"near": "generic"}
        assert datapath.state()["xdp_attached"] == {"near": "generic"}
        assert datapath.program.bindings == 1024
        datapath.detach()
        assert datapath.devices.modes == {"near": None}
    finally:
        datapath.close()


@needs_bpf
@pytest.mark.usefixtures("here")
def test_attaching_is_all_or_nothing(object_file: bytes) -> None:
    other = XdpProgram(4, object_file)
    both = OffloadConfig(("near", "far"), AttachMode.GENERIC)
    with other.attach(socket.if_nametoindex("far"), XdpMode.GENERIC):
        assert "far has another XDP program" in refusal("near", "far")
    # The first attempt left no state.
    opened = in_a_thread(lambda: open_datapath(CONFIG, both))
    assert opened.devices.modes == {"near": "generic", "far": "generic"}
    opened.close()
    other.close()


Modes: TypeAlias = Callable[..., dict[str, str | None]]


@pytest.fixture
def modes(here: Machine, object_file: bytes) -> Modes:
    """Return the automatic modes of interfaces: two with a known driver, and a bridge."""
    here.run("ip", "link", "add", "b0", "type", "bridge")

    def attached(*names: str, **drivers: str) -> dict[str, str | None]:
        program = XdpProgram(4, object_file)
        devices = Devices(
            program,
            OffloadConfig(names),
            native_drivers={"veth", "nfp"},
            driver_of=lambda name: drivers.get(name) or driver_of(name),
        )
        with Network() as network:
            devices.attach(network.links())
        found = devices.modes
        devices.detach()
        program.close()
        return found

    return attached


@needs_bpf
def test_all_interfaces_in_automatic_mode_use_the_same_mode(modes: Modes) -> None:
    assert modes("near", "far") == {"near": "driver", "far": "driver"}
    # A driver loses packets redirected to an interface without a program in its driver.
    assert modes("near", "b0") == {"near": "generic", "b0": "generic"}
    assert modes("b0", "far") == {"b0": "generic", "far": "generic"}


@needs_bpf
def test_a_driver_without_redirects_is_native_only_as_a_single_interface(modes: Modes) -> None:
    assert modes("near", near="nfp") == {"near": "driver"}
    assert modes("near", "far", near="nfp") == {"near": "generic", "far": "generic"}


class Attaching:
    """A program that any interface takes."""

    def attach(self, ifindex: int, mode: XdpMode) -> SimpleNamespace:
        return SimpleNamespace(close=lambda: None, of=(ifindex, mode))


def test_ports_of_a_named_interface_belong_to_it() -> None:
    """As of a bond, or below hv_netvsc: packets arrive at the port, with the MAC address of the named interface."""
    mac, other = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
    links = [
        Link(3, "bond0", mac, 1500, 1500, up=True, ethernet=True),
        Link(4, "eth0", mac, 1500, 1500, up=True, ethernet=True, master=3),
        Link(5, "eth1", other, 1500, 1500, up=True, ethernet=True, master=3),
        Link(6, "eth2", other, 1500, 1500, up=True, ethernet=True),
    ]
    config = OffloadConfig(("bond0",), AttachMode.DRIVER)
    devices = Devices(cast(XdpProgram, Attaching()), config, driver_of=lambda _: "bonding")
    devices.attach(links)
    assert devices.by_ifindex() == {3: XdpMode.DRIVER}
    assert [each[:2] for each in devices.packed()] == [(3, mac), (4, mac), (5, mac)]
    devices.attach([*links[:2], links[2]._replace(master=0)])
    assert [each[:2] for each in devices.packed()] == [(3, mac), (4, mac)]


class Virtio(Attaching):
    """A driver that checks the MTU only when a program is attached."""

    def __init__(self) -> None:
        self.mtu = 1500
        self.attached: list[XdpMode] = []

    def attach(self, ifindex: int, mode: XdpMode) -> SimpleNamespace:
        if mode is XdpMode.DRIVER and self.mtu > 3500:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.attached.append(mode)
        return super().attach(ifindex, mode)


@pytest.mark.parametrize(
    ("mtus", "modes"),
    [
        pytest.param((1500, 1400, 1500), [XdpMode.DRIVER], id="not raised"),
        pytest.param((1500, 3000), [XdpMode.DRIVER] * 2, id="within the driver's limit"),
        pytest.param((1500, 9000, 9001), [XdpMode.DRIVER, XdpMode.GENERIC], id="above the driver's limit"),
    ],
)
def test_a_raised_mtu_attaches_the_program_again(
    monkeypatch: pytest.MonkeyPatch, mtus: tuple[int, ...], modes: list[XdpMode]
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="6.12.1-amd64"))
    driver = Virtio()
    devices = Devices(cast(XdpProgram, driver), OffloadConfig(("eth0",)), driver_of=lambda _: "virtio_net")
    for mtu in mtus:
        driver.mtu = mtu
        notes = devices.attach([Link(3, "eth0", b"\2\0\0\0\0\1", mtu, mtu, up=True, ethernet=True)])
    assert driver.attached == modes
    assert devices.by_ifindex() == {3: modes[-1]}
    assert (f"eth0 has an MTU of {mtu} now: the program is attached again" in notes) is (mtus[1:] == (3000,))


@pytest.mark.parametrize(("mtu", "failures"), [(4064, 0), (4065, 1)])
def test_an_mtu_at_which_an_old_kernel_cannot_detach_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, mtu: int, failures: int
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="6.1.0-50-amd64"))
    devices = Devices(cast(XdpProgram, Attaching()), OffloadConfig(("eth0",)), driver_of=lambda _: "virtio_net")
    link = Link(3, "eth0", b"\2\0\0\0\0\1", 1500, 1500, up=True, ethernet=True)
    devices.attach([link])
    (note, *_) = devices.attach([link._replace(mtu=mtu)])
    assert ("can't detach" in note, len(devices.failures)) == (bool(failures), failures)
    assert devices.attach([link._replace(mtu=mtu)]) == []


@pytest.mark.parametrize(
    ("features", "mode"),
    [
        pytest.param({7, 15}, XdpMode.DRIVER, id="mergeable"),
        pytest.param({0, 5}, XdpMode.DRIVER, id="no TSO"),
        *(pytest.param({each}, XdpMode.GENERIC, id=f"feature {each}") for each in (7, 8, 10, 54)),
        pytest.param(None, XdpMode.DRIVER, id="unknown"),
    ],
)
def test_virtio_net_without_mergeable_buffers_is_not_native(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: set[int] | None, mode: XdpMode
) -> None:
    monkeypatch.setattr("relay.offload.devices._SYS", tmp_path)
    if features is not None:
        (tmp_path / "eth0/device").mkdir(parents=True)
        (tmp_path / "eth0/device/features").write_text("".join("01"[bit in features] for bit in range(64)) + "\n")
    links = [Link(3, "eth0", b"\2\0\0\0\0\1", 1500, 1500, up=True, ethernet=True)]
    found = {}
    for chosen in (AttachMode.AUTO, AttachMode.DRIVER):
        devices = Devices(cast(XdpProgram, Attaching()), OffloadConfig(("eth0",), chosen), driver_of=lambda _: "virtio_net")
        devices.attach(links)
        found[chosen] = (devices.by_ifindex().get(3), devices.failures)
    assert found[AttachMode.AUTO] == (mode, {})
    if mode is XdpMode.GENERIC:
        why = "eth0 would never run the program (virtio_net without mergeable buffers): give --ebpf-attach-mode generic"
        assert found[AttachMode.DRIVER] == (None, {"eth0": why})


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_usage_is_returned_by_channel() -> None:
    opened = in_a_thread(lambda: open_datapath(CONFIG, OffloadConfig(("near",))))
    try:
        commands = [
            InstallChannel(CLIENT, ChannelNumber(0x4000 + i), RelayedPort(50000), PeerAddress(("192.0.2.9", 9000 + i)), 1e6)
            for i in range(300)
        ]
        opened.channels.carry_out(commands)
        portions = list(opened.usage())
        assert [len(each) for each in portions] == [256, 44]
        assert sorted(each.number for portion in portions for each in portion) == [each.number for each in commands]
        assert opened.state()["xdp_channels"] == 300
    finally:
        opened.close()


def test_usage_has_a_readable_age() -> None:
    used = ChannelUsage(CLIENT, ChannelNumber(0x4000), Usage(3, 300, 997.7654), Usage(0, 0, None))
    unused = {"packets": 0, "bytes": 0, "idle_seconds": None}
    both = {"to_peer": {"packets": 3, "bytes": 300, "idle_seconds": 2.235}, "to_client": unused}
    assert used.readable(now=1000.0) == both
