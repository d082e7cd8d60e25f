"""Reading exports as trainers do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


def open_clip_loader(
    monkeypatch: pytest.MonkeyPatch, shards: str, samples: int, code_of: Callable[[str], int], *, train: bool = True
) -> Any:
    """open_clip's own data loader over shards: batches of images (arrays) and of the codes of their texts.

    In training it takes the number of samples from sizes.json.
    """
    from pairmill._torchvision import ensure_torchvision

    ensure_torchvision()
    import open_clip_train.data
    import torch

    # open_clip 3.3 knows webdataset up to 0.2.86; later ones mark the end of a tar with a sample without a name.
    expander = functools.partial(open_clip_train.data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(open_clip_train.data, "tar_file_expander", expander)
    args = SimpleNamespace(
        train_data=shards,
        val_data=shards,
        train_num_samples=None,
        val_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=1,
        workers=0,
        world_size=1,
        seed=0,
    )
    info = open_clip_train.data.get_wds_dataset(
        args,
        lambda image: torch.from_numpy(np.array(image)),
        is_train=train,
        tokenizer=lambda text: torch.tensor([[code_of(text)]]),
    )
    assert info.dataloader.num_samples == samples
    return info.dataloader
