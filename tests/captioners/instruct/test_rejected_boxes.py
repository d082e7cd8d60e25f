"""What writers are told of boxes that were rejected: that their labels cannot be counted."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from captioners.instruct.offline import OfflineWriter
from captioners.instruct.stage import Instructions, unboxed
from pairmill.boxes import Box
from pairmill.instructions import Instruction
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import fields
from schemas.reasons import Reason

LEFT, RIGHT = Box("cup", 10, 40, 40, 80), Box("cup", 120, 40, 150, 80)
PLATE = Box("plate", 60, 40, 90, 60)


def entry(box: Box, reason: Reason) -> dict[str, Any]:
    return {"box": box.to_row(), "reason": reason.value, "detail": "wrong"}


def test_labels_of_rejected_boxes_are_crowded():
    assert unboxed([], [LEFT]) == set()
    assert unboxed([entry(RIGHT, Reason.BOX_NOT_FINITE)], [LEFT, PLATE]) == {"cup"}
    assert unboxed([entry(LEFT, Reason.BOX_REPEATED)], [LEFT]) == set()  # it has its box
    assert unboxed([entry(Box("", 0, 0, 9, 9), Reason.BOX_NO_LABEL)], [LEFT, PLATE]) >= {"cup", "plate"}


def answers(boxes: list[Box], rejected: list[dict[str, Any]]) -> str:
    """All that the offline writer says of such a pair."""
    stage = Instructions(OfflineWriter(), tuple((kind, 1.0) for kind in ("conversation", "complex", "grounding")))
    types = {f.name: f for f in (*fields.PAIRS, *fields.IMAGES, fields.REGIONS, fields.REJECTED_BOXES, fields.CROWDED)}
    row = {
        "texts": [{"text": "cups on a table", "source": "human"}],
        "regions": [box.to_row() for box in boxes],
        "rejected_boxes": rejected,
        "crowded": [],
        "width": 200,
        "height": 100,
        "shard": 0,
    }
    columns = {name: pa.array([row[name]], (types | {"shard": fields.SHARD})[name].type) for name in stage.reads}
    table = pa.table({"uid": ["a"], **columns})
    (found,) = apply(stage, stage.open(), Batch(table), ErrorBudget(0, 0)).to_pylist()
    written = [Instruction.from_row(instruction) for instruction in found["instructions"]]
    return " ".join(turn.content for instruction in written for turn in instruction.turns).lower()


def test_nobody_counts_what_may_have_lost_a_box():
    assert "two cups" in answers([LEFT, RIGHT, PLATE], [])
    told = answers([LEFT, RIGHT, PLATE], [entry(Box("cup", 9, 9, 5, 5), Reason.BOX_DEGENERATE)])
    assert told and "two cups" not in told
