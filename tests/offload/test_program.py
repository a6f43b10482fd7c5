"""What the XDP program makes of packets: under sanitizers, and in the kernel.

Every test compares all of what comes out, and all that is counted, with tests/offload/model.py; what it asserts besides is
what its name says.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Final

import pytest

from relay.offload.layout import PLACES, NextHop, Own, PassReason, packed_address
from tests.offload.model import BUCKETS, SECOND, TICKS, Channel, Device, End, Hop, Tables, Verdict, hash_of, tick_of
from tests.offload.packets import (
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
from tests.offload.runners import ENTRIES, HostRunner, Runner
from tests.offload.world import (
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
    TO_CLIENT,
    TO_OTHER,
    TO_PEER,
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

clients = pytest.mark.parametrize("client", FAMILIES)
peers = pytest.mark.parametrize("peer", FAMILIES)


def expected_frame(
    source: tuple[bytes, int], destination: tuple[bytes, int], payload: bytes, mac: bytes, label: int
) -> bytes:
    """A frame as the relay would send it, written down once more."""
    inner = udp(source, destination, payload)
    if len(destination[0].lstrip(b"\0")) <= 6:
        return ethernet(mac, OUR_MAC, IPV4, ipv4(source[0], destination[0], inner, hop_limit=63))
    return ethernet(mac, OUR_MAC, IPV6, ipv6(source[0], destination[0], inner, hop_limit=63, flow_label=label))


def ip_of(frame: bytes) -> bytes:
    """The IP packet in a frame, with or without a tag."""
    return frame[18:] if frame[12:14] == VLAN.to_bytes(2, "big") else frame[14:]


def udp_sum(family: int, frame: bytes) -> int:
    """The sum over a whole datagram, 0 if its checksum is right."""
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
    assert outcome == (Verdict.TX, expected_frame(source, destination, PAYLOAD, BACK_MAC, 0xABCDE), 0, None)


@clients
@peers
def test_a_peers_datagram_becomes_channel_data_from_the_service(runner: Runner, client: int, peer: int) -> None:
    (outcome,) = agreed(runner, world(client, peer), from_peer(peer))
    source, destination = (OWN[client], SERVICE), (CLIENT[client], CLIENT_PORT)
    message = channel_data(NUMBER, PAYLOAD)
    assert outcome == (Verdict.TX, expected_frame(source, destination, message, FRONT_MAC, 0xABCDE), 0, None)


@clients
@pytest.mark.parametrize("other", FAMILIES)
@pytest.mark.parametrize("relayed", FAMILIES)
def test_from_client_to_client_a_packet_takes_both_steps_at_once(
    runner: Runner, client: int, other: int, relayed: int
) -> None:
    (outcome,) = agreed(runner, hairpin(client, other, relayed), from_client(client))
    source, destination = (OWN[other], SERVICE), (OTHER[other], OTHER_PORT)
    message = channel_data(OTHER_NUMBER, PAYLOAD)
    assert outcome == (Verdict.TX, expected_frame(source, destination, message, FRONT_MAC, 0x54321), 0, None)
    assert runner.usage(2 * CHANNEL)[:2] == runner.usage(2 * OTHER_CHANNEL + 1)[:2] == (1, len(PAYLOAD))
    assert runner.totals().packets == [1, 1]


@clients
@peers
@pytest.mark.parametrize("tags", [(), (0x2007,)], ids=["untagged", "tagged"])
@pytest.mark.parametrize("vlan", [0, 0x6FFE], ids=["to-untagged", "to-tagged"])
@pytest.mark.parametrize("direction", ["to-peer", "to-client"])
def test_a_vlan_tag_is_the_next_hops_not_the_packets(
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
def test_what_marks_a_packet_is_carried_over(runner: Runner, client: int, peer: int, traffic_class: int) -> None:
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
def test_the_hop_limit_is_one_less(runner: Runner, client: int, peer: int, hop_limit: int) -> None:
    (outcome,) = agreed(runner, world(client, peer), from_client(client, ip={"hop_limit": hop_limit}))
    assert ip_of(outcome.frame)[8 if peer == 4 else 7] == hop_limit - 1


@clients
@pytest.mark.parametrize("fragment", [0x0000, 0x4000, 0x8000])
def test_an_ipv4_packet_is_sent_whole_or_not_at_all(runner: Runner, client: int, fragment: int) -> None:
    sent = {"fragment": fragment, "identification": 0x1234} if client == 4 else {}
    (outcome,) = agreed(runner, world(client), from_client(client, ip=sent))
    packet = ip_of(outcome.frame)
    assert packet[4:8] == b"\0\0\x40\0"
    assert sum_of(packet[:20]) == 0


@clients
@peers
@pytest.mark.parametrize("flow_label", [0, 1, 0xFFFFF])
def test_the_flow_label_is_the_bindings(runner: Runner, client: int, peer: int, flow_label: int) -> None:
    sent: dict[str, int] = {"flow_label": 0xFFFFF} if client == 6 else {}
    tables = world(client, peer).with_channels(flow_label=flow_label)
    (outcome,) = agreed(runner, tables, from_client(client, ip={**sent, "traffic_class": 0xFF}))
    assert peer == 4 or int.from_bytes(ip_of(outcome.frame)[:4], "big") == 0x6FF00000 | flow_label


@clients
@peers
@pytest.mark.parametrize("size", [20, 21, 127, 128, 129, 255, 256, 1000, 1371, 1372])
def test_payloads_stay_as_they_are_whatever_their_size(runner: Runner, client: int, peer: int, size: int) -> None:
    payload = bytes(each * each % 251 for each in range(size))
    there, back = agreed(runner, world(client, peer), from_client(client, payload), from_peer(peer, payload))
    assert there.frame.endswith(payload)
    assert back.frame.endswith(channel_data(NUMBER, payload))
    assert udp_sum(peer, there.frame) == udp_sum(client, back.frame) == 0
    totals = runner.totals()
    for direction in (0, 1):
        assert totals.sizes[direction] == [int(step == min(size // 128, 15)) for step in range(16)]


def test_the_largest_payloads_share_a_step_of_the_histogram(host: HostRunner) -> None:
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
def test_an_ipv6_address_that_looks_like_a_mapped_one_is_none(runner: Runner, like: str) -> None:
    peer = packed_address(like)
    tables = world(4, 6).with_channels(peer=(peer, PEER_PORT, RELAYED))
    tables = replace(
        tables,
        next_hops={
            **tables.next_hops,
            TO_PEER: next_hop(PEER[6], BACK_MAC)._replace(hop=NextHop(HERE, peer, OWN[6], mtu=1500)),
        },
    )
    there, back_again = agreed(runner, tables, from_client(), datagram((peer, PEER_PORT), (OWN[6], RELAYED), PAYLOAD))
    assert there.verdict is back_again.verdict is Verdict.TX
    assert there.frame[12:14] == IPV6.to_bytes(2, "big")


@pytest.mark.parametrize("client_port", [1, SERVICE, 49152, 65535])
def test_any_port_can_be_a_clients(runner: Runner, client_port: int) -> None:
    tables = world().with_channels(client=(CLIENT[4], client_port, NUMBER))
    (outcome,) = agreed(runner, tables, datagram((CLIENT[4], client_port), (OWN[4], SERVICE), channel_data(NUMBER, PAYLOAD)))
    assert outcome.verdict is Verdict.TX


@pytest.mark.parametrize("number", [0x4000, 0x4FFF, 0x5000, 0x7FFF])
def test_channel_numbers_are_those_of_old_clients_too(runner: Runner, number: int) -> None:
    tables = world().with_channels(client=(CLIENT[4], CLIENT_PORT, number))
    assert agreed(runner, tables, from_client(number=number))[0].verdict is Verdict.TX


@pytest.mark.parametrize("port", [49152, 49153, 65534, 65535])
def test_relayed_ports_are_those_from_the_lowest_to_the_highest(runner: Runner, port: int) -> None:
    tables = world().with_channels(peer=(PEER[4], PEER_PORT, port))
    frame = datagram((PEER[4], PEER_PORT), (OWN[4], port), PAYLOAD)
    outside = tables.with_settings(
        lowest_port=port + 1 if port < 65535 else 1, highest_port=65535 if port < 65535 else 65534
    )
    assert agreed(runner, tables, frame)[0].verdict is Verdict.TX
    assert agreed(runner, tables.with_settings(lowest_port=port, highest_port=port), frame)[0].verdict is Verdict.TX
    assert agreed(runner, outside, frame)[0] == (Verdict.PASS, frame, 0, None)


def test_the_service_comes_first_if_its_port_is_among_the_relayed(runner: Runner) -> None:
    assert agreed(runner, world().with_settings(lowest_port=SERVICE), from_client())[0].verdict is Verdict.TX


def test_channels_of_a_client_are_told_apart(runner: Runner) -> None:
    tables = world()
    (channel,) = tables.channels.values()
    more = Channel((CLIENT[4], CLIENT_PORT, OTHER_NUMBER), (PEER[6], 7, RELAYED), TO_CLIENT, TO_OTHER)
    hops = {**tables.next_hops, TO_OTHER: next_hop(PEER[6], FRONT_MAC)}
    tables = Tables.of(tables.settings, {CHANNEL: channel, OTHER_CHANNEL: more}, hops)
    agreed(runner, tables, from_client(), from_client(number=OTHER_NUMBER), from_client(number=OTHER_NUMBER))
    assert runner.usage(2 * CHANNEL).packets == 1
    assert runner.usage(2 * OTHER_CHANNEL).packets == 2


@clients
@peers
def test_a_bucket_is_searched_to_its_last_place(runner: Runner, client: int, peer: int) -> None:
    """Other channels whose ends are in the same buckets, before those of this one."""
    tables = world(client, peer)
    (channel,) = tables.channels.values()
    before: dict[int, Channel] = {}
    tags = iter(range(1 << 16))
    while len(before) < PLACES - 1:
        tag = next(tags)
        other = channel._replace(client=(*channel.client[:2], tag), peer=(*channel.peer[:2], tag))
        if bucket_of(other.client) == bucket_of(channel.client) and bucket_of(other.peer) == bucket_of(channel.peer):
            before[OTHER_CHANNEL + len(before)] = other
    tables = Tables.of(tables.settings, {**before, CHANNEL: channel}, tables.next_hops)
    assert {each.verdict for each in agreed(runner, tables, from_client(client), from_peer(peer))} == {Verdict.TX}


def bucket_of(end: End) -> int:
    return (hash_of(end) >> 16) % BUCKETS


def test_a_channel_that_is_gone_or_another_by_now_is_none(runner: Runner) -> None:
    """A place in a hash table may be read before a channel goes, and its entry after another has come there."""
    tables = world()
    (channel,) = tables.channels.values()
    other = channel._replace(client=(OTHER[4], CLIENT_PORT, NUMBER), peer=(OTHER[4], PEER_PORT, RELAYED))
    for there in ({CHANNEL: channel._replace(version=2)}, {CHANNEL: other}, {}):
        assert both_ways(runner, replace(tables, channels=there)) == [PassReason.UNBOUND] * 2
    beyond = dict.fromkeys(tables.clients, 1 << 20), dict.fromkeys(tables.peers, (1 << 32) - 2)
    assert both_ways(runner, replace(tables, clients=beyond[0], peers=beyond[1])) == [PassReason.UNBOUND] * 2
    for version in (3, (1 << 32) - 1):
        assert both_ways(runner, tables.with_channels(version=version)) == [None, None]


@pytest.mark.parametrize("word", range(4))
def test_every_word_of_an_end_counts(runner: Runner, word: int) -> None:
    """Also if the place says otherwise: its 32 bits of a hash may be another's."""
    tables = world(6, 6)
    (channel,) = tables.channels.values()
    changed = bytearray(CLIENT[6])
    changed[4 * word] ^= 1
    there = channel._replace(client=(bytes(changed), *channel.client[1:]))
    (outcome,) = agreed(runner, replace(tables, channels={CHANNEL: there}), from_client(6))
    assert outcome.reason is PassReason.UNBOUND


