"""bpf(2), with the kernel itself."""

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from relay.offload import bpf, syscall
from relay.offload.bpf import Link, Map, MapFlag, MapType, Program, Verdict, VerifierError, XdpMode
from relay.offload.elf import MapDefinition
from tests.conftest import wait_until
from tests.machine import Machine
from tests.offload.conftest import needs_bpf

pytestmark = needs_bpf

FRAME = bytes(range(60))
EXIT = bytes.fromhex("9500000000000000")


def answer(verdict: int) -> bytes:
    """A program: r0 = verdict; exit."""
    return struct.pack("<BBhi", 0xB7, 0, 0, verdict) + EXIT


INTERFACE_AS_VERDICT = bytes.fromhex("61100c0000000000") + EXIT
"""r0 = context->ingress_ifindex; exit."""


def counting(counter: Map) -> bytes:
    """A program that counts packets in element 0 of a map, and passes them."""
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
    """A map of a kind that has no memory to share: BPF_MAP_TYPE_HASH."""
    with Map(MapDefinition("hash", 1, 8, 12, 100, 0)) as made:
        yield made


@pytest.fixture
def array() -> Iterator[Map]:
    with Map(MapDefinition("array", MapType.ARRAY, 4, 12, 10, MapFlag.MMAPABLE)) as made:
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
    """A network with two ends of a cable, by which the kernel says nothing of itself."""
    machine.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    machine.run(
        "ip",
        "-batch",
        "-",
        text="".join(f"link set {end} {do}\n" for do in ("addrgenmode none", "up") for end in ("near", "far")),
    )
    with machine.entered():
        yield machine


def test_what_is_put_is_found(table: Map) -> None:
    table.update(key(1), b"first value.")
    assert table.lookup(key(1)) == b"first value."


def test_what_is_put_again_is_replaced(table: Map) -> None:
    table.update(key(1), b"first value.")
    table.update(key(1), b"second value")
    assert table.lookup(key(1)) == b"second value"


def test_what_there_is_no_place_for_is_not_found(table: Map) -> None:
    assert table.lookup(key(100)) is None


@pytest.mark.parametrize("size", [3, 5])
def test_a_key_of_another_size_never_gets_to_the_kernel(table: Map, size: int) -> None:
    """It would read what lies behind it."""
    with pytest.raises(ValueError, match=f"a key of {size} bytes"):
        table.update(bytes(size), bytes(12))
    with pytest.raises(ValueError, match=f"a key of {size} bytes"):
        table.lookup(bytes(size))


def test_a_value_of_another_size_never_gets_to_the_kernel(table: Map) -> None:
    with pytest.raises(ValueError, match="a value of 11"):
        table.update(key(1), bytes(11))
    with pytest.raises(ValueError, match="1 values of 11 bytes for 1 keys"):
        table.update_batch([key(1)], [bytes(11)])


def test_a_batch_needs_a_value_for_each_key(table: Map) -> None:
    with pytest.raises(ValueError, match="1 values of 12 bytes for 2 keys"):
        table.update_batch([key(1), key(2)], [bytes(12)])


def test_a_place_that_there_is_not_is_not_written(table: Map) -> None:
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_ELEM of map table") as raised:
        table.update(key(100), bytes(12))
    assert raised.value.errno == errno.E2BIG


def test_a_batch_puts_all(table: Map) -> None:
    keys = [key(each) for each in range(100)]
    table.update_batch(keys, [each + b"12345678" for each in keys])
    assert [table.lookup(each) for each in keys] == [each + b"12345678" for each in keys]


def test_a_batch_of_nothing_does_nothing(table: Map) -> None:
    table.update_batch([], [])
    assert table.lookup_array() == bytes(100 * 12)


def test_a_batch_that_does_not_fit_puts_what_does(table: Map) -> None:
    keys = [key(each) for each in range(130)]
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_BATCH of map table") as raised:
        table.update_batch(keys, [b"as many here"] * 130)
    assert raised.value.errno == errno.E2BIG
    assert [table.lookup(each) for each in keys] == [b"as many here"] * 100 + [None] * 30


def test_an_array_is_full_of_zeros_at_first(array: Map) -> None:
    assert array.lookup_array() == bytes(10 * 12)


