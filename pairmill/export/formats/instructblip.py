"""Questions and answers as InstructBLIP is trained on them: one JSON list in the form of LAVIS' and BLIP's VQA data.

::

    [{"question_id": "<uid>-conversation-0", "image": "images/00000/000000000.jpg", "question": "...",
      "answer": ["..."], "dataset": "vqa", "dialog": ""}, ...]

LAVIS' ``COCOVQADataset`` and ``COCOVQAInstructDataset``, BLIP's and ALBEF's ``vqa_dataset`` read it; they join
``image`` to the folder of images, which is the export's. Each question of a conversation is a record. These readers
show the model one question at a time: a later one may lean on the turns before it, which stand in ``dialog`` as LAVIS
writes a dialogue (``q: ... a: ...``), empty for the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pairmill.export.format import Options, json_list
from pairmill.export.formats.annotations import annotation_format
from pairmill.export.formats.conversations import conversations_of, with_frame
from pairmill.instructions import KINDS


def _annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:
    for conversation in conversations_of(row, options):
        said = [turn.content for turn in conversation.turns]
        before: list[str] = []
        for number, (question, answer) in enumerate(zip(said[::2], said[1::2], strict=True)):
            record = {
                "question_id": f"{conversation.id}-{number}",
                "image": image,
                "question": question,
                "answer": [answer],
                "dataset": "vqa",
                "dialog": " ".join(before),
            }
            yield with_frame(record, conversation)
            before.append(f"q: {question} a: {answer}")


INSTRUCTBLIP = annotation_format(
    "instructblip",
    "instructblip.json and images: questions and answers as LAVIS and BLIP read them",
    _annotate,
    (json_list("instructblip.json"),),
    Options("files", KINDS, "plain"),
)
