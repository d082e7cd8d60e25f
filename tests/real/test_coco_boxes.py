"""Boxes of 80 real photographs, against a mapping by hand; skipped where they are not beside the project."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captioners.boxes.regions import Regions
from pairmill.sources import download_stage, read
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import config

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason="the COCO photographs are not beside the project")


def by_hand(mode: str, size: int, width: int, height: int) -> tuple[float, float, float, int, int]:
    """Scale, shift to the right, shift down, and the stored size."""
    side = min(width, height) if mode in ("keep_ratio", "center_crop") else max(width, height)
    scale = size / side
    across, down = round(width * scale), round(height * scale)
    if mode == "center_crop":
        return scale, -((across - size) // 2), -((down - size) // 2), size, size
    if mode == "border":
        return scale, (size - across) // 2, (size - down) // 2, size, size
    return scale, 0, 0, across, down


@pytest.mark.parametrize("mode", ["keep_ratio", "center_crop", "border"])
def test_every_region_is_where_the_annotation_is(mode):
    files = {key: str(COCO / f"{key}.json") for key in ("captions", "instances")}
    rows = pa.concat_tables(list(read(config.ImageFolder(path=str(COCO / "images"), **files))))
    rows = rows.append_column("uid", pa.array([json.loads(extra)["file_name"] for extra in rows["extra"].to_pylist()]))
    resize = config.Resize(mode=mode, size=256)
    fetch, stage = download_stage(config.Download(resize=resize)), Regions(1.0)
    images = apply(fetch, fetch.open(), Batch(rows.select(["uid", *fetch.reads])), ErrorBudget(0, 0))
    for name in ("boxes", "extra"):
        images = images.append_column(name, rows[name])
    found = apply(stage, stage.open(), Batch(images.select(["uid", *stage.reads])), ErrorBudget(0, 0)).to_pylist()

    coco = json.loads((COCO / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    sizes = {image["id"]: (image["file_name"], image["width"], image["height"]) for image in coco["images"]}
    wanted, crowds = defaultdict(list), defaultdict(set)
    for annotation in coco["annotations"]:
        file_name, width, height = sizes[annotation["image_id"]]
        label = names[annotation["category_id"]]
        if annotation["iscrowd"]:
            crowds[file_name].add(label)
            continue
        scale, dx, dy, across, down = by_hand(mode, 256, width, height)
        x, y, w, h = annotation["bbox"]
        corners = np.array([x, y, x + w, y + h]) * scale + [dx, dy, dx, dy]
        wanted[file_name].append((label, np.clip(corners, 0, [across, down] * 2), corners))
    checked = 0
    for row in found:
        kept, lost = row["regions"], [r["box"] for r in row["rejected_boxes"]]
        assert len(kept) + len(lost) == len(wanted[row["uid"]])
        assert set(row["crowded"]) == crowds[row["uid"]]
        left = iter(wanted[row["uid"]])
        for region in kept:  # in the order of the file, the rejected ones between them
            label, clipped, _ = next(
                w for w in left if min(w[1][2] - w[1][0], w[1][3] - w[1][1]) > 0.9 and w[0] == region["label"]
            )
            assert [region[c] for c in ("x1", "y1", "x2", "y2")] == pytest.approx(clipped, abs=1)
            checked += 1
        for rejection in row["rejected_boxes"]:
            assert rejection["reason"] in ("box.outside", "box.too_small")
    assert checked > 550 and (mode == "center_crop" or checked > 590)
    assert sum(map(len, crowds.values())) >= 5
