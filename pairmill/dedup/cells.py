"""Finding all near pairs of unit vectors by FAISS, in k-means cells; results depend on nothing but the vectors.

Floating-point sums depend on their order, and so on threads, blocks and hardware. Here vectors are rounded to integers
so small (`SCALE`) that every inner product is exact in float32 in whatever order it is summed: all partial sums stay
below 2^24. The rounding changes a cosine by about 1e-4; what is stored is computed again, exactly, from the original
vectors (`exact_cosines`).
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pairmill.dedup.seniority import Rows
from pairmill.errors import ContractError

SCALE = 4000
"""Length of the rounded vectors: the largest round number whose square stays below 2^24 with room for rounding."""
SLACK = 2e-3
"""Rounding moves a cosine by 1e-4 (standard deviation); pairs this far below the floor are still looked at exactly."""
FLAT_ROWS = 20_000
"""Below this many rows all are compared with all: that takes seconds, and cells would save little of them."""
BLOCK = 65_536
"""Rows held as float32 at a time."""
PAIRS = 2**24
"""Inner products computed at a time."""
RAM = 2**30
"""Rounded vectors up to this many bytes stay in memory; more go to a temporary file that the system pages."""

TRAINING_ROWS = 24
"""Rows a cell in the sample that cells are trained on."""
ITERATIONS = 6
"""Of k-means; twice as many on more rows did not change recall (benchmarks/dedup.py)."""

PRODUCTS = 1024
"""Pairs of vectors multiplied at a time by a thread; those of 512 numbers fit its cache."""

Matrix = npt.NDArray[np.float32]


class Embeddings:
    """A ``list<float>`` column as matrices, without copying it. Null vectors and vectors with NaN are left out.

    Attributes:
        rows: The row in the column of each vector, ascending.
        dimensions: Length of a vector; 0 when there are none.
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._views: list[Matrix] = []
        rows, start, self.dimensions = [np.empty(0, dtype=np.int64)], 0, 0
        for chunk in column.chunks:
            present = np.flatnonzero(chunk.is_valid().to_numpy(zero_copy_only=False))
            if len(present):
                view = self._view(chunk, len(present))
                squares = np.einsum("ij,ij->i", view, view)
                finite = np.isfinite(squares)
                if np.any(np.abs(squares[finite] - 1) > 1e-2):
                    raise ContractError("image embeddings must have length 1; divide them by their norm")
                self._views.append(view if finite.all() else view[finite])
                rows.append(present[finite] + start)
            start += len(chunk)
        self.rows = np.concatenate(rows)
        self._starts = np.cumsum([0, *map(len, self._views)])

    def __len__(self) -> int:
        return len(self.rows)

    def _view(self, chunk: pa.ListArray, count: int) -> Matrix:
        values = chunk.flatten().to_numpy(zero_copy_only=False)
        dimensions = self.dimensions or len(values) // count
        if len(values) != count * dimensions or len(set(chunk.value_lengths().unique().to_pylist()) - {None}) > 1:
            raise ContractError("image embeddings differ in length; one model must write them all")
        self.dimensions = dimensions
        return values.reshape(count, dimensions)

    def take(self, vectors: Rows) -> Matrix:
        """Some vectors, by their position among the vectors."""
        out = np.empty((len(vectors), self.dimensions), dtype=np.float32)
        view = np.searchsorted(self._starts, vectors, side="right") - 1
        for number in np.unique(view):
            here = view == number
            out[here] = self._views[number][vectors[here] - self._starts[number]]
        return out

    def rounded(self) -> npt.NDArray[np.int16]:
        """All vectors times `SCALE`, rounded."""
        shape = (len(self), self.dimensions)
        if len(self) * self.dimensions * 2 <= RAM:
            out: npt.NDArray[np.int16] = np.empty(shape, dtype=np.int16)
        else:
            with tempfile.TemporaryFile() as file:  # the map holds it open, and its end deletes it
                out = np.memmap(file, dtype=np.int16, mode="w+", shape=shape)
        for view, start in zip(self._views, self._starts[:-1], strict=True):
            for i in range(0, len(view), BLOCK):
                part = view[i : i + BLOCK]
                out[start + i : start + i + len(part)] = np.rint(part * np.float32(SCALE))
        return out


