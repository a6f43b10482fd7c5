"""VLAN tags and padding around packets."""

from collections.abc import Callable
from typing import Final

import pytest

from relay.offload.layout import Own
from tests.support.offload.model import Tables, Verdict
from tests.support.offload.packets import IPV4, IPV6
from tests.support.offload.runners import Runner
from tests.support.offload.world import OWN, agreed, from_client, from_peer, hairpin, world

Sender = Callable[..., bytes]

FAMILIES: Final = [pytest.param(4, id="ipv4"), pytest.param(6, id="ipv6")]

clients = pytest.mark.parametrize("client", FAMILIES)
peers = pytest.mark.parametrize("peer", FAMILIES)

# ---------------------------------------------------------------------------------------------------- behind the packet

PADDED: Final = [
    # A peer's packet has no ChannelData header, and the packet to the client has the minimum size. IPv6 has no minimum size.
    pytest.param(4, 4, from_peer, 14, id="peer-to-client"),
    pytest.param(4, 6, from_client, 3, id="client-to-ipv6-peer"),
    pytest.param(6, 4, from_peer, 0, id="peer-to-ipv6-client"),
]


@pytest.mark.parametrize(("client", "peer", "sent", "size"), PADDED)
@pytest.mark.parametrize("tags", [(), (7,)], ids=["untagged", "tagged"])
def test_padding_is_not_relayed(
    runner: Runner, client: int, peer: int, sent: Sender, size: int, tags: tuple[int, ...]
) -> None:
    payload, family = bytes(range(1, size + 1)), client if sent is from_client else peer
    tables = world(client, peer).in_vlan(7 if tags else 0)
    bare = sent(family, payload, tags=tags)
    for length in (60, 61, 64):
        padding = b"\xee" * (length - len(bare))
        (outcome,) = agreed(runner, tables, bare + padding)
        assert outcome.verdict is Verdict.TX
        assert outcome.frame.endswith(payload + padding)


@pytest.mark.parametrize(("client", "peer", "sent", "size"), PADDED)
@pytest.mark.parametrize("tags", [(), (7,)], ids=["untagged", "tagged"])
def test_data_longer_than_padding_is_left_to_the_sockets(
    runner: Runner, client: int, peer: int, sent: Sender, size: int, tags: tuple[int, ...]
) -> None:
    family = client if sent is from_client else peer
    tables = world(client, peer).in_vlan(7 if tags else 0)
    bare = sent(family, bytes(size), tags=tags)
    for length in (65, 66, 1514):
        frame = bare + bytes(length - len(bare))
        assert agreed(runner, tables, frame)[0] == (Verdict.PASS, frame, 0, None)


@clients
@pytest.mark.parametrize("hidden", [1, 4, 1400])
@pytest.mark.parametrize("direction", ["to-peer", "to-client"])
def test_data_behind_a_packet_of_full_size_is_left_to_the_sockets(
    runner: Runner, client: int, hidden: int, direction: str
) -> None:
    sent = from_client if direction == "to-peer" else from_peer
    frame = sent(client, trailing=bytes(hidden))
    assert agreed(runner, world(client, client), frame)[0] == (Verdict.PASS, frame, 0, None)
    assert agreed(runner, world(client, client), sent(client))[0].verdict is Verdict.TX


# ------------------------------------------------------------------------------------------------- own addresses' VLANs


def with_vlans(tables: Tables, ipv4_vlan: int, ipv6_vlan: int) -> Tables:
    """Return the tables with a separate VLAN for each of this machine's addresses."""
    return tables.with_settings(own=(Own(OWN[4], ipv4_vlan), Own(OWN[6], ipv6_vlan)))


@clients
@peers
@pytest.mark.parametrize("vlan", [1, 7, 0x0100, 0x0FFF])
@pytest.mark.parametrize("priority", [0x0000, 0x1000, 0xE000, 0xF000])
def test_packets_with_the_tag_of_their_address_are_relayed_at_any_priority(
    runner: Runner, client: int, peer: int, vlan: int, priority: int
) -> None:
    tags = (priority | vlan,)
    outcomes = agreed(runner, world(client, peer).in_vlan(vlan), from_client(client, tags=tags), from_peer(peer, tags=tags))
    assert [each.verdict for each in outcomes] == [Verdict.TX] * 2
    assert {each.frame[12:14] for each in outcomes} <= {IPV4.to_bytes(2, "big"), IPV6.to_bytes(2, "big")}


