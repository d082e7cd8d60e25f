"""What formats of annotations share: records about images in JSON Lines files, and the images beside them.

::

    00000.jsonl          the records of the group's pairs, each with its pair's uid
    00000.parquet        the metadata of those pairs, one row each: key, uid, url ...
    images/00000/        the images as files, or 00000.tar (`pairmill.export.images`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from pairmill.export import images, jsonl
from pairmill.export.folder import Folder, Written
from pairmill.export.format import Format, Options, Whole
from pairmill.export.metadata import write_metadata
from pairmill.export.selection import Group, Selection, as_json, without_images
from pairmill.instructions import KINDS
from schemas.config import InstructKind

Annotate = Callable[[dict[str, Any], str, Options], Iterable[dict[str, Any]]]
"""From a pair's metadata row as JSON values (``uid``, ``key``, ``width``, ``height``, ``caption``, ``texts``,
``conversations`` ...), what its image is called, and the options, to its records; none of them says ``uid``."""


def annotation_format(
    name: str,
    told: str,
    annotate: Annotate,
    wholes: tuple[Whole, ...],
    defaults: Options,
    columns: tuple[str, ...] = (),
    *,
    kinds: tuple[InstructKind, ...] = KINDS,
    ending: str | None = None,
) -> Format:
    """A format of annotations.

    Args:
        name: The format's name.
        told: What reads it.
        annotate: Gives the records of a pair.
        wholes: What is made of all records.
        defaults: Its options. With ``images`` as ``files`` an image is called by its path in the export, else by its
            file name alone.
        columns: Columns of the store that `annotate` needs besides the metadata.
        kinds: Kinds of conversations that it can hold.
        ending: Of all image files, for readers that know one ending alone; null: that of the image's format.
    """

    def write(
        selection: Selection, group: Group, metadata: pa.Table, folder: Folder, options: Options
    ) -> list[Written]:
        main = f"{group.number:05d}.jsonl"
        stored = selection.images(metadata) if options.images in ("files", "shards") else without_images(metadata)
        with images.writing(folder, group.number, options.images, ending) as beside, folder.create(main) as sink:
            for rows, files in stored:
                for row, file in zip(as_json(rows), files, strict=True):
                    for record in annotate(row, beside.add(row, file), options):
                        jsonl.write(sink, row["uid"], record)
        own = [name for name in metadata.column_names if name not in ("conversations", *columns)]
        return [sink.written(main), write_metadata(folder, group.number, metadata.select(own)), *beside.written]

    return Format(name, told, ".jsonl", write, wholes, defaults, kinds, columns)