@pytest.mark.parametrize("change", [(CLIENT[4], CLIENT_PORT + 1, NUMBER), (CLIENT[4], CLIENT_PORT, OTHER_NUMBER)])
def test_port_and_number_of_an_end_count(runner: Runner, change: tuple[bytes, int, int]) -> None:
    tables = world()
    (channel,) = tables.channels.values()
    tables = replace(tables, channels={CHANNEL: channel._replace(client=change)})
    assert agreed(runner, tables, from_client())[0].reason is PassReason.UNBOUND


# ------------------------------------------------------------------------------------------------- where it is sent


def test_what_goes_on_through_another_interface_is_redirected(runner: Runner) -> None:
    (outcome,) = agreed(runner, world().with_next_hops(ifindex=ELSEWHERE), from_client())
    assert outcome.verdict is Verdict.REDIRECT
    assert outcome.ifindex == ELSEWHERE


def test_what_goes_back_is_redirected_if_its_driver_is_not_known_to_send_from_there(runner: Runner) -> None:
    tables = world().with_settings(devices=(Device(HERE, OUR_MAC),))
    (outcome,) = agreed(runner, tables, from_client())
    assert outcome.verdict is Verdict.REDIRECT
    assert outcome.ifindex == HERE


def test_of_many_interfaces_and_addresses_the_last_ones_count_too(runner: Runner) -> None:
    devices = (
        *(Device(10 + index, FRONT_MAC, sends_back=True) for index in range(7)),
        Device(HERE, OUR_MAC, sends_back=True),
    )
    own = tuple(Own(each) for each in (*(bytes(15) + bytes([index]) for index in range(1, 15)), OWN[6], OWN[4]))
    tables = world().with_settings(devices=devices, own=own)
    assert agreed(runner, tables, from_client())[0].verdict is Verdict.TX
    for shorter in (tables.with_settings(devices=devices[:-1]), tables.with_settings(own=own[:-1])):
        assert agreed(runner, shorter, from_client())[0].verdict is Verdict.PASS


