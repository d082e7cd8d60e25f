"""LLaVA's instruction data: one JSON list, read by LLaVA's own training code, LLaVA-NeXT and many that follow them.

::

    [{"id": "<uid>-conversation", "image": "images/00000/000000000.jpg",
      "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}, ...]

There is one ``<image>`` in a conversation, at the start of its first turn. The trainer joins ``image`` to its option
``image_folder``, which is the export's folder here. Boxes are fractions of the image *padded to a square*, as LLaVA-1.5
sees it (``image_aspect_ratio: pad``); a record with boxes says in ``frame`` what that square is, in pixels of the
image: ``width``, ``height``, and ``left`` and ``top``, where the image lies on it. Where the image is a square itself
there is no ``frame``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pairmill.export.format import Options, json_list
from pairmill.export.formats.annotations import annotation_format
from pairmill.export.formats.conversations import IMAGE, conversations_of, spoken, with_frame
from pairmill.instructions import KINDS


def _annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:
    for conversation in conversations_of(row, options):
        turns = spoken(conversation, f"{IMAGE}\n", "human", "gpt")
        yield with_frame({"id": conversation.id, "image": image, "conversations": turns}, conversation)


LLAVA = annotation_format(
    "llava",
    "llava.json and images, as LLaVA's training code reads them",
    _annotate,
    (json_list("llava.json"),),
    Options("files", KINDS, "llava"),
)
