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
        ("end", layout.END, 0, "address port tag"),
        (
            "binding",
            layout.BINDING,
            0,
            "destination expires next_hop usage end flow_label destination_port source_port number flags",
        ),
        ("next_hop", layout.NEXT_HOP, 4, "ifindex destination source to from vlan mtu flags"),
        ("device", layout.DEVICE, 0, "ifindex mac flags"),
        ("settings", layout.SETTINGS, 0, "service_port lowest_port highest_port own_count own device_count _ devices"),
        ("usage", layout.USAGE, 0, "packets bytes last_used"),
    ],
)
def test_fields_are_where_the_program_has_them(
    host: HostRunner, structure: str, packed: struct.Struct, start: int, fields: str
) -> None:
    in_program = host.layout()
    expected = dict(zip(fields.split(), offsets_of(packed, start), strict=True))
    expected.pop("_", None)
    assert {name: in_program[f"{structure}.{name}"] for name in expected} == expected


def test_structures_are_as_large_as_the_program_has_them(host: HostRunner) -> None:
    in_program = host.layout()
    sizes = {
        "end": layout.END.size,
        "binding": layout.BINDING.size,
        "next_hop": layout.NEXT_HOP_SIZE,
        "device": layout.DEVICE.size,
        "settings": layout.SETTINGS.size,
        "usage": layout.USAGE.size,
        "totals": layout.TOTALS.size,
    }
    assert {name: in_program[name] for name in sizes} == sizes
    assert in_program["next_hop.nudged"] == 4 + layout.NEXT_HOP.size == layout.NEXT_HOP_SIZE - 8


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
    assert in_program["= ENDS"] == layout.ENDS
    assert in_program["= HAIRPIN"] == layout.HAIRPIN
    assert in_program["= STALE"] == layout.STALE
    assert in_program["= SEND_BACK"] == layout.SEND_BACK
    assert [in_program[f"= {each.upper()}"] for each in layout.DIRECTIONS] == list(range(in_program["= DIRECTIONS"]))


def test_what_packets_have_is_packed_as_it_stands_there() -> None:
    address = layout.packed_address("192.0.2.1")
    assert layout.END.pack(address, 0x0102, 0x4003) == bytes(10) + b"\xff\xff\xc0\0\2\1\1\2\x40\3"
    hop = NextHop(1, address, vlan=0x0FFE).packed()
    assert hop[4 + 16 + 16 + 12 :].startswith(b"\x0f\xfe")
    assert layout.in_packet(0x4001).to_bytes(2, "little") == b"\x40\1"
