"""BLIP models for training: from a checkpoint of either kind, or from scratch, and how they are written."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pairmill._torchvision import ensure_torchvision
from pairmill.blip import quiet_transformers
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from pairmill.train.clip_data import write_tokenizer
from pairmill.train.fit import FitConfig, Scratch
from schemas.config import ModelChoice

CAPTIONER, FILTER = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
_TOWERS = {CAPTIONER: "text_decoder.bert.", FILTER: "text_encoder."}
_PROCEDURAL = "procedural"
_LONGEST_TEXT = 40
WEIGHTS_NAME = "model.safetensors"
TRAINED_BESIDE = "itc_temperature"
"""A parameter that is trained with a filter and is no part of its checkpoint."""


@dataclass(frozen=True)
class Blip:
    """A BLIP that is about to be trained.

    Args:
        model: a `BlipForConditionalGeneration` or `BlipForImageTextRetrieval`, fp32.
        tokenizer: a transformers tokenizer with [DEC] and [ENC].
        image_size: side of the input, pixels.
        image_mean, image_std: of the input's normalisation, for values in [0, 1].
        fresh: names of weights that the checkpoint did not have.
    """

    model: Any
    tokenizer: Any
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    fresh: tuple[str, ...] = ()

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] as the model wants them, on its device."""
        device = next(self.model.parameters()).device
        pixels = pixels.to(device)
        if self.image_mean == self.image_std == (0.5, 0.5, 0.5):
            return pixels
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixels * 0.5 + 0.5 - mean) / std

    def tokens(self, texts: list[str], first: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, (n, longest) int64; `first` replaces [CLS]: [DEC] or [ENC]."""
        device = next(self.model.parameters()).device
        longest = self.model.config.text_config.max_position_embeddings
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=min(longest, 64), return_tensors="pt")
        ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
        if first is not None:
            ids[:, 0] = self.tokenizer.convert_tokens_to_ids(first)
        return ids, mask


def open_blip(config: FitConfig, kind: str) -> Blip:
    """The model to start from.

    A checkpoint of the other kind lends its image tower and its text layers; the heads it lacks are fresh.

    Args:
        kind: `CAPTIONER` or `FILTER`.

    Raises:
        ConfigError: no such folder or checkpoint, or it is no BLIP.
    """
    ensure_torchvision()
    torch.manual_seed(config.seed)
    blip = _from_scratch(config.scratch, config.image_size, kind) if config.scratch else _from_checkpoint(config, kind)
    blip.model.to(config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"))
    return blip


def _classes() -> dict[str, Any]:
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    return {CAPTIONER: BlipForConditionalGeneration, FILTER: BlipForImageTextRetrieval}


def _from_scratch(scratch: Scratch, image_size: int | None, kind: str) -> Blip:
    from transformers import BlipConfig

    tokenizer = _tokenizer(scratch)
    vision = {"initializer_range": 0.02, **scratch.vision, **({"image_size": image_size} if image_size else {})}
    sep, pad = tokenizer.sep_token_id, tokenizer.pad_token_id
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "sep_token_id": sep,
        "eos_token_id": sep,
        "pad_token_id": pad,
        **scratch.text,
    }
    config = BlipConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=scratch.projection,
        image_text_hidden_size=scratch.projection,
    )
    model = _classes()[kind](config)
    if scratch.positions == "sincos":
        embeddings = model.vision_model.embeddings
        with torch.no_grad():
            embeddings.position_embedding[0, 1:] = sincos_positions(
                math.isqrt(embeddings.num_patches), embeddings.embed_dim
            )
    return Blip(model, tokenizer, config.vision_config.image_size, scratch.image_mean, scratch.image_std)


def sincos_positions(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sine and cosine of column and row at falling frequencies, amplitude 1 (Vaswani et al. 2017,
    section 3.5; for two axes as in MoCo v3, arXiv:2104.02057)."""
    quarter = width // 4
    frequency = 1 / 100 ** (torch.arange(quarter, dtype=torch.float32) / max(1, quarter - 1))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [place.flatten()[:, None] * frequency for place in (columns, rows)]
    found = torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=1)
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))


def _tokenizer(scratch: Scratch) -> Any:
    from transformers import AutoTokenizer

    if scratch.tokenizer != _PROCEDURAL:
        if not Path(scratch.tokenizer).is_dir():
            raise ConfigError(f"scratch.tokenizer: there is no folder {scratch.tokenizer}; name one, or procedural")
        return _with_blip_tokens(AutoTokenizer.from_pretrained(scratch.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), _LONGEST_TEXT, joins_words=True)
        return AutoTokenizer.from_pretrained(folder)


def _with_blip_tokens(tokenizer: Any) -> Any:
    """With [DEC] and [ENC], as BLIP adds them to BERT's vocabulary."""
    known = tokenizer.get_vocab()
    if missing := [token for token in ("[DEC]", "[ENC]") if token not in known]:
        tokenizer.add_special_tokens({"additional_special_tokens": missing})
    return tokenizer


