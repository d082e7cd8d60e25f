"""Export as Parquet files with the images inside: ``00000.parquet``, and the manifest as in the WebDataset export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.export.folder import Folder, Written
from pairmill.export.run import ExportReport, export
from pairmill.export.selection import Group, Selection
from pairmill.store import ROW_GROUP, parquet_options
from schemas import fields

if TYPE_CHECKING:
    from pairmill.report.progress import Reporter
    from pairmill.store import Snapshot


def export_parquet(
    snapshot: Snapshot,
    out: str,
    *,
    where: str | None = None,
    pairs_per_shard: int = 10_000,
    progress: Reporter | None = None,
) -> ExportReport:
    """Export the kept pairs of a snapshot as Parquet: the metadata columns of the WebDataset export, and ``image``.

    Arguments, updates and errors are those of `pairmill.export.webdataset.export_webdataset`.
    """
    return export(snapshot, out, "parquet", _write_group, where, pairs_per_shard, progress)


def _write_group(selection: Selection, group: Group, metadata: pa.Table, folder: Folder) -> list[Written]:
    schema = metadata.schema.append(fields.IMAGE)
    name = f"{group.number:05d}.parquet"
    with folder.create(name) as sink, pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
        for rows, images in selection.images(metadata):
            table = rows.append_column(fields.IMAGE, pa.array([image.to_pybytes() for image in images], pa.binary()))
            writer.write_table(table.cast(schema), row_group_size=ROW_GROUP)
    return [sink.written(name)]