def test_devices_and_addresses_that_were_taken_back_do_not_count(host: HostRunner) -> None:
    class Stale(type(SETTINGS)):  # type: ignore[misc]
        """With entries behind the last that counts, as they are left when there were more."""

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


def test_of_too_many_interfaces_and_addresses_those_there_is_room_for_count(host: HostRunner) -> None:
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
def test_a_checksum_that_comes_out_as_zero_is_sent_as_all_ones(runner: Runner, client: int, peer: int) -> None:
    length = 8 + len(PAYLOAD)
    ports = RELAYED.to_bytes(2, "big") + PEER_PORT.to_bytes(2, "big") + length.to_bytes(2, "big")
    without = with_last_word(PAYLOAD, 0)
    payload = with_last_word(PAYLOAD, checksum_of(pseudo_header(OWN[peer], PEER[peer], length), ports, without))
    (outcome,) = agreed(runner, world(client, peer), from_client(client, payload))
    assert ip_of(outcome.frame)[HEADER[peer] + 6 : HEADER[peer] + 8] == b"\xff\xff"


@clients
@peers
def test_a_checksum_of_all_ones_that_comes_in_is_right(runner: Runner, client: int, peer: int) -> None:
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
def test_a_wrong_checksum_stays_as_wrong(runner: Runner, client: int, peer: int, error: int) -> None:
    tables = world(client, peer)
    for frame, family in ((from_client(client), peer), (from_peer(peer), client)):
        came_by = client if family == peer and frame == from_client(client) else peer
        at = 14 + HEADER[came_by] + 6
        wrong = (int.from_bytes(frame[at : at + 2], "big") + error) % 0xFFFF or 0xFFFF
        (outcome,) = agreed(runner, tables, frame[:at] + wrong.to_bytes(2, "big") + frame[at + 2 :])
        assert outcome.verdict is Verdict.TX
        assert udp_sum(family, outcome.frame) == error


