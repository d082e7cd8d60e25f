from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pairmill.blip_pixels import BlipPixels
from tests.blip_models import image_processor, library


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pixels")
    image_processor(folder, 48)
    return load(folder)


def load(folder: Path, **changes: Any) -> Any:
    return library().AutoImageProcessor.from_pretrained(folder, backend="pil", **changes)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=40)
@given(st.integers(1, 200), st.integers(1, 200))
def test_pixels_are_the_librarys_to_the_bit(processor: Any, width: int, height: int) -> None:
    pixels = BlipPixels.of(processor)
    assert pixels.size == (48, 48)
    images = [picture(width, height), picture(48, 48), picture(height, width)]
    found = pixels.normalise(torch.stack([pixels.prepare(image) for image in images]))
    assert torch.equal(found, processor(images, return_tensors="pt")["pixel_values"])
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "followed"),
    [
        ({"size": {"height": 40, "width": 24}, "resample": 2}, True),
        ({"do_normalize": False}, True),
        ({"do_rescale": False, "image_mean": [100.0, 90.0, 80.0], "image_std": [50.0, 60.0, 70.0]}, True),
        ({"do_resize": False}, False),
        ({"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 30, "width": 30}}, False),
    ],
)
def test_other_settings_are_followed_or_left_to_the_library(
    tmp_path: Path, changes: dict[str, Any], followed: bool
) -> None:
    image_processor(tmp_path, 48)
    processor = load(tmp_path, **changes)
    pixels = BlipPixels.of(processor)
    assert (pixels.size is not None) == followed
    image = picture(70, 50)
    found = pixels.normalise(pixels.prepare(image)[None])
    assert torch.equal(found.float(), torch.as_tensor(processor([image], return_tensors="pt")["pixel_values"]).float())
