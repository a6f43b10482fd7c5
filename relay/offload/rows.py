"""Many records of one layout, packed at once: column by column, each a loop in C."""

import itertools
import re
import struct
from collections.abc import Sequence
from functools import cache
from typing import Final, Literal, NamedTuple, TypeAlias

_FIELDS: Final = re.compile(r"(\d*)([sHIQ])")
_FEW: Final = 40
"""Rows that are packed faster one by one."""

_Unit: TypeAlias = Literal["H", "I", "Q"]
_UNITS: Final[dict[int, _Unit]] = {8: "Q", 4: "I", 2: "H"}
"""What memory is copied in, by length in bytes."""


class _Column(NamedTuple):
    """Where a field is in the row, in units."""

    code: str
    """Byte order, `%d` for the number of rows, and the field's letter; nothing for bytes, which are as they are."""
    unit: _Unit
    first: int
    width: int
    stride: int
    """From one row to the next."""


def pack_rows(layout: struct.Struct, *columns: Sequence[int] | Sequence[bytes]) -> bytes:
    """Give what `layout.pack` gives for each row, one after the other.

    Args:
        layout: fields s, H, I and Q, in a byte order that has no gaps.
        columns: the values of each field, all as many; bytes as long as the field.

    Raises:
        ValueError: there are not as many of one as of another, or bytes are longer or shorter.
        struct.error: a number is out of range.
    """
    count = len(columns[0])
    if count < _FEW:
        return b"".join(map(layout.pack, *columns))
    rows = bytearray(count * layout.size)
    memory = memoryview(rows)
    for column, values in zip(_columns(layout.format), columns, strict=True):
        # Bytes or numbers, as the layout says: what is wrong is a TypeError.
        packed = struct.pack(column.code % count, *values) if column.code else b"".join(values)  # type: ignore[arg-type]
        source, target = memoryview(packed).cast(column.unit), memory.cast(column.unit)
        for at in range(column.width):
            target[column.first + at :: column.stride] = source[at :: column.width]
    return bytes(rows)


@cache
def _columns(layout: str) -> tuple[_Column, ...]:
    order, fields = layout[0], _FIELDS.findall(layout, 1)
    sizes = [struct.calcsize(f"{order}{count}{letter}") for count, letter in fields]
    row = sum(sizes)
    columns = []
    for first, size, (_, letter) in zip(itertools.accumulate(sizes, initial=0), sizes, fields, strict=False):
        # Units as large as all three are multiples of.
        length = next(each for each in _UNITS if not (first % each or size % each or row % each))
        code = "" if letter == "s" else f"{order}%d{letter}"
        columns.append(_Column(code, _UNITS[length], first // length, size // length, row // length))
    return tuple(columns)
