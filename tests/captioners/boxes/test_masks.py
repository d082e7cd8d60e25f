"""Masks by a tiny real SAM checkpoint, and their run-length encoding against pycocotools."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from captioners.boxes.checkpoints import load_segmenter
from captioners.boxes.masks import BOXES, Masks, Segmenter
from captioners.boxes.rle import decode, encode
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import fields
from tests.blip_models import library
from tests.captioners.boxes.conftest import folder, stored


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.booleans()))
def test_the_encoding_is_that_of_pycocotools(mask):
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode(mask) == theirs["counts"].decode()
    assert (decode(encode(mask), *mask.shape) == mask).all()


@pytest.mark.parametrize("fill", [False, True])
def test_long_runs(fill):
    mask = np.full((700, 900), fill)
    mask[100:500, 200:600] ^= True
    mask[:, 899] = ~fill
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode(mask) == theirs["counts"].decode() and (decode(encode(mask), 700, 900) == mask).all()


@given(st.text(max_size=8))
def test_damaged_counts_are_told(counts):
    try:
        mask = decode(counts, 5, 7)
    except ValueError:
        return
    assert mask.shape == (5, 7)


@pytest.mark.parametrize("counts", ["", "S1", "S", "S1\x00", "S1P1O"])
def test_counts_of_another_size_are_told(counts):
    with pytest.raises(ValueError, match="mask"):
        decode(counts, 5, 6)


def boxes_of(image, count: int) -> list[Box]:
    rng = np.random.default_rng(image.width)
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * [image.width, image.height]
    return [Box("a", *corner.ravel().tolist()) for corner in corners]


def test_masks_are_those_of_transformers_own_processor(checkpoints, images):
    import torch

    transformers = library()
    files = folder(checkpoints["sam"])
    processor = transformers.SamProcessor(transformers.AutoImageProcessor.from_pretrained(files, backend="pil"))
    model = transformers.SamModel.from_pretrained(files).eval()
    segmenter = Segmenter(load_segmenter(checkpoints["sam"], "cpu"), 4)
    boxes = [boxes_of(image, 3) for image in images]
    seen = 0
    for image, row, ours in zip(images, boxes, segmenter.masks(images, boxes), strict=True):
        inputs = processor(images=[image], input_boxes=[[list(box.xyxy) for box in row]], return_tensors="pt")
        with torch.inference_mode():
            output = model(
                pixel_values=inputs["pixel_values"],
                input_boxes=inputs["input_boxes"].float(),
                multimask_output=False,
            )
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        (theirs,) = processor.post_process_masks(output.pred_masks, *sizes)
        for n, mask in enumerate(ours):
            found = decode(mask["counts"], image.height, image.width)
            assert (found != theirs[n, 0].numpy()).mean() < 0.002  # a logit next to zero may fall on either side
            assert mask["area"] == found.sum() and mask["box"] == n
            assert mask["score"] == pytest.approx(float(output.iou_scores[0, n, 0].clamp(0, 1)), abs=1e-4)
            seen += 0 < mask["area"] < found.size
    assert seen > 5


def test_masks_do_not_depend_on_neighbours(checkpoints, images):
    segmenter = Segmenter(load_segmenter(checkpoints["sam"], "cpu"), 4)
    boxes = [boxes_of(image, n * 7) for n, image in enumerate(images)]
    together = segmenter.masks(images, boxes)
    assert [len(row) for row in together] == [0, 7, 14, 21, 28, 35] and BOXES < 21
    assert [segmenter.masks([image], [row])[0] for image, row in zip(images, boxes, strict=True)] == together
    assert segmenter.masks(images, [row[:1] for row in boxes]) == [row[:1] for row in together]


def test_the_stage(checkpoints, images):
    stage = Masks(checkpoints["sam"], detections=True, device="cpu")
    box = {"label": "dog", "x1": 1, "y1": 2, "x2": 30, "y2": 30, "score": None, "source": "human"}
    table = {
        "uid": ["a", "b", "c"],
        "image": pa.array([stored(images[0]), stored(images[1]), None], pa.binary()),
        "regions": pa.array([[box, box | {"x1": 5}], None, None], fields.REGIONS.type),
        "detections": pa.array([[box | {"x2": 50}], [box], None], fields.DETECTIONS.type),
    }
    found = apply(stage, stage.open(), Batch(pa.table(table)), ErrorBudget(0, 0)).to_pylist()
    assert [[m["box"] for m in row["masks"]] for row in found[:2]] == [[0, 1, 2], [0]]
    assert found[2]["masks"] is None and found[2]["reason"] is None


def test_what_is_no_segmenter_says_so(checkpoints):
    with pytest.raises(ConfigError, match=r"models\.segmenter.*Owlv2ForObjectDetection.*needs a segmenter"):
        load_segmenter(checkpoints["owlv2"], "cpu")