@clients
def test_a_damaged_payload_is_relayed_for_its_receiver_to_see(runner: Runner, client: int) -> None:
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
def test_what_only_the_relay_can_handle_is_left_to_it(runner: Runner, frame: bytes, reason: PassReason) -> None:
    assert agreed(runner, world(), frame)[0] == (Verdict.PASS, frame, 0, reason)
    assert runner.totals().passed == [int(each == reason) for each in PassReason]


@clients
@peers
def test_the_mtu_is_for_the_packet_that_is_sent(runner: Runner, client: int, peer: int) -> None:
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
def test_frames_that_a_driver_would_have_to_pad_are_left(runner: Runner, client: int, peer: int) -> None:
    shortest = {4: 60 - 42, 6: 0}
    tables = world(client, peer)
    for size, frame in ((shortest[peer], from_client), (max(shortest[client] - 4, 0), from_peer)):
        family = client if frame is from_client else peer
        assert agreed(runner, tables, frame(family, bytes(size)))[0].verdict is Verdict.TX
        if size:
            assert agreed(runner, tables, frame(family, bytes(size - 1)))[0].reason is PassReason.SHORT_FRAME


@clients
@pytest.mark.parametrize("direction", ["to-peer", "to-client"])
def test_a_checksum_that_an_interface_would_complete_is_none(runner: Runner, client: int, direction: str) -> None:
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


