"""The program's tables, as the relay writes and reads them, with the kernel itself."""

import contextlib
import gc
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.offload import layout
from relay.offload.layout import NEXT_HOP_SIZE, SETTINGS, NextHop, Own, PassReason, packed_address
from relay.offload.program import MOST_BINDINGS, Device, Usage, XdpProgram, bindings_for
from tests.offload.conftest import needs_bpf

ROOM = 8
BUCKETS = 4
"""Of the hash tables, as that many take."""
HOP = NextHop(7, packed_address("192.0.2.1"), packed_address("192.0.2.2"), b"\2abcde", b"\2fghij", 5, 1500, stale=True)


@pytest.fixture
def program(object_file: bytes) -> Iterator[XdpProgram]:
    """The program with room for eight channels."""
    del object_file
    opened = XdpProgram(ROOM)
    yield opened
    opened.close()


def index(number: int) -> bytes:
    return struct.pack("=I", number)


def on_each_cpu(program: XdpProgram, make: Callable[[int], bytes]) -> bytes:
    """A value with a part for each CPU there may be."""
    usage = program._usage
    return b"".join(make(cpu).ljust(-(-len(make(cpu)) // 8) * 8, b"\0") for cpu in range(usage.cpus))


def count(program: XdpProgram, entry: int, packets: int, octets: int, last_used: int) -> None:
    """Have each CPU have counted: the first one so much, the second twice as much, and so on."""
    parts = on_each_cpu(
        program, lambda cpu: layout.USAGE.pack(packets * (cpu + 1), octets * (cpu + 1), last_used * (cpu + 1))
    )
    program._usage.update(index(entry), parts)


@needs_bpf
def test_at_first_nothing_was_counted(program: XdpProgram) -> None:
    totals = program.totals()
    assert totals.packets == totals.bytes == {"to_peer": 0, "to_client": 0}
    assert totals.sizes == {"to_peer": (0,) * 16, "to_client": (0,) * 16}
    assert totals.passed == dict.fromkeys(PassReason, 0)
    assert program.usage(0, ROOM) == [(Usage(0, 0, None), Usage(0, 0, None))] * ROOM


@needs_bpf
def test_totals_are_sums_over_all_cpus(program: XdpProgram) -> None:
    numbers = layout.TOTALS.size // 8
    program._totals.update(
        index(0),
        on_each_cpu(program, lambda cpu: struct.pack(f"={numbers}Q", *((cpu + 1) * (i + 1) for i in range(numbers)))),
    )
    times = sum(range(1, program._totals.cpus + 1))
    expected = iter([times * (i + 1) for i in range(numbers)])
    totals = program.totals()
    for each in (totals.packets, totals.bytes):
        assert list(each) == ["to_peer", "to_client"]
        assert [each["to_peer"], each["to_client"]] == [next(expected), next(expected)]
    for direction in ("to_peer", "to_client"):
        assert totals.sizes[direction] == tuple(next(expected) for _ in range(16))
    assert totals.passed == {reason: next(expected) for reason in PassReason}
    assert list(expected) == []


@needs_bpf
def test_usage_is_the_sum_over_all_cpus_and_the_latest_of_their_times(program: XdpProgram) -> None:
    count(program, 4, packets=10, octets=1000, last_used=500)
    count(program, 5, packets=3, octets=30, last_used=1)
    cpus, at = program._usage.cpus, program.ticks.seconds
    times = sum(range(1, cpus + 1))
    (used,) = program.usage(2, 1)
    assert used == (Usage(10 * times, 1000 * times, at(500 * cpus)), Usage(3 * times, 30 * times, at(cpus)))
    assert program.usage(1, 3)[1] == used
    assert len(program.usage(ROOM - 1, 256)) == 1
    assert program.usage(ROOM, 256) == []


@needs_bpf
def test_clearing_slots_clears_both_directions_on_all_cpus_and_no_neighbour(program: XdpProgram) -> None:
    for entry in range(2 * ROOM):
        count(program, entry, 1, 1, 1)
    program.clear([0, 3])
    kept = [slot for slot, used in enumerate(program.usage(0, ROOM)) if used[0].packets and used[1].packets]
    gone = [slot for slot, used in enumerate(program.usage(0, ROOM)) if used == (Usage(0, 0, None),) * 2]
    assert (kept, gone) == ([1, 2, 4, 5, 6, 7], [0, 3])


@needs_bpf
def test_no_two_programs_hash_alike(program: XdpProgram) -> None:
    with contextlib.closing(XdpProgram(ROOM)) as other:
        keys = {*program.hash_keys.numbers, *other.hash_keys.numbers}
    assert len(keys) == 2 * layout.HASH_KEYS
    assert all(0 <= each < 1 << 64 for each in keys)
    assert sum(each.bit_count() for each in keys) > 200, "of 768 bits"


def entry(program: XdpProgram, number: int) -> bytes:
    return bytes(program._next_hops[number * NEXT_HOP_SIZE : (number + 1) * NEXT_HOP_SIZE])


@needs_bpf
def test_a_next_hop_is_written_whole_with_an_even_version_and_no_other_is_touched(program: XdpProgram) -> None:
    program.write_next_hop(3, HOP)
    written = entry(program, 3)
    assert written == index(2) + HOP.packed() + bytes(NEXT_HOP_SIZE - 4 - len(HOP.packed()))
    assert not any(any(entry(program, each)) for each in range(2 * ROOM) if each != 3)
    program.write_next_hop(3, NextHop(0, HOP.destination))
    assert entry(program, 3)[:8] == index(4) + index(0)


@needs_bpf
def test_what_the_kernel_writes_of_a_next_hop_is_left_alone(program: XdpProgram) -> None:
    nudged = slice(3 * NEXT_HOP_SIZE + 4 + len(HOP.packed()), 4 * NEXT_HOP_SIZE)
    program._next_hops[nudged] = b"\xff" * (nudged.stop - nudged.start)
    program.write_next_hop(3, HOP)
    assert entry(program, 3) == index(2) + HOP.packed() + b"\xff" * (nudged.stop - nudged.start)


class Watched:
    """Memory that is looked at before and after each store."""

    def __init__(self, memory: memoryview, look: Callable[[], None]) -> None:
        self._memory = memory
        self._look = look

    def __setitem__(self, at: Any, value: Any) -> None:  # noqa: ANN401 - as a memoryview has them
        self._look()
        self._memory[at] = value
        self._look()


@needs_bpf
@pytest.mark.parametrize("version", [0, 2, 0xFFFFFFFE])
def test_whoever_reads_a_next_hop_while_it_is_written_sees_an_odd_version(program: XdpProgram, version: int) -> None:
    seen = []
    memory = program._next_hops
    memory[:4] = index(version)
    program._next_hops = Watched(memory, lambda: seen.append(bytes(memory[:8])))  # type: ignore[assignment]
    program.write_next_hop(0, HOP)
    assert seen == [index(version + 1) + index(0), index(version + 1) + index(HOP.ifindex)]
    assert bytes(memory[:8]) == index((version + 2) & 0xFFFFFFFF) + index(HOP.ifindex)


@needs_bpf
def test_a_version_that_was_left_odd_is_even_after_the_next_write(program: XdpProgram) -> None:
    program._next_hops[:4] = index(7)
    program.write_next_hop(0, HOP)
    assert entry(program, 0)[:4] == index(8)


@needs_bpf
def test_settings_name_ports_addresses_and_interfaces(program: XdpProgram) -> None:
    program.listen_to(3478, range(50000, 50010))
    own = [Own(packed_address("192.0.2.1")), Own(packed_address("2001:db8::1"), vlan=100)]
    program.write_settings(own, [Device(3, b"abcdef", send_back=True), Device(4, b"ghijkl", send_back=False)])
    assert SETTINGS.unpack(bytes(program._settings[: SETTINGS.size])) == (
        *(3478, 50000, 50009, 2),
        *(*program.hash_keys.numbers, BUCKETS - 1, round(program.ticks.per_second)),
        b"".join((own[0].address, bytes(4), own[1].address, b"\0\x64\0\0")).ljust(320, b"\0"),
        2,
        (struct.pack("=I6sH", 3, b"abcdef", 1) + struct.pack("=I6sH", 4, b"ghijkl", 0)).ljust(96, b"\0"),
    )


@needs_bpf
def test_settings_of_nobody_leave_no_address_and_no_interface(program: XdpProgram) -> None:
    program.listen_to(3478, range(50000, 50010))
    program.write_settings([Own(HOP.destination)], [Device(3, b"abcdef", send_back=True)])
    program.write_settings((), ())
    assert SETTINGS.unpack(bytes(program._settings[: SETTINGS.size])) == (
        *(3478, 50000, 50009, 0),
        *(*program.hash_keys.numbers, BUCKETS - 1, round(program.ticks.per_second)),
        bytes(320),
        0,
        bytes(96),
    )


@needs_bpf
def test_more_addresses_and_interfaces_than_there_is_room_for_are_left_out(program: XdpProgram) -> None:
    program.listen_to(3478, range(50000, 50010))
    own = [Own(bytes([i]) * 16) for i in range(17)]
    program.write_settings(own, [Device(i, b"abcdef", send_back=False) for i in range(9)])
    written = SETTINGS.unpack(bytes(program._settings[: SETTINGS.size]))
    assert (written[3], written[12], written[13]) == (16, b"".join(each.address + bytes(4) for each in own[:16]), 8)


def descriptors() -> int:
    """Count those that are open, without those that only wait to be collected: a mapped table has one of its own."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@needs_bpf
def test_a_closed_program_leaves_no_descriptor(program: XdpProgram) -> None:
    before = descriptors()
    XdpProgram(ROOM).close()
    assert descriptors() == before
    program.close()


@pytest.mark.parametrize(
    ("capacity", "bindings"),
    [(1, 1024), (256, 1024), (257, 2048), (1000, 4096), (4096, 16384), (16384, MOST_BINDINGS), (64512, MOST_BINDINGS)],
)
def test_room_is_for_four_channels_each_in_powers_of_two_up_to_65536(capacity: int, bindings: int) -> None:
    assert bindings_for(capacity) == bindings
