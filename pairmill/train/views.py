"""Views of small decoded pictures, made in batches: cropped, mirrored, recoloured, noised."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

_LARGEST_CROP = 0.125


def make_views(
    rng: np.random.Generator,
    pictures: torch.Tensor,
    limits: NDArray[np.floating],
    mirrored: NDArray[np.bool_],
    side: int,
    strength: float,
    largest_crop: float = _LARGEST_CROP,
) -> torch.Tensor:
    """One view of each picture, (n, 3, side, side) float32 in [-1, 1].

    Args:
        rng: the only source of chance.
        pictures: (n, 3, height, width) uint8.
        limits: (n, 4) what a crop may take off left, top, right and bottom at most, as fractions of the side.
        mirrored: (n,) which views are flipped left to right.
        side: pixels.
        strength: 0 to 1, how often a view is cropped, and how much it is recoloured; above 0 it is noised and sharpened
            or softened, too.
        largest_crop: what a crop may take off both ends of a side together, as a fraction of it.
    """
    count = len(pictures)
    edges = limits * rng.random((count, 4)) * (rng.random((count, 1)) < strength)
    total = np.maximum(edges[:, :2] + edges[:, 2:], 1e-6)
    edges *= np.tile(np.minimum(1, largest_crop / total), 2)
    x1, y1, x2, y2 = edges[:, 0], edges[:, 1], 1 - edges[:, 2], 1 - edges[:, 3]
    theta = np.zeros((count, 2, 3), dtype=np.float32)
    theta[:, 0, 0] = (x2 - x1) * np.where(mirrored, -1, 1)
    theta[:, 0, 2] = x1 + x2 - 1
    theta[:, 1, 1] = y2 - y1
    theta[:, 1, 2] = y1 + y2 - 1
    grid = functional.affine_grid(torch.from_numpy(theta), [count, 3, side, side], align_corners=False)
    views = functional.grid_sample(pictures.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    gain = torch.from_numpy(rng.normal(1, 0.025 * strength, (count, 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.normal(0, 4 * strength, (count, 1, 1, 1)).astype(np.float32))
    changes = float(strength > 0)  # all is drawn whatever the strength, so that a seed's other draws stay the same
    amount = changes * rng.choice([0.0, 1.0, 3.0], (count, 1, 1, 1)).astype(np.float32)
    chance = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
    noise = torch.randn((count, 3, side, side), generator=chance) * torch.from_numpy(amount)
    sharpen = torch.from_numpy(changes * rng.uniform(-0.5, 0.5, (count, 1, 1, 1)).astype(np.float32))
    blurred = functional.avg_pool2d(views, 3, stride=1, padding=1, count_include_pad=False)
    views = views + sharpen * (views - blurred)
    return ((views * gain + shift + noise).clamp(0, 255) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
