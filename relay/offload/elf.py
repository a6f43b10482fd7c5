"""A compiled BPF program as its object file has it: instructions, maps, and where the one names the other.

Read is what `clang -target bpf` writes: ELF of 64 bits, little-endian, one program in the section `xdp` that calls no
other, and in the section `maps` one structure of five 32-bit numbers for each map, whose symbol is the map's name.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

_PACKAGED: Final = Path(__file__).with_name("program.o")

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QII")
_DEFINITION: Final = struct.Struct("<5I")

_IDENTIFICATION: Final = b"\x7fELF\x02\x01\x01"
"""64 bits, little-endian, first version."""
_RELOCATABLE: Final = 1
_BPF: Final = 247
_SYMBOL_TABLE: Final = 2
_WITHOUT_CONTENT: Final = 8
_RELOCATIONS: Final = 9
_RELOCATIONS_WITH_ADDENDS: Final = 4
_SECTION_SYMBOL: Final = 3
_R_BPF_64_64: Final = 1

_INSTRUCTION: Final = 8
_LOAD_WIDE: Final = 0x18
"""The operation that takes two instructions and loads a number of 64 bits."""
_MAP_DESCRIPTOR: Final = 1
"""In the source register of that: the number is a map's file descriptor."""


class BrokenObjectError(ValueError):
    """A file is no BPF object, or one with more in it than is understood here."""


class NotBuiltError(BrokenObjectError):
    """The package was built without clang: there is no object in it."""


class MapDefinition(NamedTuple):
    """What a map is made with.

    Attributes:
        name: its symbol.
        type: its kind, a number of `enum bpf_map_type`.
        key_size: bytes of a key.
        value_size: bytes of a value.
        max_entries: the most elements, for an array all it ever has.
        flags: `BPF_F_...`.
    """

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class Relocation(NamedTuple):
    """An instruction that needs a map's file descriptor.

    Attributes:
        instruction: its index; it takes the place of two.
        name: the map's.
    """

    instruction: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgramObject:
    """A program that isn't loaded yet.

    Attributes:
        instructions: of section `xdp`, 8 bytes each.
        relocations: which of them name maps.
        maps: the definitions, in the order of their addresses.
        license: of the program, which the kernel wants to know.
    """

    instructions: bytes
    relocations: tuple[Relocation, ...]
    maps: tuple[MapDefinition, ...]
    license: str

    def linked(self, descriptors: Mapping[str, int]) -> bytes:
        """The instructions, with maps in their places.

        Args:
            descriptors: of the maps, by name.

        Raises:
            KeyError: a map is missing.
        """
        code = bytearray(self.instructions)
        for index, name in self.relocations:
            at = index * _INSTRUCTION
            code[at + 1] = code[at + 1] & 0x0F | _MAP_DESCRIPTOR << 4
            code[at + 4 : at + 8] = descriptors[name].to_bytes(4, "little")
        return bytes(code)


def packaged() -> bytes:
    """The object that comes with this package.

    Raises:
        NotBuiltError: none does.
    """
    try:
        return _PACKAGED.read_bytes()
    except FileNotFoundError:
        raise NotBuiltError("built without clang: there is no program for the kernel in this package") from None


def parse(data: bytes) -> ProgramObject:
    """Read an object file.

    Args:
        data: all of it.

    Raises:
        BrokenObjectError: it can't be read, or isn't such a program.
    """
    try:
        return _Reader(data).read()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise BrokenObjectError(f"broken BPF object: {error}") from error


class _Section(NamedTuple):
    number: int
    name: str
    type: int
    content: bytes
    link: int
    info: int


class _Symbol(NamedTuple):
    name: str
    kind: int
    section: int
    address: int


