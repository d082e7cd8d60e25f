from __future__ import annotations

import numpy as np
import pyarrow as pa

from filters.image_rules import ImageStats
from filters.threshold import blank_verdicts, size_verdicts
from pairmill.stage import Batch, ErrorBudget, apply
from schemas.config import Keep
from schemas.reasons import Reason
from tests.filters.rows import noise, pairs_table, png


def test_contrast_is_the_deviation_of_grey_levels_and_blank_images_fall() -> None:
    half = np.zeros((20, 20, 3), np.uint8)
    half[:, 10:] = 255
    images = [png(half), png(np.full((20, 20, 3), 200, np.uint8)), noise(0), None]
    stage = ImageStats()
    table = apply(stage, stage.open(), Batch(pairs_table(images, [["a"]] * 4)), ErrorBudget())
    contrast = table["contrast"].to_pylist()
    assert contrast[0] == 127.5
    assert contrast[1] == 0
    assert contrast[2] > 30
    assert contrast[3] is None
    layout = table["colour_layout"].to_pylist()
    assert layout[0] == [0.0] * 6 + [1.0] * 6 + ([0.0] * 6 + [1.0] * 6) * 3, "black on the left, white on the right"
    assert np.allclose(layout[1], 200 / 255) and len(layout[1]) == 48
    assert layout[3] is None
    assert table["reason"].to_pylist() == [None, None, None, Reason.IMAGE_MISSING]
    (verdict,) = blank_verdicts(Keep())
    assert verdict.judge(table.slice(0, 3)).reason.to_pylist() == [None, Reason.IMAGE_BLANK, None]


def test_an_image_that_does_not_decode_is_quarantined_alone() -> None:
    stage = ImageStats()
    table = pairs_table([noise(0), b"no image", noise(1)], [["a"]] * 3)
    found = apply(stage, stage.open(), Batch(table), ErrorBudget())
    assert found["reason"].to_pylist() == [None, Reason.ERROR_KERNEL, None]


def test_sides_and_aspect_are_judged_by_the_original_size() -> None:
    sizes = [(200, 200), (199, 900), (200, 600), (200, 601), (601, 200), (None, 300)]
    rows = pa.table(
        {"original_width": pa.array([w for w, _ in sizes], pa.int32()), "original_height": [h for _, h in sizes]}
    )
    side, aspect = size_verdicts(Keep())
    assert side.judge(rows).reason.to_pylist() == [
        None,
        Reason.IMAGE_TOO_SMALL,
        None,
        None,
        None,
        Reason.IMAGE_TOO_SMALL,
    ]
    judged = aspect.judge(rows)
    dropped = [Reason.IMAGE_ASPECT] * 2
    assert judged.reason.to_pylist() == [None, Reason.IMAGE_ASPECT, None, *dropped, Reason.IMAGE_ASPECT]
    assert judged.detail is not None
    assert judged.detail.to_pylist()[3:] == ["200x601", "601x200", "no score"]
    assert size_verdicts(Keep(min_side=None, max_aspect=None)) == ()
    assert blank_verdicts(Keep(min_contrast=None)) == ()
