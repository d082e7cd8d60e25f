"""Detectors and segmenters in transformers' format: found, checked and loaded, as `pairmill.blip` does for BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pairmill.blip import checkpoint_folder, checkpoint_kind, complete_checkpoint, load_tokenizer, load_weights
from pairmill.models import ModelRef, resolve_device

if TYPE_CHECKING:
    from PIL import Image

DETECTORS = {"owlv2": "Owlv2ForObjectDetection", "grounding-dino": "GroundingDinoForObjectDetection"}
"""The detector's class in transformers, by ``model_type`` of a checkpoint's config.json."""
SEGMENTERS = {"sam": "SamModel"}
"""The segmenter's class, by ``model_type``."""


@dataclass(frozen=True)
class BoxCheckpoint:
    """A model in memory, in evaluation mode, with what prepares its inputs."""

    kind: str
    """``model_type``."""
    model: Any
    tokenizer: Any
    """None of a segmenter."""
    processor: Any
    """transformers' image processor, by Pillow."""
    device: str
    dtype: Any
    """torch.dtype of the arithmetic."""

    def inputs(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Each RGB image on its own as the checkpoint's preprocessor_config.json says: tensors with one row each, those
        of floats in the model's dtype and where it wants them."""

        def prepare(image: Image.Image) -> dict[str, Any]:
            return dict(self.processor([image], return_tensors="pt"))

        if self.device == "cpu" or len(images) == 1:  # passes run side by side already
            prepared = [prepare(image) for image in images]
        else:
            with ThreadPoolExecutor(thread_name_prefix="pairmill-prepare") as pool:
                prepared = list(pool.map(prepare, images))
        return [
            {
                name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
                for name, tensor in one.items()
            }
            for one in prepared
        ]


def load_detector(ref: ModelRef, device: str = "auto", precision: str = "fp32") -> BoxCheckpoint:
    """Load an open-vocabulary detector: OWLv2 or Grounding DINO, which of them by ``model_type`` of its config.json.

    Args:
        ref: a local folder in transformers' format, or a hub name with a pinned revision.
        device: auto, cpu or cuda.
        precision: fp32 or bf16, of the arithmetic; Grounding DINO's is fp32 (its encoder mixes in float32 positions).

    Raises:
        ConfigError: not pinned, not there, no such detector, no safetensors, or weights missing, superfluous or of
            another shape.
    """
    return _load(ref, "models.detector", DETECTORS, device, precision)


def load_segmenter(ref: ModelRef, device: str = "auto", precision: str = "fp32") -> BoxCheckpoint:
    """Load SAM. Arguments and errors as `load_detector`."""
    return _load(ref, "models.segmenter", SEGMENTERS, device, precision)


def _load(ref: ModelRef, key: str, classes: dict[str, str], device: str, precision: str) -> BoxCheckpoint:
    from pairmill._torchvision import ensure_torchvision

    ensure_torchvision()
    import torch
    import transformers

    place = resolve_device(device)
    folder = checkpoint_folder(ref, key)
    kind = checkpoint_kind(folder, key, classes, ref)
    dtype = torch.bfloat16 if precision == "bf16" and kind != "grounding-dino" else torch.float32
    with complete_checkpoint(key, ref):
        model = load_weights(getattr(transformers, classes[kind]), folder, dtype, key, ref)
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        tokenizer = None
        if kind in DETECTORS:
            rows = model.config.text_config.vocab_size
            tokenizer = load_tokenizer(folder, rows)
    model = model.to(place).eval()
    if place == "cpu":
        from pairmill import onednn

        onednn.pack(model)
    return BoxCheckpoint(kind, model, tokenizer, processor, place, dtype)
