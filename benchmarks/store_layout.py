"""One folder a shard, or one folder for all and file statistics to prune by? (docs/decisions.md, "Partitions")

Both layouts hold the same rows: SHARDS files of ROWS narrow rows each. Measured, interleaved: listing the files of a
version with their shard, reading one shard's columns, and reading two columns of all shards.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction

SHARDS, ROWS, ROUNDS = 500, 1000, 7
SHARD = pa.field("shard", pa.int32(), nullable=False)
NARROW = pa.schema([pa.field("uid", pa.string()), pa.field("words", pa.int32()), pa.field("score", pa.float32())])


def rows(shard: int) -> pa.Table:
    rng = np.random.default_rng(shard)
    uids = [rng.bytes(32).hex() for _ in range(ROWS)]
    return pa.table({"uid": uids, "words": rng.integers(0, 30, ROWS).astype("int32"), "score": rng.random(ROWS, "f4")})


def build(root: Path, partitioned: bool) -> None:
    schema = NARROW.append(SHARD)
    delta = DeltaTable.create(str(root), schema=schema, partition_by=["shard"] if partitioned else None)
    adds = []
    for shard in range(SHARDS):
        table, path = rows(shard), f"shard={shard}/part.parquet" if partitioned else f"{shard:05d}.parquet"
        stats: dict[str, object] = {"numRecords": ROWS}
        if not partitioned:
            table = table.append_column(SHARD, pa.array([shard] * ROWS, pa.int32()))
            stats |= {"minValues": {"shard": shard}, "maxValues": {"shard": shard}, "nullCount": {"shard": 0}}
        (root / path).parent.mkdir(exist_ok=True)
        pq.write_table(table, root / path, compression="zstd")
        adds.append(
            AddAction(
                path=path,
                size=os.path.getsize(root / path),
                partition_values={"shard": str(shard)} if partitioned else {},
                modification_time=0,
                data_change=True,
                stats=json.dumps(stats),
            )
        )
    delta.create_write_transaction(adds, "append", schema, ["shard"] if partitioned else None)


def listing(root: Path, partitioned: bool) -> list[tuple[str, int]]:
    actions = pa.table(DeltaTable(str(root)).get_add_actions(flatten=True))
    column = "partition.shard" if partitioned else "min.shard"
    return list(zip(actions["path"].to_pylist(), actions[column].to_pylist(), strict=True))


def read(root: Path, partitioned: bool, shard: int | None) -> pa.Table:
    paths = [str(root / path) for path, n in sorted(listing(root, partitioned)) if shard is None or n == shard]
    partitioning = pads.partitioning(pa.schema([SHARD]), flavor="hive") if partitioned else None
    source = pads.dataset(paths, schema=NARROW.append(SHARD), format="parquet", partitioning=partitioning)
    return source.to_table(columns=["uid", "score", "shard"])


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        roots = {True: Path(temporary) / "partitioned", False: Path(temporary) / "statistics"}
        for partitioned, root in roots.items():
            build(root, partitioned)
        tasks: dict[str, Callable[[bool], object]] = {
            "list files": lambda p: listing(roots[p], p),
            "read one shard": lambda p: read(roots[p], p, 123),
            "read two columns of all": lambda p: read(roots[p], p, None),
        }
        times: dict[tuple[str, bool], list[float]] = {(t, p): [] for t in tasks for p in roots}
        for _ in range(ROUNDS):
            for task, work in tasks.items():
                for partitioned in roots:
                    begin = time.perf_counter()
                    work(partitioned)
                    times[task, partitioned].append(time.perf_counter() - begin)
        sizes = {p: sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) for p, root in roots.items()}
    print(f"{SHARDS} shards of {ROWS} rows; median of {ROUNDS} interleaved rounds, ms")
    result: dict[str, object] = {"shards": SHARDS, "rows": ROWS, "bytes": {str(p): s for p, s in sizes.items()}}
    for task in tasks:
        a, b = (statistics.median(times[task, p]) * 1000 for p in (True, False))
        print(f"  {task:26} partitioned {a:8.1f}   statistics {b:8.1f}   ratio {a / b:.2f}")
        result[task] = {"partitioned_ms": round(a, 2), "statistics_ms": round(b, 2)}
    out = Path(__file__).parent / "results" / f"store_layout-{time.strftime('%Y-%m-%d')}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
