"""WebDataset, in img2dataset's layout.

::

    00000.tar            000000000.jpg (or .png, .webp), 000000000.txt, 000000000.json, 000000001.jpg ...
    00000.parquet        the metadata of its samples, one row each
    sizes.json           {"00000.tar": samples}: open_clip and others read it

The .txt, and ``caption`` in .json, is the pair's first text; ``texts`` in .json are all kept ones by rank, with source
and scores, for trainers that draw one a step. Texts that are not kept are not exported.

With kinds of conversations asked for, ``conversations`` in .json are those of the pair (`CONVERSATIONS` of
`pairmill.export.formats.rendered` says what is in one); without, nothing of them is there.
"""

from __future__ import annotations

import pyarrow as pa

from pairmill.export import tar
from pairmill.export.folder import Folder, Written
from pairmill.export.format import Format, Options
from pairmill.export.formats.rendered import with_conversations
from pairmill.export.metadata import write_metadata
from pairmill.export.selection import Group, Selection, as_json


def _write(selection: Selection, group: Group, metadata: pa.Table, folder: Folder, options: Options) -> list[Written]:
    metadata = with_conversations(metadata, options)
    name = f"{group.number:05d}"
    with folder.create(f"{name}.tar") as archive:
        for rows, images in selection.images(metadata):
            for row, image in zip(as_json(rows), images, strict=True):
                tar.add_sample(archive, row, image)
        tar.end(archive)
    return [archive.written(f"{name}.tar"), write_metadata(folder, group.number, metadata)]


WEBDATASET = Format(
    "webdataset",
    "tar files that webdataset, open_clip and img2dataset's users read",
    ".tar",
    _write,
    defaults=Options(kinds=(), boxes="plain"),
)
