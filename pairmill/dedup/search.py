"""The search of one cell as work that any engine does: rows and queries go in as a table, edges come out as one.

A table of work has one row for each vector that belongs to the cell, asks in it, or both. It holds the vectors
themselves, so that whoever does the work needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairmill.dedup.cells import Near, knows_gpus, near_pairs
from pairmill.dedup.seniority import Rows
from pairmill.stage import CELL, Resources, whole_cells

SENIORS = 4
"""How many of the most senior near rows are stored for every similarity, so that a big cluster is a star around its
most senior rows: whatever the threshold, and even when up to three of them are dropped for other reasons, its rows
meet."""

EDGES = pa.schema([("query", pa.int64()), ("other", pa.int64()), ("similarity", pa.float32())])
"""What the work of a cell answers: pairs of vectors by number, with the inner product of the rounded vectors. Where
`query` and `similarity` are null, `other` belongs to the cell, does not ask in it, and is near to a more senior vector
that does."""

Vectors = npt.NDArray[np.int16]
Mask = npt.NDArray[np.bool_]


def cell_tables(vectors: Vectors, rank: Rows, parts: Iterable[tuple[Rows, Rows]]) -> Iterator[pa.Table]:
    """The work on each part, made when it is asked for: a copy of its vectors.

    Args:
        vectors: Rounded, shape (n, dimensions).
        rank: The seniority of each, 0 for the most senior one.
        parts: Numbers of the vectors that belong to a part, and of those that ask in it; each ascending.
    """
    for cell, (rows, queries) in enumerate(parts):
        numbers = np.union1d(rows, queries)
        columns = {
            CELL: pa.array(np.full(len(numbers), cell)),
            "number": pa.array(numbers),
            "rank": pa.array(rank[numbers]),
            "belongs": pa.array(np.isin(numbers, rows, assume_unique=True)),
            "asks": pa.array(np.isin(numbers, queries, assume_unique=True)),
            "vector": _binary(vectors[numbers]),
        }
        yield whole_cells(pa.table(columns))


def _binary(vectors: Vectors) -> pa.Array:
    """Vectors as fixed-size binary, without another copy."""
    kind = pa.binary(vectors.shape[1] * vectors.itemsize)
    return pa.Array.from_buffers(kind, len(vectors), [None, pa.py_buffer(vectors)])


def _vectors(column: pa.ChunkedArray) -> Vectors:
    """What `_binary` made."""
    array = column.combine_chunks()
    size = array.type.byte_width
    buffer = array.buffers()[1].slice(array.offset * size, len(array) * size)
    return np.frombuffer(buffer, dtype=np.int16).reshape(len(array), -1)


@dataclass(frozen=True)
class CellSearch:
    """The search of one cell: a table of `cell_tables` to one of `EDGES`, pruned."""

    floor: float
    """Least cosine of the rounded vectors."""
    neighbours: int
    """See `prune`."""

    @property
    def resources(self) -> Resources:
        """One CPU; and a GPU where there is one and the installed FAISS can use it."""
        return Resources(gpu_if_any=knows_gpus())

    def __call__(self, cell: pa.Table) -> pa.Table:
        """Find the rows near to each query. Whatever the order of the rows, the edges are the same."""
        number, rank = (cell.column(name).to_numpy() for name in ("number", "rank"))
        belongs, asks = (np.asarray(cell.column(name)) for name in ("belongs", "asks"))
        vectors = _vectors(cell.column("vector"))
        senior_first = np.argsort(rank)
        rows, queries = senior_first[belongs[senior_first]], np.flatnonzero(asks)
        group = _equal(vectors, rows)
        # More of a group could not be stored, and a placeholder image that many sites share would cost the square of
        # its number.
        shown = rows[_positions_in(group) <= self.neighbours]
        found: list[Near] = []
        group_of = np.full(len(rank), -1)
        group_of[rows] = group
        asked_by = np.full(len(rows), np.iinfo(np.int64).max)  # the most senior query near to each group
        for near in near_pairs(vectors, shown, queries, self.floor):
            np.minimum.at(asked_by, group_of[near.other], rank[near.query])
            found.append(prune(near, rank, self.neighbours))
        edges = prune(Near.concatenate(found), rank, self.neighbours)
        return _answer(
            Near(number[edges.query], number[edges.other], edges.similarity),
            number[rows[~asks[rows] & (asked_by[group] < rank[rows])]],
        )


def _answer(edges: Near, overtaken: Rows) -> pa.Table:
    nothing = pa.nulls(len(overtaken))
    columns = [
        pa.chunked_array([pa.array(edges.query), nothing.cast(pa.int64())]),
        pa.chunked_array([pa.array(edges.other), pa.array(overtaken)]),
        pa.chunked_array([pa.array(edges.similarity), nothing.cast(pa.float32())]),
    ]
    return pa.table(columns, schema=EDGES)


def answered(answer: pa.Table) -> tuple[Near, Rows]:
    """The edges of an answer, and the vectors that were overtaken."""
    edges = answer.filter(answer.column("query").is_valid())
    overtaken = answer.filter(answer.column("query").is_null())
    columns = (edges.column(name).to_numpy() for name in EDGES.names)
    return Near(*columns), overtaken.column("other").to_numpy()


def _equal(vectors: Vectors, rows: Rows) -> Rows:
    """Numbers below ``len(rows)`` for some vectors, the same for equal ones."""
    block = vectors[rows]
    _, group = np.unique(block.view(np.dtype((np.void, block.itemsize * block.shape[1]))), return_inverse=True)
    return group.ravel()


def _positions_in(group: Rows) -> Rows:
    """How many elements of the same group come before each."""
    order = np.argsort(group, kind="stable")
    position = np.empty(len(group), dtype=np.int64)
    position[order] = positions(group[order])
    return position


def positions(group: npt.NDArray[Any]) -> Rows:
    """The position of each element within its run of equal values."""
    starts = np.flatnonzero(np.r_[True, np.diff(group) != 0]) if len(group) else np.empty(0, dtype=np.int64)
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))


def storing_order(near: Near, rank: Rows) -> Rows:
    """By query, then most similar first, then most senior first."""
    return np.lexsort((rank[near.other], -near.similarity, near.query))


def prune(near: Near, rank: Rows, most: int) -> Near:
    """The edges worth storing: for each query the `most` most similar rows and `SENIORS` layers of the senior ones.

    The first layer holds the rows to which no other is both as similar and more senior; the next layer is the same
    without the first. So for any similarity t, the `SENIORS` most senior rows at t or above are in some layer. What is
    pruned in parts and pruned again together is the same as pruned once.
    """
    near = near.where(storing_order(near, rank))
    keep = positions(near.query) < most
    if keep.all():
        return near
    # Subtracting a large step for each query makes one running minimum serve all queries.
    key = rank[near.other] - (np.cumsum(np.r_[0, np.diff(near.query) != 0])) * (int(rank.max()) + 1)
    left = np.arange(len(near))
    for _ in range(SENIORS):
        lowest = np.minimum.accumulate(key[left])
        layer = np.r_[True, key[left][1:] < lowest[:-1]][: len(left)]
        keep[left[layer]] = True
        left = left[~layer]
    return near.where(keep)