def test_a_part_of_an_array_is_told(array: Map) -> None:
    for index in range(10):
        array.update(struct.pack("<I", index), bytes([index]) * 12)
    assert array.lookup_array(7, 2) == b"\x07" * 12 + b"\x08" * 12
    assert array.lookup_array(8, 100) == b"\x08" * 12 + b"\x09" * 12
    assert array.lookup_array(10) == b""


def test_memory_and_map_are_the_same(array: Map) -> None:
    with array.mapped() as memory:
        memory[16:28] = b"by memory..."
        assert array.lookup(struct.pack("<I", 1)) == b"by memory..."
        array.update(struct.pack("<I", 2), b"by update...")
        assert memory[32:44] == b"by update..."


def test_an_array_that_was_made_without_has_no_memory(table: Map) -> None:
    with pytest.raises(OSError, match="mmap of map table: Invalid argument"):
        table.mapped()


def test_what_libraries_have_no_words_for_is_said(hash_table: Map) -> None:
    with pytest.raises(OSError, match="mmap of map hash: not supported") as raised:
        hash_table.mapped()
    assert raised.value.errno == syscall.ENOTSUPP


def test_a_per_cpu_value_has_a_part_for_each_cpu(counters: Map) -> None:
    parts = [bytes([1 + each]) * 12 for each in range(bpf.possible_cpus())]
    counters.update(struct.pack("<I", 3), b"".join(each + bytes(4) for each in parts))
    assert counters.lookup_per_cpu(struct.pack("<I", 3)) == tuple(parts)


def test_per_cpu_values_are_told_in_one_go(counters: Map) -> None:
    first, third = (bytes([each]) * counters.size for each in (1, 3))
    counters.update(struct.pack("<I", 0), first)
    counters.update(struct.pack("<I", 2), third)
    size, padded = 12, counters.stride
    told = counters.lookup_array(0, 3)
    assert len(told) == 3 * counters.size == 3 * counters.cpus * padded
    # The kernel copies the padding or doesn't.
    values = [told[at : at + size] for at in range(0, len(told), padded)]
    assert values == [b"\x01" * size] * counters.cpus + [bytes(size)] * counters.cpus + [b"\x03" * size] * counters.cpus


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0,2-5", 5), ("0-1,4-5,9", 5)])
def test_possible_cpus_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, text: str, count: int
) -> None:
    path = tmp_path_factory.mktemp("cpus") / "possible"
    path.write_text(text + "\n")
    monkeypatch.setattr("relay.offload.maps._POSSIBLE", path)
    assert bpf.possible_cpus.__wrapped__() == count


def test_a_map_of_impossible_sizes_is_refused() -> None:
    with pytest.raises(OSError, match="BPF_MAP_CREATE of map odd: Invalid argument"):
        Map(MapDefinition("odd", MapType.ARRAY, 8, 8, 10, 0))


def test_closing_twice_closes_nothing_else(table: Map) -> None:
    number = table.fd
    table.close()
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert other == number
        table.close()
        os.fstat(other)
    finally:
        os.close(other)
    assert table.fileno() == -1


def test_a_closed_map_is_not_used(table: Map) -> None:
    table.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        table.update(key(1), bytes(12))


def test_a_machine_whose_number_is_not_known_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscall, "NUMBER", -1)
    with pytest.raises(OSError, match=r"bpf\(2\) can be called on x86_64 and aarch64, not on") as raised:
        Map(MapDefinition("table", MapType.ARRAY, 4, 8, 1, 0))
    assert raised.value.errno == errno.ENOSYS


@pytest.mark.parametrize("verdict", [Verdict.DROP, Verdict.PASS, Verdict.TX])
def test_a_test_run_tells_the_verdict_and_the_packet(verdict: Verdict) -> None:
    with Program(answer(verdict), license="GPL") as program:
        outcome = program.test_run(FRAME)
    assert (outcome.verdict, outcome.data) == (verdict, FRAME)