def test_a_channel_whose_time_is_over_is_none(runner: Runner) -> None:
    now = runner.now()
    expired = PassReason.EXPIRED
    assert both_ways(runner, world().with_channels(expires=now - SECOND)) == [expired] * 2
    assert both_ways(runner, world().with_channels(expires=now - 3600 * SECOND)) == [expired] * 2
    assert both_ways(runner, world().with_channels(expires=now + 60 * SECOND)) == [None] * 2


def test_a_channel_stands_until_its_last_tick(host: HostRunner) -> None:
    now = host.now()
    for until, reason in ((now, PassReason.EXPIRED), (now + 1, None)):
        assert both_ways(host, world().with_channels(expires=until)) == [reason] * 2


def test_between_clients_both_channels_have_to_stand(runner: Runner) -> None:
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


def test_between_clients_the_longer_header_counts_for_the_mtu(runner: Runner) -> None:
    for size, reason in ((1468, None), (1469, PassReason.TOO_LONG)):
        assert agreed(runner, hairpin(), from_client(payload=bytes(size)))[0].reason is reason


@pytest.mark.parametrize(
    "change",
    [
        {"ifindex": 0},
        {"destination": OTHER[4]},
        {"destination": PEER[4][:15] + b"\x0a"},
        {"destination": b"\1" + PEER[4][1:]},
        {"destination": PEER[4][:4] + b"\1" + PEER[4][5:]},
        {"destination": PEER[4][:8] + b"\1" + PEER[4][9:]},
        {"version": 3},
    ],
    ids=str,
)
def test_a_next_hop_that_is_not_known_for_sure_is_not_taken(runner: Runner, change: dict[str, object]) -> None:
    assert agreed(runner, world().with_next_hops(**change), from_client())[0].reason is PassReason.NO_NEXT_HOP