@clients
@peers
@pytest.mark.parametrize("tag", [0x0000, 0xE000, 0x1000])
def test_a_priority_tag_counts_as_untagged(runner: Runner, client: int, peer: int, tag: int) -> None:
    frames = from_client(client, tags=(tag,)), from_peer(peer, tags=(tag,))
    assert [each.verdict for each in agreed(runner, world(client, peer), *frames)] == [Verdict.TX] * 2
    assert {each[:1] + each[2:] for each in agreed(runner, world(client, peer).in_vlan(7), *frames)} == {
        (Verdict.PASS, 0, None)
    }


@clients
@peers
@pytest.mark.parametrize(
    ("vlan", "tags"),
    [
        (0, (7,)),
        (0, (0x0FFF,)),
        (7, ()),
        (7, (6,)),
        (7, (0x0107,)),
        (0x0107, (7,)),
        (0x0107, (0x0701,)),
        (7, (0x0807,)),
        (7, (8, 7)),
        (7, (7, 7)),
    ],
    ids=str,
)
def test_a_packet_with_the_wrong_tag_for_its_address_is_ignored(
    runner: Runner, client: int, peer: int, vlan: int, tags: tuple[int, ...]
) -> None:
    frames = from_client(client, tags=tags), from_peer(peer, tags=tags)
    outcomes = agreed(runner, world(client, peer).in_vlan(vlan), *frames)
    assert outcomes == [(Verdict.PASS, frame, 0, None) for frame in frames]
    assert not any(runner.totals().passed)


def test_each_address_has_its_own_vlan(runner: Runner) -> None:
    tables = with_vlans(world(4, 6), 7, 8)
    for tag, there, back in ((7, Verdict.TX, Verdict.PASS), (8, Verdict.PASS, Verdict.TX)):
        outcomes = agreed(runner, tables, from_client(4, tags=(tag,)), from_peer(6, tags=(tag,)))
        assert [each.verdict for each in outcomes] == [there, back]
    outcomes = agreed(runner, with_vlans(world(4, 6), 0, 8), from_client(4), from_peer(6), from_peer(6, tags=(8,)))
    assert [each.verdict for each in outcomes] == [Verdict.TX, Verdict.PASS, Verdict.TX]


def test_between_clients_only_the_vlan_of_the_service_counts(runner: Runner) -> None:
    tables = with_vlans(hairpin(4, 4, 6), 7, 8)
    assert agreed(runner, tables, from_client(4, tags=(7,)))[0].verdict is Verdict.TX
    assert agreed(runner, tables, from_client(4, tags=(8,)))[0].verdict is Verdict.PASS


IN_VLAN_IGNORED: Final = {
    "no VLAN tag": from_client(),
    "no VLAN tag over IPv6": from_client(6),
    "a tag with no VLAN": from_client(tags=(0,)),
    "two VLAN tags": from_client(tags=(7, 8)),
    "the same VLAN tag twice": from_client(tags=(7, 7)),
    "a tag and ARP": from_client(tags=(7,), kind=0x0806),
    "half an IPv4 header behind a tag": from_client(tags=(7,))[:37],
    "half a UDP header behind a tag": from_client(tags=(7,))[:45],
    "half an IPv6 header behind a tag": from_client(6, tags=(7,))[:57],
    "something behind it": from_client(tags=(7,), trailing=b"?"),
}


@clients
@pytest.mark.parametrize("frame", [pytest.param(frame, id=name) for name, frame in IN_VLAN_IGNORED.items()])
def test_unrelated_packets_in_a_vlan_pass_untouched(runner: Runner, client: int, frame: bytes) -> None:
    assert agreed(runner, world(client).in_vlan(7), frame)[0] == (Verdict.PASS, frame, 0, None)
    assert not any(runner.totals().passed)