def test_a_test_run_repeats_itself() -> None:
    with Map(MapDefinition("counter", MapType.ARRAY, 4, 8, 1, 0)) as counter:
        with Program(counting(counter), license="GPL") as program:
            outcome = program.test_run(FRAME, repeat=1000)
        assert outcome.verdict == Verdict.PASS
        assert outcome.nanoseconds > 0
        assert counter.lookup(bytes(4)) == struct.pack("<Q", 1000)


def test_a_test_run_seems_to_come_by_an_interface(link_pair: Machine) -> None:
    del link_pair
    near = socket.if_nametoindex("near")
    # Whose queues know of XDP once something is attached.
    with Program(INTERFACE_AS_VERDICT, license="GPL") as program, Link(program, near, XdpMode.DRIVER):
        assert program.test_run(FRAME, ifindex=near).verdict == near


def test_a_frame_that_is_none_is_refused(passing: Program) -> None:
    with pytest.raises(OSError, match="BPF_PROG_TEST_RUN of program passing: Invalid argument"):
        passing.test_run(bytes(13))


def test_live_frames_are_sent(link_pair: Machine) -> None:
    """What the program sends back where it seems to have come from arrives at the cable's other end."""
    del link_pair
    near, far = (socket.if_nametoindex(each) for each in ("near", "far"))
    with (
        Map(MapDefinition("counter", MapType.ARRAY, 4, 8, 1, 0)) as counter,
        Program(answer(Verdict.TX), license="GPL") as sending,
        Program(counting(counter), license="GPL") as receiving,
        Link(sending, near, XdpMode.DRIVER),
        Link(receiving, far, XdpMode.DRIVER),
    ):
        sending.send_live(FRAME, ifindex=near, repeat=128)
        wait_until(lambda: counter.lookup(bytes(4)) == struct.pack("<Q", 128))


def test_a_program_that_is_refused_shows_why() -> None:
    with pytest.raises(VerifierError, match=r"BPF_PROG_LOAD of program bad: Permission denied: .*R0 !read_ok") as raised:
        Program(EXIT, license="GPL", name="bad")
    assert raised.value.errno == errno.EACCES
    assert "R0 !read_ok" in raised.value.log


def test_a_long_name_is_cut() -> None:
    with Program(answer(Verdict.PASS), license="GPL", name="a_name_of_more_than_15_letters"):
        pass


@pytest.mark.parametrize("mode", XdpMode)
def test_a_link_runs_its_program_until_it_is_closed(link_pair: Machine, mode: XdpMode) -> None:
    del link_pair
    near = socket.if_nametoindex("near")
    with (
        Map(MapDefinition("counter", MapType.ARRAY, 4, 8, 1, 0)) as counter,
        Program(counting(counter), license="GPL") as program,
    ):
        with Link(program, near, mode), packet_socket("far") as sender:
            sender.send(FRAME)
            wait_until(lambda: counter.lookup(bytes(4)) != bytes(8))
        counted = counter.lookup(bytes(4))
        with packet_socket("far") as sender, packet_socket("near") as receiver:
            sender.send(FRAME)
            while receiver.recv(100) != FRAME:
                pass
        assert counter.lookup(bytes(4)) == counted


def test_a_second_link_is_refused(link_pair: Machine, passing: Program) -> None:
    del link_pair
    near = socket.if_nametoindex("near")
    with Link(passing, near, XdpMode.DRIVER):
        with pytest.raises(OSError, match="BPF_LINK_CREATE of link to interface") as raised:
            Link(passing, near, XdpMode.DRIVER)
        assert raised.value.errno == errno.EBUSY


def test_a_driver_that_can_not_says_so(link_pair: Machine, passing: Program) -> None:
    del link_pair
    with pytest.raises(OSError, match="Operation not supported") as raised:
        Link(passing, socket.if_nametoindex("lo"), XdpMode.DRIVER)
    assert raised.value.errno == errno.EOPNOTSUPP


def test_a_link_outlives_its_interface(link_pair: Machine, passing: Program) -> None:
    with Link(passing, socket.if_nametoindex("near"), XdpMode.DRIVER):
        link_pair.run("ip", "link", "del", "near")
        link_pair.run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
        with Link(passing, socket.if_nametoindex("near"), XdpMode.DRIVER) as link:
            assert link.fd >= 0
