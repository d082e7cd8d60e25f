"""Masks of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from captioners.boxes.checkpoints import BoxCheckpoint, load_segmenter
from captioners.boxes.detect import no_tiny
from captioners.boxes.rle import encode
from filters.clip_score import scatter
from filters.image_rules import with_image
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.models import ModelRef, model_resources
from pairmill.passes import fixed_rows, in_passes, padded
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import RunConfig

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGES = 4
"""Images of each forward pass of the image encoder at most: one has 4096 tokens, of which global attention makes more
than a GPU holds for many. One on a CPU."""
BOXES = 16
"""Boxes of each forward pass of the mask decoder."""


@dataclass(frozen=True)
class Masks(Stage):
    """A mask of each box of the source and, with `detections`, of each detection, by SAM.

    A box is an unambiguous prompt, so the one mask that SAM makes for such is taken, not the best of its three for an
    ambiguous point (Segment Anything, section 3 and appendix A). Masks are at the stored image's size, in COCO's
    compressed run-length encoding (`captioners.boxes.rle`); one may be empty or leave its box.

    A column is null where there is no image. Results do not depend on the number of rows of a kernel call (see
    `pairmill.passes`).
    """

    name = "masks"
    writes = (fields.MASKS,)

    model: ModelRef
    detections: bool = False
    """Also make masks of `schemas.fields.DETECTIONS`."""
    precision: str = "fp32"
    device: str = field(default="auto", metadata={"identity": False})
    batch: int = field(default=32, metadata={"identity": False})
    """Images a forward pass, at most `IMAGES`."""

    resources: Resources = field(default=Resources(rows=256, actor=True), metadata={"identity": False})

    @property
    def reads(self) -> tuple[str, ...]:
        """Images and boxes."""
        names = (fields.IMAGE.name, fields.REGIONS.name)
        return (*names, fields.DETECTIONS.name) if self.detections else names

    @classmethod
    def of(cls, config: RunConfig) -> Masks:
        """The stage that a config asks for.

        Raises:
            ConfigError: ``models.segmenter`` is null.
        """
        models = config.models
        if models.segmenter is None:
            raise ConfigError("models.segmenter is null; name a SAM checkpoint")
        return cls(
            ModelRef.of(models.segmenter, no_tiny("models.segmenter")),
            models.detector is not None,
            models.precision,
            models.device,
            fixed_rows(models.batch),
            model_resources(models),
        )

    def open(self) -> Kernel:
        """Load the model.

        Raises:
            ConfigError: the checkpoint does not fit.
        """
        segmenter = Segmenter(load_segmenter(self.model, self.device, self.precision), self.batch)

        def kernel(batch: Batch) -> pa.Table:
            rows, positions = with_image(batch)
            columns = [rows.pylist(name) for name in self.reads[1:]]
            boxes = [[Box.from_row(b) for column in row for b in column or ()] for row in zip(*columns, strict=True)]
            masks = segmenter.masks(rows.images(), boxes)
            return pa.table({fields.MASKS.name: scatter(masks, positions, len(batch), fields.MASKS)})

        return kernel


class Segmenter:
    """Makes masks with one SAM checkpoint: an image is encoded once for all its boxes."""

    def __init__(self, checkpoint: BoxCheckpoint, batch: int) -> None:
        self._checkpoint = checkpoint
        self._rows = 1 if checkpoint.device == "cpu" else min(batch, IMAGES)

    def masks(self, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]) -> list[list[dict[str, Any]]]:
        """Of each image, values of `schemas.fields.MASKS` for its boxes, in their order."""
        wanted = [n for n, row in enumerate(boxes) if row]
        chunks = [wanted[start : start + self._rows] for start in range(0, len(wanted), self._rows)]

        def look(chunk: list[int]) -> list[list[dict[str, Any]]]:
            import torch

            inputs = self._checkpoint.inputs([images[n] for n in chunk])
            pixels = padded(torch.cat([one["pixel_values"] for one in inputs]), self._rows)
            states = self._checkpoint.model.get_image_embeddings(pixels)
            return [
                self._of_image(states[n : n + 1], one["reshaped_input_sizes"][0].tolist(), images[row], boxes[row])
                for n, (row, one) in enumerate(zip(chunk, inputs, strict=True))
            ]

        found: list[list[dict[str, Any]]] = [[] for _ in images]
        for chunk, rows in zip(chunks, in_passes(look, chunks, self._checkpoint.device), strict=True):
            for row, masks in zip(chunk, rows, strict=True):
                found[row] = masks
        return found

    def _of_image(
        self, state: torch.Tensor, shape: Sequence[int], image: Image.Image, boxes: Sequence[Box]
    ) -> list[dict[str, Any]]:
        """The masks of one image, which the model sees at `shape` (height, width)."""
        import torch

        sx, sy = shape[1] / image.width, shape[0] / image.height
        scaled = [[b.x1 * sx, b.y1 * sy, b.x2 * sx, b.y2 * sy] for b in boxes]
        found: list[dict[str, Any]] = []
        for start in range(0, len(scaled), BOXES):
            some = torch.tensor(scaled[start : start + BOXES], dtype=torch.float32)
            asked = padded(some, BOXES)[None].to(state.device, state.dtype)
            output = self._checkpoint.model(image_embeddings=state, input_boxes=asked, multimask_output=False)
            for n in range(len(some)):
                mask = self._at_size(output.pred_masks[:, n].float(), shape, image)
                score = min(1.0, max(0.0, float(output.iou_scores[0, n, 0])))
                found.append({"box": start + n, "counts": encode(mask), "area": int(mask.sum()), "score": score})
        return found

    def _at_size(self, logits: torch.Tensor, shape: Sequence[int], image: Image.Image) -> Any:
        """Logits of shape (1, 1, low, low) as a mask of the image's height x width."""
        (mask,) = self._checkpoint.processor.post_process_masks([logits], [(image.height, image.width)], [tuple(shape)])
        return mask[0, 0].cpu().numpy()
