"""What does a checksum on each Parquet page cost, and what does it find? (docs/integrity.md)

Interleaved: files of ROWS images of 35 kB, and of ROWS embeddings, written and read with and without it, in memory (so
that no disk hides the cost). Then FLIPS single bits, one at a time, in a small file of each: how many does a reader
report, how many does it read as other values? Readers: pyarrow, which checks, and DuckDB, which does not (2.0).
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from pairmill.store.files import ROW_GROUP, parquet_options
from schemas import fields

ROWS, ROUNDS, FLIPS = 1000, 15, 600
COMMON = (fields.UID, fields.REASON, fields.DETAIL)
IMAGES = pa.schema([*COMMON, *fields.IMAGES])
CLIP = pa.schema([*COMMON, fields.CLIP_IMAGE, fields.CLIP_SCORES, fields.CLIP_SCORE])
CHECKED = pads.ParquetFileFormat(
    default_fragment_scan_options=pads.ParquetFragmentScanOptions(page_checksum_verification=True)
)


def images(rows: int, size: int) -> pa.Table:
    rng = np.random.default_rng(0)
    sizes = {"width": 512, "height": 384, "original_width": 512, "original_height": 384, "original_bytes": size}
    return pa.Table.from_pylist(
        [
            {"uid": rng.bytes(32).hex(), "image": rng.bytes(size), "sha256": rng.bytes(32).hex(), "format": "jpeg"}
            | sizes
            for _ in range(rows)
        ],
        schema=IMAGES,
    )


def clip(rows: int, width: int) -> pa.Table:
    rng = np.random.default_rng(0)
    return pa.Table.from_pylist(
        [
            {"uid": rng.bytes(32).hex(), "clip_image": rng.standard_normal(width).tolist(), "clip_score": 0.3}
            for _ in range(rows)
        ],
        schema=CLIP,
    )


def write(table: pa.Table, path: str, checked: bool) -> None:
    options = parquet_options(table.schema) | {"write_page_checksum": checked}
    with pq.ParquetWriter(path, table.schema, **options) as parquet:
        parquet.write_table(table, row_group_size=ROW_GROUP)


def read(table: pa.Table, path: str, checked: bool) -> pa.Table:
    return pads.dataset([path], schema=table.schema, format=CHECKED if checked else "parquet").to_table()


def cost(table: pa.Table, folder: Path) -> dict[str, float]:
    """Median microseconds a row."""
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for checked in (False, True):
            path, suffix = str(folder / f"{checked}.parquet"), "with" if checked else "without"
            for what, work in (("write", write), ("read", read)):
                begin = time.perf_counter()
                work(table, path, checked)
                seconds.setdefault(f"{what} {suffix}", []).append(time.perf_counter() - begin)
    return {what: round(statistics.median(found) / table.num_rows * 1e6, 1) for what, found in seconds.items()}


def flips(table: pa.Table, folder: Path, checked: bool) -> dict[str, int]:
    """What becomes of single flipped bits."""
    path = folder / "flipped.parquet"
    write(table, str(path), checked)
    good = path.read_bytes()
    readers: dict[str, Callable[[], pa.Table]] = {
        "pyarrow": lambda: read(table, str(path), True),
        "duckdb": lambda: duckdb.connect().sql(f"SELECT * FROM '{path}'").to_arrow_table(),
    }
    before = {name: reader() for name, reader in readers.items()}
    rng, found = np.random.default_rng(1), Counter[str]()
    for _ in range(FLIPS):
        data = bytearray(good)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        for name, reader in readers.items():
            try:
                found[f"{name} {'same' if reader().equals(before[name]) else 'other values'}"] += 1
            except Exception:  # noqa: BLE001 (whatever it is, it was found)
                found[f"{name} error"] += 1
    return dict(sorted(found.items()))


def main() -> None:
    result: dict[str, object] = {}
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        for what, table in (("images", images(ROWS, 35_000)), ("embeddings", clip(ROWS, 512))):
            result[f"{what}: us a row"] = cost(table, folder)
        for what, table in (("images", images(60, 500)), ("embeddings", clip(60, 32))):
            for checked in (False, True):
                result[f"{what}, {'with' if checked else 'without'}: {FLIPS} flips"] = flips(table, folder, checked)
    for title, values in result.items():
        print(title, values)
    if len(sys.argv) > 1:
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        Path(sys.argv[1], f"page_checksums-{today}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
