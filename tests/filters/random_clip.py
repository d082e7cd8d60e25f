"""A tiny CLIP with random (seeded) weights in open_clip's folder format: for tests that must not depend on quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ["a", "an", "the", "and", "of", "in", "on", "red", "blue", "green", "circle", "square", "triangle", "photo"]


def write_random_clip(folder: Path, seed: int = 0, dimensions: int = 64) -> Path:
    """Write config, weights and tokenizer to `folder` and return it. Images are 64 px, texts 16 tokens."""
    from pairmill._torchvision import ensure_torchvision

    ensure_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    model_cfg = {
        "embed_dim": dimensions,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 96, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": len(vocabulary),
            "width": 64,
            "heads": 2,
            "layers": 2,
            "hf_tokenizer_name": "local",
            "pool_type": "eos",
            "eos_id": vocabulary["<eos>"],
        },
    }
    preprocess_cfg = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    model = open_clip.CLIP(**model_cfg)
    state = {name: _random(tensor, generator) for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def _random(tensor: Any, generator: Any) -> Any:
    """Seeded values of a size that keeps activations spread out; the caller's random state is left alone."""
    import torch

    if not tensor.is_floating_point() or tensor.ndim == 0:
        return tensor
    scale = 0.5 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
    return torch.randn(tensor.shape, generator=generator) * scale