class _Reader:
    """Every number is the file's: one that leads out of it ends as an `IndexError` or in `_slice`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._sections = self._read_sections()
        self._symbols = self._read_symbols()

    def read(self) -> ProgramObject:
        code = self._only("xdp")
        if not code.content or len(code.content) % _INSTRUCTION:
            raise BrokenObjectError(f"section xdp has {len(code.content)} bytes, which are no instructions")
        maps = self._only("maps")
        return ProgramObject(code.content, self._read_relocations(code, maps), self._read_maps(maps), self._read_license())

    def _slice(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._data):
            raise BrokenObjectError("the file ends early")
        return self._data[offset : offset + size]

    def _read_sections(self) -> list[_Section]:
        (identification, kind, machine, _, _, _, offset, _, _, _, _, size, count, names) = _HEADER.unpack(
            self._slice(0, _HEADER.size)
        )
        if not identification.startswith(_IDENTIFICATION) or (kind, machine) != (_RELOCATABLE, _BPF):
            raise BrokenObjectError("not an object file for BPF")
        if size != _SECTION.size:
            raise BrokenObjectError(f"section headers of {size} bytes")
        headers = list(_SECTION.iter_unpack(self._slice(offset, count * size)))
        # What has no content in the file says where it would be, and how long.
        contents = [
            b"" if kind in (0, _WITHOUT_CONTENT) else self._slice(start, length)
            for _, kind, _, _, start, length, *_ in headers
        ]
        strings = contents[names]
        return [
            _Section(index, _string(strings, header[0]), header[1], contents[index], header[6], header[7])
            for index, header in enumerate(headers)
        ]

    def _read_symbols(self) -> list[_Symbol]:
        tables = [each for each in self._sections if each.type == _SYMBOL_TABLE]
        if len(tables) != 1:
            raise BrokenObjectError(f"{len(tables)} symbol tables")
        (table,) = tables
        strings = self._sections[table.link].content
        return [
            _Symbol(_string(strings, name), kind & 0xF, section, address)
            for name, kind, _, section, address, _ in _SYMBOL.iter_unpack(table.content)
        ]

    def _only(self, name: str) -> _Section:
        found = [each for each in self._sections if each.name == name]
        if len(found) != 1:
            raise BrokenObjectError(f"{len(found)} sections {name}")
        return found[0]

    def _read_maps(self, section: _Section) -> tuple[MapDefinition, ...]:
        symbols = sorted(
            (each for each in self._symbols if each.section == section.number and each.kind != _SECTION_SYMBOL),
            key=lambda each: each.address,
        )
        # One after the other without a gap: no map is without a name, and none has two.
        if [each.address for each in symbols] != list(range(0, len(section.content), _DEFINITION.size)):
            raise BrokenObjectError("section maps isn't one definition after the other")
        if len({each.name for each in symbols} - {""}) != len(symbols):
            raise BrokenObjectError("maps without names of their own")
        return tuple(MapDefinition(each.name, *_DEFINITION.unpack_from(section.content, each.address)) for each in symbols)

    def _read_relocations(self, code: _Section, maps: _Section) -> tuple[Relocation, ...]:
        found = []
        for section in self._sections:
            if section.info != code.number or section.type not in (_RELOCATIONS, _RELOCATIONS_WITH_ADDENDS):
                continue
            if section.type == _RELOCATIONS_WITH_ADDENDS:
                raise BrokenObjectError("relocations with addends")
            for offset, kind, symbol in _RELOCATION.iter_unpack(section.content):
                target = self._symbols[symbol]
                if kind != _R_BPF_64_64 or target.section != maps.number or target.kind == _SECTION_SYMBOL:
                    raise BrokenObjectError(f"relocation of kind {kind} against {target.name!r}, which is no map")
                # Both halves of the instruction have to be there, since the number is written into it.
                whole = code.content[offset : offset + 2 * _INSTRUCTION]
                if offset % _INSTRUCTION or len(whole) < 2 * _INSTRUCTION or whole[0] != _LOAD_WIDE:
                    raise BrokenObjectError(f"a map at {offset}, where no instruction loads one")
                found.append(Relocation(offset // _INSTRUCTION, target.name))
        return tuple(found)

    def _read_license(self) -> str:
        text = self._only("license").content.removesuffix(b"\0").decode("ascii")
        if not text.isprintable():
            raise BrokenObjectError("a license that can't be read")
        return text


def _string(table: bytes, offset: int) -> str:
    if offset >= len(table):
        raise BrokenObjectError("a name that isn't there")
    name, end, _ = table[offset:].partition(b"\0")
    if not end:
        raise BrokenObjectError("a name without an end")
    return name.decode("ascii")