def test_without_an_entry_there_is_no_next_hop(runner: Runner) -> None:
    assert both_ways(runner, replace(world(), next_hops={})) == [PassReason.NO_NEXT_HOP] * 2
    assert both_ways(runner, world().with_channels(peer_hop=1 << 20)) == [PassReason.NO_NEXT_HOP, None]
    assert both_ways(runner, world().with_channels(peer_hop=TO_CLIENT)) == [PassReason.NO_NEXT_HOP, None]
    assert both_ways(runner, world().with_channels(client_hop=TO_PEER)) == [None, PassReason.NO_NEXT_HOP]


def test_usage_without_an_entry_is_not_counted(runner: Runner) -> None:
    tables = world()
    (channel,) = tables.channels.values()
    agreed(runner, Tables.of(tables.settings, {ENTRIES // 2: channel}, tables.next_hops), from_client())
    assert runner.totals().packets == [1, 0]


def test_a_packet_a_second_asks_for_a_stale_neighbour(runner: Runner) -> None:
    tables = world().with_next_hops(stale=True)
    outcomes = agreed(runner, tables, from_client(), from_client(), from_client(), from_peer(), from_peer())
    stale = PassReason.STALE_NEIGHBOUR
    assert [each.reason for each in outcomes] == [stale, None, None, stale, None]


def test_who_was_asked_for_a_second_ago_is_asked_for_again(runner: Runner) -> None:
    now = runner.now()
    tables = world().with_next_hops(stale=True)
    for ago, reason in ((2 * SECOND, PassReason.STALE_NEIGHBOUR), (SECOND // 10, None)):
        assert agreed(runner, tables.with_next_hops(nudged=tick_of(now - ago)), from_client())[0].reason is reason


LAST_TICK: Final = TICKS - 1


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(1000 * SECOND, id="some-time-after-the-start"),
        pytest.param(LAST_TICK, id="at-the-last-tick"),
        pytest.param(LAST_TICK + 1, id="as-they-begin-anew"),
        pytest.param(LAST_TICK + SECOND // 2, id="half-a-second-later"),
        pytest.param(LAST_TICK + 2 * SECOND, id="two-seconds-later"),
        pytest.param(3 * LAST_TICK + SECOND // 3, id="after-beginning-anew-a-few-times"),
    ],
)
def test_to_the_tick_a_second_passes_between_two_questions(host: HostRunner, now: int) -> None:
    tables = world().with_next_hops(stale=True)
    with host.at(now):
        for ticks, reason in (
            (0, None),
            (1, None),
            (SECOND - 1, None),
            (SECOND, PassReason.STALE_NEIGHBOUR),
            (SECOND + 1, PassReason.STALE_NEIGHBOUR),
            (TICKS // 2, PassReason.STALE_NEIGHBOUR),
            (TICKS - 1, PassReason.STALE_NEIGHBOUR),
        ):
            asked = tables.with_next_hops(nudged=(tick_of(now) - ticks) % TICKS)
            assert agreed(host, asked, from_client())[0].reason is reason


def test_as_ticks_begin_anew_one_packet_a_second_still_asks(host: HostRunner) -> None:
    host.load(world().with_next_hops(stale=True))
    start, asked = LAST_TICK - 3 * SECOND, []
    for tenth in range(60):
        now = start + tenth * SECOND // 10
        with host.at(now):
            if host.run(from_client()).verdict is Verdict.PASS:
                assert host.nudged(TO_PEER) == tick_of(now)
                asked.append(tenth)
    assert asked[0] == 0
    assert {later - before for before, later in pairwise(asked)} <= {10, 11}


def test_who_is_not_stale_is_not_asked_for(runner: Runner) -> None:
    assert both_ways(runner, world().with_next_hops(nudged=0)) == [None, None]


def test_to_ask_changes_nothing_of_a_next_hop_but_the_time(runner: Runner) -> None:
    tables = world().with_next_hops(stale=True, vlan=0x0FFE, mtu=0xFFFF)
    first, second = agreed(runner, tables, from_client(), from_client())
    assert first.reason is PassReason.STALE_NEIGHBOUR
    assert second.frame[:16] == BACK_MAC + OUR_MAC + b"\x81\x00\x0f\xfe"


@pytest.mark.parametrize(("mtu", "reason"), [(0xFFFF, None), (0x1_0000, None), (0, PassReason.TOO_LONG)])
def test_an_mtu_can_be_any_size_of_packet(runner: Runner, mtu: int, reason: PassReason | None) -> None:
    assert agreed(runner, world().with_next_hops(mtu=mtu), from_client(payload=bytes(1400)))[0].reason is reason


@clients
@peers
def test_without_room_in_front_a_packet_is_left(host: HostRunner, client: int, peer: int) -> None:
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
def test_what_is_none_of_the_relays_business_passes_untouched(runner: Runner, client: int, frame: bytes) -> None:
    assert agreed(runner, world(client), frame)[0] == (Verdict.PASS, frame, 0, None)
    assert not any(runner.totals().passed)


@clients
@pytest.mark.parametrize("tags", [(), (7,)], ids=["untagged", "tagged"])
def test_whatever_its_length_a_packet_that_was_cut_off_passes_untouched(
    host: HostRunner, client: int, tags: tuple[int, ...]
) -> None:
    host.load(world(client).in_vlan(7 if tags else 0))
    for frame in (from_client(client, tags=tags), from_peer(4, tags=tags)):
        for length in range(len(frame)):
            outcome = host.run(frame[:length])
            assert outcome.verdict is Verdict.PASS
            assert outcome.frame == frame[:length]
        assert not any(host.totals().passed)
        assert host.run(frame).verdict is Verdict.TX


def test_an_interface_without_an_entry_has_no_packets_for_the_relay(host: HostRunner) -> None:
    assert agreed(host, world(), from_client(), ifindex=ELSEWHERE)[0] == (Verdict.PASS, from_client(), 0, None)


def test_each_interface_has_its_own_address(host: HostRunner) -> None:
    tables = world().with_settings(devices=(Device(ELSEWHERE, OUR_MAC), Device(HERE, FRONT_MAC)))
    assert agreed(host, tables, from_client(), ifindex=HERE)[0].verdict is Verdict.PASS
    assert agreed(host, tables, from_client(to_mac=FRONT_MAC), ifindex=HERE)[0].verdict is Verdict.REDIRECT
    assert agreed(host, tables, from_client(), ifindex=ELSEWHERE)[0].verdict is Verdict.REDIRECT


@pytest.mark.parametrize("byte", range(6))
def test_each_byte_of_a_mac_address_counts(runner: Runner, byte: int) -> None:
    mac = bytearray(OUR_MAC)
    mac[byte] ^= 1
    assert agreed(runner, world(), from_client(to_mac=bytes(mac)))[0].verdict is Verdict.PASS


@pytest.mark.parametrize("byte", range(16))
def test_each_byte_of_an_address_counts(runner: Runner, byte: int) -> None:
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
    tables = world(6, 6)
    hop = tables.next_hops[TO_PEER]
    hops = {**tables.next_hops, TO_PEER: Hop(replace(hop.hop, destination=bytes(changed)))}
    assert agreed(runner, replace(tables, next_hops=hops), from_client(6))[0].reason is PassReason.NO_NEXT_HOP


# ------------------------------------------------------------------------------------------------------- what is counted


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


def test_when_a_channel_was_used_is_known(host: HostRunner) -> None:
    host.load(world())
    start = host.now()
    host.run(from_client())
    host.set_clock(start + 5)
    host.run(from_peer())
    host.run(from_client(ip={"hop_limit": 1}))
    assert host.usage(2 * CHANNEL).last_used == start
    assert host.usage(2 * CHANNEL + 1).last_used == start + 5
