"""Folders of image files, with COCO caption and instance files or with a .txt beside each image."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
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
    boxes = _boxes(source.instances) if source.instances else {}
    return tables(_rows(source, names, captions, boxes))


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
    boxes: dict[str, list[dict[str, Any]]],
) -> Iterator[Row]:
    root = files.full_name(source.path).rstrip("/\\")
    beside = source.captions is None
    for name in sorted(names.keys() | captions.keys()):
        path = names[name].name if name in names else f"{root}/{name}"
        texts = _text_beside(path) if beside else [(t, "human") for t in captions.get(name, [])]
        yield Row(
            url=_uri(path),
            texts=texts,
            boxes=boxes.get(name),
            locator=file_locator(path),
            extra=extra_json({"file_name": name}),
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


def _boxes(path: str) -> dict[str, list[dict[str, Any]]]:
    """Boxes by file name: xyxy in pixels. Crowd regions are left out: their box is no single thing of its label."""
    content = _coco(path, "instances")
    labels = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
    grouped = _by_image(content, path, "instances")
    try:
        return {
            name: [_box(a, labels) for a in annotations if not a.get("iscrowd")]
            for name, annotations in grouped.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"instances {path!r}: an annotation has no usable bbox or category_id ({error!r})."
        ) from error


def _box(annotation: dict[str, Any], labels: dict[int, str]) -> dict[str, Any]:
    x, y, width, height = map(float, annotation["bbox"])
    label = labels[annotation["category_id"]]
    return {"label": label, "x1": x, "y1": y, "x2": x + width, "y2": y + height, "score": None, "source": "human"}
