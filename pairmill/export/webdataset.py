"""Export as WebDataset, in img2dataset's layout.

::

    00000.tar            000000000.jpg (or .png, .webp), 000000000.txt, 000000000.json, 000000001.jpg ...
    00000.parquet        the metadata of its samples, one row each
    00000_stats.json     counts, and what the files hold
    sizes.json           {"00000.tar": samples}: open_clip and others read it
    manifest.json        snapshot, condition, sha256 of each tar; written last

The .txt, and ``caption`` in .json, is the pair's first text; ``texts`` in .json are all kept ones by rank, with source
and scores, for trainers that draw one a step. Texts that are not kept are not exported. The same snapshot gives the
same bytes.
"""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.export.folder import Folder, Sink, Written
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
    """Export the kept pairs of a snapshot as tar files.

    Args:
        snapshot: What to export.
        out: A new or empty folder, local or any fsspec URL; an unfinished export of the same is completed, a finished
        one left alone. where: An SQL condition over the view ``pairs``, such as ``clip_score >= 0.3``. Only kept pairs
        are exported, whatever it says. pairs_per_shard: Admitted pairs a tar file at most; it holds those of them that
        are kept. progress: Told how it goes.

    Raises:
        ConfigError: `out` holds something else, or `where` is wrong.
        StoreError: a stored file cannot be read, or a file cannot be written.
    """
    return export(snapshot, out, "webdataset", _write_group, where, pairs_per_shard, progress, _sizes)


def _write_group(selection: Selection, group: Group, folder: Folder) -> tuple[int, list[Written]]:
    metadata = selection.metadata(group)
    name = f"{group.number:05d}"
    with folder.create(f"{name}.tar") as tar:
        for rows, images in selection.images(metadata):
            for row, image in zip(as_json(rows), images, strict=True):
                _add_sample(tar, row, image)
        _end(tar)
    with folder.create(f"{name}.parquet") as table:
        pq.write_table(metadata, table, compression="zstd")
    return metadata.num_rows, [tar.written(f"{name}.tar"), table.written(f"{name}.parquet")]


def _add_sample(tar: Sink, row: dict[str, Any], image: pa.Buffer) -> None:
    key = row["key"]
    _add(tar, f"{key}.{ENDINGS[row['format']]}", image)
    _add(tar, f"{key}.txt", (row["caption"] or "").encode())
    _add(tar, f"{key}.json", json.dumps(row, sort_keys=True, ensure_ascii=False).encode())


def _add(tar: Sink, name: str, data: bytes | pa.Buffer) -> None:
    size = memoryview(data).nbytes
    tar.write(_header(name, size))
    tar.write(data)
    tar.write(b"\0" * (-size % tarfile.BLOCKSIZE))


def _header(name: str, size: int) -> bytes:
    """A member's header in POSIX ustar format, as `tarfile` writes it, which takes seven times as long: longer than
    writing a small image. It says nothing of this machine: mode 644, owner 0, time 0."""
    owner, time = b"0000000\0" * 2, b"00000000000\0"
    before = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + owner + b"%011o\0" % size + time
    after = b"0" + b"\0" * 100 + b"ustar\0" + b"00" + b"\0" * 247
    checksum = sum(before) + sum(after) + 8 * ord(" ")  # its own field counts as spaces
    return before + b"%06o\0 " % checksum + after


def _end(tar: Sink) -> None:
    tar.write(b"\0" * (2 * tarfile.BLOCKSIZE))
    tar.write(b"\0" * (-tar.tell() % tarfile.RECORDSIZE))


def _sizes(folder: Folder, files: list[dict[str, Any]]) -> None:
    folder.write_json("sizes.json", {file["name"]: file["samples"] for file in files})
