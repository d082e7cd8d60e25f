"""Export as WebDataset, in img2dataset's layout.

::

    00000.tar            000000000.jpg (or .png, .webp), 000000000.txt, 000000000.json, 000000001.jpg ...
    00000.parquet        the metadata of its samples, one row each
    00000_stats.json     counts, and what the files hold
    sizes.json           {"00000.tar": samples}: open_clip and others read it
    manifest.json        what the export is and what each file holds (`pairmill.export.manifest`); written last

The .txt, and ``caption`` in .json, is the pair's first text; ``texts`` in .json are all kept ones by rank, with source
and scores, for trainers that draw one a step. Texts that are not kept are not exported. The same snapshot gives the
same bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.export import tar
from pairmill.export.folder import Folder, Sink, Written
from pairmill.export.manifest import METADATA_COMPRESSION, write_sizes
from pairmill.export.run import ExportReport, export
from pairmill.export.selection import ENDINGS, Group, Selection, as_json

if TYPE_CHECKING:
    from pairmill.report.progress import Reporter
    from pairmill.store import Snapshot


def export_webdataset(
    snapshot: Snapshot,
    out: str,
    *,
    where: str | None = None,
    pairs_per_shard: int = 10_000,
    progress: Reporter | None = None,
) -> ExportReport:
    """Export the kept pairs of a snapshot as tar files, or bring an export that is there to this snapshot.

    Args:
        snapshot: What to export.
        out: A folder, local or any fsspec URL: a new or empty one, or one that holds an export of this dataset with
            the same condition and `pairs_per_shard`, finished or not, of whatever snapshot. Of such a one only files
            whose content changed are written.
        where: An SQL condition over the view ``pairs``, such as ``clip_score >= 0.3``. Only kept pairs are exported,
            whatever it says.
        pairs_per_shard: Admitted pairs a tar file at most; it holds those of them that are kept.
        progress: Told how it goes.

    Raises:
        ConfigError: `out` holds something else, or `where` is wrong.
        DatasetLocked: another process is writing in `out`.
        StoreError: a stored file cannot be read, or a file cannot be written.
    """
    return export(snapshot, out, "webdataset", _write_group, where, pairs_per_shard, progress, write_sizes)


def _write_group(selection: Selection, group: Group, metadata: pa.Table, folder: Folder) -> list[Written]:
    name = f"{group.number:05d}"
    with folder.create(f"{name}.tar") as archive:
        for rows, images in selection.images(metadata):
            for row, image in zip(as_json(rows), images, strict=True):
                _add_sample(archive, row, image)
        tar.end(archive)
    with folder.create(f"{name}.parquet") as table:
        pq.write_table(metadata, table, compression=METADATA_COMPRESSION)
    return [archive.written(f"{name}.tar"), table.written(f"{name}.parquet")]


def _add_sample(archive: Sink, row: dict[str, Any], image: pa.Buffer) -> None:
    key = row["key"]
    tar.add(archive, f"{key}.{ENDINGS[row['format']]}", image)
    tar.add(archive, f"{key}.txt", (row["caption"] or "").encode())
    tar.add(archive, f"{key}.json", json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
