from __future__ import annotations

import pytest

from pairmill.models import ModelRef
from tests.filters.random_clip import write_random_clip


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A tiny CLIP with random weights, as a folder."""
    return ModelRef(path=str(write_random_clip(tmp_path_factory.mktemp("clip"))))
