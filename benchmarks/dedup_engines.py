"""Semantic search in cells, in one process and on Ray: CPU seconds in the driver and in the work of cells, wall time,
and the driver's memory, as rows grow.

    python -m benchmarks.dedup_engines [--rows 20000,100000,300000] [--dimensions 512] [--rounds 3]

The embeddings are those of benchmarks/dedup.py. Each run is a process of its own, engines take turns, and all of them
must find the same. FAISS has one thread, here as in a task of Ray, so that CPU seconds compare. What stays in the
driver (training and assigning cells, making tables, merging) bounds what more machines can gain; where CPUs are
shared with others, CPU seconds tell more than wall time. Prints a table; writes
benchmarks/results/dedup_engines-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.dedup import embeddings, table
from pairmill.dedup.semantic import SemanticDuplicates, SemanticNeighbours
from pairmill.engines import in_cells, open_engine
from pairmill.stage import CellWork, Scatter
from schemas.config import Engine

ENGINES = ("local", "ray")
SEARCH = ("wall_s", "driver_cpu_s", "work_cpu_s", "driver_mb")


@dataclass(frozen=True)
class Timed:
    """Work whose answers say how many CPU seconds they took."""

    work: CellWork

    def __call__(self, cell: pa.Table) -> pa.Table:
        begin = time.thread_time()
        answer = self.work(cell)
        return answer.replace_schema_metadata({b"cpu_s": str(time.thread_time() - begin).encode()})


class Work:
    """What the answers say, added up."""

    def __init__(self, scatter: Scatter) -> None:
        self.cpu_s = 0.0
        self.cells = 0
        self._scatter = scatter

    def __call__(self, work: CellWork, rows: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for answer in self._scatter(Timed(work), rows):
            self.cells += 1
            self.cpu_s += float(answer.schema.metadata[b"cpu_s"])
            yield answer


class Memory:
    """The most anonymous memory that this process had, above what it had at first."""

    def __enter__(self) -> Memory:
        self._first = self._most = _anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._most = max(self._most, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.megabytes = (self._most - self._first) / 1e6


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def search(engine: str, vectors: np.ndarray) -> dict:
    """One run of one engine, in this process."""
    import faiss

    faiss.omp_set_num_threads(1)
    live = table(vectors)
    with open_engine(Engine(kind=engine, address="local")) as opened:
        if engine == "ray":  # workers start and import before the clock does
            SemanticNeighbours(cells=8).measure(live.slice(0, 2000), pa.array([True] * 2000), opened.scatter)
        work = Work(opened.scatter if engine == "ray" else in_cells)
        with Memory() as memory:
            wall, cpu = time.perf_counter(), time.process_time()
            output = SemanticNeighbours().measure(live, pa.array(np.ones(live.num_rows, dtype=bool)), work)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    lists = output.column("neighbours").combine_chunks()
    with Memory() as judging:
        SemanticDuplicates().judge(live.append_column("neighbours", lists))
    digest = hashlib.sha256(lists.offsets.buffers()[1])
    digest.update(lists.flatten().field("similarity").buffers()[1])
    return {
        "wall_s": wall,
        "driver_cpu_s": cpu - (work.cpu_s if engine == "local" else 0),
        "work_cpu_s": work.cpu_s,
        "cells": work.cells,
        "driver_mb": memory.megabytes,
        "judge_mb": judging.megabytes,
        "edges": len(lists.flatten()),
        "digest": digest.hexdigest()[:16],
    }


def run(engine: str, file: Path) -> dict:
    """The same in another process."""
    command = [sys.executable, "-m", "benchmarks.dedup_engines", "--one", engine, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="20000,100000,300000")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(search(options.one[0], np.load(options.one[1]))))
        return
    results = []
    for rows in map(int, options.rows.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vectors.npy"
            np.save(file, embeddings(rows, options.dimensions))
            taken: dict[str, list[dict]] = {engine: [] for engine in ENGINES}
            for _ in range(options.rounds):
                for engine in ENGINES:
                    taken[engine].append(run(engine, file))
        found = {one["digest"] for runs in taken.values() for one in runs}
        assert len(found) == 1, f"engines find different neighbours: {taken}"
        for engine, runs in taken.items():
            medians = {name: statistics.median(one[name] for one in runs) for name in (*SEARCH, "judge_mb")}
            results.append({"rows": rows, "engine": engine, **medians, "cells": runs[0]["cells"]})
            show(results[-1])
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    out = Path(__file__).parent / "results" / f"dedup_engines-{today}.json"
    rounded = [{k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in results]
    machine = {"cores": os.cpu_count(), "load": [round(n, 1) for n in os.getloadavg()]}
    head = {"date": today, "dimensions": options.dimensions, "rounds": options.rounds, **machine}
    out.write_text(json.dumps({**head, "results": rounded}, indent=1) + "\n")
    print(f"wrote {out.name}")


def show(row: dict) -> None:
    """One line of the table."""
    print(
        f"{row['rows']:>8} rows  {row['engine']:5}  {row['cells']:>5} cells  wall {row['wall_s']:6.1f} s   CPU: driver "
        f"{row['driver_cpu_s']:6.2f} s, work {row['work_cpu_s']:6.2f} s   driver's memory: search "
        f"{row['driver_mb']:5.0f} MB, judging {row['judge_mb']:5.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    main()
