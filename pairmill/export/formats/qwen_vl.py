"""Qwen-VL's fine-tuning data: one JSON list, read by its ``finetune.py``.

::

    [{"id": "<uid>-grounding", "conversations": [
        {"from": "user", "value": "Picture 1: <img>images/00000/000000000.jpg</img>\\nWhere is the dog?"},
        {"from": "assistant", "value": "<ref>The dog</ref><box>(100,200),(300,400)</box> is ..."}]}, ...]

The model opens an image under the path that stands in the text, so training runs in the export's folder. Boxes are in
thousandths of the image's width and height. Qwen2-VL and its successors are trained by frameworks that read ShareGPT's
form (`pairmill.export.formats.sharegpt`, with ``boxes`` as ``qwen2_vl``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pairmill.export.format import Options, json_list
from pairmill.export.formats.annotations import annotation_format
from pairmill.export.formats.conversations import conversations_of, spoken, with_frame
from pairmill.instructions import KINDS


def _annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:
    for conversation in conversations_of(row, options):
        turns = spoken(conversation, f"Picture 1: <img>{image}</img>\n", "user", "assistant")
        yield with_frame({"id": conversation.id, "conversations": turns}, conversation)


QWEN_VL = annotation_format(
    "qwen-vl",
    "qwen_vl.json and images, as Qwen-VL's fine-tuning code reads them",
    _annotate,
    (json_list("qwen_vl.json"),),
    Options("files", KINDS, "qwen_vl"),
)
