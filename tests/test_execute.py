"""Values of a frame by their rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pairmill.execute import take

CHUNKS = st.lists(st.lists(st.none() | st.binary(max_size=3), max_size=4), max_size=5)


@given(CHUNKS, st.data())
def test_bytes_are_taken_from_any_number_of_chunks(chunks: list[list[bytes | None]], data: st.DataObject):
    column = pa.chunked_array([pa.array(chunk, pa.binary()) for chunk in chunks], pa.binary())
    index = np.array(data.draw(st.lists(st.integers(-1, len(column) - 1), max_size=12)), np.int64)
    values = column.to_pylist()
    assert take(column, index).to_pylist() == [None if i < 0 else values[i] for i in index]


def test_images_of_more_than_two_gibibytes_are_taken():
    """As many as Arrow cannot put into one array; the chunks are one buffer, so this costs what one of them does."""
    chunk = pa.array([bytes(2**20)] * 512, pa.binary())
    column = pa.chunked_array([chunk] * 5)
    index = np.arange(0, len(column), 100)
    assert {len(value) for value in take(column, index).to_pylist()} == {2**20}
