from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pairmill.models import ModelRef
from tests.captioners.boxes import models


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    """A tiny random checkpoint of every kind, as folders."""
    root = tmp_path_factory.mktemp("boxes")
    makers = {"owlv2": models.owlv2, "grounding_dino": models.grounding_dino, "sam": models.sam}
    return {kind: ModelRef(path=str(make(root / kind))) for kind, make in makers.items()}


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Noise and gradients in odd sizes: one pixel wide, thin, a prime, larger and smaller than a model's input."""
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (33, 61), (90, 7), (1, 50), (48, 48), (131, 97)]
    found = []
    for width, height in sizes:
        base = np.linspace(0, 200, width)[None, :, None] * rng.random(3) + rng.integers(0, 56, (height, width, 3))
        found.append(Image.fromarray(base.astype(np.uint8)))
    return found


def stored(image: Image.Image | None) -> bytes | None:
    """The file of a stored image."""
    if image is None:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def folder(ref: ModelRef) -> Path:
    """Of a checkpoint."""
    assert ref.path is not None
    return Path(ref.path)
