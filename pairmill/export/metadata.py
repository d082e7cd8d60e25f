"""The metadata of a group's samples, as a Parquet file beside its main file."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.export.folder import Folder, Written

COMPRESSION = "zstd"


def write_metadata(folder: Folder, number: int, metadata: pa.Table) -> Written:
    """Write ``00000.parquet``."""
    name = f"{number:05d}.parquet"
    with folder.create(name) as sink:
        pq.write_table(metadata, sink, compression=COMPRESSION)
    return sink.written(name)
