"""What the offline writer makes of 160 real photographs with people's captions and boxes.

They lie beside the project (../shared); the tests are skipped where they do not.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from captioners.instruct.offline import OfflineWriter
from filters.instruct import check
from pairmill.boxes import Box
from pairmill.instructions import KINDS, Context, Instruction, Task

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "coco-mini").is_dir(), reason="the photographs are not beside the project")


def coco_mini() -> tuple[list[Context], tuple[str, ...]]:
    captions = json.loads((DATA / "coco-mini" / "captions.json").read_text())
    instances = json.loads((DATA / "coco-mini" / "instances.json").read_text())
    labels = {category["id"]: category["name"] for category in instances["categories"]}
    texts, boxes, crowded = defaultdict(list), defaultdict(list), defaultdict(set)
    for caption in captions["annotations"]:
        texts[caption["image_id"]].append(caption["caption"])
    for thing in instances["annotations"]:
        label, (x, y, width, height) = labels[thing["category_id"]], thing["bbox"]
        if thing["iscrowd"]:
            crowded[thing["image_id"]].add(label)
        else:
            boxes[thing["image_id"]].append(Box(label, x, y, x + width, y + height, None, "human"))
    looked_for = tuple(labels.values())
    return [
        Context(
            image["file_name"], tuple(texts[image["id"]]), tuple(boxes[image["id"]]), image["width"], image["height"],
            frozenset(crowded[image["id"]]), looked_for,
        )
        for image in captions["images"]
    ], looked_for  # fmt: skip


def coco_2014(looked_for: tuple[str, ...]) -> list[Context]:
    """Boxes are fractions of the image, whose size is not given: every image counts as 1000 by 1000."""
    lines = (DATA / "caps_boxes_coco2014_val_80.jsonl").read_text().splitlines()
    return [
        Context(
            row["image"],
            tuple(row["captions"]),
            tuple(Box(thing["category"], *(1000 * edge for edge in thing["bbox"])) for thing in row["instances"]),
            1000,
            1000,
            labels=looked_for,
        )
        for row in map(json.loads, lines)
    ]


@pytest.fixture(scope="module")
def written() -> list[tuple[Context, Instruction]]:
    mini, labels = coco_mini()
    write = OfflineWriter().open()
    return [
        (context, answer)
        for context in (*mini, *coco_2014(labels))
        for answer in write([Task(context, kind) for kind in KINDS])
    ]


def test_every_conversation_passes_every_check(written):
    stored = [(context, answer) for context, answer in written if answer.reason is None]
    assert len(written) == 640 and len(stored) > 560
    assert [
        (context.uid, findings)
        for context, answer in stored
        if (findings := check(answer.turns, answer.boxes, answer.kind, context))
    ] == []


def test_most_images_give_every_kind(written):
    found = Counter(answer.kind for _, answer in written if answer.reason is None)
    assert found["conversation"] >= 155 and found["grounding"] >= 155
    assert found["detail"] >= 130 and found["complex"] >= 140
    assert all(answer.detail for _, answer in written if answer.reason is not None)


def test_no_wording_is_used_too_often(written):
    asked = [turn.content for _, answer in written for turn in answer.turns[::2]]
    assert len(asked) > 900 and len(set(asked)) > 0.5 * len(asked)
    assert Counter(asked).most_common(1)[0][1] <= 0.03 * len(asked)
    said = [turn.content for _, answer in written for turn in answer.turns[1::2]]
    short = sum(len(words.split()) <= 2 for words in said)
    assert 0.02 * len(said) < short < 0.2 * len(said)


def test_yes_is_said_as_often_as_no(written):
    verdicts = Counter(
        turn.content.split()[0].rstrip(",.")
        for _, answer in written
        if answer.kind == "conversation"
        for turn in answer.turns[1::2]
        if turn.content.startswith(("Yes", "No,", "No."))
    )
    assert 0.4 < verdicts["No"] / sum(verdicts.values()) < 0.6
