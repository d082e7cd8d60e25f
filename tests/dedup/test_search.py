"""The search in cells: what it finds is what its definition says, and what it found before it was spread over cells."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairmill.dedup import cells
from pairmill.dedup.cells import SCALE, SLACK, Assignment, Embeddings, Flat, Near
from pairmill.dedup.search import CellSearch, answered, cell_tables, prune
from pairmill.dedup.semantic import SemanticNeighbours
from pairmill.dedup.seniority import seniority
from pairmill.engines import in_cells
from tests.dedup.synthetic import clusters, live, uid


def rounded(sizes: list[int], seed: int = 0, dimensions: int = 16) -> np.ndarray:
    """Vectors that are the same on every machine."""
    return np.round(clusters(sizes, noise=0.3, dimensions=dimensions, seed=seed) * 1024) / np.float32(1024)


def by_definition(stage: SemanticNeighbours, table: pa.Table, todo: np.ndarray) -> list[set[tuple[int, int]]]:
    """The edges stored for each row of todo, as pairs of row numbers: quadratic and plain. A row is compared with those
    whose own cell it probes."""
    embeddings = Embeddings(table["clip_image"])
    vectors, rank = embeddings.rounded(), seniority(table, "clip_score")
    nearest = Assignment(vectors, stage.cells, stage.probe).nearest
    products = vectors.astype(np.int64) @ vectors.T.astype(np.int64)
    near = products >= np.float32((stage.floor - SLACK) * SCALE**2)
    np.fill_diagonal(near, False)
    near &= (nearest[:, :, None] == nearest[:, 0][None, None, :]).any(axis=1)

    def edges(queries: np.ndarray) -> Near:
        query, other = np.nonzero(near & queries[:, None])
        return prune(Near(query, other, products[query, other].astype(np.float32)), rank, stage.neighbours)

    overtaken = (near & todo[:, None] & (rank[:, None] < rank[None, :])).any(axis=0) & ~todo
    ours, theirs = edges(todo), edges(overtaken)
    found = set(zip(ours.query.tolist(), ours.other.tolist(), strict=True))
    for query, other in zip(theirs.query.tolist(), theirs.other.tolist(), strict=True):
        if todo[other] and rank[other] < rank[query]:
            found.add((other, query))
    cosine = cosines(table)
    found = {(q, o) for q, o in found if cosine[q, o] >= np.float32(stage.floor)}
    return [{e for e in found if e[0] == row} for row in np.flatnonzero(todo)]


def cosines(table: pa.Table) -> np.ndarray:
    vectors = np.array(table["clip_image"].to_pylist(), dtype=np.float64)
    return np.round(vectors @ vectors.T, 6).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cells_find_what_the_definition_says(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=10))
    vectors = rounded(sizes, data.draw(st.integers(0, 99)), dimensions=8)
    copies = data.draw(st.integers(0, 20))
    vectors = np.concatenate([vectors, np.repeat(vectors[:1], copies, axis=0)])
    rows = len(vectors)
    stage = SemanticNeighbours(
        floor=0.85,
        neighbours=data.draw(st.sampled_from([4, 8])),
        cells=data.draw(st.integers(2, 9)),
        probe=data.draw(st.integers(1, 3)),
    )
    refresh = data.draw(st.lists(st.integers(1, 2), min_size=rows, max_size=rows))
    todo = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    table = live(vectors, refresh, chunks=data.draw(st.integers(1, 3)))
    row_of = {name: row for row, name in enumerate(table["uid"].to_pylist())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "BLOCK", data.draw(st.sampled_from([5, 1000])))
        patch.setattr(cells, "PAIRS", data.draw(st.sampled_from([30, 2**24])))
        stored = stage.measure(table, pa.array(todo), in_cells)["neighbours"].to_pylist()
    found = [{(row, row_of[n["uid"]]) for n in lists} for row, lists in zip(np.flatnonzero(todo), stored, strict=True)]
    assert found == by_definition(stage, table, todo)


BEFORE = {
    (1, 4, 32): ["b0e365f89c58", "a668dd7bd9a6", "1962574bc133"],
    (7, 1, 8): ["2325a29a25ed", "5c895f75efc7", "0c1639096c99"],
    (20, 4, 32): ["cdf7abc5ef4a", "c847aebc1735", "1962574bc133"],
    (30, 2, 4): ["4ffac8bb6be6", "a1566d7bb36d", "c866367cc41c"],
}
"""Digests of what the search found when one process did all of it (commit a954fb9), by cells, probe and neighbours; for
a first run, one of half of the rows, and one of few."""


@pytest.mark.parametrize("case", BEFORE)
@pytest.mark.parametrize("block", [65_536, 150])
def test_bytes_are_those_of_the_search_in_one_piece(case, block, monkeypatch):
    monkeypatch.setattr(cells, "BLOCK", block)
    vectors = np.concatenate([rounded([1, 2, 3, 30, 5] * 14, seed=4), np.repeat(rounded([1], seed=5), 200, axis=0)])
    random = np.random.default_rng(6)
    table = live(vectors, random.integers(1, 3, len(vectors)), random.integers(0, 50, len(vectors)) / 50)
    number, probe, neighbours = case
    stage = SemanticNeighbours(cells=number, probe=probe, neighbours=neighbours)
    digests = []
    for share in (1.0, 0.5, 0.05):
        output = stage.measure(table, pa.array(random.random(len(vectors)) < share), in_cells)
        stored = repr(output["neighbours"].to_pylist())
        digests.append(hashlib.sha256(stored.encode()).hexdigest()[:12])
    assert digests == BEFORE[case]


def work() -> tuple[CellSearch, list[pa.Table]]:
    vectors = Embeddings(live(rounded([40, 9, 3, 1, 1]))["clip_image"]).rounded()
    rank = np.random.default_rng(0).permutation(len(vectors))
    asking = rank % 3 > 0
    return CellSearch(0.8, 4), list(cell_tables(vectors, rank, Assignment(vectors, 3, 2).parts(asking)))


def contents(answer: pa.Table) -> list[tuple]:
    return sorted((row["query"] or -1, row["other"], row["similarity"]) for row in answer.to_pylist())


def test_the_rows_of_a_cell_may_come_in_any_order_and_in_parts():
    search, tables = work()
    search = pickle.loads(pickle.dumps(search))
    overtaken = 0
    for table in tables:
        order = np.random.default_rng(1).permutation(table.num_rows)
        mixed = table.take(order)
        parts = pa.concat_tables([mixed.slice(0, 5), mixed.slice(5)])
        padded = pa.concat_tables([table, table]).combine_chunks().slice(table.num_rows)
        expected = contents(search(table))
        assert contents(search(parts)) == contents(search(padded)) == expected
        edges, rows = answered(search(table))
        asking = set(table.filter(table["asks"])["number"].to_pylist())
        assert set(edges.query.tolist()) <= asking
        assert not asking & set(rows.tolist())
        overtaken += len(rows)
    assert overtaken > 5


def test_many_tables_are_in_memory_one_by_one(monkeypatch):
    made, done, most = 0, 0, 0

    def counted(*arguments):
        nonlocal made, most
        for table in cell_tables(*arguments):
            made += 1
            most = max(most, made - done)
            yield table

    def scatter(search, tables):
        nonlocal done
        for answer in in_cells(search, tables):
            done += 1
            yield answer

    monkeypatch.setattr("pairmill.dedup.semantic.cell_tables", counted)
    table = live(rounded([3] * 60))
    SemanticNeighbours(cells=12).measure(table, pa.array([True] * 180), scatter)
    assert made == done > 8
    assert most == 1


def test_edges_are_pruned_on_the_way(monkeypatch):
    table = live(rounded([60, 60, 60]))
    stage, todo = SemanticNeighbours(cells=12, neighbours=3), pa.array([True] * 180)
    whole = stage.measure(table, todo, in_cells)
    monkeypatch.setattr("pairmill.dedup.semantic.MERGE", 10)
    assert stage.measure(table, todo, in_cells).equals(whole)


def test_small_work_is_done_here():
    def never(*_):
        raise AssertionError("sent away")

    table = live(rounded([5, 5]))
    output = SemanticNeighbours().measure(table, pa.array([True] * 10), never)
    assert uid(0) in {n["uid"] for row in output["neighbours"].to_pylist() for n in row}
    with pytest.raises(AssertionError, match="sent away"):
        SemanticNeighbours(cells=2).measure(table, pa.array([True] * 10), never)


def test_parts_are_of_bounded_size(monkeypatch):
    monkeypatch.setattr(cells, "BLOCK", 10)
    queries = np.arange(47) % 2 == 0
    met = np.zeros((47, 47), dtype=int)
    for rows, asking in Flat(47).parts(queries):
        assert len(rows) <= 10
        assert len(asking) <= 10
        met[np.ix_(asking, rows)] += 1
    assert (met == queries[:, None]).all()
