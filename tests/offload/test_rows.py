"""Records that are packed at once are as if each had been packed by itself."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.offload.layout import BINDING, END
from relay.offload.rows import pack_rows

BYTES = st.binary(min_size=16, max_size=16)
U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
SIZES = pytest.mark.parametrize("count", [1, 39, 40, 41, 100])


@SIZES
@pytest.mark.parametrize(
    ("layout", "fields"),
    [(END, (BYTES, U16, U16)), (BINDING, (BYTES, U64, *(U32,) * 4, *(U16,) * 4)), (struct.Struct(">HIQ"), (U16, U32, U64))],
)
@given(data=st.data())
def test_rows_are_as_if_packed_one_by_one(
    count: int, layout: struct.Struct, fields: tuple[st.SearchStrategy[bytes | int], ...], data: st.DataObject
) -> None:
    # A few values many times are as good as many.
    rows = data.draw(st.lists(st.tuples(*fields), min_size=1, max_size=5)) * count
    columns: list[Sequence[int]] = list(zip(*rows[:count], strict=True))
    assert pack_rows(layout, *columns) == b"".join(layout.pack(*row) for row in rows[:count])


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="different structures"):
        pack_rows(END, [bytes(16)] * 99 + [bytes(8)], [1] * 100, [2] * 100)


def test_a_number_out_of_range_is_refused() -> None:
    with pytest.raises(struct.error):
        pack_rows(END, [bytes(16)] * 100, [1 << 16] * 100, [2] * 100)
