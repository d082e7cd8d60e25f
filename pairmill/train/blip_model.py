"""BLIP models for training: from a checkpoint of either kind, or from scratch, and how they are written."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pairmill._torchvision import ensure_torchvision
from pairmill.blip import (
    checkpoint_folder,
    complete_checkpoint,
    load_tokenizer,
    load_weights,
    model_settings,
    quiet_transformers,
)
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from pairmill.train.clip_data import write_tokenizer
from pairmill.train.fit import FitConfig, Scratch, device_of
from pairmill.weights import tiny_captioner_dir
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
        ConfigError: no such folder or checkpoint, it is incomplete or no BLIP, keys of scratch do not fit, or a GPU is
            asked for and there is none.
    """
    ensure_torchvision()
    device = device_of(config)
    torch.manual_seed(config.seed)
    blip = _from_scratch(config.scratch, config.image_size, kind) if config.scratch else _from_checkpoint(config, kind)
    blip.model.to(device)
    return blip


def _classes() -> dict[str, Any]:
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    return {CAPTIONER: BlipForConditionalGeneration, FILTER: BlipForImageTextRetrieval}


def _from_scratch(scratch: Scratch, image_size: int | None, kind: str) -> Blip:
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

    _check_keys("scratch.vision", scratch.vision, BlipVisionConfig)
    _check_keys("scratch.text", scratch.text, BlipTextConfig)
    tokenizer = _scratch_tokenizer(scratch)
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
    try:
        config = BlipConfig(
            vision_config=vision,
            text_config=text,
            projection_dim=scratch.projection,
            image_text_hidden_size=scratch.projection,
        )
        _check_sizes(config, len(tokenizer))
        model = _classes()[kind](config)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"scratch: transformers builds no BLIP of these keys: {error}; correct them") from error
    if scratch.positions == "sincos":
        embeddings = model.vision_model.embeddings
        with torch.no_grad():
            embeddings.position_embedding[0, 1:] = sincos_positions(
                math.isqrt(embeddings.num_patches), embeddings.embed_dim
            )
    return Blip(model, tokenizer, config.vision_config.image_size, scratch.image_mean, scratch.image_std)


def _check_keys(key: str, given: dict[str, Any], kind: Any) -> None:
    """Raise `ConfigError` for a key that transformers would take and never read."""
    signature = inspect.signature(kind.__init__).parameters.values()
    known = [parameter.name for parameter in signature if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{key}.{name}: {kind.__name__} has no such key; {hint}")


def _check_sizes(config: Any, tokens: int) -> None:
    vision, text = config.vision_config, config.text_config
    _check_patches(vision.image_size, vision.patch_size)
    if text.vocab_size < tokens:
        raise ConfigError(
            f"scratch.text.vocab_size: the tokenizer has {tokens} tokens, so give as many, or leave it out"
        )
    for key, tower in (("scratch.vision", vision), ("scratch.text", text)):
        if tower.hidden_size % tower.num_attention_heads:
            raise ConfigError(
                f"{key}.hidden_size: {tower.hidden_size} is no multiple of the {tower.num_attention_heads} heads "
                "(num_attention_heads)"
            )


def _check_patches(size: int, patch: int) -> None:
    if size % patch:
        raise ConfigError(
            f"image_size: {size} is no multiple of the patch size {patch}; {size // patch * patch or patch} is one"
        )


def sincos_positions(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sine and cosine of column and row at falling frequencies, amplitude 1 (Vaswani et al. 2017,
    section 3.5; for two axes as in MoCo v3, arXiv:2104.02057)."""
    quarter = width // 4
    frequency = 1 / 100 ** (torch.arange(quarter, dtype=torch.float32) / max(1, quarter - 1))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = [place.flatten()[:, None] * frequency for place in (columns, rows)]
    found = torch.cat([f(wave) for wave in waves for f in (torch.sin, torch.cos)], dim=1)
    return torch.nn.functional.pad(found, (0, width - found.shape[1]))


def _scratch_tokenizer(scratch: Scratch) -> Any:
    from transformers import AutoTokenizer

    if scratch.tokenizer != _PROCEDURAL:
        if not Path(scratch.tokenizer).is_dir():
            raise ConfigError(f"scratch.tokenizer: there is no folder {scratch.tokenizer}; name one, or procedural")
        try:
            return _with_blip_tokens(load_tokenizer(Path(scratch.tokenizer), sys.maxsize))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"scratch.tokenizer: {scratch.tokenizer} cannot be loaded ({type(error).__name__}: {error}); name a "
                "folder with a tokenizer in transformers' format, or procedural"
            ) from error
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
    assert config.model is not None
    ref = model_ref(config.model)
    folder = checkpoint_folder(ref, "model")
    found = (model_settings(folder, "model", ref).get("architectures") or ["?"])[0]
    if found not in _TOWERS:
        raise ConfigError(f"model: {ref} holds a {found}; give a {CAPTIONER} or a {FILTER}")
    classes = _classes()
    with complete_checkpoint("model", ref):
        model = load_weights(classes[found], folder, torch.float32, "model", ref)
        tokenizer = load_tokenizer(folder, model.config.text_config.vocab_size)
        preprocessing = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        mean, std = (tuple(map(float, preprocessing[key])) for key in ("image_mean", "image_std"))
        if not len(mean) == len(std) == 3:
            raise ValueError("preprocessor_config.json: image_mean and image_std must be three numbers each")
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
    tokenizer = _with_blip_tokens(tokenizer)
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ConfigError(f"model: the tokenizer in {folder} has more tokens than the model; do the files fit?")
    return Blip(model, tokenizer, size, mean, std, fresh)


def model_ref(choice: ModelChoice) -> ModelRef:
    """What the key `model` of a training names; tiny is the shipped captioner."""
    return ModelRef.of(choice, tiny_captioner_dir)


def _resize_positions(model: Any, size: int) -> None:
    """Another input size: the grid of position embeddings is interpolated, as BLIP does between 224 and 384 pixels."""
    embeddings = model.vision_model.embeddings
    _check_patches(size, embeddings.patch_size)
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
