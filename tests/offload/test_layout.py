"""Python's layout of the tables is the program's."""

import struct

import pytest

from relay.offload import layout
from relay.offload.layout import NextHop, PassReason
from tests.offload.runners import HostRunner


def offsets_of(packed: struct.Struct, start: int = 0) -> list[int]:
    """Where each field begins, of those that `unpack` gives."""
    form = packed.format
    order, rest = form[0], form[1:]
    offsets, prefix, count = [], "", ""
    for letter in rest:
        if letter.isdigit():
            count += letter
        elif letter in "sx":
            if letter == "s":
                offsets.append(start + struct.calcsize(order + prefix))
            prefix, count = f"{prefix}{count}{letter}", ""
        else:
            for _ in range(int(count or "1")):
                offsets.append(start + struct.calcsize(order + prefix))
                prefix += letter
            count = ""
    return offsets


@pytest.mark.parametrize(
    ("structure", "packed", "start", "fields"),
    [
        (
            "channel",
            layout.CHANNEL,
            0,
            "client.address client.port peer.address peer.port client_hop peer_hop expires flow_label flags",
        ),
        ("next_hop", layout.NEXT_HOP, 4, "ifindex destination source macs.to macs.from vlan mtu flags"),
        ("own", layout.OWN, 0, "address vlan"),
        ("device", layout.DEVICE, 0, "ifindex mac flags"),
        (
            "settings",
            layout.SETTINGS,
            0,
            """service_port lowest_port highest_port own_count hash_keys k k k k k bucket_mask second own device_count
            devices""",
        ),
        ("usage", layout.USAGE, 0, "packets bytes last_used"),
    ],
)
def test_fields_are_where_the_program_has_them(
    host: HostRunner, structure: str, packed: struct.Struct, start: int, fields: str
) -> None:
    in_program = host.layout()
    expected = dict(zip(fields.split(), offsets_of(packed, start), strict=True))
    expected.pop("k", None)
    assert {name: in_program[f"{structure}.{name}"] for name in expected} == expected


def test_structures_are_as_large_as_the_program_has_them(host: HostRunner) -> None:
    in_program = host.layout()
    sizes = {
        "channel": layout.CHANNEL_SIZE,
        "bucket": layout.PLACES * layout.PLACE_SIZE,
        "next_hop": layout.NEXT_HOP_SIZE,
        "own": layout.OWN.size,
        "device": layout.DEVICE.size,
        "settings": layout.SETTINGS.size,
        "usage": layout.USAGE.size,
        "totals": layout.TOTALS.size,
    }
    assert {name: in_program[name] for name in sizes} == sizes
    assert in_program["channel.version"] == layout.CHANNEL.size == layout.CHANNEL_SIZE - 4
    assert in_program["next_hop.nudged"] == 4 + layout.NEXT_HOP.size == layout.NEXT_HOP_SIZE - 4


def test_what_is_waited_for_lies_in_one_line_of_the_cache(host: HostRunner) -> None:
    in_program = host.layout()
    line = 64
    assert in_program["next_hop"] == in_program["channel"] == in_program["bucket"] == line
    assert line % in_program["usage"] == 0


def test_numbers_lie_where_the_kernel_reads_them_whole(host: HostRunner) -> None:
    in_program = host.layout()
    eight = (
        "channel bucket usage.packets usage.bytes usage.last_used totals.packets usage totals settings settings.hash_keys"
    )
    four = """channel.client_hop channel.peer_hop channel.expires channel.flow_label channel.flags channel.version
        channel.client.address channel.peer.address next_hop next_hop.version next_hop.ifindex
        next_hop.destination next_hop.source next_hop.nudged own own.address device device.ifindex
        settings.own settings.device_count settings.devices end"""
    two = "next_hop.macs.to next_hop.macs.from next_hop.vlan next_hop.mtu next_hop.flags own.vlan device.mac device.flags"
    for names, size in ((eight, 8), (four, 4), (two, 2)):
        assert {name: in_program[name] % size for name in names.split()} == dict.fromkeys(names.split(), 0)


def test_the_totals_stand_in_the_programs_order(host: HostRunner) -> None:
    in_program = host.layout()
    numbers = {"packets": 0, "bytes": 2, "sizes": 4, "passed": 4 + 2 * layout.SIZES}
    assert {name: in_program[f"totals.{name}"] // 8 for name in numbers} == numbers


def test_reasons_are_the_programs(host: HostRunner) -> None:
    in_program = host.layout()
    assert {each.name: in_program[f"= {each.name}"] for each in PassReason} == {each.name: each.value for each in PassReason}
    assert in_program["= REASONS"] == len(PassReason)


def test_numbers_are_the_programs(host: HostRunner) -> None:
    in_program = host.layout()
    assert in_program["= OWN_ADDRESSES"] == layout.OWN_ADDRESSES
    assert in_program["= DEVICES"] == layout.DEVICES
    assert in_program["= SIZES"] == layout.SIZES
    assert 1 << in_program["= SIZE_SHIFT"] == layout.SIZE_STEP
    assert in_program["= PLACES"] == layout.PLACES
    assert in_program["= HASH_KEYS"] == layout.HASH_KEYS
    assert in_program["= HAIRPIN"] == layout.HAIRPIN
    assert in_program["= STALE"] == layout.STALE
    assert in_program["= SEND_BACK"] == layout.SEND_BACK
    assert [in_program[f"= {each.upper()}"] for each in layout.DIRECTIONS] == list(range(in_program["= DIRECTIONS"]))


@pytest.mark.parametrize(("mtu", "packed"), [(1500, 1500), (0xFFFF, 0xFFFF), (0x1_0000, 0xFFFF), (0xFFFF_FFFF, 0xFFFF)])
def test_an_mtu_beyond_all_packets_is_the_largest(mtu: int, packed: int) -> None:
    assert layout.NEXT_HOP.unpack(NextHop(1, bytes(16), mtu=mtu).packed())[6] == packed


def test_what_packets_have_is_packed_as_it_stands_there() -> None:
    address = layout.packed_address("192.0.2.1")
    port, number = map(layout.in_packet, (0x0102, 0x4003))
    packed = layout.CHANNEL.pack(address, number << 16 | port, bytes(16), *[0] * 6)
    assert packed[:20] == bytes(10) + b"\xff\xff\xc0\0\2\1\1\2\x40\3"
    hop = NextHop(1, address, vlan=0x0FFE).packed()
    assert hop[4 + 16 + 16 + 12 :].startswith(b"\x0f\xfe")
    assert layout.OWN.pack(address, b"\x0f\xfe") == address + b"\x0f\xfe\0\0"
    assert layout.in_packet(0x4001).to_bytes(2, "little") == b"\x40\1"
