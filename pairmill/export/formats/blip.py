"""Annotations as BLIP, ALBEF and LAVIS read captions.

::

    train.json           [{"image": "images/00000/000000000.jpg", "image_id": "<uid>", "caption": "..."}, ...]
    eval.json            [{"image": "images/00000/000000000.jpg", "image_id": "<uid>", "caption": ["...", ...]}, ...]
    eval_gt.json         eval.json once more, in COCO's form, to score captions against

``train.json`` has a record a text (BLIP's ``coco_karpathy_train`` and ``flickr30k_train``, ALBEF's
``re_train_dataset``, LAVIS' caption datasets), ``eval.json`` a record an image, with its texts by rank (BLIP's
``*_retrieval_eval`` and ``coco_karpathy_caption_eval``, ALBEF's ``re_eval_dataset`` and ``pretrain_dataset``). They
join ``image`` to the folder of images, which is the export's; only the pre-training datasets open it as it is, from the
folder that they run in.

``image_id`` groups the texts of an image; it is the pair's uid. Where captions are scored, BLIP takes the number in a
JPEG's file name for the image's id: so does ``eval_gt.json``. Images without a text are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pairmill.export.folder import Folder, Written
from pairmill.export.format import Options, Parts, Whole, write_list
from pairmill.export.formats.annotations import annotation_format

TRAIN, EVAL, EVAL_GT = "train.json", "eval.json", "eval_gt.json"


def annotate(row: dict[str, Any], image: str, options: Options) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """A pair's record: its image and its texts by rank."""
    texts = [text["text"] for text in row["texts"] or () if text["text"]]
    yield {"image": image, "image_id": row["uid"], "caption": texts}


def _records(parts: Parts) -> Iterator[dict[str, Any]]:
    return (record for _, record in parts.records() if record["caption"])


def _texts(parts: Parts) -> Iterator[dict[str, Any]]:
    return ({**record, "caption": text} for record in _records(parts) for text in record["caption"])


def number_of(image: str) -> int:
    """What BLIP takes for an image's id: the number that its file is named by."""
    return int(image.rpartition("/")[2].partition(".")[0])


def _listed(name: str, records: Callable[[Parts], Iterable[dict[str, Any]]]) -> Whole:
    def write(folder: Folder, parts: Parts) -> Written:
        with folder.create(name) as sink:
            write_list(sink, map(_dumped, records(parts)))
            sink.write(b"\n")
        return sink.written(name)

    return Whole(name, write)


def _write_gt(folder: Folder, parts: Parts) -> Written:
    images = ({"id": number_of(record["image"])} for record in _records(parts))
    texts = (
        {"id": number, "image_id": number_of(record["image"]), "caption": record["caption"]}
        for number, record in enumerate(_texts(parts))
    )
    with folder.create(EVAL_GT) as sink:
        sink.write(b'{"images": ')
        write_list(sink, map(_dumped, images))
        sink.write(b',\n"annotations": ')
        write_list(sink, map(_dumped, texts))
        sink.write(b"}\n")
    return sink.written(EVAL_GT)


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


BLIP = annotation_format(
    "blip",
    "train.json, eval.json and images, as BLIP, ALBEF and LAVIS read them",
    annotate,
    (_listed(TRAIN, _texts), _listed(EVAL, _records), Whole(EVAL_GT, _write_gt)),
    Options(images="files"),
)
