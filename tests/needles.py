"""Looks for needles in every byte of a folder, the decoded columns of Parquet files among them: made apart from what it
tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq


def find_needles(folders: Iterable[Path], needles: Iterable[str | bytes]) -> list[str]:
    """Which needle is in which file, ``needle in path``. Parquet files are also decoded, whole."""
    wanted = [n.encode() if isinstance(n, str) else n for n in needles]
    found = []
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += b"\n" + _decoded(path)
            found += [f"{needle[:40]!r} in {path}" for needle in wanted if needle in data]
    return found


def _decoded(path: Path) -> bytes:
    """All values of a Parquet file one after the other: texts as UTF-8, bytes as they are, statistics too."""
    parquet = pq.ParquetFile(path)
    parts = [repr(parquet.metadata.to_dict()).encode()]
    for row in parquet.read().to_pylist():
        parts += [value if isinstance(value, bytes) else _text(value) for value in row.values()]
    return b"\n".join(parts)


def _text(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
