"""Train a tiny CLIP on procedural scenes: small enough to ship, real enough to judge and deduplicate a small web.

The model is open_clip's own `CLIP`; only the loop is ours. Three terms share one embedding:

- contrast: InfoNCE between pictures and captions (CLIP, arXiv:2103.00020, section 2.3), where a caption of another
  scene that the oracle finds true of this one is left out;
- threshold: the pairwise sigmoid loss (SigLIP, arXiv:2303.15343, section 3.2) with the oracle's answer for every
  picture and caption as label, and the bias tied to a fixed cosine, so that one cosine parts true from false;
- views: NT-Xent between two augmented views of a picture (SLIP, arXiv:2112.12750, section 3), on the final
  image embedding, so that copies of a picture lie close together and different pictures apart. It weighs more in the
  second half: captions teach the objects first, then backgrounds, which no caption names, must part pictures of the
  same objects.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional

from pairmill._torchvision import ensure_torchvision
from pairmill.errors import ConfigError
from pairmill.train.clip_data import Batch, Corpus, write_tokenizer
from pairmill.train.fit import TrainProgress

CHECKPOINT_NAME = "checkpoint.safetensors"
WEIGHTS_NAME = "open_clip_model.safetensors"
CONFIG_NAME = "open_clip_config.json"


class TrainClipConfig(BaseModel):
    """What `pairmill train clip` reads; equal configs give equal models on equal hardware."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path = Field(description="folder to write the model, its tokenizer, card and metrics to")
    work: Path | None = Field(default=None, description="folder for the checkpoint; by default the out folder")
    seed: int = Field(default=0, description="the only source of chance")
    scenes: int = Field(default=14000, ge=64, multiple_of=2, description="training scenes, half of them twins")
    captions: int = Field(default=3, ge=1, description="true captions a scene, each with its corruptions")
    steps: int = Field(default=2000, ge=1, description="optimizer steps")
    batch: int = Field(default=128, ge=2, multiple_of=2, description="scenes a step; each is seen in two views")
    junk_texts: int = Field(default=10, ge=0, description="texts a step that describe no picture, always false")
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate of AdamW, cosine to zero")
    warmup: int = Field(default=100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's decay, on matrices only")
    contrast_weight: float = Field(default=1.0, ge=0, description="weight of the InfoNCE term")
    threshold_weight: float = Field(default=1.0, ge=0, description="weight of the sigmoid term")
    true_weight: float = Field(default=12.0, gt=0, description="weight of true pairs within the sigmoid term")
    views_weight: float = Field(default=1.0, ge=0, description="weight of the view-to-view term, first half")
    late_views_weight: float = Field(default=10.0, ge=0, description="the same, second half of the steps")
    views_temperature: float = Field(default=0.06, gt=0, description="temperature of the view-to-view term")
    decision_cosine: float = Field(default=0.28, gt=0, lt=1, description="cosine that is to part true from false")
    image_size: int = Field(default=64, description="side of the model's input in pixels")
    embed_dim: int = Field(default=128, description="width of the shared embedding")
    vision_width: int = Field(default=12, description="base width of open_clip's ModifiedResNet")
    vision_layers: tuple[int, int, int, int] = Field(default=(2, 2, 2, 2), description="blocks in each stage")
    text_width: int = Field(default=96, description="width of the text transformer, a multiple of 32")
    text_layers: int = Field(default=3, description="layers of the text transformer")
    context_length: int = Field(default=40, description="longest text in tokens, the two special ones included")
    bf16: bool = Field(default=True, description="train under bfloat16 autocast")
    threads: int = Field(default=2, ge=1, description="torch threads")
    checkpoint_every: int = Field(default=250, ge=1, description="steps between checkpoints")
    evaluation_scenes: int = Field(default=1000, ge=50, description="held-out scenes of the final evaluation")
    evaluation_pairs: int = Field(default=2000, ge=100, description="pairs of the held-out web of the final evaluation")


@dataclass(frozen=True)
class TrainClipReport:
    """What a training did.

    Args:
        out: the folder written.
        first_loss, last_loss: mean loss of the first and the last 20 steps of this call (nan without steps).
        seconds: wall time of this call, without the evaluation.
        metrics: what `metrics.json` holds; its `train_seconds` adds up the calls of an interrupted training.
    """

    out: Path
    first_loss: float
    last_loss: float
    seconds: float
    metrics: Mapping[str, Any]


def train_clip(config: TrainClipConfig, *, progress: Callable[[TrainProgress], None] | None = None) -> TrainClipReport:
    """Train, save and evaluate a tiny CLIP; goes on from a checkpoint of the same config when there is one.

    Writes open_clip's folder format into `config.out` (`open_clip_config.json`, `open_clip_model.safetensors` in
    fp16, the tokenizer's files), `metrics.json`, a model card `README.md` and `train.yaml` (the config, to do it
    again), and removes the checkpoint. Sets torch's number of threads.

    Args:
        config: what to train.
        progress: called about once a second; may raise to interrupt (the next call resumes).

    Raises:
        ConfigError: a checkpoint of another config lies in the work folder.
    """
    from pairmill.train.clip_card import write_card
    from pairmill.train.clip_quality import measure_clip

    ensure_torchvision()
    torch.set_num_threads(config.threads)
    report = progress or (lambda _: None)
    started = time.monotonic()
    config.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(config.out, config.context_length)
    encode, vocabulary = _encoder(config.out, config.context_length)
    trainer = _Trainer(config, vocabulary)
    checkpoint = (config.work or config.out) / CHECKPOINT_NAME
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer.resume(checkpoint)
    corpus = Corpus(
        seed=config.seed,
        scenes=config.scenes,
        captions=config.captions,
        side=config.image_size * 3 // 2,
        encode=encode,
        progress=lambda done, total: report(TrainProgress("scenes", done, total)),
    )
    losses: list[float] = []
    begun, first_step, told = time.monotonic(), trainer.step, 0.0
    while trainer.step < config.steps:
        batch = corpus.batch(
            seed=config.seed,
            step=trainer.step,
            scenes=config.batch,
            junk_texts=config.junk_texts,
            side=config.image_size,
        )
        losses.append(trainer.update(batch))
        if trainer.step % config.checkpoint_every == 0:
            trainer.save_checkpoint(checkpoint, seconds=time.monotonic() - started)
        now = time.monotonic()
        if now - told >= 1 or trainer.step == config.steps:
            told = now
            rate = (trainer.step - first_step) / (now - begun)
            recent = losses[-20:]
            loss = sum(recent) / len(recent)
            report(TrainProgress("train", trainer.step, config.steps, loss, rate, (config.steps - trainer.step) / rate))
    seconds = time.monotonic() - started
    save_clip(trainer.model, config, vocabulary)
    report(TrainProgress("evaluate", 0, 1))
    metrics = measure_clip(config.out, scenes=config.evaluation_scenes, pairs=config.evaluation_pairs)
    in_all = round(trainer.seconds_before + seconds, 1)
    metrics = {**metrics, "train_seconds": in_all, "steps": config.steps, "seed": config.seed}
    _write_text(config.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_card(config, metrics)
    settings = {**config.model_dump(mode="json", exclude={"work"}), "out": f"out/{config.out.name}"}
    _write_text(config.out / "train.yaml", yaml.safe_dump(settings, sort_keys=False))
    checkpoint.unlink(missing_ok=True)
    first, last = (sum(part) / len(part) if part else math.nan for part in (losses[:20], losses[-20:]))
    return TrainClipReport(config.out, first, last, seconds, metrics)


def model_config(config: TrainClipConfig, vocabulary: int) -> dict[str, Any]:
    """open_clip's `model_cfg` for the config and a vocabulary of so many tokens."""
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": list(config.vision_layers),
            "width": config.vision_width,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "clip-tiny",
            "width": config.text_width,
            "heads": config.text_width // 32,
            "layers": config.text_layers,
            "pool_type": "eos",
            "eos_id": 3,
        },
    }