def _from_checkpoint(config: FitConfig, kind: str) -> Blip:
    from transformers import AutoTokenizer

    assert config.model is not None
    folder = checkpoint_folder(config.model)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = (settings.get("architectures") or ["?"])[0]
    if found not in _TOWERS:
        raise ConfigError(f"model: {folder} holds a {found}; give a {CAPTIONER} or a {FILTER}")
    classes = _classes()
    with quiet_transformers():
        model, info = classes[found].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, info["missing_keys"] or info["mismatched_keys"]))[:3]
        raise ConfigError(f"model: the weights in {folder} do not fit its config: {', '.join(wrong)} ...")
    fresh: tuple[str, ...] = ()
    if found != kind:
        other = classes[kind](model.config)
        theirs, ours = _TOWERS[found], _TOWERS[kind]
        lent = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: value
            for name, value in model.state_dict().items()
        }
        own = other.state_dict()
        fitting = {name: value for name, value in lent.items() if name in own and own[name].shape == value.shape}
        other.load_state_dict(fitting, strict=False)
        fresh = tuple(sorted(set(own) - set(fitting)))
        model = other
    vision = model.config.vision_config
    size = config.image_size or vision.image_size
    if size != vision.image_size:
        _resize_positions(model, size)
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (tuple(preprocessing[key]) for key in ("image_mean", "image_std"))
    tokenizer = _with_blip_tokens(AutoTokenizer.from_pretrained(folder))
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ConfigError(f"model: the tokenizer in {folder} has more tokens than the model; do the files fit?")
    return Blip(model, tokenizer, size, mean, std, fresh)


def checkpoint_folder(choice: ModelChoice) -> Path:
    """The local folder of a checkpoint: as given, one of the shipped ones, or fetched by name and revision."""
    from pairmill.weights import tiny_captioner_dir

    ref = ModelRef.of(choice, tiny_captioner_dir)
    if ref.path is not None:
        folder = Path(ref.path)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model: there is no {folder / 'config.json'}; give a folder in transformers' format")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(ref.name), revision=ref.revision, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        )
    except Exception as error:
        raise ConfigError(
            f"model: {ref} cannot be fetched ({type(error).__name__}: {error}); give a local folder as model.path"
        ) from error


def _resize_positions(model: Any, size: int) -> None:
    """Another input size: the grid of position embeddings is interpolated, as BLIP does between 224 and 384 pixels."""
    embeddings = model.vision_model.embeddings
    height = size // embeddings.patch_size * embeddings.patch_size
    if height != size:
        raise ConfigError(f"image_size: {size} is no multiple of the patch size {embeddings.patch_size}")
    cells = (size // embeddings.patch_size) ** 2
    dummy = torch.empty(1, cells + 1, embeddings.embed_dim)
    with torch.no_grad():
        resized = embeddings.interpolate_pos_encoding(dummy, size, size).clone()
    embeddings.position_embedding = torch.nn.Parameter(resized)
    embeddings.image_size = size
    embeddings.num_patches, embeddings.num_positions = cells, cells + 1
    model.config.vision_config.image_size = size


def save_blip(blip: Blip, out: Path, *, half: bool) -> None:
    """Write a folder that `models:` of a run accepts, and transformers too. Weights come last, by a rename."""
    from transformers import GenerationConfig

    settings = blip.model.config.to_dict()
    text = blip.model.config.text_config
    settings |= {"architectures": [type(blip.model).__name__], "dtype": "float16" if half else "float32"}
    for section in (settings, settings["vision_config"], settings["text_config"]):
        section.pop("_name_or_path", None)
        section.pop("transformers_version", None)
    _write(out / "config.json", settings)
    size = {"height": blip.image_size, "width": blip.image_size}
    _write(
        out / "preprocessor_config.json",
        {
            "image_processor_type": "BlipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(blip.image_mean),
            "image_std": list(blip.image_std),
        },
    )
    blip.tokenizer.save_pretrained(out)
    if type(blip.model).__name__ == CAPTIONER:
        generation = GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id
        )
        generation.save_pretrained(out)
    state = {k: v for k, v in blip.model.state_dict().items() if not k.startswith(TRAINED_BESIDE)}
    # a model of its own class in the saved type: save_pretrained knows which weights are tied
    plain = type(blip.model)(blip.model.config)
    plain.load_state_dict(state)
    with tempfile.TemporaryDirectory(dir=out) as folder, quiet_transformers():
        (plain.half() if half else plain).save_pretrained(folder)
        (Path(folder) / WEIGHTS_NAME).chmod(0o644)  # safetensors writes it for its owner only
        os.replace(Path(folder) / WEIGHTS_NAME, out / WEIGHTS_NAME)


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
