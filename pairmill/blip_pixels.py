"""Preprocessing of BLIP and its successors: what transformers' image processor computes, to the bit, but faster.

Pixels stay bytes until they are on the device. There they are looked up in a table of 256 values a channel that the
processor itself has filled, so rescaling and normalisation cannot differ. Resizing is Pillow's, as the processor's is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class BlipPixels:
    """How an image becomes what a model sees: `prepare` one image, then `normalise` a pass of them."""

    processor: Any
    """transformers' own, by Pillow."""
    size: tuple[int, int] | None
    """Width and height that images are resized to; None: the processor does everything."""
    resample: int
    table: np.ndarray | None
    """Float32 of shape (256 x 3,): what becomes of each byte of red, then of green, then of blue."""

    @classmethod
    def of(cls, processor: Any) -> BlipPixels:
        """A processor that resizes to one size and then rescales or normalises is followed; any other does all
        itself."""
        told = processor.to_dict()
        size = dict(told.get("size") or {})
        plain = (
            told.get("do_resize")
            and size.keys() == {"height", "width"}
            and isinstance(told.get("resample"), int)
            and not any(told.get(name) for name in ("do_center_crop", "do_pad", "pad_size"))
            and told.get("image_processor_type") == "BlipImageProcessor"
        )
        if not plain:
            return cls(processor, None, 0, None)
        ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        values = np.asarray(processor(ramp, do_resize=False, input_data_format="channels_last")["pixel_values"][0])
        return cls(processor, (size["width"], size["height"]), told["resample"], values.reshape(-1).astype(np.float32))

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        """The table and where each channel begins in it, by device."""
        return {}

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as uint8 of shape (height, width, 3), or as the processor leaves it, (3, height, width)."""
        import torch

        if self.size is None:
            pixels: torch.Tensor = self.processor([image], return_tensors="pt")["pixel_values"][0]
            return pixels
        resized = image if image.size == self.size else image.resize(self.size, self.resample)
        return torch.from_numpy(np.array(resized))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 of shape (images, 3, height, width) of `prepare`'s outputs; the channels may lie innermost."""
        import torch

        if self.table is None:
            return pixels
        if pixels.device not in self._on_device:  # made once: to put numbers on a GPU is to wait for all before
            channels = torch.tensor([0, 256, 512], dtype=torch.int32, device=pixels.device)
            self._on_device[pixels.device] = torch.from_numpy(self.table).to(pixels.device), channels
        table, channels = self._on_device[pixels.device]
        return table[pixels.int() + channels].permute(0, 3, 1, 2)
