"""Measures of pixels that cost next to nothing. Sides and aspect need none: they are columns of the images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.reasons import Reason

LAYOUT_SIDE = 4
"""Cells a side of `schemas.fields.COLOUR_LAYOUT`."""


def with_image(batch: Batch) -> tuple[Batch, list[int]]:
    """The rows of a batch that have an image, and their positions."""
    present = pc.is_valid(batch.column(fields.IMAGE.name)).to_pylist()
    positions = [i for i, there in enumerate(present) if there]
    if len(positions) == len(batch):
        return batch, positions
    return Batch(batch.table.take(pa.array(positions, pa.int64())), batch.pixels), positions


def missing_image(count: int, positions: list[int]) -> dict[str, pa.Array]:
    """The columns ``reason`` and ``detail`` of a kernel's output: `Reason.IMAGE_MISSING` outside `positions`."""
    there = set(positions)
    reason = [None if i in there else Reason.IMAGE_MISSING.value for i in range(count)]
    detail = [None if i in there else "the row has no image" for i in range(count)]
    return {"reason": pa.array(reason, pa.string()), "detail": pa.array(detail, pa.string())}


@dataclass(frozen=True)
class ImageStats(Stage):
    """Contrast of the stored image (standard deviation of its grey levels, 0 to 255) and the layout of its colours. A
    row without image is dropped."""

    name = "image_stats"
    version = 2
    resources: Resources = field(default=Resources(), metadata={"identity": False})
    reads = (fields.IMAGE.name,)
    writes = (fields.CONTRAST, fields.COLOUR_LAYOUT)

    def open(self) -> Kernel:
        """Nothing to load."""
        import numpy as np
        from PIL import Image, ImageStat

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            contrast: list[float | None] = [None] * len(batch)
            layout: list[Any] = [None] * len(batch)
            for position, image in zip(positions, rows.images(), strict=True):
                contrast[position] = ImageStat.Stat(image.convert("L")).stddev[0]
                cells = image.resize((LAYOUT_SIDE, LAYOUT_SIDE), Image.Resampling.BOX)
                layout[position] = np.asarray(cells, dtype=np.float32).ravel() / 255
            measured = {
                fields.CONTRAST.name: pa.array(contrast, fields.CONTRAST.type),
                fields.COLOUR_LAYOUT.name: pa.array(layout, fields.COLOUR_LAYOUT.type),
            }
            return pa.table(measured | missing_image(len(batch), positions))

        return kernel
