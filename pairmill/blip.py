"""BLIP, BLIP-2 and InstructBLIP checkpoints in transformers' format: found, checked and loaded.

A checkpoint that does not fit is an error. transformers itself only prints a report and goes on with random weights.
Only safetensors are read, and no code that comes with a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairmill.blip_attention import attend_by_parts
from pairmill.blip_pixels import BlipPixels
from pairmill.blip_text import TextTower
from pairmill.errors import ConfigError
from pairmill.models import ModelRef, resolve_device
from pairmill.weights_cache import QFORMER_TOKENIZER

if TYPE_CHECKING:
    import torch
    from PIL import Image

CAPTIONERS = {
    "blip": "BlipForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
}
"""The captioner's class in transformers, by ``model_type`` of a checkpoint's config.json."""

MATCHERS = {"blip": "BlipForImageTextRetrieval", "blip-2": "Blip2ForImageTextRetrieval"}
"""The class with an image-text matching head, by ``model_type``."""

FAMILIES = {"blip": "blip", "blip-2": "blip2", "instructblip": "instructblip"}
"""The family's name in the column ``source``, by ``model_type``."""

MOVING_REVISIONS = ("main", "master", "HEAD")
"""Names of a branch's tip: no pins."""

CPU_TOKENS = 1024
"""Image tokens of a forward pass on a CPU. A bigger pass is no faster there, and pads more: BLIP-base at 384 pixels
took 0.62 CPU seconds an image in passes of one and of two, and 0.64 in passes of four."""

CPU_TEXTS = 8
"""Texts of a forward pass on a CPU, at most."""

CPU_CAPTIONS = 16
"""Captions that are written at a time on a CPU, at most: each step reads all weights of the decoder from memory."""

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
"""Files that hold a tokenizer's vocabulary; a tokenizer has one of them."""

IMAGE_TOKEN = "<image>"  # noqa: S105
"""BLIP-2's processor adds it to a tokenizer; it stands for image features and is never embedded."""

