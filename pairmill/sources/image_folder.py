"""Folders of image files, with COCO caption and instance files or with a .txt beside each image."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pairmill.errors import SourceError
from pairmill.sources import files
from pairmill.sources.files import SourceFile
from pairmill.sources.locator import file_locator
from pairmill.sources.rows import Row, clean, extra_json, tables
from schemas import config

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif")


def read_image_folder(source: config.ImageFolder) -> Iterator[pa.Table]:
    """The rows of a `schemas.config.ImageFolder`, one an image, in the order of their names.

    Images named in the captions file but not in the folder get a row too; fetching it says ``image.missing``.
    """
    names = _image_files(source)
    captions = _captions(source.captions) if source.captions else {}
    instances = _instances(source.instances) if source.instances else {}
    return tables(_rows(source, names, captions, instances))


@dataclass(frozen=True)
class _Instances:
    """What a COCO instances file says of an image."""

    boxes: list[dict[str, Any]]
    crowded: list[str]
    """Labels of crowd regions, each once."""
    size: list[int] | None
    """Width and height of the image that was annotated, pixels."""

    def extra(self) -> dict[str, Any]:
        """What `captioners.boxes.regions` wants to know besides the boxes."""
        crowded = {"crowded": self.crowded} if self.crowded else {}
        return crowded | ({"annotated_size": self.size} if self.size and self.boxes else {})


_NOTHING = _Instances([], [], None)


def _image_files(source: config.ImageFolder) -> dict[str, SourceFile]:
    """The folder's images by their path inside it, with forward slashes."""
    if source.captions is None:
        found = files.find(source.path, IMAGE_ENDINGS, "image_folder")
    else:
        try:
            found = files.find(source.path, IMAGE_ENDINGS, "image_folder")
        except SourceError:
            if not files.is_folder(source.path):
                raise
            found = []  # all images of the captions file are missing: their rows will say so
    root = files.full_name(source.path)
    return {file.name.removeprefix(root).lstrip("/\\").replace("\\", "/"): file for file in found}


def _rows(
    source: config.ImageFolder,
    names: dict[str, SourceFile],
    captions: dict[str, list[str]],
    instances: dict[str, _Instances],
) -> Iterator[Row]:
    root = files.full_name(source.path).rstrip("/\\")
    beside = source.captions is None
    for name in sorted(names.keys() | captions.keys()):
        path = names[name].name if name in names else f"{root}/{name}"
        texts = _text_beside(path) if beside else [(t, "human") for t in captions.get(name, [])]
        annotated = instances.get(name, _NOTHING)
        yield Row(
            url=_uri(path),
            texts=texts,
            boxes=annotated.boxes,
            locator=file_locator(path),
            extra=extra_json({"file_name": name} | annotated.extra()),
        )


def _uri(path: str) -> str:
    return path if "://" in path else Path(path).as_uri()


def _text_beside(path: str) -> list[tuple[str, str]]:
    """The text of ``key.txt`` beside ``key.jpg``."""
    stem, _, _ = path.rpartition(".")
    data = files.read_if_there(f"{stem}.txt")
    text = clean(data.decode("utf-8", "replace")).strip() if data is not None else ""
    return [(text, "human")] if text else []


def _coco(path: str, what: str) -> dict[str, Any]:
    (file,) = files.find(path, (".json",), what)[:1]
    with files.open_bytes(file) as handle:
        try:
            content = json.load(handle)
        except ValueError as error:
            raise SourceError(f"{what} {file.name!r} is not JSON: {error}") from error
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise SourceError(f"{what} {file.name!r} is not a COCO file: it needs the lists 'images' and 'annotations'.")
    return content


def _by_image(content: dict[str, Any], path: str, what: str) -> dict[str, list[dict[str, Any]]]:
    """The annotations of each image, by the image's file name."""
    try:
        file_names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if (name := file_names.get(annotation["image_id"])) is not None:
                grouped[name].append(annotation)
    except (KeyError, TypeError) as error:
        raise SourceError(f"{what} {path!r} is not a COCO file: {error!r} is missing or of the wrong kind.") from error
    return grouped


def _captions(path: str) -> dict[str, list[str]]:
    grouped = _by_image(_coco(path, "captions"), path, "captions")
    cleaned = {name: [clean(a.get("caption")).strip() for a in annotations] for name, annotations in grouped.items()}
    return {name: [t for t in texts if t] for name, texts in cleaned.items()}


def _instances(path: str) -> dict[str, _Instances]:
    """Boxes by file name: xyxy in pixels. Crowd regions are no boxes, for theirs is no single thing of its label; their
    labels are kept. An annotation without a usable bbox or category is a box of nulls, to be rejected with a reason."""
    content = _coco(path, "instances")
    grouped = _by_image(content, path, "instances")
    try:
        labels = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
        sizes = {str(image["file_name"]): _size(image) for image in content["images"]}
    except (KeyError, TypeError) as error:
        raise SourceError(f"instances {path!r}: a category has no usable id or name ({error!r}).") from error
    found = {}
    for name, rows in grouped.items():
        boxes = [_box(row, labels) for row in rows if not row.get("iscrowd")]
        crowded = [_label(row, labels) for row in rows if row.get("iscrowd")]
        found[name] = _Instances(boxes, [label for label in dict.fromkeys(crowded) if label], sizes.get(name))
    return found


def _size(image: dict[str, Any]) -> list[int] | None:
    size = [image.get("width"), image.get("height")]
    sides = [side for side in size if isinstance(side, int) and side > 0]
    return sides if len(sides) == 2 else None


def _label(annotation: dict[str, Any], labels: dict[Any, str]) -> str | None:
    category = annotation.get("category_id")
    return labels.get(category) if isinstance(category, (int, str)) else None


def _box(annotation: dict[str, Any], labels: dict[Any, str]) -> dict[str, Any]:
    box: dict[str, Any] = dict.fromkeys(("label", "x1", "y1", "x2", "y2", "score"))
    box |= {"label": _label(annotation, labels), "source": "human"}
    try:
        x, y, width, height = map(float, annotation["bbox"])
        box |= {"x1": x, "y1": y, "x2": x + width, "y2": y + height}
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    return box
