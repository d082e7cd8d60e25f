"""From COCO files to the views of a snapshot: boxes on the things that they were drawn around, however the image is
turned and resized."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioners.boxes.rle import decode
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import parse_config, refresh
from pairmill.store import Dataset
from tests.captioners.boxes.conftest import folder

SIZE = (120, 80)
RED = (30, 20, 70, 60)
"""Corners of the red thing in each upright picture."""


def picture(orientation: int = 1) -> bytes:
    """Red on blue; the pixels turned so that the EXIF orientation makes them upright again."""
    upright = Image.new("RGB", SIZE, (0, 0, 255))
    upright.paste((255, 0, 0), RED)
    turn = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    how = turn[orientation]
    stored = upright if how is None else upright.transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def write(root: Path) -> dict[str, str]:
    """Pictures with COCO files. Of ``swapped.jpg`` the file says the size of the pixels before they are turned."""
    (root / "images").mkdir()
    sizes = {"plain": SIZE, "turned3": SIZE, "turned6": SIZE, "turned8": SIZE, "swapped": SIZE[::-1]}
    images, annotations, captions = [], [], []
    for n, (name, (width, height)) in enumerate(sizes.items()):
        turned = 6 if name == "swapped" else int(name[-1]) if name[-1].isdigit() else 1
        (root / "images" / f"{name}.jpg").write_bytes(picture(turned))
        images.append({"id": n, "file_name": f"{name}.jpg", "width": width, "height": height})
        captions.append({"image_id": n, "caption": f"a dog and a kite, {name}"})
        x1, y1, x2, y2 = RED
        for bbox, crowd in (([x1, y1, x2 - x1, y2 - y1], 0), ([-9, 0, 0, 5], 0), ([0, 0, 9, 9], 1)):
            annotations.append({"image_id": n, "category_id": 7, "bbox": bbox, "iscrowd": crowd})
    categories = [{"id": 7, "name": "red thing"}]
    for key, rows in (("captions", captions), ("instances", annotations)):
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / f"{key}.json").write_text(json.dumps(content))
    return {
        "kind": "image_folder",
        "path": str(root / "images"),
        "captions": str(root / "captions.json"),
        "instances": str(root / "instances.json"),
    }


def run(root: Path, source: dict[str, str], mode: str, **more: Any) -> Dataset:
    config = parse_config(
        {
            "dataset": str(root / mode),
            "recipe": "tests.captioners.boxes.recipe:recipe",
            "source": source,
            "engine": {"kind": "local"},
            "download": {"resize": {"mode": mode, "size": 60}},
            **more,
        }
    )
    assert refresh(config, Silent()).published
    again = refresh(config, Silent())
    assert not again.published and again.computed == {}
    return Dataset(config.dataset)


def named(dataset: Dataset, sql: str) -> list[dict[str, Any]]:
    return query(dataset.snapshot(), sql).to_pylist()


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "center_crop", "border"])
def test_regions_lie_on_what_they_were_drawn_around(tmp_path, mode):
    dataset = run(tmp_path, write(tmp_path), mode)
    rows = named(dataset, "SELECT p.url, b.*, i.image FROM boxes b JOIN images i USING (uid) JOIN pairs p USING (uid)")
    assert sorted(Path(r["url"]).stem for r in rows) == ["plain", "turned3", "turned6", "turned8"]
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(int)
        red = (pixels[..., 0] > 128) & (pixels[..., 1] < 128)
        down, across = np.nonzero(red)
        seen = (across.min(), down.min(), across.max() + 1, down.max() + 1)
        assert [row[c] for c in ("x1", "y1", "x2", "y2")] == pytest.approx(seen, abs=1)
        assert (row["label"], row["source"], row["ordinal"], row["mask"]) == ("red thing", "human", 0, None)
    sql = "SELECT url, reason, r.detail FROM rejected_boxes r JOIN pairs p USING (uid) ORDER BY ALL"
    rejected = [(Path(r["url"]).stem, r["reason"]) for r in named(dataset, sql.replace("reason, r", "r.reason, r"))]
    assert rejected == [
        ("plain", "box.degenerate"),
        ("swapped", "box.degenerate"),
        ("swapped", "box.size_mismatch"),
        *((name, "box.degenerate") for name in ("turned3", "turned6", "turned8")),
    ]


def test_detections_and_masks(tmp_path, checkpoints):
    models = {"device": "cpu", "batch": 4}
    models |= {
        key: {"path": str(folder(checkpoints[name]))} for key, name in (("detector", "owlv2"), ("segmenter", "sam"))
    }
    boxes = {"threshold": 0.3, "min_side": 0.5, "most": 5}
    dataset = run(tmp_path, write(tmp_path), "keep_ratio", models=models, boxes=boxes)
    rows = named(
        dataset, "SELECT b.*, width, height FROM boxes b JOIN images i USING (uid, shard) ORDER BY uid, ordinal"
    )
    sources = [[r["source"] for r in rows if r["uid"] == uid] for uid in sorted({r["uid"] for r in rows})]
    assert sorted(sources) == [["human", *["owlv2"] * 5]] * 4 + [["owlv2"] * 5]
    assert {r["label"] for r in rows} <= {"red thing", "dog", "kite"} and len({r["label"] for r in rows}) > 1
    assert len({r["mask"] for r in rows}) > 15  # each box has its own
    for row in rows:
        assert 0 <= row["x1"] < row["x2"] <= row["width"] and 0 <= row["y1"] < row["y2"] <= row["height"]
        assert decode(row["mask"], row["height"], row["width"]).sum() == row["mask_area"]
        assert 0 <= row["mask_score"] <= 1 and (row["score"] is None) == (row["source"] == "human")
