"""Object files: results for valid files, and a single type of error for invalid files."""

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.offload import elf
from relay.offload.elf import BrokenObjectError, MapDefinition, NotBuiltError, ProgramObject, Relocation
from tests.support.offload.fixtures import CLANG, needs_clang

SOURCE = """
typedef unsigned int u32;
struct map { u32 type, key_size, value_size, max_entries, flags; };
#define SECTION(name) __attribute__((section(name), used))
struct map second_by_name SECTION("maps") = { 1, 20, 56, 100, 1 };
struct map first_by_name SECTION("maps") = { 2, 4, 8, 10, 1024 };
char terms[] SECTION("license") = "GPL";
static void *(*look_up)(void *map, const void *key) = (void *)1;
SECTION("xdp") int program(void *context)
{
    u32 key = 3;
    return look_up(&first_by_name, &key) ? 1 : look_up(&second_by_name, context) ? 2 : 3;
}
"""
Compile: TypeAlias = Callable[..., bytes]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    directory = tmp_path_factory.mktemp("objects")

    def compiled(source: str, option: str = "-g0") -> bytes:
        path = directory / "program.o"
        command = [str(CLANG), "-target", "bpf", "-O2", option, "-xc", "-", "-c", "-o", str(path)]
        subprocess.run(command, input=source.encode(), check=True, timeout=60)
        return path.read_bytes()

    return compiled


@pytest.fixture(scope="module")
def small(compiled: Compile) -> bytes:
    return compiled(SOURCE)


def sections(data: bytes) -> list[tuple[int, ...]]:
    """The section headers of an object."""
    (offset,) = struct.unpack_from("<Q", data, 40)
    (count,) = struct.unpack_from("<H", data, 60)
    return list(struct.iter_unpack("<IIQQQQIIQQ", data[offset : offset + 64 * count]))


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@needs_clang
def test_maps_are_in_the_order_of_their_addresses(small: bytes) -> None:
    assert elf.parse(small).maps == (
        MapDefinition("second_by_name", 1, 20, 56, 100, 1),
        MapDefinition("first_by_name", 2, 4, 8, 10, 1024),
    )


@needs_clang
def test_a_relocation_has_the_instruction_and_its_map(small: bytes) -> None:
    program = elf.parse(small)
    assert [each.name for each in program.relocations] == ["first_by_name", "second_by_name"]
    for each in program.relocations:
        assert program.instructions[8 * each.instruction] == 0x18


@needs_clang
def test_the_license_has_no_null_byte(small: bytes) -> None:
    assert elf.parse(small).license == "GPL"


@needs_clang
def test_debugging_information_is_ignored(compiled: Compile, small: bytes) -> None:
    assert elf.parse(compiled(SOURCE, "-g")) == elf.parse(small)


def test_linking_changes_only_map_descriptors() -> None:
    load, leave = bytes([0x18, 0x01, 0, 0, 0, 0, 0, 0]), bytes([0x95, *[0] * 7])
    program = ProgramObject(load + bytes(8) + leave, (Relocation(0, "table"),), (), "GPL")
    assert program.linked({"table": 0x12345}) == bytes([0x18, 0x11, 0, 0, 0x45, 0x23, 1, 0]) + bytes(8) + leave


def test_linking_without_a_map_reports_its_name() -> None:
    program = ProgramObject(bytes(16), (Relocation(0, "table"),), (), "GPL")
    with pytest.raises(KeyError, match="table"):
        program.linked({})


@needs_clang
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param('SECTION("xdp")', 'SECTION("tc")', "'xdp'", id="no program"),
        pytest.param('SECTION("license")', 'SECTION("conditions")', "'license'", id="no license"),
        pytest.param('SECTION("maps")', 'SECTION("tables")', "'maps'", id="no maps"),
        pytest.param("int program", 'extern int other(void); SECTION("xdp") int program', "KeyError", id="an extern"),
        pytest.param("u32 key = 3;", "static volatile u32 key; key = 3;", "KeyError", id="variables of its own"),
    ],
)
def test_an_object_of_another_structure_is_rejected(compiled: Compile, old: str, new: str, message: str) -> None:
    source = SOURCE.replace(old, new)
    if "other" in new:
        source = source.replace("return look_up", "return other() ? 4 : look_up")
    with pytest.raises(BrokenObjectError, match=message):
        elf.parse(compiled(source))


@needs_clang
def test_an_object_for_another_machine_is_rejected(small: bytes) -> None:
    with pytest.raises(BrokenObjectError, match="not an object file for BPF"):
        elf.parse(with_bytes(small, 18, struct.pack("<H", 62)))


@needs_clang
@given(st.data())
def test_a_damaged_object_is_parsed_or_rejected(small: bytes, data: st.DataObject) -> None:
    """Flip bits, insert extreme numbers and truncate, mostly in headers and tables."""
    parts = [(0, 64), *((each[4], each[4] + each[5]) for each in sections(small)), (len(small) - 64 * 10, len(small))]
    broken = bytearray(small)
    for _ in range(data.draw(st.integers(0, 4))):
        start, end = data.draw(st.sampled_from(parts))
        at = data.draw(st.integers(start, max(start, min(end, len(small)) - 1)))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8), b"\xff" * 2, b"\x01"]))
        broken[at : at + len(new)] = new
    cut = data.draw(st.none() | st.integers(0, len(broken)))
    try:
        program = elf.parse(bytes(broken[:cut]))
    except BrokenObjectError:
        return
    # The result is consistent.
    linked = program.linked({each.name: 1 for each in program.maps})
    assert len(linked) == len(program.instructions)


@given(st.binary(max_size=300))
def test_bytes_other_than_an_object_are_rejected(noise: bytes) -> None:
    with pytest.raises(BrokenObjectError):
        elf.parse(noise)


def test_the_program_of_the_relay_is_parsed(program_object: ProgramObject) -> None:
    named = {each.name for each in program_object.maps}
    assert {each.name for each in program_object.relocations} == named


def test_a_package_without_a_program_reports_its_build(tmp_path: Path) -> None:
    with pytest.raises(NotBuiltError, match=r"^built without clang"):
        elf.packaged(tmp_path / "program.o")
    assert issubclass(NotBuiltError, BrokenObjectError)
