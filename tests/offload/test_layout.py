"""Python's layout of the tables is the program's."""

import struct

import pytest

from relay.offload import layout
from relay.offload.layout import NextHop, PassReason
from tests.support.offload.runners import HostRunner

FIELDS = (bytes(16), bytes(6), bytes(6))
"""Source and MAC addresses of a next hop."""


def offsets_of(packed: struct.Struct) -> list[int]:
    """Return the offset of each field of a structure."""
    form = packed.format
    order, rest = form[0], form[1:]
    offsets, prefix, count = [], "", ""
    for letter in rest:
        if letter.isdigit():
            count += letter
        elif letter in "sx":
            if letter == "s":
                offsets.append(struct.calcsize(order + prefix))
            prefix, count = f"{prefix}{count}{letter}", ""
        else:
            for _ in range(int(count or "1")):
                offsets.append(struct.calcsize(order + prefix))
                prefix += letter
            count = ""
    return offsets


@pytest.mark.parametrize(
    ("structure", "packed", "fields"),
    [
        ("channel", layout.CHANNEL, "expires check other slot place"),
        ("next_hop", layout.NEXT_HOP, "ifindex source macs.to macs.from vlan mtu flags check nudged"),
        ("own", layout.OWN, "address vlan"),
        ("device", layout.DEVICE, "ifindex mac flags upper"),
        (
            "settings",
            layout.SETTINGS,
            "service_port lowest_port highest_port own_count own device_count devices",
        ),
        ("usage", layout.USAGE, "packets bytes last_used"),
    ],
)
def test_field_offsets_match_the_program(host: HostRunner, structure: str, packed: struct.Struct, fields: str) -> None:
    in_program = host.layout()
    expected = dict(zip(fields.split(), offsets_of(packed), strict=True))
    assert {name: in_program[f"{structure}.{name}"] for name in expected} == expected


def test_structure_sizes_match_the_program(host: HostRunner) -> None:
    in_program = host.layout()
    sizes = {
        "end": layout.END.size,
        "channel": layout.CHANNEL.size,
        "next_hop": layout.NEXT_HOP.size,
        "own": layout.OWN.size,
        "device": layout.DEVICE.size,
        "settings": layout.SETTINGS.size,
        "usage": layout.USAGE.size,
        "totals": layout.TOTALS.size,
    }
    assert {name: in_program[name] for name in sizes} == sizes


def test_counters_do_not_cross_cache_lines(host: HostRunner) -> None:
    assert 64 % host.layout()["usage"] == 0


def test_numbers_are_aligned(host: HostRunner) -> None:
    in_program = host.layout()
    eight = """channel channel.expires channel.check next_hop next_hop.check next_hop.nudged usage.packets usage.bytes
        usage.last_used totals.packets usage totals"""
    four = """channel.other channel.slot channel.place next_hop.ifindex next_hop.source next_hop.flags own own.address device
        device.ifindex device.upper settings settings.own settings.device_count settings.devices end"""
    two = "next_hop.macs.to next_hop.macs.from next_hop.vlan next_hop.mtu own.vlan device.mac device.flags"
    for names, size in ((eight, 8), (four, 4), (two, 2)):
        assert {name: in_program[name] % size for name in names.split()} == dict.fromkeys(names.split(), 0)


def test_the_order_of_totals_matches_the_program(host: HostRunner) -> None:
    in_program = host.layout()
    numbers = {"packets": 0, "bytes": 2, "sizes": 4, "passed": 4 + 2 * layout.SIZES}
    assert {name: in_program[f"totals.{name}"] // 8 for name in numbers} == numbers


def test_reasons_match_the_program(host: HostRunner) -> None:
    in_program = host.layout()
    assert {each.name: in_program[f"= {each.name}"] for each in PassReason} == {each.name: each.value for each in PassReason}
    assert in_program["= REASONS"] == len(PassReason)


def test_constants_match_the_program(host: HostRunner) -> None:
    in_program = host.layout()
    assert in_program["= OWN_ADDRESSES"] == layout.OWN_ADDRESSES
    assert in_program["= DEVICES"] == layout.DEVICES
    assert in_program["= SIZES"] == layout.SIZES
    assert 1 << in_program["= SIZE_SHIFT"] == layout.SIZE_STEP
    assert in_program["= HAIRPIN"] == layout.HAIRPIN
    assert in_program["= STALE"] == layout.STALE
    assert in_program["= SEND_BACK"] == layout.SEND_BACK
    assert in_program["= STRICT"] == layout.STRICT
    assert [in_program[f"= {each.upper()}"] for each in layout.DIRECTIONS] == list(range(in_program["= DIRECTIONS"]))


@pytest.mark.parametrize(("mtu", "packed"), [(1500, 1500), (0xFFFF, 0xFFFF), (0x1_0000, 0xFFFF), (0xFFFF_FFFF, 0xFFFF)])
def test_a_too_large_mtu_is_reduced_to_the_maximum(mtu: int, packed: int) -> None:
    assert layout.NEXT_HOP.unpack(NextHop(1, *FIELDS, mtu=mtu).packed(bytes(16)))[5] == packed


def test_packet_fields_are_packed_in_network_byte_order() -> None:
    address = layout.packed_address("192.0.2.1")
    assert layout.END.pack(address, 0x0102, 0x4003) == bytes(10) + b"\xff\xff\xc0\0\2\1\1\2\x40\3"
    hop = NextHop(1, *FIELDS, vlan=0x0FFE).packed(address)
    assert hop[4 + 16 + 12 :].startswith(b"\x0f\xfe")
    assert layout.OWN.pack(address, b"\x0f\xfe") == address + b"\x0f\xfe\0\0"
