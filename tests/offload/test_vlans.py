"""VLANs on the relay's link: packets of a VLAN are relayed into this VLAN, or left to the sockets.

The kernel handles the tags. `vlan.c` and `in_vlans.py` replace a VLAN interface.
"""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from relay.core.addresses import Family
from tests.support.machine import wait_until_up
from tests.support.offload import in_vlans
from tests.support.offload.fixtures import CLANG, needs_bpf, needs_clang
from tests.support.offload.relays import Lab, Talk, running, talk
from tests.support.offload.topology import BEHIND, CLIENT, PEER, RELAY, Host, Row, configure, connect, hosts
from tests.support.requirements import needs_ipv6

pytestmark = [
    *(needs_bpf, needs_clang, needs_ipv6, pytest.mark.usefixtures("object_file")),
    pytest.mark.skipif(
        shutil.which("tc") is None, reason="no packet gets a VLAN tag: tc is NOT INSTALLED (apt-get install iproute2)"
    ),
]

TAG: Final = 10
CHILD: Final = f"r0.{TAG}"
SOURCE: Final = Path(in_vlans.__file__).with_name("vlan.c")
IN_VLANS: Final = (sys.executable, str(Path(in_vlans.__file__)))
FAMILIES: Final = [pytest.param((one, other), id=f"{one.name}-{other.name}") for one in Family for other in Family]


class Network(NamedTuple):
    """A relay with a VLAN on its link r0, and one machine in the roles of client and peer."""

    row: Row
    filters: Path
    """The compiled `vlan.c`."""

    @property
    def relay(self) -> Host:
        return self.row.relay

    @property
    def far(self) -> Host:
        return self.row.client

    def add_filter(self, host: Host, link: str, way: str, program: str) -> None:
        """Attach a program of `vlan.c` to all packets that a link receives or sends.

        Args:
            host: the machine.
            link: its link.
            way: `ingress` or `egress`.
            program: the section of `vlan.c`.
        """
        host.run("tc", "qdisc", "replace", "dev", link, "clsact")
        host.run("tc", "filter", "add", "dev", link, way, "bpf", "da", "obj", str(self.filters), "sec", program)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """The network. Tests add addresses of the relay and filters."""
    with hosts("relay", "far") as (relay, far):
        connect(relay, "r0", far, "c0")
        relay.ip(
            f"link add {CHILD} type veth peer name under",
            f"link set {CHILD} address {relay.mac('r0')}",
            "link set under up",
            "link set r0 up",
        )
        for link in (CHILD, "under"):
            relay.set_features(link, sums=False)
        configure(far, "c0", CLIENT, PEER)
        built = folder / "vlan.o"
        names = {"TAG": TAG, "TRUNK": relay.ifindex("r0"), "CHILD": relay.ifindex(CHILD)}
        options = [f"-D{name}={value}" for name, value in names.items()]
        subprocess.run([str(CLANG), "-target", "bpf", "-O2", *options, "-c", str(SOURCE), "-o", str(built)], check=True)
        yield Network(Row(far, relay, far), built)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A relay in native mode; all machines are in the VLAN."""
    folder = tmp_path_factory.mktemp("tagged")
    with network(folder) as made:
        made.add_filter(made.far, "c0", "egress", "tag")
        made.add_filter(made.far, "c0", "ingress", "only_tagged")
        made.add_filter(made.relay, "r0", "ingress", "from_trunk")
        made.add_filter(made.relay, "under", "ingress", "to_trunk")
        configure(made.relay, CHILD, RELAY, BEHIND)
        wait_until_up(made.relay, made.far)
        with running(made.relay, folder, "driver", links="r0", by=IN_VLANS) as relay:
            yield Lab(made.row, relay, "driver")


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A relay in generic mode, which has its program on the interface of the VLAN."""
    folder = tmp_path_factory.mktemp("child")
    with network(folder) as made:
        # Unlike the other stand-in, it receives packets as if they had just arrived, as generic mode requires.
        made.relay.ip(f"link del {CHILD}", f"link add link r0 name {CHILD} type macvlan mode private")
        made.add_filter(made.far, "c0", "egress", "tag")
        made.add_filter(made.far, "c0", "ingress", "only_tagged")
        made.add_filter(made.relay, "r0", "ingress", "untag")
        made.add_filter(made.relay, "r0", "egress", "tag")
        configure(made.relay, CHILD, RELAY, BEHIND)
        wait_until_up(made.relay, made.far)
        with running(made.relay, folder, "generic", links=CHILD, by=IN_VLANS) as relay:
            yield Lab(made.row, relay, "generic")


def test_in_native_mode_the_sockets_relay_packets_with_an_offloaded_tag(tagged: Lab) -> None:
    network, relay, _ = tagged
    assert "r0 has VLANs on it, and removes their tags" in relay.log
    assert "until ethtool -K r0 rxvlan off" in relay.log
    with relay.client(network.client) as client, network.peer.udp(PEER[Family.IPV4]) as peer:
        way = Talk(relay, client, peer)
        before = relay.counts()
        for _ in range(10):
            way.both()
        assert relay.counts().since(before)[:2] == (0, 0)


def test_in_native_mode_a_link_that_leaves_tags_in_packets_is_not_reported(tmp_path: Path) -> None:
    with network(tmp_path) as made:
        configure(made.relay, "r0", RELAY)
        made.relay.set_tags_in("r0", inside=True)
        wait_until_up(made.relay, made.far)
        with running(made.relay, tmp_path, "driver", links="r0", by=IN_VLANS) as relay:
            assert "VLANs" not in relay.log


@pytest.mark.parametrize("families", FAMILIES)
def test_in_native_mode_tagged_packets_are_relayed_with_a_tag(tagged: Lab, families: tuple[Family, Family]) -> None:
    network, relay, _ = tagged
    network.client.set_tags_in("c0", inside=True)
    try:
        with talk(relay, network, families) as way:
            before = relay.counts()
            for size in (100, 1, 1400):
                way.both(bytes(size))
            # The neighbours may be stale by now and probed once.
            assert sum(relay.counts().since(before)[:2]) >= 3
    finally:
        network.client.set_tags_in("c0", inside=False)


@pytest.mark.parametrize("families", FAMILIES)
def test_the_interface_of_a_vlan_can_have_the_program(child: Lab, families: tuple[Family, Family]) -> None:
    with talk(child.relay, child.network, families):
        pass


def test_in_generic_mode_the_sockets_relay_packets_of_a_link_with_vlans(tmp_path: Path) -> None:
    """The peer's packets have a tag invisible to the program. Relayed packets would leave with this tag and be lost."""
    with network(tmp_path) as made:
        relay, far = made.relay, made.far
        made.add_filter(far, "c0", "egress", "tag_peer")
        made.add_filter(far, "c0", "ingress", "only_untagged")
        made.add_filter(relay, "r0", "ingress", "untag")
        configure(relay, "r0", RELAY, BEHIND)
        wait_until_up(relay, far)
        with (
            running(relay, tmp_path, "generic", links="r0", by=IN_VLANS) as offloading,
            offloading.client(far) as client,
            made.row.peer.udp(PEER[Family.IPV4]) as peer,
        ):
            assert "r0 has VLANs on it, which generic mode doesn't show" in offloading.log
            way = Talk(offloading, client, peer)
            for _ in range(10):
                way.both()
            assert offloading.counts()[:2] == (0, 0)
            relay.ip(f"link del {CHILD}")
            far.run("tc", "qdisc", "del", "dev", "c0", "clsact")
            way.wait_for_kernel()
