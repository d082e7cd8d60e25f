"""Rows come to the work cell by cell, whatever tables they were in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pairmill.engines import cells_of, in_cells
from pairmill.stage import CELL, whole_cells


def rows(cells: list[int], start: int = 0) -> pa.Table:
    return pa.table({CELL: pa.array(cells, pa.int64()), "row": pa.array(range(start, start + len(cells)), pa.int64())})


@given(st.lists(st.lists(st.integers(-2, 5), max_size=8), max_size=6))
def test_all_rows_of_a_cell_meet_once(parts):
    starts = np.cumsum([0, *map(len, parts)])
    tables = [rows(part, start) for part, start in zip(parts, starts, strict=False)]
    expected: dict[int, list[int]] = {}
    for row, cell in enumerate(cell for part in parts for cell in part):
        expected.setdefault(cell, []).append(row)
    found = {}
    for table in in_cells(lambda table: table, iter(tables)):
        (cell,) = set(table[CELL].to_pylist())
        assert cell not in found
        found[cell] = sorted(table["row"].to_pylist())
    assert found == expected


def test_whole_cells_go_on_at_once_and_the_others_wait():
    asked = []

    def tables():
        for number, table in enumerate([rows([7]), whole_cells(rows([2, 1, 2], 1)), rows([7, 6], 4)]):
            asked.append(number)
            yield table

    cells = cells_of(tables())
    assert next(cells)["row"].to_pylist() == [2]
    assert asked == [0, 1]
    assert [c["row"].to_pylist() for c in cells] == [[1, 3], [5], [0, 4]]


def test_one_whole_cell_is_not_copied():
    table = whole_cells(rows([3] * 100))
    (cell,) = cells_of([table])
    assert cell["row"].chunk(0).buffers()[1].address == table["row"].chunk(0).buffers()[1].address
