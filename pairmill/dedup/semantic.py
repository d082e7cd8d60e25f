"""Duplicates that look alike: cosine of image embeddings, as in SemDeDup (arXiv:2303.09540), without losing neighbours
across the borders of cells.

Measuring and judging are apart. `SemanticNeighbours` searches and stores edges; `SemanticDuplicates` is a cheap pass
over them, so a changed threshold, or a senior row that falls for another reason, needs no new search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.dedup.cells import SLACK, Assignment, Embeddings, Flat, Near, default_cells, exact_cosines
from pairmill.dedup.search import (
    CellSearch,
    Mask,
    Vectors,
    answered,
    cell_tables,
    positions,
    prune,
    storing_order,
)
from pairmill.dedup.seniority import Rows, seniority
from pairmill.stage import GlobalStage, GlobalVerdict, Judgement, Scatter
from schemas import fields
from schemas.reasons import Reason

MERGE = 2**22
"""Edges found before they are pruned together for the first time."""


# -- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemanticNeighbours(GlobalStage):
    """Stores for each row its near rows among all live rows: uid and cosine, most similar first.

    Stored are the `neighbours` most similar rows above `floor` and, when there are more, the most senior ones: those
    for which fewer than `SENIORS` others are both more similar and more senior. A row that joins later than rows it is
    senior to (a threshold was relaxed) also stores the edges by which they would have named it.
    """

    name: ClassVar[str] = "neighbours"
    floor: float = 0.80
    neighbours: int = 32
    cells: int | None = None
    """k-means cells; null: `pairmill.dedup.cells.default_cells`."""
    probe: int = 4
    """Cells searched for a row: its own and the next nearest ones."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The embedding, and the score that decides who is senior."""
        return (fields.CLIP_IMAGE.name, fields.CLIP_SCORE.name)

    @property
    def writes(self) -> tuple[pa.Field, ...]:
        """The neighbours; null for rows without an embedding."""
        return (fields.NEIGHBOURS,)

    def measure(self, live: pa.Table, todo: pa.BooleanArray, scatter: Scatter) -> pa.Table:
        """Search the neighbours of the marked rows among all rows, in cells that engines work on side by side."""
        marked = np.asarray(todo)
        embeddings = Embeddings(live.column(fields.CLIP_IMAGE.name))
        rank = seniority(live, fields.CLIP_SCORE.name)[embeddings.rows]
        search = _Search(embeddings.rounded(), rank, self, scatter)
        edges = self._edges(embeddings, search, rank, marked[embeddings.rows]) if len(rank) else Near.concatenate([])
        return _lists(live.column("uid"), np.flatnonzero(marked), embeddings.rows, edges)

    def _edges(self, embeddings: Embeddings, search: _Search, rank: Rows, todo: Mask) -> Near:
        """The edges to store, by vector, in the order in which they are stored."""
        found, overtaken = search.run(todo)
        if overtaken.any():
            theirs, _ = search.run(overtaken)
            theirs = theirs.where(todo[theirs.other] & (rank[theirs.other] < rank[theirs.query]))
            found = Near.concatenate([found, Near(theirs.other, theirs.query, theirs.similarity)])
            _, first = np.unique(found.query * len(rank) + found.other, return_index=True)
            found = found.where(first)
        exact = Near(found.query, found.other, exact_cosines(embeddings, found.query, found.other))
        exact = exact.where(exact.similarity >= np.float32(self.floor))
        return exact.where(storing_order(exact, rank))