_EXAMPLES = {
    "models.captioner": "Salesforce/blip-image-captioning-large@COMMIT",
    "models.itm": "Salesforce/blip-itm-large-coco@COMMIT",
    "models.detector": "google/owlv2-base-patch16-ensemble@COMMIT",
    "models.segmenter": "facebook/sam-vit-base@COMMIT",
    "model": "Salesforce/blip-image-captioning-base@COMMIT",
}
_NEEDS = {
    "models.captioner": "a captioner",
    "models.itm": "an image-text matching head",
    "models.detector": "an open-vocabulary detector",
    "models.segmenter": "a segmenter that takes boxes",
}
_SHIPPED = frozenset({"models.captioner", "models.itm", "model"})
"""Keys for which the package ships a model."""
_BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq)$")
"""Constants that older versions of transformers stored and newer ones compute."""


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory, in evaluation mode, with what prepares its inputs."""

    family: str
    """blip, blip2 or instructblip."""
    model: Any
    tokenizer: Any
    qformer_tokenizer: Any
    """InstructBLIP's second tokenizer; None for the others."""
    pixels: BlipPixels
    """What makes images the model's inputs."""
    device: str
    dtype: Any
    """torch.dtype of the arithmetic."""
    text: TextTower | None
    """BLIP's text model; None of the others."""

    @property
    def cpu_images(self) -> int:
        """Images of each forward pass of the vision model on a CPU: as many as have `CPU_TOKENS`."""
        vision = self.model.config.vision_config
        return max(1, CPU_TOKENS // (vision.image_size // vision.patch_size) ** 2)

    def blank(self, rows: int) -> torch.Tensor:
        """The model's input for so many grey images."""
        import torch

        side = self.model.config.vision_config.image_size
        return torch.zeros((rows, 3, side, side), device=self.device, dtype=self.dtype)

    def prepared(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Images as the model's input where it wants them, in its dtype: (images, 3, height, width)."""
        import torch

        return self.normalised(torch.stack([self.pixels.prepare(image) for image in images]).to(self.device))

    def normalised(self, inputs: torch.Tensor) -> torch.Tensor:
        """`BlipPixels.prepare`'s outputs, stacked and on the device, as the model's input in its dtype."""
        return self.pixels.normalise(inputs).to(self.dtype)


def load_captioner(ref: ModelRef, device: str = "auto", precision: str = "fp32") -> Checkpoint:
    """Load a captioner: BLIP, BLIP-2 or InstructBLIP, which of them by ``model_type`` of its config.json.

    Args:
        ref: a local folder in transformers' format, or a hub name with a pinned revision.
        device: auto, cpu or cuda.
        precision: fp32 or bf16, of the arithmetic (BLIP-2's Q-Former stays fp32).

    Raises:
        ConfigError: not pinned, not there, not a captioner, no safetensors, or weights missing, superfluous or of
            another shape.
    """
    return _load(ref, "models.captioner", CAPTIONERS, device, precision)


def load_matcher(ref: ModelRef, device: str = "auto", precision: str = "fp32") -> Checkpoint:
    """Load a model with an image-text matching head, BLIP or BLIP-2. Arguments and errors as `load_captioner`."""
    return _load(ref, "models.itm", MATCHERS, device, precision)


def _load(ref: ModelRef, key: str, classes: dict[str, str], device: str, precision: str) -> Checkpoint:
    from pairmill._torchvision import ensure_torchvision

    ensure_torchvision()
    import torch
    import transformers

    place = resolve_device(device)
    folder = checkpoint_folder(ref, key)
    kind = checkpoint_kind(folder, key, classes, ref)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with complete_checkpoint(key, ref):
        model = load_weights(getattr(transformers, classes[kind]), folder, dtype, key, ref)
        tokenizer = load_tokenizer(folder, model.get_input_embeddings().num_embeddings)
        second = model.config.qformer_config.vocab_size if kind == "instructblip" else None
        qformer = None if second is None else load_tokenizer(folder / QFORMER_TOKENIZER, second)
        images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    model = model.to(place).eval()
    text = None
    if kind == "blip":
        text = TextTower(model.text_decoder.bert if key == "models.captioner" else model.text_encoder)
        attend_by_parts(model.vision_model)
    if place == "cpu":
        from pairmill import onednn

        onednn.pack(model)
    return Checkpoint(FAMILIES[kind], model, tokenizer, qformer, BlipPixels.of(images), place, dtype, text)


@contextlib.contextmanager
def complete_checkpoint(key: str, ref: ModelRef) -> Iterator[None]:
    """What transformers raises while a checkpoint is loaded, as a `ConfigError` that names the key and the model."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{key}: {ref} cannot be loaded ({type(error).__name__}: {error}); is it a complete checkpoint in "
            "transformers' format (config, safetensors, preprocessor_config.json, tokenizer)?"
        ) from error


def load_tokenizer(folder: Path, rows: int) -> Any:
    """The tokenizer of a folder, for a model with so many embeddings.

    Raises:
        OSError: there is none; transformers would make one without a vocabulary.
        ValueError: it has ids that the model does not know.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise OSError(f"{folder} has no tokenizer, none of {', '.join(VOCABULARIES)}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    largest = max(n for token, n in tokenizer.get_vocab().items() if token != IMAGE_TOKEN)
    if largest >= rows:
        raise ValueError(f"the tokenizer in {folder} has ids up to {largest}, the model only {rows} embeddings")
    return tokenizer


def checkpoint_folder(ref: ModelRef, key: str) -> Path:
    """Where the checkpoint lies; one of the hub is fetched, or taken from the local cache.

    Raises:
        ConfigError: no such folder, a name that is not pinned, or one that cannot be fetched.
    """
    if ref.path is not None:
        folder = ref.folder()
        if not folder.is_dir():
            raise ConfigError(f"{key}: the folder {folder} does not exist; correct {key}.path")
        return folder
    if ref.revision is None or ref.revision in MOVING_REVISIONS:
        told = "names no revision" if ref.revision is None else f"is not pinned by {ref.revision!r}, which moves"
        raise ConfigError(
            f"{key}: {ref.name} {told}; pin a commit of the repository, as in {_EXAMPLES[key]}, so that stored results "
            "stay comparable"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(str(ref.name), revision=ref.revision, allow_patterns=patterns))
    except Exception as error:
        raise ConfigError(
            f"{key}: {ref} cannot be fetched ({type(error).__name__}: {error}). Check the name, the revision and the "
            f"network, or fetch it elsewhere and give its folder as {key}.path"
            + (f"; offline, {key}: tiny is there" if key in _SHIPPED else "")
        ) from error


def model_settings(folder: Path, key: str, ref: ModelRef) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{key}: {ref} has no readable config.json ({type(error).__name__}); give a folder in transformers' "
            "format, as save_pretrained writes it"
        ) from error


def checkpoint_kind(folder: Path, key: str, classes: dict[str, str], ref: ModelRef) -> str:
    """The ``model_type`` of a checkpoint, one of `classes`.

    Raises:
        ConfigError: it is of another type or class, or has no safetensors.
    """
    settings = model_settings(folder, key, ref)
    kind, architectures = settings.get("model_type"), settings.get("architectures") or []
    accepted = ", ".join(classes.values())
    found = ", ".join(architectures) or f"a model of type {kind!r}"
    if kind not in classes or (architectures and classes[kind] not in architectures):
        other = next((k for k, names in _BY_KEY.items() if k != key and names.get(str(kind)) in architectures), None)
        what = f", {_NEEDS[other]}" if other else ""
        raise ConfigError(
            f"{key}: {ref} is {found}{what}; {key} needs {_NEEDS[key]}: {accepted}, such as {_EXAMPLES[key]}"
        )
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{key}: {ref} holds no .safetensors file, and other formats are not read; convert it "
            f"({classes[kind]}.from_pretrained(...).save_pretrained(FOLDER)) and give the folder as {key}.path"
        )
    return str(kind)


_BY_KEY = {"models.captioner": CAPTIONERS, "models.itm": MATCHERS}


def load_weights(kind: Any, folder: Path, dtype: Any, key: str, ref: ModelRef) -> Any:
    """The model with all its weights from the folder, or `ConfigError`."""
    from safetensors import SafetensorError

    try:
        with quiet_transformers():  # its report of what does not fit is raised below
            model, told = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise ConfigError(f"{key}: the weights of {ref} are damaged or cut off ({error}); fetch them again") from error
    wrong = {
        "missing": sorted(told["missing_keys"]),
        "not known to it": sorted(name for name in told["unexpected_keys"] if not _BUFFERS.search(name)),
        "of another shape": sorted(str(entry[0]) for entry in told["mismatched_keys"]),
        "unreadable": sorted(map(str, told.get("error_msgs") or ())),
    }
    if any(wrong.values()):
        parts = "; ".join(f"{len(names)} {what} (such as {names[0]})" for what, names in wrong.items() if names)
        raise ConfigError(
            f"{key}: the weights of {ref} do not make a whole {kind.__name__}: {parts}. The checkpoint is of another "
            "model or only a part of one; give a complete one"
        )
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars and reports."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def cross_attention_cache(layers: Sequence[Any], states: Sequence[torch.Tensor], rows: Sequence[int]) -> Any:
    """Keys and values of BLIP's cross-attention, computed once for each distinct image of a pass and not for each text.

    They are two thirds of what a text costs at 384 pixels. Each image has a product of its own, so its bits do not
    depend on which other images are in the pass.

    Args:
        layers: the text model's layers.
        states: image features, each of shape (tokens, width).
        rows: for each row of the pass, which of `states` it attends to.

    Returns:
        A `transformers.EncoderDecoderCache` of ``len(rows)`` rows, contiguous whatever they are, whose self-attention
        part is empty.
    """
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    distinct = {image: place for place, image in enumerate(dict.fromkeys(rows))}
    index = torch.tensor([distinct[image] for image in rows], device=states[0].device)
    cross = DynamicCache()
    for number, layer in enumerate(layers):
        attention = layer.crossattention.self

        def split(project: Any, width: int = attention.attention_head_size) -> torch.Tensor:
            heads = [project(states[image]).view(-1, project.out_features // width, width) for image in distinct]
            return torch.stack([head.transpose(0, 1) for head in heads]).index_select(0, index)

        cross.update(split(attention.key), split(attention.value), number)
    return EncoderDecoderCache(DynamicCache(), cross)
