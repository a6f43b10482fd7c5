"""Opening the kernel's data path: all of it, or one line that says why not."""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import TypeVar

import pytest

from relay.config import AttachMode, BadUseError, Config, OffloadConfig
from relay.core.addresses import ChannelNumber, ClientAddress, PeerAddress, RelayedPort
from relay.core.commands import InstallChannel
from relay.offload import capabilities, devices, elf
from relay.offload.bpf import XdpMode
from relay.offload.datapath import ChannelUsage, Datapath, open_datapath, usage_by_client
from relay.offload.elf import NotBuiltError
from relay.offload.program import Usage, XdpProgram
from tests.machine import Machine
from tests.offload.conftest import needs_bpf

T = TypeVar("T")
CONFIG = Config(public_ip4=IPv4Address("192.0.2.1"), max_allocations=10)
CLIENT = ClientAddress(("198.51.100.7", 40001))


@pytest.fixture
def here(machine: Machine) -> Iterator[Machine]:
    """A network with an Ethernet interface, in which this thread is."""
    machine.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    machine.run("ip", "link", "set", "near", "up")
    machine.run("ip", "link", "set", "lo", "up")
    with machine.entered():
        yield machine


def elsewhere(do: Callable[[], T]) -> T:
    """Do it in a thread of its own, which has its capabilities to give up. It begins in the network that this one is in."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result(timeout=60)


def refusal(*interfaces: str, mode: AttachMode = AttachMode.AUTO) -> str:
    with pytest.raises(BadUseError) as caught:
        open_datapath(CONFIG, OffloadConfig(interfaces, mode))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("release", ["5.18.19-generic", "4.19.0", "5.4", "strange"])
def test_an_older_kernel_is_refused(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert refusal("lo") == f"--ebpf-offloading needs Linux 5.19, this is {release}: relay without it"


@pytest.mark.parametrize("release", ["5.19.0-rc1", "6.0", "6.18.5+deb13-amd64", "10.1.0"])
def test_a_newer_kernel_will_do(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert "no Ethernet interface" in refusal("lo")


def test_an_interface_that_is_not_there_is_refused_with_those_that_are() -> None:
    assert "nowhere0: there is no such interface, only " in refusal("nowhere0")
    assert ", lo" in refusal("nowhere0") or "only lo" in refusal("nowhere0")


def test_an_interface_without_ethernet_is_refused() -> None:
    assert refusal("lo").startswith("--ebpf-offloading lo: that is no Ethernet interface")


def test_more_interfaces_than_the_program_knows_are_refused() -> None:
    assert "names 9 interfaces: 8 are the most" in refusal(*(f"eth{i}" for i in range(9)))


@needs_bpf
@pytest.mark.usefixtures("here")
def test_missing_capabilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "missing", lambda: ("CAP_PERFMON", "CAP_BPF"))
    assert refusal("near") == (
        "--ebpf-offloading needs CAP_PERFMON, CAP_BPF: run as root, or with AmbientCapabilities= of the unit file"
    )


@needs_bpf
@pytest.mark.usefixtures("here")
def test_a_package_without_the_object_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def packaged() -> bytes:
        raise NotBuiltError("built without clang")

    monkeypatch.setattr(elf, "packaged", packaged)
    assert refusal("near") == "--ebpf-offloading: this package was built without clang: install clang and build it again"


@needs_bpf
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("cut", [0, 10, 500])
def test_a_broken_object_is_refused(monkeypatch: pytest.MonkeyPatch, object_file: bytes, cut: int) -> None:
    monkeypatch.setattr(elf, "packaged", lambda: object_file[:cut])
    assert refusal("near").endswith(": install this package again")


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_a_kernel_that_does_not_take_the_program_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user namespace, where capabilities seem to be there and are not."""

    def without_any() -> str:
        capabilities.drop()
        monkeypatch.setattr(capabilities, "missing", lambda: ())
        return refusal("near")

    said = elsewhere(without_any)
    assert said == (
        "--ebpf-offloading: the kernel does not take the program (BPF_MAP_CREATE of map channels: Operation not permitted): "
        "relay without it"
    )


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_an_interface_with_another_program_is_refused_and_keeps_it() -> None:
    other = XdpProgram(4)
    with other.attach(socket.if_nametoindex("near"), XdpMode.GENERIC):
        assert refusal("near").startswith("--ebpf-offloading: near has another XDP program: take that away first")
    other.close()


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_an_open_datapath_is_attached_and_has_given_up_what_that_took() -> None:
    def open_and_look() -> tuple[Datapath, tuple[str, ...]]:
        opened = open_datapath(CONFIG, OffloadConfig(("near",)))
        return opened, capabilities.missing()

    datapath, missing = elsewhere(open_and_look)
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
@pytest.mark.usefixtures("here", "object_file")
def test_all_interfaces_are_attached_or_none() -> None:
    other = XdpProgram(4)
    both = OffloadConfig(("near", "far"), AttachMode.GENERIC)
    with other.attach(socket.if_nametoindex("far"), XdpMode.GENERIC):
        assert "far has another XDP program" in refusal("near", "far")
    # Nothing is left of the first try.
    opened = elsewhere(lambda: open_datapath(CONFIG, both))
    assert opened.devices.modes == {"near": "generic", "far": "generic"}
    opened.close()
    other.close()


