"""Offload with the network cards of a virtual machine: run by `guest.sh`, with real drivers, bonds and VLANs.

The cards of a wire have addresses 52:54:00:00:WIRE:PLACE. Place 0 belongs to the clients and peers, all others to the relay.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from relay.core.addresses import Family
from relay.offload.devices import NATIVE_DRIVERS, driver_of
from tests.support.machine import wait_until_up
from tests.support.offload import watched
from tests.support.offload.relays import Running, Talk, running, talk
from tests.support.offload.stream import Stream
from tests.support.offload.topology import BEHIND, CLIENT, PEER, RELAY, Capture, Host, Row, configure, hosts
from tests.support.waiting import wait_until

VIRTIO, VMXNET3, IGB, E1000E, BOND, UNMERGED = 1, 2, 3, 4, 8, 9
"""Wires."""

CAN_DETACH: Final = (6, 3)
KERNEL: Final = tuple(map(int, os.uname().release.split(".")[:2]))
FAMILIES: Final = [(one, other) for one in Family for other in Family]
WATCHED: Final = (sys.executable, str(Path(watched.__file__)), watched.REACHED)
WITHIN: Final = 60.0
"""Seconds: emulated processors are slow."""


def card(wire: int, place: int) -> str:
    """Return the name of a card, or skip the test without such a card."""
    for each in Path("/sys/class/net").glob("*/address"):
        if each.read_text().strip() == f"52:54:00:00:{wire:02x}:{place:02x}":
            return each.parent.name
    pytest.skip(f"no card {place} on wire {wire}")


class Wire(NamedTuple):
    relay: Host
    far: Host
    link: str
    far_link: str

    @property
    def row(self) -> Row:
        return Row(self.far, self.relay, self.far)


@contextlib.contextmanager
def wire(number: int, *, bond: bool = False, vlan: int = 0) -> Iterator[Wire]:
    """Return a relay and another machine with their cards, which return at the end."""
    ours, theirs = [card(number, place) for place in ((1, 2) if bond else (1,))], card(number, 0)
    with hosts("relay", "far") as (relay, far):
        for host, names in ((relay, ours), (far, [theirs])):
            for name in names:
                subprocess.run(("ip", "link", "set", "dev", name, "netns", host.path), check=True)
        link = ours[0]
        if bond:
            link = "bond0"
            relay.ip("link add bond0 type bond mode active-backup miimon 100")
            for name in ours:
                relay.ip(f"link set {name} down", f"link set {name} master bond0")
        relay.ip(f"link set {link} up")
        far.ip(f"link set {theirs} up")
        inner, far_inner = link, theirs
        if vlan:
            inner, far_inner = f"{link}.{vlan}", f"{theirs}.{vlan}"
            relay.ip(f"link add link {link} name {inner} type vlan id {vlan}")
            far.ip(f"link add link {theirs} name {far_inner} type vlan id {vlan}")
        configure(relay, inner, RELAY, BEHIND)
        configure(far, far_inner, CLIENT, PEER)
        wait_until_up(relay, far)
        try:
            yield Wire(relay, far, link, theirs)
        finally:
            if bond:
                relay.ip("link del bond0")
            for host, names in ((relay, ours), (far, [theirs])):
                for name in names:
                    host.run("ip", "link", "set", "dev", name, "netns", "1")


def complete_checksums(made: Wire) -> None:
    """Turn checksum offload off, which a tap would leave to nobody."""
    for host, link in ((made.relay, made.link), (made.far, made.far_link)):
        host.run("ethtool", "-K", link, "tx", "off")


def relays_all_families(relay: Running, made: Wire) -> None:
    """Check that the kernel relays, and that all checksums are right on the other side."""
    for families in FAMILIES:
        with talk(relay, made.row, families) as way, Capture(made.far, made.far_link) as capture:
            before = relay.counts()
            for size in (1, 100, 1200):
                way.both(bytes(range(256)) * 5 if size == 1200 else bytes(size))
            assert sum(relay.counts().since(before)[:2]) >= 3
            for each in capture.take():
                each.check_sums()


@pytest.mark.parametrize("number", [VIRTIO, VMXNET3, IGB, E1000E, BOND])
@pytest.mark.parametrize("mode", ["driver", "generic"])
def test_all_families_are_relayed_with_right_checksums(tmp_path: Path, number: int, mode: str) -> None:
    driver = driver_of(card(number, 1))
    if mode == "driver" and (driver not in NATIVE_DRIVERS or (driver == "vmxnet3" and KERNEL < (6, 6))):
        pytest.skip(f"{driver} has no native XDP in this kernel")
    with wire(number, bond=number == BOND) as made, running(made.relay, tmp_path, mode, links=made.link) as relay:
        relays_all_families(relay, made)


def test_in_native_mode_packets_of_a_vlan_are_relayed_into_the_vlan(tmp_path: Path) -> None:
    with wire(VIRTIO, vlan=10) as made, running(made.relay, tmp_path, "driver", links=made.link) as relay:
        for families in FAMILIES:
            with talk(relay, made.row, families) as way:
                way.both(bytes(1000))


@pytest.mark.parametrize("number", [VIRTIO, VMXNET3, IGB])
def test_in_generic_mode_the_sockets_relay_packets_of_a_vlan(tmp_path: Path, number: int) -> None:
    with (
        wire(number, vlan=10) as made,
        running(made.relay, tmp_path, "generic", links=made.link) as relay,
        relay.client(made.far) as client,
        made.far.udp(PEER[Family.IPV4]) as peer,
    ):
        assert "has VLANs on it" in relay.log
        way = Talk(relay, client, peer)
        way.both()
        assert relay.counts()[:2] == (0, 0)


def test_a_raised_mtu_loses_no_long_packets_or_is_reported(tmp_path: Path) -> None:
    """virtio_net in native mode drops packets longer than a page, without a message."""
    with (
        wire(VIRTIO) as made,
        running(made.relay, tmp_path, "auto", links=made.link) as relay,
        talk(relay, made.row) as way,
    ):
        for host, link in ((made.far, made.far_link), (made.relay, made.link)):
            host.set_mtu(link, 9000)
        wait_until(lambda: "has an MTU of 9000 now" in relay.log, WITHIN)
        if KERNEL < CAN_DETACH:
            assert "can't detach the program" in relay.log
            made.relay.set_mtu(made.link, 1500)
            return
        wait_until(lambda: relay.state()["xdp_attached"] == {made.link: "generic"}, WITHIN)
        way.to_peer(bytes(8000))
        way.wait_for_kernel(WITHIN)


def test_a_card_that_would_never_run_the_program_is_generic(tmp_path: Path) -> None:
    with wire(UNMERGED) as made:
        complete_checksums(made)
        with running(made.relay, tmp_path, "generic", links=made.link) as relay:
            relays_all_families(relay, made)


def test_the_watch_steps_down_on_a_card_that_never_runs_the_program(tmp_path: Path) -> None:
    """Without /sys/class/net the relay does not know that the card lacks mergeable buffers."""
    hidden = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/class/net && exec "$@"', "sh")
    with wire(UNMERGED) as made:
        complete_checksums(made)
        with (
            running(made.relay, tmp_path, "auto", links=made.link, by=(*hidden, *WATCHED)) as relay,
            relay.client(made.far) as client,
            made.far.udp(PEER[Family.IPV4]) as peer,
        ):
            way = Talk(relay, client, peer)
            with Stream(way, loses=True):
                wait_until(lambda: relay.state()["xdp_attached"] == {made.link: "generic"}, WITHIN)
            assert "the XDP program stands still" in relay.log
            way.wait_for_kernel(WITHIN)