def exact_cosines(embeddings: Embeddings, left: Rows, right: Rows) -> npt.NDArray[np.float32]:
    """Inner products of pairs of vectors to six decimals, the same on every machine: each product of two float32 is
    exact in float64, and the products are added in whole units of 2^-40, of which float64 holds 2^53."""

    def cosines(i: int) -> npt.NDArray[np.float64]:
        products = embeddings.take(left[i : i + PRODUCTS]).astype(np.float64)
        products *= embeddings.take(right[i : i + PRODUCTS])
        products *= 2.0**40
        total: npt.NDArray[np.float64] = np.rint(products, out=products).sum(axis=1)
        return np.minimum(np.round(total / 2.0**40, 6), 1.0)

    out = np.empty(len(left), dtype=np.float32)
    starts = range(0, len(left), PRODUCTS)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for i, part in zip(starts, threads.map(cosines, starts), strict=True):
            out[i : i + PRODUCTS] = part
    return out


@dataclass(frozen=True)
class Near:
    """Pairs of near vectors. Of equal length; `similarity` is the inner product of the rounded vectors."""

    query: Rows
    other: Rows
    similarity: Matrix

    def __len__(self) -> int:
        return len(self.query)

    def where(self, chosen: npt.NDArray[Any]) -> Near:
        """Some of the pairs, by mask or by number."""
        return Near(self.query[chosen], self.other[chosen], self.similarity[chosen])

    @staticmethod
    def concatenate(parts: list[Near]) -> Near:
        """Several sets of pairs as one."""
        empty = Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        parts = [empty, *parts]
        return Near(
            np.concatenate([p.query for p in parts]),
            np.concatenate([p.other for p in parts]),
            np.concatenate([p.similarity for p in parts]),
        )


def default_cells(rows: int, queries: int) -> int:
    """The number of cells when the config names none: 1 below `FLAT_ROWS` rows or when there are so few queries that
    assigning all rows to cells would cost more than comparing the queries with everything; else ``sqrt(rows)``.

    Assigning rows costs as much as searching ``probe`` cells at ``sqrt(probe * rows)`` cells. Half as many, which this
    is with four cells probed, cost 20% less at 100,000 rows, since training counts too, and cells that are larger lose
    fewer neighbours (benchmarks/dedup.py).
    """
    cells = round(rows**0.5)
    return 1 if rows < FLAT_ROWS or queries <= cells else cells


