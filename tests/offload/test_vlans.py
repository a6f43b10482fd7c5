"""VLANs on the relay's link: what comes by one is relayed into it, and what the program can't tell the sockets relay.

Where the tags are is the kernel's own doing. What an interface in a VLAN is, `vlan.c` and `in_vlans.py` say.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

import pytest

from relay.core.addresses import Family
from tests.conftest import needs_ipv6
from tests.offload.conftest import CLANG, needs_bpf, needs_clang
from tests.offload.relays import Talk, running, talk
from tests.offload.topology import BEHIND, CLIENT, PEER, RELAY, Host, Row, configure, connect, hosts

pytestmark = [
    *(needs_bpf, needs_clang, needs_ipv6, pytest.mark.usefixtures("object_file")),
    pytest.mark.skipif(
        shutil.which("tc") is None, reason="no packet gets a VLAN tag: tc is NOT INSTALLED (apt-get install iproute2)"
    ),
]

TAG: Final = 10
CHILD: Final = f"r0.{TAG}"
SOURCE: Final = Path(__file__).with_name("vlan.c")
IN_VLANS: Final = (sys.executable, str(Path(__file__).with_name("in_vlans.py")))
FAMILIES: Final = [pytest.param((one, other), id=f"{one.name}-{other.name}") for one in Family for other in Family]

Filters: TypeAlias = Callable[[Host, str, str, str], None]
"""Has a program of `vlan.c` see what comes in by a link, or leaves by it: host, link, `ingress` or `egress`, program."""


@pytest.fixture
def network() -> Iterator[Row]:
    """A relay with a VLAN on its link r0, and one machine that is client and peer at once."""
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
        yield Row(far, relay, far)


@pytest.fixture
def filters(network: Row, tmp_path: Path) -> Filters:
    relay, built = network.relay, tmp_path / "vlan.o"
    names = {"TAG": TAG, "TRUNK": relay.ifindex("r0"), "CHILD": relay.ifindex(CHILD)}
    options = [f"-D{name}={value}" for name, value in names.items()]
    subprocess.run([str(CLANG), "-target", "bpf", "-O2", *options, "-c", str(SOURCE), "-o", str(built)], check=True)

    def add(host: Host, link: str, way: str, program: str) -> None:
        host.run("tc", "qdisc", "replace", "dev", link, "clsact")
        host.run("tc", "filter", "add", "dev", link, way, "bpf", "da", "obj", str(built), "sec", program)

    return add


@pytest.fixture
def tagged(network: Row, filters: Filters) -> Row:
    """Everyone is in the VLAN."""
    relay, far = network.relay, network.client
    filters(far, "c0", "egress", "tag")
    filters(far, "c0", "ingress", "only_tagged")
    filters(relay, "r0", "ingress", "from_trunk")
    filters(relay, "under", "ingress", "to_trunk")
    configure(relay, CHILD, RELAY, BEHIND)
    return network


@pytest.mark.parametrize("families", FAMILIES)
def test_in_native_mode_what_comes_with_a_tag_is_sent_with_it(
    tagged: Row, tmp_path: Path, families: tuple[Family, Family]
) -> None:
    tagged.client.put_tags_in("c0")
    with (
        running(tagged.relay, tmp_path, "driver", links="r0", by=IN_VLANS) as offloading,
        talk(offloading, tagged, families) as way,
    ):
        before = offloading.counts()
        for size in (100, 1, 1400):
            way.both(bytes(size))
        # The neighbours may be stale by now, and be asked once.
        assert sum(offloading.counts().since(before)[:2]) >= 3


def test_in_native_mode_what_comes_with_a_tag_beside_it_the_sockets_relay(tagged: Row, tmp_path: Path) -> None:
    with (
        running(tagged.relay, tmp_path, "driver", links="r0", by=IN_VLANS) as offloading,
        offloading.client(tagged.client) as client,
        tagged.peer.udp(PEER[Family.IPV4]) as peer,
    ):
        way = Talk(offloading, client, peer)
        for _ in range(10):
            way.both()
        assert offloading.counts()[:2] == (0, 0)


@pytest.mark.parametrize("families", FAMILIES)
def test_the_interface_of_a_vlan_can_have_the_program(
    network: Row, filters: Filters, tmp_path: Path, families: tuple[Family, Family]
) -> None:
    relay, far = network.relay, network.client
    # Unlike the other stand-in, it receives packets as if they had just come: those are what generic mode is for.
    relay.ip(f"link del {CHILD}", f"link add link r0 name {CHILD} type macvlan mode private")
    filters(far, "c0", "egress", "tag")
    filters(far, "c0", "ingress", "only_tagged")
    filters(relay, "r0", "ingress", "untag")
    filters(relay, "r0", "egress", "tag")
    configure(relay, CHILD, RELAY, BEHIND)
    with running(relay, tmp_path, "generic", links=CHILD, by=IN_VLANS) as offloading, talk(offloading, network, families):
        pass


def test_in_generic_mode_what_comes_by_a_link_with_vlans_the_sockets_relay(
    network: Row, filters: Filters, tmp_path: Path
) -> None:
    """The peer's packets come with a tag that the program can't see, and would leave with it: they would be lost."""
    relay, far = network.relay, network.client
    filters(far, "c0", "egress", "tag_peer")
    filters(far, "c0", "ingress", "only_untagged")
    filters(relay, "r0", "ingress", "untag")
    configure(relay, "r0", RELAY, BEHIND)
    with (
        running(relay, tmp_path, "generic", links="r0", by=IN_VLANS) as offloading,
        offloading.client(far) as client,
        network.peer.udp(PEER[Family.IPV4]) as peer,
    ):
        assert "r0 has VLANs on it, which generic mode doesn't show" in offloading.log
        way = Talk(offloading, client, peer)
        for _ in range(10):
            way.both()
        assert offloading.counts()[:2] == (0, 0)
        relay.ip(f"link del {CHILD}")
        far.run("tc", "qdisc", "del", "dev", "c0", "clsact")
        way.wait_for_kernel()
