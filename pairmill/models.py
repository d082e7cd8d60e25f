"""Which model a stage uses, what identifies it, and CLIP-like models by open_clip.

Weights are read from safetensors only: other formats can carry code.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairmill.clip import LoadedClip, bounded
from pairmill.errors import ConfigError
from pairmill.passes import BatchSize
from pairmill.stage import Resources
from pairmill.weights import tiny_clip_dir
from pairmill.weights_cache import folder_sha256, local_path
from schemas.config import ModelChoice, Models

TINY = "tiny"
"""The word for the model that the package ships."""

WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""What open_clip calls its weights; the first is the newer name."""


@dataclass(frozen=True)
class ModelRef:
    """A model: by name, pretrained tag and revision, or by folder (local or remote). Its `identity` holds no path."""

    name: str | None = None
    pretrained: str | None = None
    revision: str | None = None
    path: str | None = field(default=None, metadata={"identity": False})

    @classmethod
    def of(cls, choice: ModelChoice, tiny: Callable[[], Path] = tiny_clip_dir) -> ModelRef:
        """The model a config names; the word ``tiny`` alone means a model that the package ships, in folder `tiny`."""
        if choice.name == TINY and choice.pretrained is None:
            return cls(path=str(tiny()))
        return cls(choice.name, choice.pretrained, choice.revision, choice.path)

    def identity(self) -> dict[str, Any]:
        """What determines the outputs: a hash of a folder's content, or name, pretrained tag and revision.

        Raises:
            ConfigError: the folder is missing or holds no weights.
        """
        if self.path is not None:
            return {"sha256": folder_sha256(str(self.folder()))}
        return {"name": self.name, "pretrained": self.pretrained, "revision": self.revision}

    def folder(self) -> Path:
        """The folder on this machine, of a model that is given by `path`; a remote one is fetched once a machine.

        Raises:
            ConfigError, StoreError: see `pairmill.weights_cache.local_path`.
        """
        return Path(local_path(str(self.path)))

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        tag = f" {self.pretrained}" if self.pretrained else ""
        return f"{self.name}{tag}" + (f"@{self.revision}" if self.revision else "")


def model_resources(models: Models) -> Resources:
    """What a worker of a model stage occupies: one GPU where the config says cuda, and where it says auto and the
    cluster has GPUs."""
    return Resources(
        gpus=1.0 if models.device == "cuda" else 0.0, gpu_if_any=models.device == "auto", rows=256, actor=True
    )


def resolve_device(device: str, key: str = "models.device") -> str:
    """``auto`` as cuda where torch sees a GPU, else cpu.

    Args:
        device: auto, cpu or cuda.
        key: of the config, for the message.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError(f"{key} is cuda, but torch sees no GPU here; say auto or cpu, or install torch for CUDA")
    return ("cuda" if available else "cpu") if device == "auto" else device


def load_clip(
    ref: ModelRef,
    device: str = "auto",
    precision: str = "fp32",
    batch: BatchSize = "auto",
    share: float = 1.0,
) -> LoadedClip:
    """Load a CLIP-like model by open_clip: from a local folder in open_clip's format, by a name and pretrained tag that
    open_clip knows, or by ``hf-hub:owner/name``. Weights of a name are fetched (or taken from the local cache).

    Args:
        device: auto, cpu or cuda.
        precision: fp32 or bf16, of the arithmetic.
        batch: rows of a forward pass; on a CPU an upper bound.
        share: this worker's part of a GPU, 0 to 1.

    Raises:
        ConfigError: unknown name or tag, incomplete folder, weights that cannot be fetched or do not fit.
    """
    from pairmill._torchvision import ensure_torchvision

    ensure_torchvision()
    import open_clip
    import torch
    from safetensors import SafetensorError

    from pairmill.onednn import pack

    place = resolve_device(device)
    name, weights = _resolve(ref)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        tokenizer = open_clip.get_tokenizer(name)
        model, preprocess = _created(name, precision, place, weights, tokenizer)
    except SafetensorError as error:
        raise ConfigError(
            f"models.clip: the weights of {ref} are damaged or cut off ({error}); fetch them again"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"models.clip: {ref} cannot be loaded ({error}); do config, weights and tokenizer fit?"
        ) from error
    if place == "cpu":
        pack(model)
    model.visual.to(memory_format=torch.channels_last)
    return LoadedClip(model, preprocess, bounded(tokenizer), place, dtype, batch, share)


def _created(name: str, precision: str, device: str, weights: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """open_clip's model in evaluation mode, and its preprocessing.

    For bf16 open_clip leaves norms in fp32, which its own towers and timm's can do. Others (CoCa, text towers of
    transformers, a text projection with a bias) fail so, and are cast as a whole.

    Raises:
        ConfigError: no model of it computes in bf16.
    """
    import open_clip
    import torch
    from PIL import Image

    if precision != "bf16":
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, precision=precision, device=device, **weights
        )
        return model.eval(), preprocess
    failure: Exception | None = None
    for kind in ("bf16", "pure_bf16"):
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, precision=kind, device=device, **weights)
        except AttributeError as error:  # a layer where its casts expect a parameter
            failure = error
            continue
        model.eval()
        pixels = preprocess(Image.new("RGB", (64, 64)))[None].to(device, torch.bfloat16)
        try:
            with torch.inference_mode():
                model.encode_image(pixels)
                model.encode_text(tokenizer(["a photo"]).to(device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # operands of two dtypes
            failure = error
        else:
            return model, preprocess
    raise ConfigError(f"models.clip: {name} does not compute in bf16 ({failure}); set models.precision to fp32")


def _resolve(ref: ModelRef) -> tuple[str, dict[str, Any]]:
    """open_clip's model name and the keywords that name its weights."""
    if ref.path is not None:
        folder = ref.folder()
        _check_folder(folder)
        return f"local-dir:{os.path.abspath(folder)}", {"require_pretrained": True}
    assert ref.name is not None  # ModelChoice demands a name or a path
    if ref.name.startswith("hf-hub:"):
        folder = _fetch_repository(ref.name.removeprefix("hf-hub:"), ref)
        _check_folder(folder)
        return f"local-dir:{folder}", {"require_pretrained": True}
    settings = _published(ref)
    # Given a file, open_clip asks the user for what it knows of a tag: the preprocessing and the activation.
    keywords = {
        "pretrained": _fetch_weights(settings, ref),
        "require_pretrained": True,
        "image_mean": settings.get("mean"),
        "image_std": settings.get("std"),
        "image_interpolation": settings.get("interpolation"),
        "image_resize_mode": settings.get("resize_mode"),
    }
    if "quick_gelu" in settings:
        keywords["quick_gelu"] = settings["quick_gelu"]
    return ref.name.replace("/", "-"), keywords


