"""The object file of a compiled BPF program: instructions, maps and license.

The parser supports the output of `clang -target bpf`: a 64-bit little-endian ELF file with one program without subprograms
in the section `xdp`. The section `maps` has a structure of five 32-bit numbers for each map, and a symbol with the map's
name.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

PACKAGED: Final = Path(__file__).with_name("program.o")
"""The object file in this package."""

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELOCATION: Final = struct.Struct("<QII")
_DEFINITION: Final = struct.Struct("<5I")

_START: Final = (b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 1, 247)
"""64 bits, little-endian, first version; relocatable; BPF."""
_SECTION_SYMBOL: Final = 3

_INSTRUCTION: Final = 8
_MAP_DESCRIPTOR: Final = 1
"""Value of the source register of a 64-bit load, which occupies two instructions, if the number is a map's descriptor."""


class BrokenObjectError(ValueError):
    """A file is no BPF object, or has unsupported content."""


class NotBuiltError(BrokenObjectError):
    """The package was built without clang, and contains no object."""


class MapDefinition(NamedTuple):
    """The definition of a map: `struct map` of kernel.h with the map's symbol."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


class Relocation(NamedTuple):
    """The index of an instruction that needs a map's file descriptor, and the map's name."""

    instruction: int
    name: str


@dataclass(frozen=True, slots=True)
class ProgramObject:
    """A program before loading. The maps are in the order of their addresses."""

    instructions: bytes
    relocations: tuple[Relocation, ...]
    maps: tuple[MapDefinition, ...]
    license: str

    def linked(self, descriptors: Mapping[str, int]) -> bytes:
        """Return the instructions with descriptors of maps inserted."""
        code = bytearray(self.instructions)
        for index, name in self.relocations:
            at = index * _INSTRUCTION
            code[at + 1] = code[at + 1] & 0x0F | _MAP_DESCRIPTOR << 4
            code[at + 4 : at + 8] = descriptors[name].to_bytes(4, "little")
        return bytes(code)


def packaged(path: Path = PACKAGED) -> bytes:
    """Read the object file in this package.

    Raises:
        NotBuiltError: the file does not exist.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotBuiltError("built without clang: there is no program for the kernel in this package") from None


def parse(data: bytes) -> ProgramObject:
    """Parse an object file.

    Raises:
        BrokenObjectError: the file is invalid or unsupported.
    """
    try:
        return _parse(data)
    except (struct.error, LookupError, ValueError) as error:
        raise BrokenObjectError(f"broken BPF object ({error!r})") from error


def _parse(data: bytes) -> ProgramObject:
    *start, _, _, _, offset, _, _, _, _, size, count, names = _HEADER.unpack_from(data)
    if tuple(start) != _START:
        raise ValueError("not an object file for BPF")
    headers = list(_SECTION.iter_unpack(data[offset : offset + count * size]))
    contents = [data[start : start + length] for _, _, _, _, start, length, *_ in headers]
    numbers = {_text(contents[names], name): number for number, (name, *_) in enumerate(headers)}
    code, symbols = contents[numbers["xdp"]], numbers[".symtab"]
    strings = contents[headers[symbols][6]]
    maps = {
        number: (address, MapDefinition(_text(strings, name), *_DEFINITION.unpack_from(contents[section], address)))
        for number, (name, kind, _, section, address, _) in enumerate(_SYMBOL.iter_unpack(contents[symbols]))
        if section == numbers["maps"] and kind & 0xF != _SECTION_SYMBOL
    }
    relocations = [
        # A relocation against anything but a map is a KeyError.
        Relocation(at // _INSTRUCTION, maps[symbol][1].name)
        for at, _, symbol in _RELOCATION.iter_unpack(contents[numbers[".relxdp"]])
    ]
    if any((each.instruction + 2) * _INSTRUCTION > len(code) for each in relocations):
        raise ValueError("a relocation behind the program")
    license_ = contents[numbers["license"]].rstrip(b"\0").decode("ascii")
    return ProgramObject(code, tuple(relocations), tuple(definition for _, definition in sorted(maps.values())), license_)


def _text(table: bytes, offset: int) -> str:
    return table[offset:].partition(b"\0")[0].decode("ascii")
