"""The tiny models that the package ships, trained by `pairmill.train` on procedural scenes."""

from __future__ import annotations

from pathlib import Path


def tiny_clip_dir() -> Path:
    """The folder of the shipped CLIP, in open_clip's own format (its README.md says what it can and cannot do).

    Load it with `open_clip.create_model_and_transforms(f"local-dir:{tiny_clip_dir()}", require_pretrained=True)`
    after `pairmill._torchvision.ensure_torchvision()`.
    """
    return Path(__file__).resolve().parent / "clip-tiny"


def tiny_captioner_dir() -> Path:
    """The folder of the shipped BLIP captioner, a `BlipForConditionalGeneration` in transformers' format."""
    return Path(__file__).resolve().parent / "captioner-tiny"


def tiny_itm_dir() -> Path:
    """The folder of the shipped BLIP filter, a `BlipForImageTextRetrieval` in transformers' format."""
    return Path(__file__).resolve().parent / "itm-tiny"