def _check_folder(folder: Path) -> None:
    """Raise `ConfigError` unless the folder has what open_clip needs, with weights as safetensors."""
    if not folder.is_dir():
        raise ConfigError(f"models.clip: the folder {folder} does not exist; correct models.clip.path")
    if not (folder / "open_clip_config.json").is_file():
        raise ConfigError(
            f"models.clip: {folder} has no open_clip_config.json; give a folder in open_clip's format "
            "(open_clip.push_to_hf_hub.save_for_hf writes one)"
        )
    if not any((folder / name).is_file() for name in WEIGHT_NAMES):
        raise ConfigError(f"models.clip: {folder} has no {WEIGHT_NAMES[0]}; only safetensors are read")


def _published(ref: ModelRef) -> dict[str, Any]:
    """What open_clip knows of a pretrained tag; `ConfigError` with near names for an unknown model or tag."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    name = str(ref.name).replace("/", "-")
    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(f"models.clip: open_clip knows no model {name!r}{_did_you_mean(name, known)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if ref.pretrained is None:
        raise ConfigError(f"models.clip: {name} needs a pretrained tag, one of: {', '.join(tags)}")
    settings = get_pretrained_cfg(name, ref.pretrained)
    if not settings:
        hint = _did_you_mean(ref.pretrained, tags)
        everything = ", ".join(tags)
        raise ConfigError(f"models.clip: {name} has no pretrained tag {ref.pretrained!r}{hint} (all: {everything})")
    return dict(settings)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    lower = {k.lower(): k for k in known}
    near = [lower[m] for m in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    return f"; did you mean {', '.join(near)}?" if near else ""


def _fetch_weights(settings: dict[str, Any], ref: ModelRef) -> str:
    """The local path of a tag's safetensors file, fetched from the hub where the cache lacks it."""
    repository, _, filename = settings.get("hf_hub", "").rpartition("/")
    if not repository:
        raise ConfigError(f"models.clip: {ref} is not published as safetensors; convert it and give models.clip.path")
    from huggingface_hub import hf_hub_download

    names = [str(Path(filename).with_suffix(".safetensors"))] if filename else list(WEIGHT_NAMES)
    failures = []
    for name in names:
        try:
            return str(hf_hub_download(repository, name, revision=ref.revision))
        except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds; all mean: no such file here
            failures.append(f"{name}: {type(error).__name__}")
    raise ConfigError(
        f"models.clip: the weights of {ref} cannot be fetched from {repository} ({'; '.join(failures)}). Check the "
        "network, or fetch them elsewhere and give the folder as models.clip.path; offline, models.clip: tiny is there"
    )


def _fetch_repository(repository: str, ref: ModelRef) -> Path:
    """The local copy of a hub repository's config, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", *WEIGHT_NAMES]
    try:
        return Path(snapshot_download(repository, revision=ref.revision, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(
            f"models.clip: {ref} cannot be fetched ({type(error).__name__}: {error}). Check the name and the network, "
            "or give a local folder as models.clip.path"
        ) from error
