"""Semantic search: rate and recall of k-means cells against a flat search, for the defaults of `dedup.cells` and
`probe`.

    python -m benchmarks.dedup [--rows N] [--dimensions D]

Synthetic embeddings: clusters of near-duplicates (a Zipf-like mix of sizes, cosines 0.80 to 1.00) among directions
drawn from a mixture, which is harder for cells than isolated points. Prints a table; writes
benchmarks/results/dedup-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa

from pairmill.dedup import cells as search
from pairmill.dedup.semantic import SemanticDuplicates, SemanticNeighbours
from pairmill.engines import in_cells

THRESHOLD = 0.95


def embeddings(rows: int, dimensions: int, seed: int = 0) -> np.ndarray:
    """Unit vectors, shape (rows, dimensions): about a third of them have near-duplicates."""
    random = np.random.default_rng(seed)
    topics = random.normal(size=(200, dimensions))
    size = np.where(random.random(rows) < 0.15, random.zipf(2.0, rows).clip(2, 200), 1)
    size = size[: int(np.searchsorted(np.cumsum(size), rows)) + 1]
    centres = topics[random.integers(0, len(topics), len(size))] + random.normal(size=(len(size), dimensions))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = np.repeat(centres, size, axis=0)[:rows]
    spread = np.repeat(random.uniform(0.02, 0.45, len(size)), size)[:rows, None]
    vectors += random.normal(size=vectors.shape) * spread / dimensions**0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return random.permutation(vectors).astype(np.float32)


def table(vectors: np.ndarray) -> pa.Table:
    rows, dimensions = vectors.shape
    offsets = pa.array(np.arange(0, (rows + 1) * dimensions, dimensions), pa.int32())
    return pa.table(
        {
            "uid": [f"{n:064d}" for n in range(rows)],
            "refresh": pa.array(np.ones(rows), pa.int32()),
            "clip_score": pa.array(np.random.default_rng(1).uniform(0.2, 0.4, rows), pa.float32()),
            "clip_image": pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel())),
        }
    )


def measure(
    live: pa.Table, cells: int, probe: int, training: int = search.TRAINING_ROWS, iterations: int = search.ITERATIONS
):
    """(neighbours, wall seconds, CPU seconds, kept rows)."""
    search.TRAINING_ROWS, search.ITERATIONS = training, iterations
    wall, cpu = time.perf_counter(), time.process_time()
    todo = pa.array(np.ones(live.num_rows, dtype=bool))
    output = SemanticNeighbours(cells=cells, probe=probe).measure(live, todo, in_cells)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    lists = output.column("neighbours")
    judgement = SemanticDuplicates(THRESHOLD).judge(live.append_column("neighbours", lists))
    return lists.combine_chunks(), *seconds, judgement.reason.null_count


def pairs(lists: pa.ListArray, least: float) -> set[tuple[int, int]]:
    """Undirected edges, as the verdict sees them."""
    query = np.repeat(np.arange(len(lists)), np.diff(np.asarray(lists.offsets)))
    flat = lists.flatten()
    other = np.array([int(u) for u in flat.field("uid").to_pylist()], dtype=np.int64)
    near = np.asarray(flat.field("similarity")) >= np.float32(least)
    low, high = np.minimum(query, other)[near], np.maximum(query, other)[near]
    return set(zip(low.tolist(), high.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=512)
    options = parser.parse_args()
    live = table(embeddings(options.rows, options.dimensions))
    flat, wall, cpu, kept = measure(live, 1, 1)
    truth = {least: pairs(flat, least) for least in (0.80, THRESHOLD)}
    results = [{"cells": 1, "probe": 1, "wall_s": wall, "cpu_s": cpu, "recall": 1.0, "recall_dup": 1.0, "kept": kept}]
    default = search.default_cells(options.rows, options.rows)
    trials = [(default, probe, search.TRAINING_ROWS, search.ITERATIONS) for probe in (1, 2, 4, 8)]
    trials += [(n, 4, search.TRAINING_ROWS, search.ITERATIONS) for n in (default // 2, default * 2, default * 4)]
    trials += [(default, 4, 12, 3), (default, 4, 24, 3), (default, 4, 64, 12)]
    for cells, probe, training, iterations in trials:
        lists, wall, cpu, kept = measure(live, cells, probe, training, iterations)
        recall = [len(pairs(lists, least) & found) / max(1, len(found)) for least, found in truth.items()]
        results.append(
            {
                "cells": cells,
                "probe": probe,
                "training_rows": training,
                "iterations": iterations,
                "wall_s": wall,
                "cpu_s": cpu,
            }
            | {"recall": recall[0], "recall_dup": recall[1], "kept": kept}
        )
        show(results[-1], options.rows)
    show(results[0], options.rows)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    out = Path(__file__).parent / "results" / f"dedup-{today}.json"
    out.parent.mkdir(exist_ok=True)
    software = {
        "faiss": faiss.__version__,
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        "gpus": faiss.get_num_gpus(),
    }
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in results]
    out.write_text(
        json.dumps({"date": today, **vars(options), "threshold": THRESHOLD, **software, "results": rounded}, indent=1)
        + "\n"
    )
    print(f"wrote {out.name}")


def show(row: dict, rows: int) -> None:
    training = f"{row.get('training_rows', 0)} x {row.get('iterations', 0)}"
    recall = f"recall >= 0.80 {row['recall']:.4f}, >= {THRESHOLD} {row['recall_dup']:.4f}"
    times = f"{row['wall_s']:6.1f} s wall {row['cpu_s']:6.1f} s CPU {rows / row['cpu_s']:7.0f} rows/CPU s"
    line = (
        f"cells {row['cells']:5d}  probe {row['probe']}  training {training:>7}  {times}  {recall}  kept {row['kept']}"
    )
    print(line, flush=True)


if __name__ == "__main__":
    main()