@pytest.fixture
def modes(here: Machine, monkeypatch: pytest.MonkeyPatch, object_file: bytes) -> Callable[..., dict[str, str | None]]:
    """Give the modes of interfaces that have been left to choose, of two whose driver is known, and of a bridge."""
    del object_file
    here.run("ip", "link", "add", "b0", "type", "bridge")
    monkeypatch.setattr(devices, "NATIVE_DRIVERS", frozenset({"veth", "nfp"}))

    def attached(*names: str) -> dict[str, str | None]:
        opened = elsewhere(lambda: open_datapath(CONFIG, OffloadConfig(names)))
        found = opened.devices.modes
        opened.close()
        return found

    return attached


@needs_bpf
def test_interfaces_that_choose_have_one_mode(modes: Callable[..., dict[str, str | None]]) -> None:
    assert modes("near", "far") == {"near": "driver", "far": "driver"}
    # What a driver hands to an interface without a program in its driver is lost.
    assert modes("near", "b0") == {"near": "generic", "b0": "generic"}
    assert modes("b0", "far") == {"b0": "generic", "far": "generic"}


@needs_bpf
def test_a_driver_that_hands_nothing_over_is_native_only_by_itself(
    modes: Callable[..., dict[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "driver_of", lambda name: "nfp" if name == "near" else "veth")
    assert modes("near") == {"near": "driver"}
    assert modes("near", "far") == {"near": "generic", "far": "generic"}


@needs_bpf
@pytest.mark.usefixtures("here", "object_file")
def test_usage_is_told_by_channel() -> None:
    opened = elsewhere(lambda: open_datapath(CONFIG, OffloadConfig(("near",))))
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


def test_usage_is_readable_with_how_long_ago_it_was() -> None:
    used = ChannelUsage(CLIENT, ChannelNumber(0x4000), Usage(3, 300, 997.7654), Usage(0, 0, None))
    other = used._replace(client=ClientAddress(("2001:db8::7", 40001, 0, 0)), number=ChannelNumber(0x7FFF))
    unused = {"packets": 0, "bytes": 0, "idle_seconds": None}
    both = {"to_peer": {"packets": 3, "bytes": 300, "idle_seconds": 2.235}, "to_client": unused}
    assert usage_by_client([used, other], now=1000.0) == {
        "198.51.100.7:40001": {"0x4000": both},
        "[2001:db8::7]:40001": {"0x7fff": both},
    }
