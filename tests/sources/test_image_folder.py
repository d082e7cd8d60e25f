from __future__ import annotations

import json
from pathlib import Path

import pytest

from pairmill.errors import SourceError
from pairmill.sources import locator, read
from schemas import config
from tests.hostile.pictures import encoded, quadrants
from tests.sources.tables import rows

COCO_MINI = Path(__file__).parents[2].parent / "shared" / "data" / "coco-mini"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "empty.jpg"):
        (images / name).write_bytes(encoded(quadrants(), "JPEG"))
    (images / "b.txt").write_text("a text beside\n")
    (images / "empty.txt").write_text("\n")
    (images / "readme.md").write_text("no image")
    return images


def coco(tmp_path: Path) -> tuple[str, str]:
    images = [{"id": 1, "file_name": "b.jpg"}, {"id": 2, "file_name": "sub/c.jpeg"}, {"id": 9, "file_name": "gone.jpg"}]
    captions = [
        {"image_id": 1, "caption": "first "},
        {"image_id": 2, "caption": "c"},
        {"image_id": 1, "caption": "second"},
        {"image_id": 9, "caption": "lost"},
        {"image_id": 77, "caption": "of no image"},
    ]
    boxes = [
        {"image_id": 1, "bbox": [1, 2, 3.5, 4], "category_id": 5, "iscrowd": 0},
        {"image_id": 1, "bbox": [0, 0, 9, 9], "category_id": 5, "iscrowd": 1},
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    instances = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "cat"}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return str(tmp_path / "captions.json"), str(tmp_path / "instances.json")


def test_texts_beside_the_images(folder: Path) -> None:
    found = rows(config.ImageFolder(path=str(folder)))
    assert [json.loads(row["extra"])["file_name"] for row in found] == ["a.PNG", "b.jpg", "empty.jpg", "sub/c.jpeg"]
    assert [row["text"] for row in found] == [None, "a text beside", None, None]
    assert found[1]["texts"] == [{"text": "a text beside", "source": "human"}]
    assert found[1]["url"] == (folder / "b.jpg").as_uri()
    assert locator.load(found[1]["locator"]) == (folder / "b.jpg").read_bytes()


def test_coco_captions_and_boxes(folder: Path, tmp_path: Path) -> None:
    captions, instances = coco(tmp_path)
    found = {
        json.loads(row["extra"])["file_name"]: row
        for row in rows(config.ImageFolder(path=str(folder), captions=captions, instances=instances))
    }
    assert list(found) == ["a.PNG", "b.jpg", "empty.jpg", "gone.jpg", "sub/c.jpeg"]
    assert [t["text"] for t in found["b.jpg"]["texts"]] == ["first", "second"]
    assert found["b.jpg"]["text"] == "first"
    box = {"label": "cat", "x1": 1, "y1": 2, "x2": 4.5, "y2": 6, "score": None, "source": "human"}
    assert found["b.jpg"]["boxes"] == [box]
    assert json.loads(found["b.jpg"]["extra"]) == {"file_name": "b.jpg", "crowded": ["cat"]}
    assert json.loads(found["sub/c.jpeg"]["extra"]) == {"file_name": "sub/c.jpeg"}
    assert found["sub/c.jpeg"]["text"] == "c"
    assert found["a.PNG"]["texts"] == []
    with pytest.raises(locator.LocatorError) as error:
        locator.load(found["gone.jpg"]["locator"])
    assert error.value.reason == "image.missing"


def test_bad_annotations_cost_themselves_only(folder: Path, tmp_path: Path) -> None:
    """They become boxes of nulls, which the stage `regions` rejects with a reason."""
    annotations = [
        {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 99},
        {"image_id": 1, "bbox": [1, 2, "x", 4], "category_id": 5},
        {"image_id": 1, "bbox": [1, 2, 3], "category_id": [5]},
        {"image_id": 1, "bbox": None, "category_id": 5, "iscrowd": 1},
        {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 6},
        {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 99, "iscrowd": 1},
        {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 5, "iscrowd": 1},
    ]
    categories = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
    images = [{"id": 1, "file_name": "b.jpg", "width": 64, "height": 48}]
    (tmp_path / "i.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (row,) = [r for r in rows(config.ImageFolder(path=str(folder), instances=str(tmp_path / "i.json"))) if r["boxes"]]
    corners = [(b["label"], b["x1"], b["x2"]) for b in row["boxes"]]
    assert corners == [(None, 1, 4), ("cat", None, None), (None, None, None), ("dog", 1, 4)]
    extra = {"file_name": "b.jpg", "crowded": ["cat"], "annotated_size": [64, 48]}
    assert json.loads(row["extra"]) == extra
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 5}]}))
    with pytest.raises(SourceError, match="a category has no usable id or name"):
        read(config.ImageFolder(path=str(folder), instances=str(tmp_path / "i.json")))


def test_what_is_no_coco_file(folder: Path, tmp_path: Path) -> None:
    for content in ("{", "[]", '{"images": [], "annotations": [{}]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SourceError, match=r"COCO|JSON"):
            read(config.ImageFolder(path=str(folder), captions=str(tmp_path / "bad.json")))
    with pytest.raises(SourceError, match="no file matches"):
        read(config.ImageFolder(path=str(tmp_path / "nowhere")))


@pytest.mark.skipif(not COCO_MINI.exists(), reason="shared/data/coco-mini is not beside the checkout")
def test_coco_mini() -> None:
    source = config.ImageFolder(
        path=str(COCO_MINI / "images"),
        captions=str(COCO_MINI / "captions.json"),
        instances=str(COCO_MINI / "instances.json"),
    )
    found = rows(source)
    assert len(found) == len(list((COCO_MINI / "images").iterdir()))
    assert all(len(row["texts"]) >= 5 for row in found)
    assert sum(len(row["boxes"]) for row in found) > 300
    assert all(b["x1"] < b["x2"] and b["y1"] < b["y2"] for row in found for b in row["boxes"])
