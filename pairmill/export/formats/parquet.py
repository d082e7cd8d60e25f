"""Parquet files with the images inside: the metadata columns of the WebDataset export, and ``image``.

With kinds of conversations asked for, ``conversations`` are those of the pair (`CONVERSATIONS` of
`pairmill.export.formats.rendered`).
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.export.folder import Folder, Written
from pairmill.export.format import Format, Options
from pairmill.export.formats.rendered import with_conversations
from pairmill.export.selection import Group, Selection
from pairmill.store import ROW_GROUP, parquet_options
from schemas import fields


def _write(selection: Selection, group: Group, metadata: pa.Table, folder: Folder, options: Options) -> list[Written]:
    metadata = with_conversations(metadata, options)
    schema = metadata.schema.append(fields.IMAGE)
    name = f"{group.number:05d}.parquet"
    with folder.create(name) as sink, pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
        for rows, images in selection.images(metadata):
            table = rows.append_column(fields.IMAGE, pa.array([image.to_pybytes() for image in images], pa.binary()))
            writer.write_table(table.cast(schema), row_group_size=ROW_GROUP)
    return [sink.written(name)]


PARQUET = Format(
    "parquet",
    "Parquet files with metadata and images",
    ".parquet",
    _write,
    defaults=Options(kinds=(), boxes="plain"),
)
