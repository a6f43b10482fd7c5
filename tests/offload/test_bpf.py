"""bpf(2), with the kernel itself."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.offload.runs import run, send_live
from relay.offload import bpf, syscall
from relay.offload.bpf import Map, MapType, Program, XdpLink, XdpMode
from relay.offload.elf import MapDefinition
from tests.support.machine import Machine
from tests.support.offload.fixtures import needs_bpf
from tests.support.offload.model import Verdict
from tests.support.offload.tables import entries
from tests.support.waiting import wait_until

pytestmark = needs_bpf

FRAME = bytes(range(60))
EXIT = bytes.fromhex("9500000000000000")


def answer(verdict: int) -> bytes:
    """A program: r0 = verdict; exit."""
    return struct.pack("<BBhi", 0xB7, 0, 0, verdict) + EXIT


INTERFACE_AS_VERDICT = bytes.fromhex("61100c0000000000") + EXIT
"""r0 = context->ingress_ifindex; exit."""


def counting(counter: Map) -> bytes:
    """Return a program that counts packets in element 0 of a map and passes them."""
    return b"".join(
        (
            bytes.fromhex("7a0af8ff00000000"),  # *(u64 *)(r10 - 8) = 0
            bytes.fromhex("bfa2000000000000"),  # r2 = r10
            bytes.fromhex("07020000f8ffffff"),  # r2 += -8
            struct.pack("<BBhi8x", 0x18, 0x11, 0, counter.fd),  # r1 = the map
            bytes.fromhex("8500000001000000"),  # r0 = bpf_map_lookup_elem(r1, r2)
            bytes.fromhex("1500020000000000"),  # if r0 == 0 goto +2
            bytes.fromhex("b701000001000000"),  # r1 = 1
            bytes.fromhex("db10000000000000"),  # atomic *(u64 *)r0 += r1
            answer(Verdict.PASS),
        )
    )


def packet_socket(interface: str) -> socket.socket:
    """A socket for whole frames of any kind."""
    every_protocol = 3
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(every_protocol))
    made.settimeout(30)
    made.bind((interface, every_protocol))
    return made


def key(number: int) -> bytes:
    return struct.pack("<I", number)


@pytest.fixture
def table() -> Iterator[Map]:
    with Map(MapDefinition("table", MapType.ARRAY, 4, 12, 100, 0)) as made:
        yield made


@pytest.fixture
def hash_table() -> Iterator[Map]:
    with Map(MapDefinition("hash", MapType.HASH, 4, 16, 100, 0)) as made:
        yield made


@pytest.fixture
def array() -> Iterator[Map]:
    with Map(MapDefinition("array", MapType.ARRAY, 4, 12, 10, 0)) as made:
        yield made


@pytest.fixture
def counters() -> Iterator[Map]:
    with Map(MapDefinition("counters", MapType.PERCPU_ARRAY, 4, 12, 10, 0)) as made:
        yield made


@pytest.fixture
def passing() -> Iterator[Program]:
    with Program(answer(Verdict.PASS), license="GPL", name="passing") as made:
        yield made


@pytest.fixture
def link_pair(machine: Machine) -> Iterator[Machine]:
    """A network with two ends of a cable, on which the kernel sends no packets of its own."""
    machine.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    machine.run(
        "ip",
        "-batch",
        "-",
        text="".join(f"link set {end} {do}\n" for do in ("addrgenmode none", "up") for end in ("near", "far")),
    )
    with machine.entered():
        yield machine


def test_updated_values_are_returned(table: Map) -> None:
    table.update({key(1): b"first value."})
    assert table.lookup(1, 1) == b"first value."
    table.update({key(1): b"second value"})
    assert table.lookup(1, 1) == b"second value"


def test_a_value_of_a_wrong_size_is_rejected_before_the_system_call(table: Map) -> None:
    """The kernel would read memory beyond the value."""
    with pytest.raises(ValueError, match="map table: a key and a value of 4 and 11 bytes"):
        table.update({key(0): bytes(12), key(1): bytes(11)})
    with pytest.raises(ValueError, match="map table: a key and a value of 3 and 12 bytes"):
        table.update({key(0)[:3]: bytes(12)})


def test_an_element_beyond_the_end_is_not_written(table: Map) -> None:
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_BATCH of map table") as raised:
        table.update({key(100): bytes(12)})
    assert raised.value.errno == errno.E2BIG


def test_an_update_replaces_all_elements(table: Map) -> None:
    values = {key(each): key(each) + b"12345678" for each in range(100)}
    table.update(values)
    assert table.lookup() == b"".join(values.values())


def test_an_update_without_elements_has_no_effect(table: Map) -> None:
    table.update({})
    assert table.lookup() == bytes(100 * 12)


def test_an_update_beyond_the_end_replaces_the_valid_elements(table: Map) -> None:
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_BATCH of map table") as raised:
        table.update(dict.fromkeys(map(key, range(130)), b"as many here"))
    assert raised.value.errno == errno.E2BIG
    assert table.lookup() == b"as many here" * 100


def test_a_new_array_contains_zeros(array: Map) -> None:
    assert array.lookup() == bytes(10 * 12)


def test_a_part_of_an_array_is_returned(array: Map) -> None:
    array.update({key(index): bytes([index]) * 12 for index in range(10)})
    assert array.lookup(7, 2) == b"\x07" * 12 + b"\x08" * 12
    assert array.lookup(8, 100) == b"\x08" * 12 + b"\x09" * 12
    assert array.lookup(10) == b""


def test_elements_of_a_hash_map_are_added_replaced_and_deleted(hash_table: Map) -> None:
    values = {key(each): key(each) * 4 for each in range(100)}
    hash_table.update(values)
    hash_table.update({key(7): b"another value..."})
    hash_table.delete([key(each) for each in range(10, 100)])
    hash_table.delete([])
    expected = {each: value for each, value in values.items() if each < key(10)} | {key(7): b"another value..."}
    assert entries(hash_table.fd, 4, 16) == expected


def test_a_full_hash_map_rejects_further_elements(hash_table: Map) -> None:
    values = {key(each): bytes(16) for each in range(101)}
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_BATCH of map hash") as raised:
        hash_table.update(values)
    assert raised.value.errno == errno.E2BIG
    assert len(entries(hash_table.fd, 4, 16)) == 100
    hash_table.delete([key(5)])
    hash_table.update({key(100): bytes(16), key(6): b"replaced in full"})


def test_a_missing_element_cannot_be_deleted(hash_table: Map) -> None:
    hash_table.update({key(1): bytes(16)})
    with pytest.raises(OSError, match="BPF_MAP_DELETE_BATCH of map hash") as raised:
        hash_table.delete([key(1), key(2)])
    assert raised.value.errno == errno.ENOENT
    assert entries(hash_table.fd, 4, 16) == {}


def test_an_internal_error_number_has_a_text() -> None:
    assert str(syscall.described(syscall.ENOTSUPP, "it")) == "[Errno 524] it: not supported"


def test_a_per_cpu_value_has_a_part_for_each_possible_cpu(counters: Map) -> None:
    first, third = (bytes([each]) * counters.size for each in (1, 3))
    counters.update({key(0): first, key(2): third})
    size, padded = 12, counters.stride
    told = counters.lookup(0, 3)
    assert len(told) == 3 * counters.size == 3 * counters.cpus * padded == 3 * bpf.possible_cpus() * padded
    # The kernel may or may not copy the padding.
    values = [told[at : at + size] for at in range(0, len(told), padded)]
    assert values == [b"\x01" * size] * counters.cpus + [bytes(size)] * counters.cpus + [b"\x03" * size] * counters.cpus


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0,2-5", 5), ("0-1,4-5,9", 5)])
def test_possible_cpus_are_counted(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "possible"
    path.write_text(text + "\n")
    assert bpf.possible_cpus(path) == count


def test_a_map_of_impossible_sizes_is_rejected() -> None:
    with pytest.raises(OSError, match="BPF_MAP_CREATE of map odd: Invalid argument"):
        Map(MapDefinition("odd", MapType.ARRAY, 8, 8, 10, 0))


def test_closing_twice_closes_no_other_descriptor(table: Map) -> None:
    number = table.fd
    table.close()
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert other == number
        table.close()
        os.fstat(other)
    finally:
        os.close(other)
    assert table.fd == -1


def test_a_closed_map_cannot_be_used(table: Map) -> None:
    table.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        table.update({key(1): bytes(12)})


def test_an_unknown_machine_raises_enosys() -> None:
    with pytest.raises(OSError, match=r"bpf\(2\) can be called on x86_64 and aarch64, not on") as raised:
        syscall.call(syscall.Command.MAP_CREATE, syscall.MapCreate(), "map table", number=-1)
    assert raised.value.errno == errno.ENOSYS


@pytest.mark.parametrize("verdict", [Verdict.DROP, Verdict.PASS, Verdict.TX])
def test_a_test_run_returns_the_verdict_and_the_packet(verdict: Verdict) -> None:
    with Program(answer(verdict), license="GPL") as program:
        outcome = run(program, FRAME)
    assert (outcome.verdict, outcome.data) == (verdict, FRAME)


def test_a_test_run_repeats_the_program() -> None:
    with Map(MapDefinition("counter", MapType.ARRAY, 4, 8, 1, 0)) as counter:
        with Program(counting(counter), license="GPL") as program:
            outcome = run(program, FRAME, repeat=1000)
        assert outcome.verdict == Verdict.PASS
        assert outcome.nanoseconds > 0
        assert counter.lookup() == struct.pack("<Q", 1000)


def test_a_test_run_sets_the_receiving_interface(link_pair: Machine) -> None:
    del link_pair
    near = socket.if_nametoindex("near")
    # Its queues handle XDP only with an attached program.
    with Program(INTERFACE_AS_VERDICT, license="GPL") as program, XdpLink.create(program, near, XdpMode.DRIVER):
        assert run(program, FRAME, ifindex=near).verdict == near


def test_a_too_short_frame_is_rejected(passing: Program) -> None:
    with pytest.raises(OSError, match=r"BPF_PROG_TEST_RUN of program [0-9]+: Invalid argument"):
        run(passing, bytes(13))


def test_live_frames_are_sent(link_pair: Machine) -> None:
    """Frames that the program sends back arrive at the other end of the cable."""
    del link_pair
    near, far = (socket.if_nametoindex(each) for each in ("near", "far"))
    with (
        Map(MapDefinition("counter", MapType.ARRAY, 4, 8, 1, 0)) as counter,
        Program(answer(Verdict.TX), license="GPL") as sending,
        Program(counting(counter), license="GPL") as receiving,
        XdpLink.create(sending, near, XdpMode.DRIVER),
        XdpLink.create(receiving, far, XdpMode.DRIVER),
    ):
        send_live(sending, FRAME, ifindex=near, repeat=128)
        wait_until(lambda: counter.lookup() == struct.pack("<Q", 128))


def test_a_rejected_program_shows_the_verifier_log() -> None:
    with pytest.raises(OSError, match=r"BPF_PROG_LOAD of program bad: Permission denied: .*R0 !read_ok") as raised:
        Program(EXIT, license="GPL", name="bad")
    assert raised.value.errno == errno.EACCES


def test_a_long_name_is_truncated() -> None:
    with Program(answer(Verdict.PASS), license="GPL", name="a_name_of_more_than_15_letters"):
        pass


@pytest.mark.parametrize("mode", XdpMode)
def test_a_link_runs_its_program_until_closed(link_pair: Machine, mode: XdpMode) -> None:
    del link_pair
    near = socket.if_nametoindex("near")
    with (
        Map(MapDefinition("counter", MapType.ARRAY, 4, 8, 1, 0)) as counter,
        Program(counting(counter), license="GPL") as program,
    ):
        with XdpLink.create(program, near, mode), packet_socket("far") as sender:
            sender.send(FRAME)
            wait_until(lambda: counter.lookup() != bytes(8))
        counted = counter.lookup()
        with packet_socket("far") as sender, packet_socket("near") as receiver:
            sender.send(FRAME)
            while receiver.recv(100) != FRAME:
                pass
        assert counter.lookup() == counted


def test_a_second_link_is_rejected(link_pair: Machine, passing: Program) -> None:
    del link_pair
    near = socket.if_nametoindex("near")
    with XdpLink.create(passing, near, XdpMode.DRIVER):
        with pytest.raises(OSError, match="BPF_LINK_CREATE of link to interface") as raised:
            XdpLink.create(passing, near, XdpMode.DRIVER)
        assert raised.value.errno == errno.EBUSY


def test_a_driver_without_xdp_is_an_error(link_pair: Machine, passing: Program) -> None:
    del link_pair
    with pytest.raises(OSError, match="Operation not supported") as raised:
        XdpLink.create(passing, socket.if_nametoindex("lo"), XdpMode.DRIVER)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_a_link_outlives_its_interface(link_pair: Machine, passing: Program) -> None:
    with XdpLink.create(passing, socket.if_nametoindex("near"), XdpMode.DRIVER):
        link_pair.run("ip", "link", "del", "near")
        link_pair.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
        with XdpLink.create(passing, socket.if_nametoindex("near"), XdpMode.DRIVER) as link:
            assert link.fd >= 0
