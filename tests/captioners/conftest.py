from __future__ import annotations

import pytest

from pairmill.models import ModelRef
from tests.blip_models import write_blip, write_blip2, write_instructblip


@pytest.fixture(scope="session")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    """A small random captioner of every kind, as folders."""
    root = tmp_path_factory.mktemp("captioners")
    folders = {
        "blip": write_blip(root / "blip", "captioner"),
        "blip2-opt": write_blip2(root / "blip2-opt", "opt"),
        "blip2-t5": write_blip2(root / "blip2-t5", "t5"),
        "instructblip-opt": write_instructblip(root / "instructblip-opt", "opt"),
        "instructblip-t5": write_instructblip(root / "instructblip-t5", "t5"),
    }
    return {kind: ModelRef(path=str(folder)) for kind, folder in folders.items()}
