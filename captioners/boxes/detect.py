"""Boxes that a detector finds of what the texts name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import pyarrow as pa

from captioners.boxes.checkpoints import load_detector
from captioners.boxes.detectors import detector_of
from captioners.boxes.nouns import named, nouns
from captioners.boxes.regions import clean_label
from filters.clip_score import scatter
from filters.image_rules import with_image
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.models import ModelRef, model_resources
from pairmill.passes import fixed_rows
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import Boxes, RunConfig

MAX_LABELS = 60
"""Labels that are looked for in an image at most."""


@dataclass(frozen=True)
class Detections(Stage):
    """The boxes that an open-vocabulary detector finds of the labels of the config and of the nouns of an image's texts
    (`captioners.boxes.nouns`), best score first, clipped to the image.

    What the source has boxes of, or says that it is crowded with, is not looked for, nor kinds of it: no thing has two
    boxes, and counts stay right. Of boxes of one label that overlap, the best stays (greedy non-maximum suppression).
    Boxes that lie outside the image, or whose visible part is too small, are left out without a word: unlike a person's
    they are many, and nobody misses them.

    The thresholds are part of the identity: below them a detector returns a box for each of hundreds of patches or
    queries, which nobody would want stored so that a threshold can be moved.

    A column is null where there is no image, and an empty list where nothing is looked for or found. Results do not
    depend on the number of rows of a kernel call (see `captioners.boxes.detectors`).
    """

    name = "detections"
    writes = (fields.DETECTIONS,)

    model: ModelRef
    boxes: Boxes
    captions: bool = False
    """Also look for the nouns of `schemas.fields.CAPTIONS`."""
    precision: str = "fp32"
    device: str = field(default="auto", metadata={"identity": False})
    batch: int = field(default=32, metadata={"identity": False})
    """Images a forward pass."""

    resources: Resources = field(default=Resources(rows=256, actor=True), metadata={"identity": False})

    @property
    def reads(self) -> tuple[str, ...]:
        """Images, texts and the source's boxes, and captions where their nouns are looked for."""
        names = (fields.IMAGE.name, fields.TEXTS.name, fields.REGIONS.name, fields.CROWDED.name)
        return (*names, fields.CAPTIONS.name) if self.captions else names

    @classmethod
    def of(cls, config: RunConfig, captions: bool) -> Detections:
        """The stage that a config asks for.

        Raises:
            ConfigError: ``models.detector`` is null.
        """
        models = config.models
        if models.detector is None:
            raise ConfigError("models.detector is null; name an OWLv2 or Grounding DINO checkpoint")
        return cls(
            ModelRef.of(models.detector, no_tiny("models.detector")),
            config.boxes,
            captions,
            models.precision,
            models.device,
            fixed_rows(models.batch),
            model_resources(models),
        )

    def parameters(self) -> dict[str, Any]:
        """As of any stage, and what decides which words are nouns."""
        return super().parameters() | {"vocabulary": vocabulary_digest()}

    def open(self) -> Kernel:
        """Load the model.

        Raises:
            ConfigError: the checkpoint does not fit.
        """
        checkpoint = load_detector(self.model, self.device, self.precision)
        detector = detector_of(checkpoint, self.boxes.threshold, self.boxes.text_threshold, self.batch)

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            images = rows.images()
            found = detector.detect(images, [self.labels(row) for row in _rows(rows, self.reads[1:])])
            kept = [
                [box.to_row() for box in chosen(boxes, *image.size, self.boxes)]
                for boxes, image in zip(found, images, strict=True)
            ]
            return pa.table({fields.DETECTIONS.name: scatter(kept, positions, len(batch), fields.DETECTIONS)})

        return kernel

    def labels(self, row: dict[str, Any]) -> list[str]:
        """What is looked for in an image: the labels of the config, then the nouns of its texts and captions."""
        texts = [text["text"] for name in ("texts", "captions") for text in row.get(name) or () if text["text"]]
        wanted: dict[str, str] = {}
        for label in (*map(clean_label, self.boxes.labels), *nouns(texts)):
            wanted.setdefault(label.lower(), label)
        there = [region["label"] for region in row[fields.REGIONS.name] or ()] + (row[fields.CROWDED.name] or [])
        drawn = named(wanted, list(dict.fromkeys(there)))
        return [label for key, label in wanted.items() if key and key not in drawn][:MAX_LABELS]


def no_tiny(key: str) -> Any:
    """For `ModelRef.of`: the package ships no such model."""

    def refuse() -> Any:
        raise ConfigError(f"{key}: there is no tiny one; give a hub name with a revision, or a folder as {key}.path")

    return refuse


def vocabulary_digest() -> str:
    """sha256 (hex) of the word lists that `captioners.boxes.nouns` reads."""
    digest = hashlib.sha256()
    for package, name in (("filters.instruct", "nouns.txt"), ("captioners.boxes", "words.txt")):
        digest.update(resources.files(package).joinpath(name).read_bytes())
    return digest.hexdigest()


def chosen(boxes: Iterable[Box], width: int, height: int, rules: Boxes) -> list[Box]:
    """Detections that are kept: clipped to the image, without overlaps of one label, best score first."""
    parts = [box.clipped(width, height) for box in boxes if box.refusal(width, height, rules.min_side) is None]
    parts.sort(key=lambda box: (-(box.score or 0.0), box.label, box.xyxy))
    by_label: dict[str, list[int]] = {}
    for place, box in enumerate(parts):
        by_label.setdefault(box.label, []).append(place)
    kept = [
        places[n]
        for places in by_label.values()
        for n in suppressed([parts[place] for place in places], rules.overlap, rules.most)
    ]
    return [parts[place] for place in sorted(kept)[: rules.most]]


def suppressed(boxes: Sequence[Box], overlap: float, most: int) -> list[int]:
    """Greedy non-maximum suppression: the positions of boxes, given best first, that no better kept one overlaps with
    an intersection over union of `overlap` or more; the first `most` of them."""
    corners = np.array([box.xyxy for box in boxes], np.float64).reshape(-1, 4)
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    left = np.arange(len(boxes))
    kept: list[int] = []
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(corners[best, :2], corners[left, :2])
        high = np.minimum(corners[best, 2:], corners[left, 2:])
        shared = np.clip(high - low, 0, None).prod(axis=1)
        left = left[shared < overlap * (areas[best] + areas[left] - shared)]
    return kept


def _rows(batch: Batch, names: Sequence[str]) -> list[dict[str, Any]]:
    columns = [batch.pylist(name) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