class _Search:
    """Searches one set of vectors."""

    def __init__(self, vectors: Vectors, rank: Rows, stage: SemanticNeighbours, scatter: Scatter) -> None:
        self._vectors = vectors
        self._rank = rank
        self._stage = stage
        self._scatter = scatter
        self._cells: dict[int, Assignment] = {}

    def run(self, queries: Mask) -> tuple[Near, Mask]:
        """The edges of the queries, and the rows that are no queries but near to one that is senior to them."""
        overtaken = np.zeros(len(queries), dtype=bool)
        parts: list[Near] = []
        edges, full = 0, MERGE
        for answer in self._answers(queries):
            near, rows = answered(answer)
            overtaken[rows] = True
            parts.append(near)
            edges += len(near)
            if edges > full:
                parts = [self._pruned(parts)]
                edges = len(parts[0])
                full = max(MERGE, 2 * edges)
        return self._pruned(parts), overtaken & ~queries

    def _pruned(self, parts: list[Near]) -> Near:
        return prune(Near.concatenate(parts), self._rank, self._stage.neighbours)

    def _answers(self, queries: Mask) -> Iterator[pa.Table]:
        """What the work on each cell answers. Where all is one cell the work is done here: it is small, or it is so
        little for each vector that sending the vectors away would cost as much."""
        stage, rows = self._stage, len(queries)
        work = CellSearch(stage.floor - SLACK, stage.neighbours)
        cells = stage.cells or default_cells(rows, int(queries.sum()))
        if cells == 1:
            return map(work, cell_tables(self._vectors, self._rank, Flat(rows).parts(queries)))
        if cells not in self._cells:
            self._cells[cells] = Assignment(self._vectors, cells, stage.probe)
        return self._scatter(work, cell_tables(self._vectors, self._rank, self._cells[cells].parts(queries)))


def _lists(uids: pa.ChunkedArray, todo: Rows, rows: Rows, edges: Near, block: int = 262_144) -> pa.Table:
    """The edges as lists, one for each row of `todo`; null for rows without a vector."""
    schema = pa.schema([fields.NEIGHBOURS])
    sizes = np.bincount(rows[edges.query], minlength=len(uids))[todo] if len(uids) else np.empty(0, dtype=np.int64)
    ends = np.cumsum(np.r_[0, sizes])
    missing = ~np.isin(todo, rows)
    parts = []
    for i in range(0, len(todo), block):
        j = min(i + block, len(todo))
        other = uids.take(pa.array(rows[edges.other[ends[i] : ends[j]]])).combine_chunks()
        pairs = pa.StructArray.from_arrays(
            [other, pa.array(edges.similarity[ends[i] : ends[j]])], fields=list(fields.NEIGHBOURS.type.value_type)
        )
        offsets = pa.array((ends[i : j + 1] - ends[i]).astype(np.int32))
        lists = pa.ListArray.from_arrays(offsets, pairs, type=fields.NEIGHBOURS.type, mask=pa.array(missing[i:j]))
        parts.append(pa.table([lists], schema=schema))
    return pa.concat_tables(parts) if parts else schema.empty_table()


