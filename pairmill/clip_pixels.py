"""Preprocessing of CLIP-like models: what open_clip's transform computes, to the bit, ready for threads and a GPU.

Pixels stay bytes until they are on the device, a quarter of what the library's floats take, and are normalised there, a
whole pass at once. Resizing is Pillow's, as the library's is: of the 1.3 ms that a picture of 400 x 300 takes, 1.0.
torch's own resizing of bytes takes 0.25 but differs by one level in 0.4% of the values, so it is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image


LONG = 64
"""How many times as long as the model's side a resized image may be before its middle alone is resized, to the bit but
for a level here and there: a line of 20,000 x 1 pixels would otherwise become a thousand million."""


@dataclass(frozen=True)
class ClipPixels:
    """How an image becomes what a model sees: `prepare` one image, then `normalise` a pass of them."""

    height: int
    width: int
    mode: Literal["squash", "shortest", "longest"]
    """squash: both sides to size; shortest: the shorter one to size, the rest cut off evenly; longest: the longer, and
    bars."""
    resample: Any
    """Pillow's resampling."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fill: tuple[int, ...] = (0, 0, 0)
    """Colour of the bars."""

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as uint8 of shape (height, width, 3)."""
        import torch

        size = self._resized(image.width, image.height)
        if self.mode == "shortest" and max(size) > LONG * max(self.width, self.height):
            image = image.resize((self.width, self.height), self.resample, self._middle(image, size))
            size = image.size
        resized = image if image.size == size else image.resize(size, self.resample)
        pixels = np.array(resized.convert("RGB") if resized.mode != "RGB" else resized)
        return torch.from_numpy(self._cut(pixels))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Float32 of shape (images, 3, height, width), the channels innermost in memory, of `prepare`'s bytes."""
        mean, std = (_on_device(values, pixels.device) for values in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing, as torchvision (one side) and open_clip (`ResizeKeepRatio`) round them."""
        if self.mode == "squash":
            return self.width, self.height
        if self.mode == "shortest" and self.height == self.width:
            short, long = sorted((width, height))
            other = int(self.height * long / short)
            return (self.width, other) if width <= height else (other, self.height)
        ratios = height / self.height, width / self.width
        ratio = max(ratios) if self.mode == "longest" else min(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))  # the library fails on thinner ones

    def _middle(self, image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of an image that is not cut off when it has been resized to `size`."""
        (width, height), across, down = size, image.width / size[0], image.height / size[1]
        left, top = round((width - self.width) / 2), round((height - self.height) / 2)
        return left * across, top * down, (left + self.width) * across, (top + self.height) * down

    def _cut(self, pixels: np.ndarray) -> np.ndarray:
        """The middle, of shape (height, width, 3), with bars where there is too little."""
        height, width = pixels.shape[:2]
        if height < self.height or width < self.width:
            top, left = (max(0, self.height - height) // 2, max(0, self.width - width) // 2)
            larger = np.empty((max(height, self.height), max(width, self.width), 3), dtype=np.uint8)
            larger[:] = self.fill
            larger[top : top + height, left : left + width] = pixels
            pixels, (height, width) = larger, larger.shape[:2]
        top, left = round((height - self.height) / 2), round((width - self.width) / 2)
        return pixels[top : top + self.height, left : left + self.width]


@lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Made once: to put numbers on a GPU is to wait for all that it has been given before."""
    import torch

    return torch.tensor(values, dtype=torch.float32, device=device)


def recognised(transform: Any) -> ClipPixels | None:
    """A transform of `open_clip.create_model_and_transforms` (for inference) as `ClipPixels`; None for any other."""
    from open_clip.transform import CenterCropOrPad, MaybeConvertMode, MaybeToTensor, ResizeKeepRatio
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    if type(transform) is not Compose or len(transform.transforms) < 4:
        return None
    *shaping, convert, to_tensor, normalise = transform.transforms
    kinds = tuple(type(step) for step in shaping)
    if (type(convert), type(to_tensor), type(normalise)) != (MaybeConvertMode, MaybeToTensor, Normalize):
        return None
    resize, last = shaping[0], shaping[-1]
    known = {InterpolationMode.BICUBIC: Image.Resampling.BICUBIC, InterpolationMode.BILINEAR: Image.Resampling.BILINEAR}
    if getattr(resize, "interpolation", None) not in known:
        return None
    mean, std = tuple(map(float, normalise.mean)), tuple(map(float, normalise.std))
    if kinds == (Resize,) and isinstance(resize.size, (tuple, list)) and len(resize.size) == 2:
        return ClipPixels(resize.size[0], resize.size[1], "squash", known[resize.interpolation], mean, std)
    size = tuple(last.size) if kinds and hasattr(last, "size") else ()
    if kinds == (Resize, CenterCrop) and size == (resize.size, resize.size):
        return ClipPixels(size[0], size[1], "shortest", known[resize.interpolation], mean, std)
    if kinds == (ResizeKeepRatio, CenterCrop) and resize.longest == 0 and size == tuple(resize.size):
        return ClipPixels(size[0], size[1], "shortest", known[resize.interpolation], mean, std)
    if kinds == (ResizeKeepRatio, CenterCropOrPad) and resize.longest == 1 and size == tuple(resize.size):
        return ClipPixels(size[0], size[1], "longest", known[resize.interpolation], mean, std, _rgb(last.fill))
    return None


def _rgb(fill: Any) -> tuple[int, ...]:
    return (int(fill),) * 3 if isinstance(fill, (int, float)) else tuple(int(value) for value in fill)
