"""MiniGPT-4's second stage: detailed descriptions, read by its ``CCSBUAlignDataset`` and by mmpretrain.

::

    filter_cap.json    {"annotations": [{"image_id": "00000/000000000", "caption": "..."}, ...]}
    images/            00000/000000000.jpg

The reader opens ``<vis_root>/<image_id>.jpg``: ``vis_root`` is the export's folder ``images``. It asks for that ending,
so images of all formats have it here; what they are is told by their first bytes. The description is the answer of the
pair's ``detail``; the questions are the trainer's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pairmill.export.folder import Folder, Written
from pairmill.export.format import Options, Parts, Whole, write_list
from pairmill.export.formats.annotations import annotation_format
from pairmill.export.formats.conversations import conversations_of
from pairmill.export.images import IMAGES

FILE = "filter_cap.json"
"""Its name in MiniGPT-4's own data."""


def _annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:
    image_id = image.removeprefix(f"{IMAGES}/").rpartition(".")[0]
    for conversation in conversations_of(row, options):
        yield {"image_id": image_id, "caption": conversation.turns[-1].content}


def _write(folder: Folder, parts: Parts) -> Written:
    with folder.create(FILE) as sink:
        sink.write(b'{"annotations": ')
        write_list(sink, parts.lines())
        sink.write(b"}\n")
    return sink.written(FILE)


MINIGPT4 = annotation_format(
    "minigpt4",
    "filter_cap.json and images: detailed descriptions for MiniGPT-4's second stage",
    _annotate,
    (Whole(FILE, _write),),
    Options("files", ("detail",), "plain"),
    kinds=("detail",),
    ending="jpg",
)