class Assignment:
    """Vectors in k-means cells (spherical k-means, Dhillon and Modha 2001; cells as in SemDeDup, arXiv:2303.09540).

    Centres are rounded like the vectors, so the cells, too, are the same on every machine. Vectors arrive sorted by
    uid, a hash, so the first ones are a random sample.
    """

    def __init__(self, vectors: npt.NDArray[np.int16], cells: int, probe: int) -> None:
        self.cells = min(cells, len(vectors))
        probe = min(probe, self.cells)
        centres = self._train(vectors[: self.cells * TRAINING_ROWS].astype(np.float32))
        index = _index(centres)
        self.nearest = np.empty((len(vectors), probe), dtype=np.int32)  # cells of each vector, nearest first
        for i in range(0, len(vectors), BLOCK):
            _, self.nearest[i : i + BLOCK] = index.search(vectors[i : i + BLOCK].astype(np.float32), probe)

    def _train(self, sample: Matrix) -> Matrix:
        centres = sample[: self.cells]
        for _ in range(ITERATIONS):
            _, found = _index(centres).search(sample, 1)
            order = np.argsort(found[:, 0], kind="stable")
            cells, starts = np.unique(found[order, 0], return_index=True)
            # Sums of integers: the order in which they are added is of no matter.
            sums = np.add.reduceat(sample[order].astype(np.int64), starts, axis=0)
            lengths = np.sqrt((sums * sums).sum(axis=1).astype(np.float64))
            centres = centres.copy()  # a cell that lost all its rows keeps its centre
            centres[cells] = np.rint(sums * (SCALE / np.maximum(lengths, 1))[:, None])
        return centres

    def parts(self, queries: npt.NDArray[np.bool_]) -> Iterator[tuple[Rows, Rows]]:
        """For each cell its rows and the queries that probe it, at most `BLOCK` of either at a time."""
        own = np.argsort(self.nearest[:, 0], kind="stable")
        edges = np.searchsorted(self.nearest[own, 0], np.arange(self.cells + 1))
        asking = np.flatnonzero(queries)
        flat = self.nearest[asking].ravel()
        order = np.argsort(flat, kind="stable")
        bounds = np.searchsorted(flat[order], np.arange(self.cells + 1))
        for cell in range(self.cells):
            rows = own[edges[cell] : edges[cell + 1]]
            probing = asking[order[bounds[cell] : bounds[cell + 1]] // self.nearest.shape[1]]
            yield from _blocks(rows, probing)


@dataclass(frozen=True)
class Flat:
    """One cell: every query meets every row."""

    rows: int

    def parts(self, queries: npt.NDArray[np.bool_]) -> Iterator[tuple[Rows, Rows]]:
        """All rows and all queries, at most `BLOCK` of either at a time."""
        return _blocks(np.arange(self.rows), np.flatnonzero(queries))


def _blocks(rows: Rows, queries: Rows) -> Iterator[tuple[Rows, Rows]]:
    for i in range(0, len(rows), BLOCK):
        for j in range(0, len(queries), BLOCK):
            yield rows[i : i + BLOCK], queries[j : j + BLOCK]


def near_pairs(vectors: npt.NDArray[np.int16], rows: Rows, queries: Rows, floor: float) -> Iterator[Near]:
    """All pairs of a query and a row whose similarity is `floor` or more, in blocks of bounded size; a block holds all
    pairs of its queries. A query is never paired with itself."""
    least = np.float32(floor * SCALE**2)
    index = _index(vectors[rows].astype(np.float32))
    step = max(1, PAIRS // len(rows))
    for i in range(0, len(queries), step):
        asking = queries[i : i + step]
        number, found, similarity = _search(index, vectors[asking].astype(np.float32), least)
        pairs = Near(asking[number], rows[found], similarity)
        yield pairs.where(pairs.query != pairs.other)


def _search(index: Any, asked: Matrix, least: np.float32) -> tuple[Rows, Rows, Matrix]:
    """All pairs (number of the query, number of the row, similarity) with at least `least`."""
    if not hasattr(index, "getDevice"):
        return _range(index, asked, least)
    # FAISS on a GPU finds the nearest k only. Queries with more near rows than that are asked again on the CPU.
    import faiss

    k = min(_GPU_NEAREST, index.ntotal)
    similarity, found = index.search(asked, k)
    full = (similarity[:, -1] >= least) & (k < index.ntotal)
    number, column = np.nonzero((similarity >= least) & ~full[:, None])
    pairs = number, found[number, column], similarity[number, column]
    if not full.any():
        return pairs
    again = _range(faiss.index_gpu_to_cpu(index), asked[full], least)
    return (
        np.concatenate([pairs[0], np.flatnonzero(full)[again[0]]]),
        np.concatenate([pairs[1], again[1]]),
        np.concatenate([pairs[2], again[2]]),
    )


_GPU_NEAREST = 256
"""Rows a GPU search returns for a query (FAISS allows 2,048; more cost time for every query)."""


def _range(index: Any, asked: Matrix, least: np.float32) -> tuple[Rows, Rows, Matrix]:
    # The bound itself counts as near: similarities are whole numbers, FAISS wants more than the bound.
    limits, similarity, found = index.range_search(asked, float(np.ceil(least)) - 0.5)
    return np.repeat(np.arange(len(asked)), np.diff(limits.astype(np.int64))), found, similarity


def _index(vectors: Matrix) -> Any:
    """A flat FAISS index over vectors, on the first GPU where FAISS has one."""
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    if faiss.get_num_gpus() > 0:
        return faiss.index_cpu_to_gpu(_gpu(), 0, index)
    return index


def knows_gpus() -> bool:
    """Whether the FAISS that is installed can use GPUs, here or on a machine with the same software."""
    import faiss

    return hasattr(faiss, "StandardGpuResources")


@functools.cache
def _gpu() -> Any:
    """FAISS's scratch memory on the GPU, made once: making it takes longer than searching a cell."""
    import faiss

    return faiss.StandardGpuResources()
