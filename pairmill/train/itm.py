"""Train a BLIP filter: image-text contrast with momentum distillation, and matching with hard negatives.

ALBEF (arXiv:2107.07651), sections 3.2 and 3.3, as BLIP (arXiv:2201.12086) uses it for retrieval: two terms,

- ITC: symmetric cross entropy between image and text embeddings over the batch and a queue of momentum embeddings,
  with soft targets from the momentum encoder, `q = alpha * softmax(s_m / tau) + (1 - alpha) * onehot`;
- ITM: does the text match the image? For each pair, one image and one text that are wrong for it but alike, drawn
  from the softmax of the contrastive similarities, and, where the data names one, a text known to be false.

Pairs with one identity (the image, or its group of duplicates) never count as wrong for each other.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from pairmill.train.blip_model import TRAINED_BESIDE, Blip
from pairmill.train.fit import FitConfig, Task, autocast
from pairmill.train.samples import Samples, TrainBatch

_NO_ID = -1


class TrainFilterConfig(FitConfig):
    """What `pairmill train filter` reads."""

    queue: int = Field(57600, ge=0, description="momentum embeddings kept as further negatives")
    momentum: float = Field(0.995, ge=0, lt=1, description="of the averaged encoders")
    alpha: float = Field(0.4, ge=0, lt=1, description="weight of soft targets, ramped up over `alpha_steps`")
    alpha_steps: int | None = Field(
        None, gt=0, description="forward passes, `accumulate` of them an optimizer step; null: those of the first epoch"
    )
    temperature: float = Field(0.07, gt=0, description="at the start; learnt, within 0.001 to 0.5")
    itc_weight: float = Field(1.0, ge=0)
    itm_weight: float = Field(1.0, ge=0)


class FilterTask(Task):
    """ITC and ITM for a `BlipForImageTextRetrieval`."""

    def __init__(self, blip: Blip, config: TrainFilterConfig, rows: int) -> None:
        self.blip, self.config = blip, config
        retrieval: Any = blip.model
        self.model = retrieval
        device = next(retrieval.parameters()).device
        # learnt with the model, so it is registered there; save_blip leaves it out
        retrieval.register_parameter(TRAINED_BESIDE, nn.Parameter(torch.tensor(config.temperature, device=device)))
        self._towers = {
            name: getattr(retrieval, name) for name in ("vision_model", "text_encoder", "vision_proj", "text_proj")
        }
        self._averaged = {
            name: copy.deepcopy(tower).eval().requires_grad_(False) for name, tower in self._towers.items()
        }
        width = retrieval.text_proj.out_features
        self._queue = {
            "image": torch.zeros(config.queue, width, device=device),
            "text": torch.zeros(config.queue, width, device=device),
            "ids": torch.full((config.queue,), _NO_ID, device=device),
            "next": torch.zeros((), dtype=torch.long),
        }
        self._ramp = config.alpha_steps or max(1, rows // config.batch)

    # -- state --

    def after_update(self, step: int) -> None:  # noqa: ARG002
        """Average the encoders."""
        keep = self.config.momentum
        with torch.no_grad():
            for name, tower in self._towers.items():
                pairs = zip(self._averaged[name].parameters(), tower.parameters(), strict=True)
                ours, theirs = (list(side) for side in zip(*pairs, strict=True))
                torch._foreach_lerp_(ours, theirs, 1 - keep)
            self.model.itc_temperature.clamp_(0.001, 0.5)

    def extra_state(self) -> dict[str, torch.Tensor]:
        """The averaged encoders and the queue."""
        averaged = {
            f"{name}.{key}": value for name, tower in self._averaged.items() for key, value in tower.named_parameters()
        }
        return averaged | {f"queue.{key}": value for key, value in self._queue.items()}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of `extra_state`."""
        with torch.no_grad():
            for name, tower in self._averaged.items():
                for key, value in tower.named_parameters():
                    value.copy_(state[f"{name}.{key}"])
            for key, value in self._queue.items():
                value.copy_(state[f"queue.{key}"])

    # -- losses --

    def losses(self, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """``itc``, ``itm`` and their weighted sum ``loss``."""
        model: Any = self.model
        pixels = self.blip.normalised(batch.pixels)
        device = pixels.device
        ids, fits = batch.ids.to(device), batch.fits.to(device)
        tokens, mask = self.blip.tokens(batch.texts)
        image = model.vision_model(pixel_values=pixels).last_hidden_state
        image_vector = _unit(model.vision_proj(image[:, 0]))
        text_vector = _unit(model.text_proj(model.text_encoder(input_ids=tokens, attention_mask=mask)[0][:, 0]))
        alpha = self.config.alpha * min(1.0, step / self._ramp)
        itc, similarity = self._contrast(pixels, tokens, mask, image_vector, text_vector, ids, fits, alpha)
        itm = self._matching(batch, image, similarity, fits, generator)
        return {"loss": self.config.itc_weight * itc + self.config.itm_weight * itm, "itc": itc, "itm": itm}

    def _contrast(
        self,
        pixels: torch.Tensor,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        image: torch.Tensor,
        text: torch.Tensor,
        ids: torch.Tensor,
        fits: torch.Tensor,
        alpha: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ITC term, and the similarities (images, texts) of the batch that hard negatives are drawn from."""
        averaged, tau = self._averaged, self.model.itc_temperature
        with torch.no_grad():
            momentum_image = averaged["vision_model"](pixel_values=pixels).last_hidden_state[:, 0]
            momentum_image = _unit(averaged["vision_proj"](momentum_image))
            momentum_text = averaged["text_encoder"](input_ids=tokens, attention_mask=mask)[0][:, 0]
            momentum_text = _unit(averaged["text_proj"](momentum_text))
        with torch.autocast(pixels.device.type, enabled=False):  # divided by tau, bfloat16 would be too coarse
            filled = self._queue["ids"] != _NO_ID
            all_images = torch.cat([momentum_image, self._queue["image"][filled]])
            all_texts = torch.cat([momentum_text, self._queue["text"][filled]])
            same = ids[:, None] == self._queue["ids"][filled][None, :]
            right_texts, right_images = torch.cat([fits, same], 1).float(), torch.cat([fits.T, same], 1).float()
            loss = torch.zeros((), device=pixels.device)
            for query, momentum_query, keys, right in (
                (image, momentum_image, all_texts, right_texts),
                (text, momentum_text, all_images, right_images),
            ):
                with torch.no_grad():
                    soft = functional.softmax(momentum_query @ keys.T / tau, dim=1)
                    target = alpha * soft + (1 - alpha) * right / right.sum(1, keepdim=True)
                loss = loss - (target * functional.log_softmax(query @ keys.T / tau, dim=1)).sum(1).mean() / 2
            similarity = (image @ text.T / tau).detach()
        self._enqueue(momentum_image, momentum_text, ids)
        return loss, similarity

    def _enqueue(self, image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> None:
        size = self.config.queue
        if not size or not self.model.training:
            return
        image, text, ids = image[-size:], text[-size:], ids[-size:]
        start = int(self._queue["next"])
        places = (start + torch.arange(len(ids), device=ids.device)) % size
        self._queue["image"][places], self._queue["text"][places], self._queue["ids"][places] = image, text, ids
        self._queue["next"].fill_((start + len(ids)) % size)

    def _matching(
        self,
        batch: TrainBatch,
        image: torch.Tensor,
        similarity: torch.Tensor,
        fits: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Cross entropy of the matching head over pairs, hard negatives and the texts known to be false."""
        own = torch.arange(len(image), device=image.device)
        wrong_text, has_text = _draw_hard(similarity, fits, generator)
        wrong_image, has_image = _draw_hard(similarity.T, fits.T, generator)
        known = [place for place, text in enumerate(batch.negatives) if text is not None]
        false = torch.tensor(known, device=image.device, dtype=torch.long)
        texts = [*batch.texts, *(batch.negatives[place] or "" for place in known)]
        pictures = torch.cat([own, own[has_text], wrong_image[has_image], false])
        chosen = torch.cat([own, wrong_text[has_text], own[has_image], len(image) + own[: len(known)]])
        if len(known) > len(own):
            raise AssertionError("more known negatives than pictures")
        logits = self.match(texts, chosen, image, pictures)
        labels = torch.zeros(len(pictures), dtype=torch.long, device=image.device)
        labels[: len(own)] = 1
        return functional.cross_entropy(logits, labels)

    def match(
        self, texts: list[str], chosen: torch.Tensor, image: torch.Tensor, pictures: torch.Tensor
    ) -> torch.Tensor:
        """(n, 2) logits of the matching head for `texts[chosen]` with `image[pictures]`, [ENC] first.

        Keys and values of the cross-attention are computed once an image, not once a pair.
        """
        model: Any = self.model
        tokens, mask = self.blip.tokens(texts, "[ENC]")
        hidden = model.text_encoder(
            input_ids=tokens[chosen],
            attention_mask=mask[chosen],
            encoder_hidden_states=image[:1].expand(len(pictures), -1, -1),  # says that there are some: see the cache
            past_key_values=_keys_and_values(model.text_encoder.encoder.layer, image, pictures),
        )[0]
        return model.itm_head(hidden[:, 0]).float()

    # -- evaluation --

    def evaluate(self, samples: Samples, rows: Any) -> dict[str, float]:
        """``itm_auc``: own text against another image's; ``recall_at_1``: of images, by cosine, a text of the same
        identity first; ``itm_loss``: nats, of as many true as false pairs. Nothing where all images share one
        identity: no text is wrong then."""
        from pairmill.train.clip_quality import area_under_curve

        model: Any = self.model
        device = next(model.parameters()).device.type
        images, texts, vectors, text_vectors, ids = [], [], [], [], []
        size = self.config.batch
        for start in range(0, len(rows), size):
            batch = samples.draw(rows[start : start + size], np.random.default_rng(0), self.blip.image_size, None)
            with autocast(device, self.config.precision):
                image = model.vision_model(pixel_values=self.blip.normalised(batch.pixels)).last_hidden_state
                tokens, mask = self.blip.tokens(batch.texts)
                vectors.append(_unit(model.vision_proj(image[:, 0])))
                hidden = model.text_encoder(input_ids=tokens, attention_mask=mask)[0]
                text_vectors.append(_unit(model.text_proj(hidden[:, 0])))
            images.append(image)
            texts += batch.texts
            ids.append(batch.ids)
        image, identity = torch.cat(images), torch.cat(ids)
        count = len(identity)
        if len(identity.unique()) < 2:
            return {}
        shift = 1 + int(np.random.default_rng(0).integers(max(1, count - 1)))
        while bool((identity.roll(-shift) == identity).all()):  # identities that repeat with this period
            shift = shift % (count - 1) + 1
        differs = identity.roll(-shift) != identity
        against = torch.arange(count)[differs]
        other = (against + shift) % count
        right = self._probabilities(texts, torch.arange(count), image, torch.arange(count), device)
        wrong = self._probabilities(texts, other, image, against, device)
        best = (torch.cat(vectors) @ torch.cat(text_vectors).T).argmax(1).cpu()
        return {
            "itm_auc": area_under_curve(right.numpy(), wrong.numpy()),
            "recall_at_1": float((identity[best] == identity).float().mean()),
            "itm_loss": float(-(right.clamp_min(1e-6).log().mean() + (1 - wrong).clamp_min(1e-6).log().mean()) / 2),
        }

    def _probabilities(
        self, texts: list[str], chosen: torch.Tensor, image: torch.Tensor, pictures: torch.Tensor, device: str
    ) -> torch.Tensor:
        parts = []
        for start in range(0, len(chosen), self.config.batch):
            some = slice(start, start + self.config.batch)
            with autocast(device, self.config.precision):
                logits = self.match(
                    [texts[place] for place in chosen[some]], torch.arange(len(chosen[some])), image, pictures[some]
                )
            parts.append(logits.softmax(1)[:, 1].cpu())
        return torch.cat(parts)


def _keys_and_values(layers: Any, image: torch.Tensor, pictures: torch.Tensor) -> Any:
    """The cross-attention's cache for rows that attend to `image[pictures]`; gradients flow through it. As
    `pairmill.blip.cross_attention_cache`, whose bits do not depend on the batch, but in one product a layer."""
    from transformers import DynamicCache, EncoderDecoderCache

    cross = DynamicCache()
    for number, layer in enumerate(layers):
        attention = layer.crossattention.self
        shape = (*image.shape[:2], -1, attention.attention_head_size)
        keys, values = (project(image).view(shape).transpose(1, 2) for project in (attention.key, attention.value))
        cross.update(keys[pictures], values[pictures], number)
    return EncoderDecoderCache(DynamicCache(), cross)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors.float(), dim=-1)


def _draw_hard(
    similarity: torch.Tensor, fits: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, a column that does not fit, drawn from the softmax of the similarities; and which rows have one."""
    weights = functional.softmax(similarity.float(), dim=1).masked_fill(fits, 0.0)
    weights = weights + (~fits) * 1e-6
    has = weights.sum(1) > 0
    weights = torch.where(has[:, None], weights, torch.ones_like(weights))
    return torch.multinomial(weights.cpu(), 1, generator=generator)[:, 0].to(similarity.device), has
