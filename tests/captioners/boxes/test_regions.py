"""Boxes of the source: moved, clipped, rejected with a reason; never kept wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from captioners.boxes import box_steps
from captioners.boxes.regions import MAX_LABEL, Regions, clean_label
from pairmill.imaging import resize
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import fields
from schemas.config import Resize, RunConfig

STAGE = Regions()


def row(
    *boxes: tuple[Any, ...],
    size: tuple[int, int] = (100, 80),
    transform: tuple[float, ...] | None = (1, 1, 0, 0),
    original: tuple[int, int] | None = None,
    extra: Any = None,
) -> dict[str, Any]:
    """A pair: each box is label, x1, y1, x2, y2 and perhaps a score."""
    values = [
        dict(zip(("label", "x1", "y1", "x2", "y2", "score"), (*box, None)[:6], strict=True)) | {"source": "human"}
        for box in boxes
    ]
    width, height = original or size
    return {
        "boxes": values,
        "transform": transform,
        "width": size[0],
        "height": size[1],
        "original_width": width,
        "original_height": height,
        "extra": None if extra is None else json.dumps(extra),
    }


def measured(*rows: dict[str, Any], stage: Regions = STAGE) -> list[dict[str, Any]]:
    known = {f.name: f for f in (*fields.PAIRS, *fields.IMAGES)}
    columns = {name: pa.array([r[name] for r in rows], known[name].type) for name in stage.reads}
    table = pa.table({"uid": [str(n) for n in range(len(rows))], **columns})
    return apply(stage, stage.open(), Batch(table), ErrorBudget(0, 0)).to_pylist()


def corners(box: dict[str, Any]) -> tuple[float, ...]:
    return tuple(box[name] for name in ("x1", "y1", "x2", "y2"))


def told(found: dict[str, Any]) -> list[tuple[str, str]]:
    assert all(rejected["detail"] for rejected in found["rejected_boxes"])
    return [(rejected["box"]["label"], rejected["reason"]) for rejected in found["rejected_boxes"]]


def test_boxes_are_moved_and_clipped_in_their_order():
    boxes = [("dog", -10, 10, 50, 400), ("cat", 20, 20, 60, 60, 0.5)]
    (found,) = measured(row(*boxes, transform=(0.5, 0.25, 8, -1)))
    assert [(b["label"], corners(b), b["score"], b["source"]) for b in found["regions"]] == [
        ("dog", (3, 1.5, 33, 80), None, "human"),
        ("cat", (18, 4, 38, 14), 0.5, "human"),
    ]
    assert found["rejected_boxes"] == [] and found["crowded"] == [] and found["reason"] is None


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((" \u202e\x00", 1, 1, 50, 50), "box.no_label"),
        ((None, 1, 1, 50, 50), "box.no_label"),
        (("a", math.nan, 1, 50, 50), "box.not_finite"),
        (("a", 1, 1, math.inf, 50), "box.not_finite"),
        (("a", 50, 1, 1, 50), "box.degenerate"),
        (("a", 1, 9, 50, 9), "box.degenerate"),
        (("a", 100, 1, 300, 50), "box.outside"),
        (("a", -9, -9, 0, 50), "box.outside"),
        (("a", 97, 1, 300, 50), "box.too_small"),
        (("a", 1, None, 30, 50), "box.malformed"),
        (("good", 1, 1, 30, 50), "box.repeated"),
    ],
)
def test_what_cannot_be_kept_is_rejected_with_a_reason(box, reason):
    (found,) = measured(row(("good", 1, 1, 30, 50), box, ("too", 2, 1, 30, 50)))
    assert [b["label"] for b in found["regions"]] == ["good", "too"]
    assert told(found) == [(clean_label(box[0]), reason)]
    kept = found["rejected_boxes"][0]["box"]
    assert all(value is None or math.isfinite(value) for value in corners(kept))


def test_overlapping_boxes_of_one_label_are_two_things():
    (found,) = measured(row(("a", 1, 1, 30, 50), ("a", 1, 1, 30, 50.5), ("b", 1, 1, 30, 50)))
    assert len(found["regions"]) == 3
    # both cover the whole crop, yet the source has two
    (found,) = measured(row(("a", -1, -1, 200, 200), ("a", -2, -2, 200, 200)))
    assert len(found["regions"]) == 2


def test_huge_boxes_are_clipped():
    (found,) = measured(row(("a", -3e38, -3e38, 3e38, 3e38), ("b", 3e38, 0, 3.2e38, 9), transform=(2, 2, 0, 0)))
    assert [corners(b) for b in found["regions"]] == [(0, 0, 100, 80)]
    assert told(found) == [("b", "box.outside")] and found["rejected_boxes"][0]["box"]["x1"] is None


@pytest.mark.parametrize("score", [-0.1, 1.5, math.nan, math.inf])
def test_a_score_that_is_no_probability_is_null(score):
    (found,) = measured(row(("a", 1, 1, 30, 50, score)))
    assert found["regions"][0]["score"] is None


def test_a_row_without_image_has_nulls():
    empty = row(("a", 1, 1, 30, 50), transform=None) | dict.fromkeys(
        ["width", "height", "original_width", "original_height"]
    )
    found = measured(empty, row())
    assert [found[0][f.name] for f in STAGE.writes] == [None, None, None]
    assert [found[1][f.name] for f in STAGE.writes] == [[], [], []]


def test_labels_are_cleaned():
    assert clean_label(" traffic\t\n light \x07\u202eder\u2066 ") == "traffic light der"
    assert clean_label("man [on bike](box:1)") == "man (on bike)(box:1)"
    assert clean_label("e\u0301") == "\u00e9" and clean_label("e\u200b\u0301") == "\u00e9"
    assert len(clean_label("x" * 10**6)) == MAX_LABEL
    assert clean_label(None) == "" == clean_label("\u200e")


@given(st.text(max_size=300))
def test_cleaning_a_clean_label_changes_nothing(text):
    clean = clean_label(text)
    assert clean_label(clean) == clean and len(clean) <= MAX_LABEL and clean == clean.strip()
    clean.encode()


@pytest.mark.parametrize(
    ("extra", "labels"),
    [
        ({"crowded": ["person", " person ", "", 7, "car"]}, ["person", "car"]),
        ({"crowded": '["person"]'}, ["person"]),
        ({"crowded": "person"}, []),
        ({"crowded": {"a": 1}}, []),
        (["crowded"], []),
        ({"other": "crowded"}, []),
    ],
)
def test_crowded_labels(extra, labels):
    assert measured(row(extra=extra))[0]["crowded"] == labels


def test_the_annotated_size_is_compared_with_the_image_that_came():
    box = ("a", 10, 20, 30, 40)

    def with_size(size, original):
        return row(box, size=(400, 400), original=original, extra={"annotated_size": size})

    same, half, odd, turned, junk = measured(
        with_size([100, 60], (100, 60)),
        with_size([100, 60], (200, 120)),
        with_size([101, 61], (333, 201)),
        with_size([100, 60], (60, 100)),
        with_size(["a", None], (60, 100)),
    )
    assert corners(same["regions"][0]) == corners(junk["regions"][0]) == (10, 20, 30, 40)
    assert corners(half["regions"][0]) == (20, 40, 60, 80)
    assert corners(odd["regions"][0]) == pytest.approx([10 * 333 / 101, 20 * 201 / 61, 30 * 333 / 101, 40 * 201 / 61])
    assert told(turned) == [("a", "box.size_mismatch")] and turned["regions"] == []


SIDES = st.integers(1, 300)
NUMBERS = st.floats(width=32) | st.floats(-400, 400, width=32)


@given(
    st.sampled_from(["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]),
    st.tuples(SIDES, SIDES),
    SIDES,
    st.booleans(),
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=8),
    st.sampled_from([0.0, 1.0, 4.0]),
)
def test_regions_lie_in_the_image_and_are_the_moved_boxes(mode, size, side, only_if_bigger, boxes, least):
    resized = resize(Image.new("RGB", size), Resize(mode=mode, size=side, only_if_bigger=only_if_bigger))
    width, height = resized.image.size
    labels = [(str(n), *box) for n, box in enumerate(boxes)]
    given_row = row(*labels, size=(width, height), transform=resized.transform, original=size)
    (found,) = measured(given_row, stage=Regions(least))
    kept, rejected = found["regions"], [r["box"] for r in found["rejected_boxes"]]
    assert sorted(b["label"] for b in kept + rejected) == sorted(label for label, *_ in labels)
    assert [b["label"] for b in kept] == sorted((b["label"] for b in kept), key=int)
    sx, sy, dx, dy = np.array(resized.transform, np.float32).astype(float)
    for box in kept:
        x1, y1, x2, y2 = corners(box)
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height and min(x2 - x1, y2 - y1) >= least
        a, b, c, d = boxes[int(box["label"])]
        moved = np.clip([a * sx + dx, b * sy + dy, c * sx + dx, d * sy + dy], 0, [width, height] * 2)
        assert np.allclose((x1, y1, x2, y2), moved, atol=1e-4)
    for box in rejected:  # none is lost that could be kept
        a, b, c, d = boxes[int(box["label"])]
        if np.isfinite([a, b, c, d]).all():
            across = min(c * sx + dx, width) - max(a * sx + dx, 0)
            down = min(d * sy + dy, height) - max(b * sy + dy, 0)
            assert min(across, down) < max(least, 1e-4) + 1e-4


def test_box_steps_begin_with_the_regions():
    config = RunConfig.model_validate(
        {"dataset": "d", "source": {"path": "x", "kind": "url_table"}, "boxes": {"min_side": 9}}
    )
    assert box_steps(config, captions=True)[0] == Regions(9)