def save_clip(model: nn.Module, config: TrainClipConfig, vocabulary: int) -> None:
    """Write the weights (fp16 safetensors) and `open_clip_config.json` into `config.out`."""
    from safetensors.torch import save_file

    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = (tensor.half() if tensor.is_floating_point() else tensor).contiguous().clone()
    partial = config.out / (WEIGHTS_NAME + ".partial")
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, config.out / WEIGHTS_NAME)
    settings = {
        "model_cfg": model_config(config, vocabulary),
        "preprocess_cfg": {
            "size": config.image_size,
            "mode": "RGB",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    _write_text(config.out / CONFIG_NAME, json.dumps(settings, indent=1) + "\n")


class _Trainer:
    """Model, optimizer, step and time spent; a checkpoint holds them all."""

    def __init__(self, config: TrainClipConfig, vocabulary: int) -> None:
        from open_clip.model import CLIP

        self.config = config
        self.step = 0
        self.seconds_before = 0.0
        torch.manual_seed(config.seed)
        self.model = CLIP(**model_config(config, vocabulary)).to(memory_format=torch.channels_last)
        named = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        matrices = [value for _, value in named if value.ndim >= 2]
        others = [value for _, value in named if value.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.98),
        )
        self.order = [name for group in (2, 1) for name, value in named if (value.ndim >= 2) == (group == 2)]

    def rate(self) -> float:
        """The learning rate of the coming step."""
        config = self.config
        if self.step < config.warmup:
            return config.lr * (self.step + 1) / config.warmup
        done = (self.step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))

    def update(self, batch: Batch) -> float:
        """One optimizer step; returns the loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            images = self.model.encode_image(batch.views)
            texts = _encode_text(self.model, batch.tokens)
        images = functional.normalize(images.float(), dim=-1)
        texts = functional.normalize(texts.float(), dim=-1)
        loss = self.loss(images, texts, batch.truth)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        self.step += 1
        return float(loss.detach())

    def loss(self, images: torch.Tensor, texts: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the three terms; images (2n, d), texts (t, d), truth (2n, t)."""
        config = self.config
        scale = self.model.logit_scale.exp()
        scenes = len(images) // 2
        cosines = images @ texts.T
        own = torch.arange(scenes)
        logits = scale * cosines[:scenes]
        masked = truth[:scenes].clone()
        masked[own, own] = False
        logits = logits.masked_fill(masked, -math.inf)
        contrast = functional.cross_entropy(logits, own) + functional.cross_entropy(logits[:, :scenes].T, own)
        decisions = scale * (cosines - config.decision_cosine)
        right = functional.softplus(-decisions)[truth].mean()
        wrong = functional.softplus(decisions)[~truth].sum() / len(images)
        pairs = images @ images.T / config.views_temperature
        pairs = pairs.masked_fill(torch.eye(len(images), dtype=torch.bool), -math.inf)
        views = functional.cross_entropy(pairs, torch.cat([own + scenes, own]))
        return (
            config.contrast_weight * contrast / 2
            + config.threshold_weight * (config.true_weight * right + wrong) / 2
            + (config.views_weight if 2 * self.step < config.steps else config.late_views_weight) * views
        )

    def save_checkpoint(self, path: Path, *, seconds: float) -> None:
        """Write everything the next step depends on, atomically; `seconds` is the time this call took so far."""
        from safetensors.torch import save_file

        tensors = {"model." + name: tensor.contiguous().clone() for name, tensor in self.model.state_dict().items()}
        for place, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{self.order[place]}:{key}"] = value.contiguous().clone()
        partial = path.with_name(path.name + ".partial")
        seconds += self.seconds_before
        metadata = {"step": str(self.step), "config": _digest(self.config), "seconds": f"{seconds:.1f}"}
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Load a checkpoint if there is one."""
        from safetensors import safe_open

        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["config"] != _digest(self.config):
                raise ConfigError(f"{path} is a checkpoint of another config: delete it or choose another work folder")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.model.load_state_dict(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
        )
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                parameter, key = name.removeprefix("optimizer.").rsplit(":", 1)
                state.setdefault(self.order.index(parameter), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = int(metadata["step"])
        self.seconds_before = float(metadata["seconds"])


def _encode_text(model: Any, tokens: torch.Tensor, groups: int = 4) -> torch.Tensor:
    """`CLIP.encode_text` without the padding: texts in groups of like length, each cut to its longest.

    Attention is causal and the text ends before its padding, so the values are those of the whole sequence.
    """
    lengths = (tokens != 0).sum(dim=1)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.tensor_split(groups):
        if len(rows) == 0:
            continue
        length = int(lengths[rows].max())
        part = tokens[rows, :length]
        x = model.token_embedding(part) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        ends = (part == model.text_eos_id).int().argmax(dim=-1)
        parts.append(x[torch.arange(len(x)), ends] @ model.text_projection)
    return torch.cat(parts)[order.argsort()]


def _encoder(folder: Path, context_length: int) -> tuple[Callable[[list[str]], torch.Tensor], int]:
    """The folder's tokenizer as open_clip calls it, and the size of its vocabulary."""
    from open_clip.tokenizer import HFTokenizer

    tokenizer = HFTokenizer(str(folder), context_length=context_length)

    def encode(texts: list[str]) -> torch.Tensor:
        return torch.as_tensor(tokenizer(texts))

    return encode, len(tokenizer.tokenizer)


def _digest(config: TrainClipConfig) -> str:
    """What must be equal for a checkpoint to fit: everything but folders and how the result is measured."""
    parts = config.model_dump(
        mode="json",
        exclude={"out", "work", "checkpoint_every", "evaluation_scenes", "evaluation_pairs"},
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
