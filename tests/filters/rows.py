"""Small batches and images for the tests of filters."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image

from pairmill.stage import Batch
from schemas import fields


def texts_batch(texts: Sequence[str | None]) -> Batch:
    """A batch of rows with alt texts."""
    return Batch(pa.table({"uid": [f"{i:04d}" for i in range(len(texts))], "text": pa.array(texts, pa.string())}))


def png(pixels: np.ndarray) -> bytes:
    """An image file of uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, height: int = 40, width: int = 50) -> bytes:
    """An image file of seeded noise."""
    return png(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pairs_table(images: Sequence[bytes | None], texts: Sequence[Sequence[str | None] | None]) -> pa.Table:
    """Rows with an image and a list of texts."""
    listed = [None if row is None else [{"text": text, "source": "web"} for text in row] for row in texts]
    return pa.table(
        {
            "uid": [f"{i:04d}" for i in range(len(images))],
            "image": pa.array(images, pa.binary()),
            "texts": pa.array(listed, fields.TEXTS.type),
        }
    )
