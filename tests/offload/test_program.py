"""Single packets through the XDP program: under sanitizers, and in the kernel.

Each test compares all results and counters with tests/support/offload/model.py. Its own assertions concern its name.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Final

import pytest

from relay.offload.layout import CHANNEL as CHANNEL_LAYOUT
from relay.offload.layout import NEXT_HOP, NextHop, Own, PassReason, packed_address
from tests.support.offload.model import SECOND, Channel, Device, Entry, Hop, Tables, Verdict, Way, key_of
from tests.support.offload.packets import (
    IPV4,
    IPV6,
    VLAN,
    channel_data,
    checksum_of,
    ethernet,
    ipv4,
    ipv6,
    pseudo_header,
    sum_of,
    udp,
    with_right_header,
)
from tests.support.offload.runners import ENTRIES, HostRunner, Runner
from tests.support.offload.world import (
    BACK_MAC,
    CHANNEL,
    CLIENT,
    CLIENT_PORT,
    ELSEWHERE,
    FRONT_MAC,
    HERE,
    NUMBER,
    OTHER,
    OTHER_CHANNEL,
    OTHER_NUMBER,
    OTHER_PORT,
    OTHER_RELAYED,
    OUR_MAC,
    OWN,
    PAYLOAD,
    PEER,
    PEER_PORT,
    RELAYED,
    SERVICE,
    SETTINGS,
    agreed,
    client_says,
    datagram,
    from_client,
    from_peer,
    hairpin,
    next_hop,
    world,
)

FAMILIES: Final = [pytest.param(4, id="ipv4"), pytest.param(6, id="ipv6")]
HEADER: Final = {4: 20, 6: 40}
LABELS: Final = {CHANNEL: 0x9F054, OTHER_CHANNEL: 0x46C69}
"""Flow labels of the channels."""

HOP: Final = NextHop(HERE, OWN[6], BACK_MAC, OUR_MAC, mtu=1500)

clients = pytest.mark.parametrize("client", FAMILIES)
peers = pytest.mark.parametrize("peer", FAMILIES)


def expected_frame(
    source: tuple[bytes, int], destination: tuple[bytes, int], payload: bytes, mac: bytes, label: int
) -> bytes:
    """Return the relayed frame, independently of the model."""
    inner = udp(source, destination, payload)
    if len(destination[0].lstrip(b"\0")) <= 6:
        return ethernet(mac, OUR_MAC, IPV4, ipv4(source[0], destination[0], inner, hop_limit=63))
    return ethernet(mac, OUR_MAC, IPV6, ipv6(source[0], destination[0], inner, hop_limit=63, flow_label=label))


def ip_of(frame: bytes) -> bytes:
    """Return the IP packet in a frame with or without a tag."""
    return frame[18:] if frame[12:14] == VLAN.to_bytes(2, "big") else frame[14:]


def udp_sum(family: int, frame: bytes) -> int:
    """Return the sum over a whole datagram, 0 for a correct checksum."""
    packet = ip_of(frame)
    source, destination = (packet[12:16], packet[16:20]) if family == 4 else (packet[8:24], packet[24:40])
    mapped = PEER[4][:12] if family == 4 else b""
    inner = packet[HEADER[family] :]
    return sum_of(pseudo_header(mapped + source, mapped + destination, len(inner)), inner)


# ----------------------------------------------------------------------------------------------------------- relayed


@clients
@peers
def test_channel_data_becomes_a_datagram_from_the_relayed_address(runner: Runner, client: int, peer: int) -> None:
    (outcome,) = agreed(runner, world(client, peer), from_client(client))
    source, destination = (OWN[peer], RELAYED), (PEER[peer], PEER_PORT)
    assert outcome == (Verdict.TX, expected_frame(source, destination, PAYLOAD, BACK_MAC, LABELS[CHANNEL]), 0, None)


@clients
@peers
def test_a_peers_datagram_becomes_channel_data_from_the_service(runner: Runner, client: int, peer: int) -> None:
    (outcome,) = agreed(runner, world(client, peer), from_peer(peer))
    source, destination = (OWN[client], SERVICE), (CLIENT[client], CLIENT_PORT)
    message = channel_data(NUMBER, PAYLOAD)
    assert outcome == (Verdict.TX, expected_frame(source, destination, message, FRONT_MAC, LABELS[CHANNEL]), 0, None)


@clients
@pytest.mark.parametrize("other", FAMILIES)
@pytest.mark.parametrize("relayed", FAMILIES)
def test_a_packet_between_two_clients_is_relayed_in_a_single_pass(
    runner: Runner, client: int, other: int, relayed: int
) -> None:
    (outcome,) = agreed(runner, hairpin(client, other, relayed), from_client(client))
    source, destination = (OWN[other], SERVICE), (OTHER[other], OTHER_PORT)
    message = channel_data(OTHER_NUMBER, PAYLOAD)
    assert outcome == (Verdict.TX, expected_frame(source, destination, message, FRONT_MAC, LABELS[OTHER_CHANNEL]), 0, None)
    assert runner.usage(2 * CHANNEL)[:2] == runner.usage(2 * OTHER_CHANNEL + 1)[:2] == (1, len(PAYLOAD))
    assert runner.totals().packets == [1, 1]


@clients
@peers
@pytest.mark.parametrize("tags", [(), (0x2007,)], ids=["untagged", "tagged"])
@pytest.mark.parametrize("vlan", [0, 0x6FFE], ids=["to-untagged", "to-tagged"])
@pytest.mark.parametrize("direction", ["to-peer", "to-client"])
def test_the_vlan_tag_comes_from_the_next_hop_not_from_the_packet(
    runner: Runner, client: int, peer: int, tags: tuple[int, ...], vlan: int, direction: str
) -> None:
    frame = from_client(client, tags=tags) if direction == "to-peer" else from_peer(peer, tags=tags)
    (outcome,) = agreed(runner, world(client, peer, vlan).in_vlan(7 if tags else 0), frame)
    assert outcome.verdict is Verdict.TX
    family = peer if direction == "to-peer" else client
    kind = (IPV4 if family == 4 else IPV6).to_bytes(2, "big")
    assert outcome.frame[12:].startswith(b"\x81\x00\x6f\xfe" + kind if vlan else kind)


@clients
@peers
@pytest.mark.parametrize("traffic_class", [0x00, 0x01, 0x02, 0x03, 0xB8, 0xBB, 0xFF])
def test_the_traffic_class_is_copied(runner: Runner, client: int, peer: int, traffic_class: int) -> None:
    there, back = agreed(
        runner,
        world(client, peer),
        from_client(client, ip={"traffic_class": traffic_class}),
        from_peer(peer, ip={"traffic_class": traffic_class}),
    )
    for family, outcome in ((peer, there), (client, back)):
        packet = ip_of(outcome.frame)
        assert traffic_class == (packet[1] if family == 4 else (packet[0] & 15) << 4 | packet[1] >> 4)


@clients
@peers
@pytest.mark.parametrize("hop_limit", [2, 3, 64, 255])
def test_the_hop_limit_is_decremented(runner: Runner, client: int, peer: int, hop_limit: int) -> None:
    (outcome,) = agreed(runner, world(client, peer), from_client(client, ip={"hop_limit": hop_limit}))
    assert ip_of(outcome.frame)[8 if peer == 4 else 7] == hop_limit - 1


@clients
@pytest.mark.parametrize("fragment", [0x0000, 0x4000, 0x8000])
def test_a_relayed_ipv4_packet_has_the_df_bit(runner: Runner, client: int, fragment: int) -> None:
    sent = {"fragment": fragment, "identification": 0x1234} if client == 4 else {}
    (outcome,) = agreed(runner, world(client), from_client(client, ip=sent))
    packet = ip_of(outcome.frame)
    assert packet[4:8] == b"\0\0\x40\0"
    assert sum_of(packet[:20]) == 0


@clients
@peers
@pytest.mark.parametrize("slot", [0, 1, ENTRIES - 1, ENTRIES, (1 << 31) - 1])
def test_the_flow_label_comes_from_the_channel(runner: Runner, client: int, peer: int, slot: int) -> None:
    sent: dict[str, int] = {"flow_label": 0xFFFFF} if client == 6 else {}
    tables = world(client, peer)
    tables = Tables.of(tables.settings, {slot: tables.channels[CHANNEL]}, tables.next_hops)
    (outcome,) = agreed(runner, tables, from_client(client, ip={**sent, "traffic_class": 0xFF}))
    label = (slot + 1) * 0xA7C15 & 0xFFFFF
    assert peer == 4 or int.from_bytes(ip_of(outcome.frame)[:4], "big") == 0x6FF00000 | label


def test_flow_labels_have_20_bits_are_nonzero_and_differ() -> None:
    """The model has the program's labels."""
    labels = [Entry(world().channels[CHANNEL], slot).flow_label for slot in range(1 << 16)]
    assert len(set(labels)) == len(labels)
    assert all(0 < label < 1 << 20 for label in labels)
    assert min(abs(a - b) for a, b in pairwise(labels)) > 1 << 16


