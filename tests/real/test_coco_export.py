"""COCO's photographs, captions and boxes through a dataset and out again in COCO's form: nothing lost, nothing moved.

They lie beside the project (../shared); the test is skipped where they do not.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from pairmill.export import export
from pairmill.report.progress import Silent
from pairmill.run import parse_config, refresh
from pairmill.store import Dataset

DATA = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the COCO photographs are not beside the project")


def opened(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def annotations(coco: COCO, name: str) -> dict[str, list[dict[str, object]]]:
    """The annotations of each image, by the last part of the address in `name`."""
    found: dict[str, list[dict[str, object]]] = defaultdict(list)
    for annotation in coco.dataset["annotations"]:
        found[Path(coco.imgs[annotation["image_id"]][name]).name].append(annotation)
    return found


def test_cocos_own_files_come_out_as_they_went_in(tmp_path: Path) -> None:
    config = parse_config(
        {
            "dataset": str(tmp_path / "dataset"),
            "recipe": "instruct",
            "source": {
                "kind": "image_folder",
                "path": str(DATA / "images"),
                "captions": str(DATA / "captions.json"),
                "instances": str(DATA / "instances.json"),
            },
            "engine": {"kind": "local"},
            "shard_size": 30,
            "download": {"resize": {"mode": "no"}},
            "instruct": {"kinds": {"grounding": 0.1}},
        }
    )
    refresh(config, Silent())
    snapshot = Dataset(config.dataset).snapshot()
    out = tmp_path / "coco"
    assert export(snapshot, str(out), "coco", pairs_per_shard=60).samples == 80

    before, after = (opened(root / "captions.json") for root in (DATA, out))
    told, said = annotations(before, "file_name"), annotations(after, "coco_url")
    for name, found in told.items():
        assert [a["caption"] for a in said[name]] == [str(a["caption"]).strip() for a in found]
        (image,) = [i for i in after.imgs.values() if Path(i["coco_url"]).name == name]
        assert size_of(out / image["file_name"]) == size_of(DATA / "images" / name) == (image["width"], image["height"])

    before, after = (opened(root / "instances.json") for root in (DATA, out))
    assert {c["id"]: c["name"] for c in after.cats.values()}.items() <= {
        c["id"]: c["name"] for c in before.cats.values()
    }.items()
    drawn, found_again = annotations(before, "file_name"), annotations(after, "coco_url")
    small = 0
    for name, found in drawn.items():
        for annotation in found:
            same = [a for a in found_again[name] if a["category_id"] == annotation["category_id"]]
            if annotation["iscrowd"]:
                assert [a["bbox"][:2] for a in same if a["iscrowd"]] == [[0, 0]]  # type: ignore[index]
                continue
            at = [a for a in same if a["bbox"] == pytest.approx(annotation["bbox"], abs=2e-3) and not a["iscrowd"]]
            small += not at
            assert at or min(annotation["bbox"][2:]) < config.boxes.min_side  # type: ignore[index]
    kept = sum(not a["iscrowd"] for of_image in found_again.values() for a in of_image)
    assert kept + small == sum(not a["iscrowd"] for of_image in drawn.values() for a in of_image)
    assert json.loads((out / "manifest.json").read_text())["pairs"] == 80
