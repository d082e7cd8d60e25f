"""How well image and texts fit: cosines of CLIP embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from filters.image_rules import missing_image, with_image
from pairmill.clip import Vectors
from pairmill.models import ModelRef, load_clip, model_resources
from pairmill.passes import BatchSize
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import Models


@dataclass(frozen=True)
class ClipScore(Stage):
    """The image's embedding, its cosine with each text, and that with the first text, the alt text.

    A row without image is dropped; with an empty (or null) list of texts its scores are null; a null text has a null
    score. Results do not depend on the number of rows a kernel call has or on threads, to the last bit (see
    `pairmill.passes`). `precision` is part of the identity. `device` and `batch` are not: they move a
    score in its last bits only (fp32: by less than 1e-6), which no threshold should rest on.
    """

    name = "clip"
    reads = (fields.IMAGE.name, fields.TEXTS.name)
    writes = (fields.CLIP_IMAGE, fields.CLIP_SCORES, fields.CLIP_SCORE)

    model: ModelRef
    precision: str = "fp32"
    device: str = field(default="auto", metadata={"identity": False})
    batch: BatchSize = field(default="auto", metadata={"identity": False})
    """Rows a forward pass (`pairmill.passes.rows_a_pass`)."""

    resources: Resources = field(default=Resources(rows=256, actor=True), metadata={"identity": False})

    @classmethod
    def of(cls, models: Models) -> ClipScore:
        """The stage that a config asks for."""
        model = ModelRef.of(models.clip)
        return cls(model, models.precision, models.device, models.batch, model_resources(models))

    def open(self) -> Kernel:
        """Load the model."""
        clip = load_clip(self.model, self.device, self.precision, self.batch, self.resources.gpus or 1.0)

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            images = clip.embed_images(rows.images())
            texts = [[t["text"] for t in row or ()] for row in rows.pylist(fields.TEXTS.name)]
            flat = [(i, text) for i, row in enumerate(texts) for text in row if text is not None]
            vectors = clip.embed_texts([text for _, text in flat])
            cosines = iter(_cosines(images[[i for i, _ in flat]], vectors) if flat else ())
            scores = [[None if text is None else next(cosines) for text in row] or None for row in texts]
            first = [row[0] if row else None for row in scores]
            values: tuple[list[Any], ...] = (list(images), scores, first)
            written = zip(self.writes, values, strict=True)
            measured = {f.name: scatter(column, positions, len(batch), f) for f, column in written}
            return pa.table(measured | missing_image(len(batch), positions))

        return kernel


@dataclass(frozen=True)
class CaptionClipScore(Stage):
    """The cosine of the image with each of its captions, from the embedding that `ClipScore` stored: no pixels.

    The model and precision must be those of the `ClipScore` of the recipe. A null caption has a null score; without
    captions (null or an empty list) or without an embedding all are null. Results depend on batch, order and threads
    as little as those of `ClipScore`.
    """

    name = "caption_clip"
    reads = (fields.CLIP_IMAGE.name, fields.CAPTIONS.name)
    writes = (fields.CAPTION_CLIP_SCORES,)

    model: ModelRef
    precision: str = "fp32"
    device: str = field(default="auto", metadata={"identity": False})
    batch: BatchSize = field(default="auto", metadata={"identity": False})
    """Rows a forward pass (`pairmill.passes.rows_a_pass`)."""

    resources: Resources = field(default=Resources(rows=256, actor=True), metadata={"identity": False})

    @classmethod
    def of(cls, models: Models) -> CaptionClipScore:
        """The stage that a config asks for, with the model of `ClipScore.of`."""
        scores = ClipScore.of(models)
        return cls(scores.model, scores.precision, scores.device, scores.batch, scores.resources)

    def open(self) -> Kernel:
        """Load the model."""
        clip = load_clip(self.model, self.device, self.precision, self.batch, self.resources.gpus or 1.0)

        def kernel(batch: Batch) -> pa.Table:
            images = batch.pylist(fields.CLIP_IMAGE.name)
            captions = batch.pylist(fields.CAPTIONS.name)
            texts = [
                [None if image is None else caption["text"] for caption in row or ()]
                for image, row in zip(images, captions, strict=True)
            ]
            flat = [(i, text) for i, row in enumerate(texts) for text in row if text is not None]
            vectors = clip.embed_texts([text for _, text in flat])
            left = np.array([images[i] for i, _ in flat], dtype=np.float32)
            cosines = iter(_cosines(left, vectors) if flat else ())
            scores = [[None if text is None else next(cosines) for text in row] or None for row in texts]
            column = pa.array(scores, fields.CAPTION_CLIP_SCORES.type)
            return pa.table({fields.CAPTION_CLIP_SCORES.name: column})

        return kernel


def _cosines(left: Vectors, right: Vectors) -> list[float]:
    """Row by row inner products of unit vectors, each summed on its own in float64."""
    return [min(1.0, max(-1.0, float(row.sum()))) for row in left.astype(np.float64) * right]


def scatter(values: list[Any], positions: list[int], count: int, field_: pa.Field) -> pa.Array:
    """`values` at their positions among `count` rows, null elsewhere; of the type of `field_`."""
    column: list[Any] = [None] * count
    for position, value in zip(positions, values, strict=True):
        column[position] = value
    return pa.array(column, field_.type)
