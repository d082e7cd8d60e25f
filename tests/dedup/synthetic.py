"""Live rows with planted duplicates."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pyarrow as pa

from pairmill.dedup.groups import settle
from pairmill.engines import in_cells
from pairmill.stage import Judgement


def uid(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def clusters(sizes: list[int], noise: float, dimensions: int = 32, seed: int = 0) -> np.ndarray:
    """Unit vectors, shape (sum of sizes, dimensions): one random direction a cluster, with noise."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(len(sizes), dimensions))
    vectors = np.repeat(centres / np.linalg.norm(centres, axis=1, keepdims=True), sizes, axis=0)
    vectors = vectors + random.normal(size=vectors.shape) * noise / dimensions**0.5
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def live(vectors, refresh=1, score=0.3, numbers=None, chunks=1) -> pa.Table:
    """Live rows as the run hands them over: sorted by uid."""
    rows = len(vectors)
    numbers = range(rows) if numbers is None else numbers
    table = pa.table(
        {
            "uid": pa.array([uid(n) for n in numbers], pa.string()),
            "shard": pa.array(np.zeros(rows), pa.int32()),
            "refresh": pa.array(np.broadcast_to(refresh, rows), pa.int32()),
            "clip_image": pa.array([None if v is None else list(v) for v in vectors], pa.list_(pa.float32())),
            "clip_score": pa.array(list(np.broadcast_to(score, rows)), pa.float32()),
        }
    ).sort_by("uid")
    bounds = np.linspace(0, rows, chunks + 1).astype(int)
    return pa.concat_tables([table.slice(a, b - a) for a, b in itertools.pairwise(bounds)])


def measured(stage, table: pa.Table, todo=None) -> pa.Table:
    """The table with its ``neighbours``: measured for the rows of `todo`, null for the others."""
    todo = np.ones(table.num_rows, dtype=bool) if todo is None else np.asarray(todo)
    output = stage.measure(table, pa.array(todo), in_cells)
    where = pa.array(np.where(todo, np.cumsum(todo) - 1, 0), mask=~todo)
    return table.append_column("neighbours", output.column("neighbours").combine_chunks().take(where))


def verdicts(table: pa.Table, judgement: Judgement) -> dict[str, tuple]:
    """(reason, duplicate_of, cluster) by uid; the cluster as the ledger has it."""
    cluster = settle(table["uid"], judgement.duplicate_of).cluster
    columns = (judgement.reason, judgement.duplicate_of, cluster)
    return dict(zip(table["uid"].to_pylist(), zip(*(c.to_pylist() for c in columns), strict=True), strict=True))


def kept(table: pa.Table, judgement: Judgement) -> set[str]:
    return {u for u, (reason, _, _) in verdicts(table, judgement).items() if reason is None}


def greedy(table: pa.Table, threshold: float) -> set[str]:
    """Which rows stay, by the definition: quadratic and plain."""
    rows = [r for r in table.to_pylist() if r["clip_image"] is not None]
    rows.sort(key=lambda r: (r["refresh"], -(r["clip_score"] if r["clip_score"] is not None else -9), r["uid"]))
    stay = []
    for row in rows:
        vector = np.array(row["clip_image"])
        if all(round(float(vector @ np.array(other["clip_image"])), 6) < threshold for other in stay):
            stay.append(row)
    return {r["uid"] for r in stay} | {r["uid"] for r in table.to_pylist() if r["clip_image"] is None}
