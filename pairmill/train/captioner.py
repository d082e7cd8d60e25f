"""Train a BLIP captioner: language modelling of captions, given the image, the prompt's tokens masked.

BLIP (arXiv:2201.12086), section 4 and the settings of its captioning code: 5 epochs, learning rate 1e-5, 384 pixels,
prompt "a picture of ".
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from pairmill.train.blip_model import Blip
from pairmill.train.fit import FitConfig, Task, autocast
from pairmill.train.samples import Samples, TrainBatch

_IGNORED = -100


class TrainCaptionerConfig(FitConfig):
    """What `pairmill train captioner` reads."""

    prompt: str = Field("a picture of ", description="what each caption goes on from")
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class CaptionTask(Task):
    """Cross entropy of each caption's tokens and its end, given the image and the tokens before."""

    def __init__(self, blip: Blip, config: TrainCaptionerConfig) -> None:
        self.blip, self.config = blip, config
        self.model: nn.Module = blip.model
        # [CLS] and the words of the prompt, without [SEP]
        self._masked = blip.tokens([config.prompt.strip()])[0].shape[1] - 1

    def losses(self, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """The mean over tokens, under ``loss``."""
        logits, labels = self._predict(batch)
        smoothing = self.config.label_smoothing if self.model.training else 0.0
        return {"loss": nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)}

    def _predict(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        model: Any = self.model
        prompt = self.config.prompt.strip()
        ids, mask = self.blip.tokens([f"{prompt} {text}".strip() for text in batch.texts], "[DEC]")
        labels = ids.masked_fill(mask == 0, _IGNORED)
        labels[:, : self._masked] = _IGNORED
        image = model.vision_model(pixel_values=self.blip.normalised(batch.pixels)).last_hidden_state
        # causal attention, and padding only after the text: the mask changes no token that counts
        logits = model.text_decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).logits
        return logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()

    def evaluate(self, samples: Samples, rows: Any) -> dict[str, float]:
        """``loss``: nats a token on the first caption of each held-out image."""
        import numpy as np

        total, tokens = 0.0, 0
        device = next(self.model.parameters()).device.type
        for start in range(0, len(rows), self.config.batch):
            batch = samples.draw(
                rows[start : start + self.config.batch], np.random.default_rng(0), self.blip.image_size, None
            )
            with autocast(device, self.config.precision):
                logits, labels = self._predict(batch)
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels != _IGNORED).sum())
        return {"loss": total / max(1, tokens)}