# -- judging ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemanticDuplicates(GlobalVerdict):
    """Drops a pair when a more senior pair that itself stays lies within `threshold`.

    Rows are judged in the order of seniority, so the outcome depends neither on the order of the rows nor on how edges
    were found, and rows of a later refresh change nothing for earlier ones. An edge counts from whichever side it was
    stored; edges to rows that are no longer live do not count. ``duplicate_of`` is the most similar of the senior pairs
    that stay (the more senior of equals).
    """

    name: ClassVar[str] = "semantic"
    threshold: float = 0.95
    max_colour_distance: float | None = None
    """Pairs whose colour layouts differ by more show different pictures, however alike their content; null: any may."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The stored edges, the score that decides who is senior, and the colour layout where it counts."""
        layout = () if self.max_colour_distance is None else (fields.COLOUR_LAYOUT.name,)
        return (fields.NEIGHBOURS.name, fields.CLIP_SCORE.name, *layout)

    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows."""
        rank = seniority(live, fields.CLIP_SCORE.name)
        edges = _stored(live.column("uid"), live.column(fields.NEIGHBOURS.name), self.threshold)
        if self.max_colour_distance is not None:
            layout = _matrix(live.column(fields.COLOUR_LAYOUT.name))
            edges = edges.where(colour_distance(layout, edges.query, edges.other) <= self.max_colour_distance)
        backwards = rank[edges.query] < rank[edges.other]
        junior = np.where(backwards, edges.other, edges.query)
        senior = np.where(backwards, edges.query, edges.other)
        dropped = greedy_duplicates(rank, junior, senior)
        counts = dropped[junior] & ~dropped[senior]
        centres = Near(junior[counts], senior[counts], edges.similarity[counts])
        centres = centres.where(storing_order(centres, rank))
        return _judgement(live.column("uid"), centres.where(positions(centres.query) == 0))


def _stored(uids: pa.ChunkedArray, lists: pa.ChunkedArray, threshold: float) -> Near:
    """The stored edges of at least `threshold` between live rows, by row."""
    known = pc.cast(uids, pa.large_string()).combine_chunks()
    parts, start = [], 0
    for chunk in lists.chunks:
        pairs = chunk.flatten()
        near = np.asarray(pairs.field("similarity")) >= np.float32(threshold)
        query = np.asarray(pc.list_parent_indices(chunk))[near] + start
        names = pc.cast(pairs.field("uid").filter(pa.array(near)), pa.large_string())
        other = np.asarray(pc.fill_null(pc.index_in(names, value_set=known), -1)).astype(np.int64)
        there = other >= 0
        parts.append(Near(query[there], other[there], np.asarray(pairs.field("similarity"))[near][there]))
        start += len(chunk)
    return Near.concatenate(parts)


def _matrix(lists: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Lists of equal length as rows of a matrix; rows of NaN for null."""
    column = lists.combine_chunks()
    known = np.asarray(pc.is_valid(column))
    values = np.asarray(column.flatten())
    matrix = np.full((len(column), len(values) // max(1, int(known.sum()))), np.nan, dtype=np.float32)
    matrix[known] = values.reshape(int(known.sum()), -1)
    return matrix


def colour_distance(
    layout: npt.NDArray[np.float32], query: Rows, other: Rows, block: int = 65_536
) -> npt.NDArray[np.float32]:
    """Root mean square difference of colour layouts, 0 to 1, for pairs of rows; the lesser one of the other picture as
    it is and mirrored. 0 where a layout is unknown, so that nothing is held against the pair.

    Args:
        layout: shape (rows, side * side * 3), see `schemas.fields.COLOUR_LAYOUT`.
    """
    side = int((layout.shape[1] // 3) ** 0.5)
    grid = layout.reshape(len(layout), side, side, 3)
    distance = np.empty(len(query), dtype=np.float32)
    for start in range(0, len(query), block):
        ours, theirs = grid[query[start : start + block]], grid[other[start : start + block]]
        both = [np.square(ours - view).mean(axis=(1, 2, 3)) for view in (theirs, theirs[:, :, ::-1])]
        distance[start : start + block] = np.sqrt(np.minimum(*both))
    return np.nan_to_num(distance, nan=0.0)


def greedy_duplicates(rank: Rows, junior: Rows, senior: Rows) -> Mask:
    """Which rows are duplicates when rows are taken in the order of `rank` and each stays unless a row that stays is
    joined to it by an edge.

    All rows whose fate is settled are settled at once, which takes few rounds (Blelloch, Fineman and Shun, "Greedy
    sequential maximal independent set and matching are parallel on average", SPAA 2012).
    """
    open_rows = np.ones(len(rank), dtype=bool)
    dropped = np.zeros(len(rank), dtype=bool)
    while len(junior):
        waiting = np.zeros(len(rank), dtype=bool)
        waiting[junior] = True
        stays = open_rows & ~waiting
        dropped[junior[stays[senior]]] = True
        open_rows &= ~stays & ~dropped
        left = open_rows[junior] & open_rows[senior]
        junior, senior = junior[left], senior[left]
    return dropped


def _judgement(uids: pa.ChunkedArray, best: Near) -> Judgement:
    """One edge from each duplicate to what it duplicates, as a judgement of all rows."""
    rows = len(uids)
    dropped = np.zeros(rows, dtype=bool)
    dropped[best.query] = True
    centre = np.arange(rows)
    centre[best.query] = best.other
    detail = np.full(rows, None, dtype=object)
    detail[best.query] = [f"cosine {similarity:.4f}" for similarity in best.similarity]
    return Judgement(
        reason=pa.array(np.where(dropped, Reason.DUPLICATE_SEMANTIC.value, ""), pa.string(), mask=~dropped),
        detail=pa.array(detail, pa.string()),
        duplicate_of=uids.take(pa.array(centre, mask=~dropped)).combine_chunks(),
    )
