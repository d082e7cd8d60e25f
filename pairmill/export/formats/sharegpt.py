"""ShareGPT's conversations with images: LLaMA-Factory and ms-swift read them, among others.

::

    sharegpt.json        [{"id": "<uid>-conversation", "images": ["images/00000/000000000.jpg"],
                           "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}, ...]
    dataset_info.json    LLaMA-Factory's index of what lies in the folder: the data set is called `DATASET` there

LLaMA-Factory takes the folder as ``dataset_dir`` and finds images below it (``media_dir`` is the same where it is not
given); ms-swift takes the path of ``sharegpt.json`` and finds images below ``ROOT_IMAGE_DIR``. There are as many
``<image>`` in a conversation as it has images: one, at the start of its first turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pairmill.export.folder import Folder, Written
from pairmill.export.format import Options, Parts, Whole, json_list
from pairmill.export.formats.annotations import annotation_format
from pairmill.export.formats.conversations import IMAGE, conversations_of, spoken, with_frame
from pairmill.instructions import KINDS

DATASET = "pairmill"
FILE = "sharegpt.json"

INFO = {
    DATASET: {
        "file_name": FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"},
    }
}


def _annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:
    for conversation in conversations_of(row, options):
        turns = spoken(conversation, f"{IMAGE}\n", "human", "gpt")
        yield with_frame({"id": conversation.id, "images": [image], "conversations": turns}, conversation)


def _write_info(folder: Folder, parts: Parts) -> Written:  # noqa: ARG001 - it is the same for all
    return folder.write_json("dataset_info.json", INFO)


SHAREGPT = annotation_format(
    "sharegpt",
    "sharegpt.json, dataset_info.json and images, as LLaMA-Factory and ms-swift read them",
    _annotate,
    (json_list(FILE), Whole("dataset_info.json", _write_info)),
    Options("files", KINDS, "plain"),
)
