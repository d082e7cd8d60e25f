"""COCO's annotation files, which detectors and captioners read, UNITER, LXMERT and ViLBERT among them.

::

    captions.json        images, and of each its kept texts by rank
    instances.json       images, and of each its boxes, with masks where there are some; categories

Images are called by their path in the export's folder, so that this is the folder of images for every reader. With
``images: shards`` they are called by their file name in the tar files.

- An **image id** is the first 53 bits of the pair's uid (JSON's readers that know only float64 keep all of them): it is
  the same in every export and update. Where two pairs of an export share these bits, the one with the greater uid gets
  another number (`image_ids`). The uid is there too.
- **Annotation ids** count from 1 (pycocotools takes 0 for "no match"), anew in each update.
- **Categories** are COCO's own, with its ids, where all labels are among its 80; else they count from 1, by name.
- Boxes are those of the source, then those of a detector, which have a ``score``; ``bbox`` is x, y, width, height in
  pixels. ``area`` is the mask's where there is one, else the box's.
- A label of which some instances have no box of their own gets a crowd region over the whole image: readers leave
  crowds out of training, and count no detection of that label as wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pairmill.export.folder import Folder, Sink, Written
from pairmill.export.format import Options, Parts, Whole, write_list
from pairmill.export.formats.annotations import annotation_format
from schemas import fields

CAPTIONS, INSTANCES = "captions.json", "instances.json"

_BITS = 53
_INFO = {"description": "exported by pairmill", "version": "1.0"}
_LICENSES = [{"id": 0, "name": "unknown", "url": ""}]

# The ids that COCO left out are blank here.
_NAMES = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,parking \
meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,\
skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,cup,\
fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,\
bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,\
clock,vase,scissors,teddy bear,hair drier,toothbrush"""
COCO_CATEGORIES = {name: number for number, name in enumerate(_NAMES.split(","), 1) if name}
"""COCO's 80 categories: id by name."""


def annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """A pair's record: ``image``, ``captions`` and ``instances`` without ids and with labels instead of categories."""
    yield {
        "image": {
            "file_name": image,
            "width": row["width"],
            "height": row["height"],
            "coco_url": row["url"],
            "license": 0,
        },
        "captions": [{"caption": t["text"], "source": t["source"]} for t in row["texts"] or () if t["text"]],
        "instances": list(_instances(row)),
    }


def _instances(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    width, height = row["width"], row["height"]
    drawn, detected = row.get(fields.REGIONS.name), row.get(fields.DETECTIONS.name)
    boxes = (row["boxes"] or []) if drawn is None and detected is None else [*(drawn or ()), *(detected or ())]
    masks = {mask["box"]: mask for mask in row.get(fields.MASKS.name) or ()}
    for number, box in enumerate(boxes):
        x, y = max(box["x1"], 0.0), max(box["y1"], 0.0)
        across, down = min(box["x2"], width) - x, min(box["y2"], height) - y
        mask = masks.get(number)
        instance = {
            "label": box["label"],
            "bbox": [round(value, 4) for value in (x, y, across, down)],
            "area": mask["area"] if mask else round(across * down, 4),
            "iscrowd": 0,
        }
        if mask:
            instance["segmentation"] = {"size": [height, width], "counts": mask["counts"]}
        instance |= {name: box[name] for name in ("score", "source") if box[name] is not None}
        yield instance
    for label in row.get(fields.CROWDED.name) or ():
        yield {
            "label": label,
            "bbox": [0, 0, width, height],
            "area": width * height,
            "iscrowd": 1,
            "segmentation": {"size": [height, width], "counts": [0, width * height]},
        }


def image_id(uid: str) -> int:
    """The number that a pair's image has unless another one of the export has it."""
    return int(uid[:16], 16) >> (64 - _BITS)


def image_ids(uids: Iterable[str], again: Callable[[], Iterable[str]]) -> Callable[[str], int]:
    """A number for each of some uids, no two the same; it does not depend on their order.

    Args:
        uids: each once.
        again: gives them once more; called only when two of them share a number.
    """
    numbers = np.fromiter(map(image_id, uids), np.int64)
    taken, counts = np.unique(numbers, return_counts=True)
    shared = set(taken[counts > 1].tolist())
    if not shared:
        return image_id
    others: dict[str, int] = {}
    met: set[int] = set()
    used = set(taken.tolist())
    for uid in sorted(uid for uid in again() if image_id(uid) in shared):
        number, tries = image_id(uid), 0
        if number not in met:
            met.add(number)
            continue
        while number in used:
            tries += 1
            number = image_id(hashlib.sha256(f"{uid}\n{tries}".encode()).hexdigest())
        used.add(number)
        others[uid] = number
    return lambda uid: others[uid] if uid in others else image_id(uid)


def category_ids(labels: Iterable[str]) -> dict[str, int]:
    """The number of each label."""
    names = sorted(set(labels))
    if COCO_CATEGORIES.keys() >= set(names):
        return {name: COCO_CATEGORIES[name] for name in sorted(names, key=COCO_CATEGORIES.__getitem__)}
    return {name: number for number, name in enumerate(names, 1)}


def _write_captions(folder: Folder, parts: Parts) -> Written:
    number = _numbers(parts)

    def captions() -> Iterator[dict[str, Any]]:
        for uid, record in parts.records():
            for caption in record["captions"]:
                yield {"image_id": number(uid), **caption}

    with folder.create(CAPTIONS) as sink:
        _write(sink, _images(parts, number), captions(), None)
    return sink.written(CAPTIONS)


def _write_instances(folder: Folder, parts: Parts) -> Written:
    number = _numbers(parts)
    categories = category_ids(found["label"] for _, record in parts.records() for found in record["instances"])

    def instances() -> Iterator[dict[str, Any]]:
        for uid, record in parts.records():
            for found in record["instances"]:
                yield {"image_id": number(uid), "category_id": categories[found.pop("label")], **found}

    known = [{"id": key, "name": name, "supercategory": name} for name, key in categories.items()]
    with folder.create(INSTANCES) as sink:
        _write(sink, _images(parts, number), instances(), known)
    return sink.written(INSTANCES)


def _numbers(parts: Parts) -> Callable[[str], int]:
    return image_ids(parts.uids(), parts.uids)


def _images(parts: Parts, number: Callable[[str], int]) -> Iterator[dict[str, Any]]:
    return ({"id": number(uid), **record["image"], "uid": uid} for uid, record in parts.records())


def _write(
    sink: Sink,
    images: Iterable[dict[str, Any]],
    found: Iterable[dict[str, Any]],
    categories: Iterable[dict[str, Any]] | None,
) -> None:
    """One object a line, so that files of any size are written as they are made."""
    sink.write(f'{{"info": {json.dumps(_INFO)},\n"licenses": {json.dumps(_LICENSES)},\n"images": '.encode())
    write_list(sink, map(_dumped, images))
    sink.write(b',\n"annotations": ')
    write_list(sink, (_dumped({"id": number, **annotation}) for number, annotation in enumerate(found, 1)))
    if categories is not None:
        sink.write(b',\n"categories": ')
        write_list(sink, map(_dumped, categories))
    sink.write(b"}\n")


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


COCO = annotation_format(
    "coco",
    "captions.json, instances.json and images, as pycocotools and all that use it read them",
    annotate,
    (Whole(CAPTIONS, _write_captions), Whole(INSTANCES, _write_instances)),
    Options(images="files"),
    (fields.REGIONS.name, fields.DETECTIONS.name, fields.CROWDED.name, fields.MASKS.name),
)