@clients
@peers
@pytest.mark.parametrize("size", [20, 21, 127, 128, 129, 255, 256, 1000, 1371, 1372])
def test_payloads_of_any_size_are_unchanged(runner: Runner, client: int, peer: int, size: int) -> None:
    payload = bytes(each * each % 251 for each in range(size))
    there, back = agreed(runner, world(client, peer), from_client(client, payload), from_peer(peer, payload))
    assert there.frame.endswith(payload)
    assert back.frame.endswith(channel_data(NUMBER, payload))
    assert udp_sum(peer, there.frame) == udp_sum(client, back.frame) == 0
    totals = runner.totals()
    for direction in (0, 1):
        assert totals.sizes[direction] == [int(step == min(size // 128, 15)) for step in range(16)]


def test_the_largest_payloads_share_a_histogram_bucket(host: HostRunner) -> None:
    tables = world().with_next_hops(mtu=9000)
    agreed(host, tables, *(from_client(4, bytes(size)) for size in (1919, 1920, 2047, 2048, 8900)))
    assert host.totals().sizes[0][14:] == [1, 4]


@clients
def test_an_empty_payload_goes_to_an_ipv6_peer(runner: Runner, client: int) -> None:
    there, back = agreed(runner, world(client, 6), from_client(client, b""), from_peer(6, b""))
    assert there.verdict is Verdict.TX
    assert back.verdict is (Verdict.TX if client == 6 else Verdict.PASS)


@pytest.mark.parametrize(
    "like", ["1::ffff:c0:9", "0:1::ffff:192.0.2.9", "0:0:1::ffff:192.0.2.9", "::1:ffff:192.0.2.9", "::192.0.2.9"]
)
def test_an_ipv6_address_similar_to_a_mapped_address_is_relayed(runner: Runner, like: str) -> None:
    peer = packed_address(like)
    tables = world(4, 6).with_channels(peer=(peer, PEER_PORT, RELAYED))
    tables = replace(
        tables,
        next_hops={
            **tables.next_hops,
            peer: next_hop(PEER[6], BACK_MAC),
        },
    )
    there, back_again = agreed(runner, tables, from_client(), datagram((peer, PEER_PORT), (OWN[6], RELAYED), PAYLOAD))
    assert there.verdict is back_again.verdict is Verdict.TX
    assert there.frame[12:14] == IPV6.to_bytes(2, "big")


@pytest.mark.parametrize("client_port", [1, SERVICE, 49152, 65535])
def test_clients_can_use_any_port(runner: Runner, client_port: int) -> None:
    tables = world().with_channels(client=(CLIENT[4], client_port, NUMBER))
    (outcome,) = agreed(runner, tables, datagram((CLIENT[4], client_port), (OWN[4], SERVICE), channel_data(NUMBER, PAYLOAD)))
    assert outcome.verdict is Verdict.TX


@pytest.mark.parametrize("number", [0x4000, 0x4FFF, 0x5000, 0x7FFF])
def test_channel_numbers_of_rfc_5766_are_relayed(runner: Runner, number: int) -> None:
    tables = world().with_channels(client=(CLIENT[4], CLIENT_PORT, number))
    assert agreed(runner, tables, from_client(number=number))[0].verdict is Verdict.TX


@pytest.mark.parametrize("port", [49152, 49153, 65534, 65535])
def test_relayed_ports_include_the_lowest_and_the_highest(runner: Runner, port: int) -> None:
    tables = world().with_channels(peer=(PEER[4], PEER_PORT, port))
    frame = datagram((PEER[4], PEER_PORT), (OWN[4], port), PAYLOAD)
    outside = tables.with_settings(
        lowest_port=port + 1 if port < 65535 else 1, highest_port=65535 if port < 65535 else 65534
    )
    assert agreed(runner, tables, frame)[0].verdict is Verdict.TX
    assert agreed(runner, tables.with_settings(lowest_port=port, highest_port=port), frame)[0].verdict is Verdict.TX
    assert agreed(runner, outside, frame)[0] == (Verdict.PASS, frame, 0, None)


def test_the_service_port_takes_precedence_within_the_relayed_ports(runner: Runner) -> None:
    assert agreed(runner, world().with_settings(lowest_port=SERVICE), from_client())[0].verdict is Verdict.TX


def test_channels_of_a_client_are_distinguished(runner: Runner) -> None:
    tables = world()
    (channel,) = tables.channels.values()
    more = Channel((CLIENT[4], CLIENT_PORT, OTHER_NUMBER), (PEER[6], 7, RELAYED))
    hops = {**tables.next_hops, PEER[6]: next_hop(PEER[6], FRONT_MAC)}
    tables = Tables.of(tables.settings, {CHANNEL: channel, OTHER_CHANNEL: more}, hops)
    agreed(runner, tables, from_client(), from_client(number=OTHER_NUMBER), from_client(number=OTHER_NUMBER))
    assert runner.usage(2 * CHANNEL).packets == 1
    assert runner.usage(2 * OTHER_CHANNEL).packets == 2


@pytest.mark.parametrize("byte", range(20))
def test_each_byte_of_an_end_is_compared(runner: Runner, byte: int) -> None:
    """Whoever has another address, port or number has no channel."""
    tables = world(6, 6)
    (channel,) = tables.channels.values()
    changed = channel._replace(client=with_bit(channel.client, byte)), channel._replace(peer=with_bit(channel.peer, byte))
    for other, expected in zip(changed, ([PassReason.UNBOUND, None], [None, PassReason.UNBOUND]), strict=True):
        found = Tables.of(tables.settings, {CHANNEL: other}, dict.fromkeys(tables.next_hops, Hop(HOP)))
        hops = {each: Hop(HOP) for each in (channel.client[0], channel.peer[0], other.client[0], other.peer[0])}
        outcomes = agreed(runner, replace(found, next_hops=hops), from_client(6), from_peer(6))
        assert [each.reason for each in outcomes] == expected


def with_bit(end: tuple[bytes, int, int], byte: int) -> tuple[bytes, int, int]:
    """Return an end with another bit in a byte."""
    packed = bytearray(key_of(end))
    packed[byte] ^= 1
    return bytes(packed[:16]), int.from_bytes(packed[16:18], "big"), int.from_bytes(packed[18:], "big")


@pytest.mark.parametrize("bit", range(0, 8 * CHANNEL_LAYOUT.size - 32, 3))
def test_a_channel_in_change_is_left_to_the_sockets(runner: Runner, bit: int) -> None:
    """The kernel may write an entry while the program reads the entry."""
    assert both_ways(runner, world().with_flipped(bit)) == [PassReason.UNBOUND] * 2


def test_the_entry_of_another_end_is_not_used(runner: Runner) -> None:
    """The kernel may reuse the memory of an entry between its look-up and its reading."""
    tables, others = world(), hairpin()
    (mine,), other = tables.clients.values(), others.clients[OTHER[4], OTHER_PORT, OTHER_NUMBER]
    for entry in (other, Entry(other.channel, mine.slot)):
        there = replace(tables, clients=dict.fromkeys(tables.clients, entry), peers=dict.fromkeys(tables.peers, entry))
        assert both_ways(runner, there) == [PassReason.UNBOUND] * 2


# ------------------------------------------------------------------------------------------------- where it is sent


def test_packets_for_another_interface_are_redirected(runner: Runner) -> None:
    (outcome,) = agreed(runner, world().with_next_hops(ifindex=ELSEWHERE), from_client())
    assert outcome.verdict is Verdict.REDIRECT
    assert outcome.ifindex == ELSEWHERE


def test_without_xdp_tx_packets_for_the_receiving_interface_are_redirected(runner: Runner) -> None:
    tables = world().with_settings(devices=(Device(HERE, OUR_MAC),))
    (outcome,) = agreed(runner, tables, from_client())
    assert outcome.verdict is Verdict.REDIRECT
    assert outcome.ifindex == HERE


def test_the_last_of_many_interfaces_and_addresses_is_used(runner: Runner) -> None:
    devices = (
        *(Device(10 + index, FRONT_MAC, sends_back=True) for index in range(7)),
        Device(HERE, OUR_MAC, sends_back=True),
    )
    own = tuple(Own(each) for each in (*(bytes(15) + bytes([index]) for index in range(1, 15)), OWN[6], OWN[4]))
    tables = world().with_settings(devices=devices, own=own)
    assert agreed(runner, tables, from_client())[0].verdict is Verdict.TX
    for shorter in (tables.with_settings(devices=devices[:-1]), tables.with_settings(own=own[:-1])):
        assert agreed(runner, shorter, from_client())[0].verdict is Verdict.PASS


def test_entries_beyond_the_counts_are_ignored(host: HostRunner) -> None:
    class Stale(type(SETTINGS)):  # type: ignore[misc]
        """Settings with stale entries beyond the counts."""

        def packed(self) -> bytes:
            packed = bytearray(super().packed())
            packed[self.offset : self.offset + self.size] = bytes(self.size)
            return bytes(packed)

    layout = host.layout()
    for field, size in (("own_count", 2), ("device_count", 4)):
        settings = Stale(*SETTINGS)
        settings.offset, settings.size = layout[f"settings.{field}"], size
        tables = world()
        host.load(replace(tables, settings=settings))
        assert host.run(from_client()).verdict is Verdict.PASS


def test_counts_beyond_the_capacity_are_limited(host: HostRunner) -> None:
    layout = host.layout()
    settings = bytearray(SETTINGS.packed())
    for field in ("own_count", "device_count"):
        settings[layout[f"settings.{field}"]] = 255

    class Full(type(SETTINGS)):  # type: ignore[misc]
        def packed(self) -> bytes:
            return bytes(settings)

    host.load(replace(world(), settings=Full(*SETTINGS)))
    assert host.run(from_client()).verdict is Verdict.TX
    assert host.run(from_client(), ELSEWHERE).verdict is Verdict.PASS
    stranger = datagram((CLIENT[4], CLIENT_PORT), (OTHER[4], SERVICE), channel_data(NUMBER, PAYLOAD))
    assert host.run(stranger).verdict is Verdict.PASS


# -------------------------------------------------------------------------------------------------------- checksums


def with_last_word(message: bytes, word: int) -> bytes:
    return message[:-2] + word.to_bytes(2, "big")


@clients
@peers
def test_a_computed_checksum_of_zero_is_sent_as_all_ones(runner: Runner, client: int, peer: int) -> None:
    length = 8 + len(PAYLOAD)
    ports = RELAYED.to_bytes(2, "big") + PEER_PORT.to_bytes(2, "big") + length.to_bytes(2, "big")
    without = with_last_word(PAYLOAD, 0)
    payload = with_last_word(PAYLOAD, checksum_of(pseudo_header(OWN[peer], PEER[peer], length), ports, without))
    (outcome,) = agreed(runner, world(client, peer), from_client(client, payload))
    assert ip_of(outcome.frame)[HEADER[peer] + 6 : HEADER[peer] + 8] == b"\xff\xff"


@clients
@peers
def test_a_received_checksum_of_all_ones_is_valid(runner: Runner, client: int, peer: int) -> None:
    message = channel_data(NUMBER, with_last_word(PAYLOAD, 0))
    ports = CLIENT_PORT.to_bytes(2, "big") + SERVICE.to_bytes(2, "big") + (8 + len(message)).to_bytes(2, "big")
    pseudo = pseudo_header(CLIENT[client], OWN[client], 8 + len(message))
    frame = from_client(client, with_last_word(PAYLOAD, checksum_of(pseudo, ports, message)))
    assert frame[14 + HEADER[client] + 6 :][:2] == b"\xff\xff"
    (outcome,) = agreed(runner, world(client, peer), frame)
    assert outcome.verdict is Verdict.TX
    assert udp_sum(peer, outcome.frame) == 0


@clients
@peers
@pytest.mark.parametrize("error", [1, 0x0100, 0x7FFF, 0xFFFE])
def test_a_wrong_checksum_keeps_its_error(runner: Runner, client: int, peer: int, error: int) -> None:
    tables = world(client, peer)
    for frame, family in ((from_client(client), peer), (from_peer(peer), client)):
        came_by = client if family == peer and frame == from_client(client) else peer
        at = 14 + HEADER[came_by] + 6
        wrong = (int.from_bytes(frame[at : at + 2], "big") + error) % 0xFFFF or 0xFFFF
        (outcome,) = agreed(runner, tables, frame[:at] + wrong.to_bytes(2, "big") + frame[at + 2 :])
        assert outcome.verdict is Verdict.TX
        assert udp_sum(family, outcome.frame) == error


@clients
def test_a_damaged_payload_is_relayed_with_its_wrong_checksum(runner: Runner, client: int) -> None:
    frame = bytearray(from_client(client))
    frame[-3] ^= 0x40
    (outcome,) = agreed(runner, world(client), bytes(frame))
    assert udp_sum(4, outcome.frame) != 0


# ------------------------------------------------------------------------------------ left to the sockets, and counted

STUN: Final = bytes.fromhex("000100002112a442") + bytes(12)


def counted(reason: PassReason, frame: bytes, name: str) -> object:
    return pytest.param(frame, reason, id=f"{reason.name.lower().replace('_', '-')}:{name}")


LEFT: Final = [
    counted(PassReason.NO_CHANNEL_DATA, client_says(STUN), "STUN"),
    counted(PassReason.NO_CHANNEL_DATA, client_says(b""), "nothing"),
    counted(PassReason.NO_CHANNEL_DATA, client_says(b"\x40\x01\x00"), "three bytes"),
    counted(PassReason.NO_CHANNEL_DATA, client_says(b"\x40\x01\x00", trailing=bytes(15)), "three bytes and padding"),
    counted(PassReason.NO_CHANNEL_DATA, from_client(number=0x3FFF), "below channel numbers"),
    counted(PassReason.NO_CHANNEL_DATA, from_client(number=0x8000), "above channel numbers"),
    counted(PassReason.NO_CHANNEL_DATA, from_client(number=0xC001), "far above channel numbers"),
    counted(PassReason.ODD_LENGTH, client_says(channel_data(NUMBER, bytes(99)) + b"\0"), "padded"),
    counted(PassReason.ODD_LENGTH, client_says(channel_data(NUMBER, PAYLOAD)[:-1]), "cut off"),
    counted(PassReason.ODD_LENGTH, client_says(channel_data(NUMBER, b"", length=0xFFFF)), "far too long"),
    counted(PassReason.ODD_LENGTH, client_says(channel_data(NUMBER, PAYLOAD, length=0)), "empty, with something behind"),
    counted(PassReason.UNBOUND, from_client(number=NUMBER + 1), "another channel"),
    counted(
        PassReason.UNBOUND,
        datagram((CLIENT[4], CLIENT_PORT + 1), (OWN[4], SERVICE), channel_data(NUMBER, PAYLOAD)),
        "another port of the client's host",
    ),
    counted(
        PassReason.UNBOUND,
        datagram((OTHER[4], CLIENT_PORT), (OWN[4], SERVICE), channel_data(NUMBER, PAYLOAD)),
        "another client",
    ),
    counted(PassReason.UNBOUND, from_client(6), "another family"),
    counted(PassReason.UNBOUND, datagram((PEER[4], PEER_PORT + 1), (OWN[4], RELAYED), PAYLOAD), "another port of the peer"),
    counted(PassReason.UNBOUND, datagram((OTHER[4], PEER_PORT), (OWN[4], RELAYED), PAYLOAD), "another peer"),
    counted(PassReason.UNBOUND, datagram((PEER[4], PEER_PORT), (OWN[4], RELAYED + 1), PAYLOAD), "another relayed port"),
    counted(PassReason.UNBOUND, from_peer(6), "a peer of another family"),
    counted(PassReason.NO_CHECKSUM, from_client(udp_fields={"checksum": 0}), "from a client"),
    counted(PassReason.NO_CHECKSUM, from_peer(udp_fields={"checksum": 0}), "from a peer"),
    counted(PassReason.LAST_HOP, from_client(ip={"hop_limit": 1}), "1"),
    counted(PassReason.LAST_HOP, from_client(ip={"hop_limit": 0}), "0"),
    counted(PassReason.LAST_HOP, from_peer(ip={"hop_limit": 1}), "from a peer"),
    counted(PassReason.TOO_LONG, from_client(payload=bytes(1473)), "to a peer"),
    counted(PassReason.TOO_LONG, from_peer(payload=bytes(1469)), "to a client"),
    counted(PassReason.SHORT_FRAME, from_client(payload=bytes(17)), "to a peer"),
    counted(PassReason.SHORT_FRAME, from_client(payload=b"", trailing=bytes(14)), "empty"),
    counted(PassReason.SHORT_FRAME, from_peer(payload=bytes(13)), "to a client"),
]


@pytest.mark.parametrize(("frame", "reason"), LEFT)
def test_packets_for_the_sockets_pass(runner: Runner, frame: bytes, reason: PassReason) -> None:
    assert agreed(runner, world(), frame)[0] == (Verdict.PASS, frame, 0, reason)
    assert runner.totals().passed == [int(each == reason) for each in PassReason]


@clients
@peers
def test_the_mtu_limits_the_relayed_packet(runner: Runner, client: int, peer: int) -> None:
    longest = {4: 1500 - 28, 6: 1500 - 48}
    tables = world(client, peer)
    for frame, reason in (
        (from_client(client, bytes(longest[peer])), None),
        (from_client(client, bytes(longest[peer] + 1)), PassReason.TOO_LONG),
        (from_peer(peer, bytes(longest[client] - 4)), None),
        (from_peer(peer, bytes(longest[client] - 3)), PassReason.TOO_LONG),
    ):
        assert agreed(runner, tables, frame)[0].reason is reason


@clients
@peers
def test_too_short_relayed_frames_are_left_to_the_sockets(runner: Runner, client: int, peer: int) -> None:
    shortest = {4: 60 - 42, 6: 0}
    tables = world(client, peer)
    for size, frame in ((shortest[peer], from_client), (max(shortest[client] - 4, 0), from_peer)):
        family = client if frame is from_client else peer
        assert agreed(runner, tables, frame(family, bytes(size)))[0].verdict is Verdict.TX
        if size:
            assert agreed(runner, tables, frame(family, bytes(size - 1)))[0].reason is PassReason.SHORT_FRAME


@clients
@pytest.mark.parametrize("direction", ["to-peer", "to-client"])
def test_an_incomplete_checksum_is_left_to_the_sockets(runner: Runner, client: int, direction: str) -> None:
    if direction == "to-peer":
        ends, message, target = (CLIENT[client], OWN[client]), channel_data(NUMBER, PAYLOAD), from_client
    else:
        ends, message, target = (PEER[client], OWN[client]), PAYLOAD, from_peer
    partial = sum_of(pseudo_header(*ends, 8 + len(message)))
    for checksum, reason in ((partial, PassReason.PARTIAL_CHECKSUM), (partial + 1, None), (0xFFFF - partial, None)):
        frame = target(client, udp_fields={"checksum": checksum})
        assert agreed(runner, world(client, client), frame)[0].reason is reason


def both_ways(runner: Runner, tables: Tables) -> list[PassReason | None]:
    return [each.reason for each in agreed(runner, tables, from_client(), from_peer())]


def test_an_expired_channel_is_ignored(runner: Runner) -> None:
    now = runner.now()
    expired = PassReason.EXPIRED
    assert both_ways(runner, world().with_channels(expires=now - SECOND)) == [expired] * 2
    assert both_ways(runner, world().with_channels(expires=1)) == [expired] * 2
    assert both_ways(runner, world().with_channels(expires=now + 60 * SECOND)) == [None] * 2


def test_a_channel_is_valid_until_its_last_nanosecond(host: HostRunner) -> None:
    now = host.now()
    for until, reason in ((now, PassReason.EXPIRED), (now + 1, None)):
        assert both_ways(host, world().with_channels(expires=until)) == [reason] * 2


def test_between_clients_both_channels_must_be_valid(runner: Runner) -> None:
    past = runner.now() - SECOND
    tables = hairpin()
    for broken, reason in (
        (tables.with_channels(CHANNEL, expires=past), PassReason.EXPIRED),
        (tables.with_channels(OTHER_CHANNEL, expires=past), PassReason.EXPIRED),
        (replace(tables, peers={}), PassReason.UNBOUND),
        (tables.with_channels(CHANNEL, peer=(OWN[4], OTHER_RELAYED + 1, RELAYED)), PassReason.UNBOUND),
        (tables.with_channels(OTHER_CHANNEL, peer=(OWN[4], RELAYED + 1, OTHER_RELAYED)), PassReason.UNBOUND),
        (tables.with_channels(OTHER_CHANNEL, peer=(OWN[4], RELAYED, OTHER_RELAYED + 1)), PassReason.UNBOUND),
        (tables.with_channels(OTHER_CHANNEL, peer=(OWN[6], RELAYED, OTHER_RELAYED)), PassReason.UNBOUND),
    ):
        assert agreed(runner, broken, from_client())[0].reason is reason


def test_between_clients_the_mtu_check_uses_the_longer_header(runner: Runner) -> None:
    for size, reason in ((1468, None), (1469, PassReason.TOO_LONG)):
        assert agreed(runner, hairpin(), from_client(payload=bytes(size)))[0].reason is reason


@pytest.mark.parametrize("bit", range(0, 8 * NEXT_HOP.size - 128, 3))
def test_a_next_hop_in_change_is_not_used(runner: Runner, bit: int) -> None:
    assert agreed(runner, world().with_next_hops(flipped=bit), from_client())[0].reason is PassReason.NO_NEXT_HOP


WRONG: Final = PassReason.WRONG_WAY


@clients
@peers
def test_packets_from_addresses_of_this_machine_are_left_to_the_stack(runner: Runner, client: int, peer: int) -> None:
    tables = world(client, peer)
    for host, reasons in ((CLIENT[client], [WRONG, None]), (PEER[peer], [None, WRONG])):
        outcomes = agreed(runner, replace(tables, ways={host: None}), from_client(client), from_peer(peer))
        assert [each.reason for each in outcomes] == reasons


@clients
@pytest.mark.parametrize("is_strict", [False, True], ids=["any", "strict"])
def test_a_strict_interface_accepts_only_ipv4_packets_of_hosts_behind_it(
    runner: Runner, client: int, *, is_strict: bool
) -> None:
    tables = world(client).with_settings(devices=(Device(HERE, OUR_MAC, sends_back=True, is_strict=is_strict),))
    for way, tags in ((Way(ELSEWHERE), ()), (Way(HERE, 7), ()), (Way(HERE), (7,))):
        other = replace(tables.in_vlan(7) if tags else tables, ways={CLIENT[client]: way})
        rejected = WRONG if is_strict and client == 4 else None
        assert agreed(runner, other, from_client(client, tags=tags))[0].reason is rejected
    assert agreed(runner, tables, from_client(client))[0].reason is None
    in_vlan = replace(tables.in_vlan(7), ways={CLIENT[client]: Way(HERE, 7)})
    assert agreed(runner, in_vlan, from_client(client, tags=(7,)))[0].reason is None


@pytest.mark.parametrize("way", [HERE, ELSEWHERE])
def test_packets_of_a_port_come_by_its_bond(runner: Runner, way: int) -> None:
    devices = (Device(HERE, OUR_MAC, is_strict=True, upper=ELSEWHERE),)
    tables = replace(world().with_settings(devices=devices), ways={CLIENT[4]: Way(way)})
    assert agreed(runner, tables, from_client())[0].reason is (None if way == ELSEWHERE else WRONG)


def test_between_clients_only_the_senders_way_counts(runner: Runner) -> None:
    tables = hairpin().with_settings(devices=(Device(HERE, OUR_MAC, is_strict=True),))
    for ways, reason in (({CLIENT[4]: None}, WRONG), ({OTHER[4]: None, OWN[4]: None}, None)):
        assert agreed(runner, replace(tables, ways=ways), from_client())[0].reason is reason


def test_without_an_entry_there_is_no_next_hop(runner: Runner) -> None:
    assert both_ways(runner, replace(world(), next_hops={})) == [PassReason.NO_NEXT_HOP] * 2
    hops = world().next_hops
    for there, reasons in ((PEER[4], [None, PassReason.NO_NEXT_HOP]), (CLIENT[4], [PassReason.NO_NEXT_HOP, None])):
        assert both_ways(runner, replace(world(), next_hops={there: hops[there]})) == reasons


def test_usage_without_an_entry_is_not_counted(runner: Runner) -> None:
    tables = world()
    (channel,) = tables.channels.values()
    agreed(runner, Tables.of(tables.settings, {ENTRIES // 2: channel}, tables.next_hops), from_client())
    assert runner.totals().packets == [1, 0]


def test_one_packet_per_second_probes_a_stale_neighbour(runner: Runner) -> None:
    tables = world().with_next_hops(stale=True)
    outcomes = agreed(runner, tables, from_client(), from_client(), from_client(), from_peer(), from_peer())
    stale = PassReason.STALE_NEIGHBOUR
    assert [each.reason for each in outcomes] == [stale, None, None, stale, None]


def test_a_stale_neighbour_is_probed_again_after_a_second(runner: Runner) -> None:
    now = runner.now()
    tables = world().with_next_hops(stale=True)
    for ago, reason in ((2 * SECOND, PassReason.STALE_NEIGHBOUR), (SECOND // 10, None)):
        assert agreed(runner, tables.with_next_hops(nudged=now - ago), from_client())[0].reason is reason


def test_the_interval_between_two_probes_is_exact(host: HostRunner) -> None:
    tables, now = world().with_next_hops(stale=True), host.now()
    for ago, reason in ((0, None), (1, None), (SECOND - 1, None), (SECOND, PassReason.STALE_NEIGHBOUR)):
        assert agreed(host, tables.with_next_hops(nudged=now - ago), from_client())[0].reason is reason


def test_probes_continue(host: HostRunner) -> None:
    host.load(world().with_next_hops(stale=True))
    start, asked = host.now(), []
    for tenth in range(60):
        now = start + tenth * SECOND // 10
        with host.at(now):
            if host.run(from_client()).verdict is Verdict.PASS:
                assert host.nudged(PEER[4]) == now
                asked.append(tenth)
    assert asked == list(range(0, 60, 10))


def test_a_reachable_neighbour_is_not_probed(runner: Runner) -> None:
    assert both_ways(runner, world().with_next_hops(nudged=0)) == [None, None]


def test_a_probe_changes_only_the_time_of_a_next_hop(runner: Runner) -> None:
    tables = world().with_next_hops(stale=True, vlan=0x0FFE, mtu=0xFFFF)
    first, second = agreed(runner, tables, from_client(), from_client())
    assert first.reason is PassReason.STALE_NEIGHBOUR
    assert second.frame[:16] == BACK_MAC + OUR_MAC + b"\x81\x00\x0f\xfe"


@pytest.mark.parametrize(("mtu", "reason"), [(0xFFFF, None), (0x1_0000, None), (0, PassReason.TOO_LONG)])
def test_the_mtu_can_be_any_packet_size(runner: Runner, mtu: int, reason: PassReason | None) -> None:
    assert agreed(runner, world().with_next_hops(mtu=mtu), from_client(payload=bytes(1400)))[0].reason is reason


@clients
@peers
def test_a_packet_without_headroom_is_left_to_the_sockets(host: HostRunner, client: int, peer: int) -> None:
    tables = world(client, peer, vlan=7)
    for frame, more in (
        (from_client(client), 4 + HEADER[peer] - HEADER[client] - 4),
        (from_peer(peer), 4 + HEADER[client] - HEADER[peer] + 4),
    ):
        host.load(tables)
        for room, verdict in ((more, Verdict.TX), (more - 1, Verdict.PASS)):
            if room >= 0:
                host.set_headroom(room)
                outcome = host.run(frame)
                assert outcome.verdict is verdict
                assert verdict is Verdict.TX or outcome.frame == frame
        assert host.totals().passed[PassReason.NO_ROOM] == int(more > 0)


# ------------------------------------------------------------------------------------------- none of the relay's business


def inner(payload: bytes = PAYLOAD, **fields: int) -> bytes:
    """The datagram of `from_client`."""
    return udp((CLIENT[4], CLIENT_PORT), (OWN[4], SERVICE), channel_data(NUMBER, payload), **fields)


def over_ipv4(payload: bytes, **fields: int | bytes) -> bytes:
    return ethernet(OUR_MAC, FRONT_MAC, IPV4, ipv4(CLIENT[4], OWN[4], payload, **fields))  # type: ignore[arg-type]


def inner6() -> bytes:
    return udp((CLIENT[6], CLIENT_PORT), (OWN[6], SERVICE), channel_data(NUMBER, PAYLOAD))


def over_ipv6(payload: bytes, **fields: int) -> bytes:
    return ethernet(OUR_MAC, FRONT_MAC, IPV6, ipv6(CLIENT[6], OWN[6], payload, **fields))


HOP_BY_HOP: Final = bytes([17, 0, 1, 4, 0, 0, 0, 0])
FRAGMENT: Final = bytes([17, 0, 0, 1, 0, 0, 0, 7])

IGNORED: Final = {
    "to another MAC address": from_client(to_mac=BACK_MAC),
    "to all": from_client(to_mac=b"\xff" * 6),
    "to a group": from_client(to_mac=b"\x03" + OUR_MAC[1:]),
    "to another address": datagram((CLIENT[4], CLIENT_PORT), (OTHER[4], SERVICE), channel_data(NUMBER, PAYLOAD)),
    "to an unused IPv6 address": datagram((CLIENT[6], CLIENT_PORT), (OTHER[6], SERVICE), channel_data(NUMBER, PAYLOAD)),
    "a peer to another address": datagram((PEER[4], PEER_PORT), (OTHER[4], RELAYED), PAYLOAD),
    "to another port": datagram((CLIENT[4], CLIENT_PORT), (OWN[4], SERVICE + 1), channel_data(NUMBER, PAYLOAD)),
    "to the port below the relayed ones": datagram((PEER[4], PEER_PORT), (OWN[4], 49151), PAYLOAD),
    "ARP": from_client(kind=0x0806),
    "MPLS": from_client(kind=0x8847),
    "IPv4 said to be IPv6": from_client(kind=IPV6),
    "IPv6 said to be IPv4": from_client(6, kind=IPV4),
    "a VLAN tag that our address has not": from_client(tags=(7,)),
    "a VLAN tag that our IPv6 address has not": from_client(6, tags=(7,)),
    "something behind it": from_client(trailing=b"?"),
    "something behind it over IPv6": from_client(6, trailing=b"?"),
    "a provider's tag": ethernet(OUR_MAC, FRONT_MAC, 0x88A8, b"\0\7\x08\0" + from_client()[14:]),
    "a tag and nothing": ethernet(OUR_MAC, FRONT_MAC, VLAN, b""),
    "half a tag": ethernet(OUR_MAC, FRONT_MAC, VLAN, b"\0\7\x08"),
    "only an Ethernet header": from_client()[:14],
    "half an IPv4 header": from_client()[:33],
    "half a UDP header": from_client()[:41],
    "half an IPv6 header": from_client(6)[:53],
    "half a UDP header over IPv6": from_client(6)[:61],
    "cut off": from_client()[:-1],
    "cut off over IPv6": from_client(6)[:-1],
    "the first fragment": over_ipv4(inner(), fragment=0x2000),
    "the first fragment, not to be fragmented": over_ipv4(inner(), fragment=0x6000),
    "a later fragment": over_ipv4(inner(), fragment=0x0001),
    "a much later fragment": over_ipv4(inner(), fragment=0x1000),
    "IP options": over_ipv4(inner(), options=b"\1\1\1\0"),
    "options said to be there": with_right_header(over_ipv4(inner())[:14] + b"\x46" + over_ipv4(inner())[15:]),
    "a header said to be shorter": with_right_header(over_ipv4(inner())[:14] + b"\x44" + over_ipv4(inner())[15:]),
    "TCP": over_ipv4(inner(), protocol=6),
    "UDP-Lite": over_ipv4(inner(), protocol=136),
    "ICMP": over_ipv4(b"\x08\0" + bytes(58), protocol=1),
    "a wrong header checksum": over_ipv4(inner(), checksum=0x1234),
    "a header checksum of 0": over_ipv4(inner(), checksum=0),
    "version 5": over_ipv4(inner())[:14] + b"\x55" + over_ipv4(inner())[15:],
    "version 6 in an IPv4 frame": over_ipv4(inner())[:14] + b"\x65" + over_ipv4(inner())[15:],
    "version 4 in an IPv6 frame": over_ipv6(inner6())[:14] + b"\x40" + over_ipv6(inner6())[15:],
    "an IPv4 length beyond the frame": over_ipv4(inner(), length=20 + len(inner()) + 1),
    "an IPv4 length below UDP's": over_ipv4(inner(), length=20 + len(inner()) - 1),
    "an IPv4 length of nothing": over_ipv4(inner(), length=0),
    "an IPv4 length of a header": over_ipv4(inner(length=0), length=20),
    "a UDP length above IP's": over_ipv4(inner(length=len(inner()) + 1)),
    "a UDP length below IP's": over_ipv4(inner(length=len(inner()) - 1)),
    "a UDP length of 0": over_ipv4(inner(length=0)),
    "a UDP length of 7": over_ipv4(udp((CLIENT[4], CLIENT_PORT), (OWN[4], SERVICE), b"", length=7), length=27),
    "lengths beyond the frame": over_ipv4(inner(length=len(inner()) + 1), length=20 + len(inner()) + 1),
    "lengths far beyond the frame": over_ipv4(inner(length=0xFFEB), length=0xFFFF),
    "an IPv6 length beyond the frame": over_ipv6(inner6(), length=len(inner6()) + 1),
    "an IPv6 length below UDP's": over_ipv6(inner6(), length=len(inner6()) - 1),
    "a jumbogram": over_ipv6(inner6(), length=0),
    "hop-by-hop options": over_ipv6(HOP_BY_HOP + inner6(), next_header=0),
    "an IPv6 fragment": over_ipv6(FRAGMENT + inner6(), next_header=44),
    "destination options": over_ipv6(HOP_BY_HOP + inner6(), next_header=60),
    "UDP-Lite over IPv6": over_ipv6(inner6(), next_header=136),
    "ICMPv6": over_ipv6(b"\x80\0" + bytes(58), next_header=58),
    "an IPv4 client's address in an IPv6 packet": ethernet(
        OUR_MAC,
        FRONT_MAC,
        IPV6,
        ipv6(CLIENT[4], OWN[6], udp((CLIENT[6], CLIENT_PORT), (OWN[6], SERVICE), channel_data(NUMBER, PAYLOAD))),
    ),
    "our IPv4 address in an IPv6 packet": ethernet(
        OUR_MAC,
        FRONT_MAC,
        IPV6,
        ipv6(CLIENT[6], OWN[4], udp((CLIENT[6], CLIENT_PORT), (OWN[6], SERVICE), channel_data(NUMBER, PAYLOAD))),
    ),
}


@clients
@pytest.mark.parametrize("frame", [pytest.param(frame, id=name) for name, frame in IGNORED.items()])
def test_unrelated_packets_pass_untouched(runner: Runner, client: int, frame: bytes) -> None:
    assert agreed(runner, world(client), frame)[0] == (Verdict.PASS, frame, 0, None)
    assert not any(runner.totals().passed)


@clients
@pytest.mark.parametrize("tags", [(), (7,)], ids=["untagged", "tagged"])
def test_a_packet_truncated_at_any_length_passes_untouched(host: HostRunner, client: int, tags: tuple[int, ...]) -> None:
    host.load(world(client).in_vlan(7 if tags else 0))
    for frame in (from_client(client, tags=tags), from_peer(4, tags=tags)):
        for length in range(len(frame)):
            outcome = host.run(frame[:length])
            assert outcome.verdict is Verdict.PASS
            assert outcome.frame == frame[:length]
        assert not any(host.totals().passed)
        assert host.run(frame).verdict is Verdict.TX


def test_packets_of_an_interface_without_an_entry_are_ignored(host: HostRunner) -> None:
    assert agreed(host, world(), from_client(), ifindex=ELSEWHERE)[0] == (Verdict.PASS, from_client(), 0, None)


def test_each_interface_has_its_own_mac_address(host: HostRunner) -> None:
    tables = world().with_settings(devices=(Device(ELSEWHERE, OUR_MAC), Device(HERE, FRONT_MAC)))
    assert agreed(host, tables, from_client(), ifindex=HERE)[0].verdict is Verdict.PASS
    assert agreed(host, tables, from_client(to_mac=FRONT_MAC), ifindex=HERE)[0].verdict is Verdict.REDIRECT
    assert agreed(host, tables, from_client(), ifindex=ELSEWHERE)[0].verdict is Verdict.REDIRECT


@pytest.mark.parametrize("byte", range(6))
def test_each_byte_of_a_mac_address_is_compared(runner: Runner, byte: int) -> None:
    mac = bytearray(OUR_MAC)
    mac[byte] ^= 1
    assert agreed(runner, world(), from_client(to_mac=bytes(mac)))[0].verdict is Verdict.PASS


@pytest.mark.parametrize("byte", range(16))
def test_each_byte_of_an_address_is_compared(runner: Runner, byte: int) -> None:
    changed = bytearray(OWN[6])
    changed[byte] ^= 0x80
    message = channel_data(NUMBER, PAYLOAD)
    to_another = datagram((CLIENT[6], CLIENT_PORT), (bytes(changed), SERVICE), message)
    assert agreed(runner, world(6), to_another)[0].reason is None
    changed = bytearray(CLIENT[6])
    changed[byte] ^= 0x80
    of_another = datagram((bytes(changed), CLIENT_PORT), (OWN[6], SERVICE), message)
    assert agreed(runner, world(6), of_another)[0].reason is PassReason.UNBOUND
    changed = bytearray(PEER[6])
    changed[byte] ^= 0x80
    hops = {bytes(changed): Hop(HOP)}
    tables = replace(world(6, 6), next_hops=hops)
    assert agreed(runner, tables, from_client(6))[0].reason is PassReason.NO_NEXT_HOP


# -------------------------------------------------------------------------------------------------------------- counters


def test_packets_and_bytes_are_counted_by_direction_and_channel(runner: Runner) -> None:
    sizes = (20, 300, 1400)
    tables = world(6, 4)
    agreed(
        runner, tables, *(from_client(6, bytes(size)) for size in sizes), from_peer(4, bytes(64)), from_client(6, bytes(20))
    )
    totals = runner.totals()
    assert totals.packets == [4, 1]
    assert totals.octets == [sum(sizes) + 20, 64]
    assert runner.usage(2 * CHANNEL)[:2] == (4, sum(sizes) + 20)
    assert runner.usage(2 * CHANNEL + 1)[:2] == (1, 64)


def test_the_time_of_the_last_packet_of_a_channel_is_recorded(host: HostRunner) -> None:
    host.load(world())
    start = host.now()
    host.run(from_client())
    host.set_clock(start + 5)
    host.run(from_peer())
    host.run(from_client(ip={"hop_limit": 1}))
    assert host.usage(2 * CHANNEL).last_used == start
    assert host.usage(2 * CHANNEL + 1).last_used == start + 5
