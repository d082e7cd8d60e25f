"""The training loop that captioners and filters share: AdamW or Muon, cosine, accumulation, checkpoints, curves.

A task says what the losses of a batch are; `fit` does the rest. Everything the next step depends on is in the
checkpoint, and dropout has a seed for each step, so a training that was interrupted ends with the weights of one that
was not: bit for bit on a CPU. A GPU's kernels may add in another order from run to run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from pairmill.errors import ConfigError, PairmillError
from pairmill.models import resolve_device
from pairmill.train.samples import CACHE_BYTES, Augment, ProceduralData, Samples, TrainBatch, TrainData
from schemas.config import ModelChoice, Quantity, Section

CHECKPOINT_NAME = "checkpoint.safetensors"
REPORT_EVERY_S = 1.0
_HIDDEN = re.compile(r"\.layers?\.\d+\.")
"""Names of what stands in a hidden layer of either tower."""


class Scratch(Section):
    """A BLIP built anew: transformers' own keys for its two towers."""

    vision: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of BlipVisionConfig; without them transformers' defaults (12 layers of width 768, 12 heads, "
        "384 pixels in patches of 16), but weights drawn with a deviation of 0.02",
    )
    text: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of BlipTextConfig; without them transformers' defaults (12 layers of width 768, 8 heads, "
        "where BLIP-base has 12) for the tokenizer's vocabulary",
    )
    projection: int = Field(256, gt=0, description="width of the embedding that the contrastive loss compares")
    positions: Literal["random", "sincos"] = Field(
        "random", description="of the image's patches, at the start: sincos gives each its row and column as waves"
    )
    tokenizer: str = Field("procedural", description="folder of a tokenizer, or procedural: that of the tiny models")
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class FitConfig(Section):
    """What both trainings read."""

    out: Path = Field(description="folder to write the model, its card, curves and metrics to")
    work: Path | None = Field(None, description="folder for the checkpoint; null: the out folder")
    seed: int = Field(0, ge=0, lt=1 << 32, description="the only source of chance")
    data: TrainData = Field(ProceduralData(), description="what is learnt from")
    cache: Quantity = Field(
        CACHE_BYTES,
        description="decoded pictures that are kept in memory, at most; a source that does not fit is decoded anew for "
        "each batch",
    )
    holdout: float = Field(0.05, ge=0, lt=1, description="share of the images that is only measured on")
    model: ModelChoice | None = Field(None, description="checkpoint to start from; null: from scratch")
    scratch: Scratch | None = Field(None, description="or a model built anew")
    image_size: int | None = Field(None, gt=0, description="side of the input, pixels; null: the model's")
    steps: int | None = Field(None, gt=0, description="optimizer steps; or give epochs")
    epochs: float | None = Field(None, gt=0)
    batch: int = Field(32, gt=1, description="images a forward pass")
    accumulate: int = Field(1, gt=0, description="forward passes an optimizer step")
    lr: float = Field(1e-5, gt=0, description="peak; cosine to 0")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: the matrices of hidden layers by Muon, all else by AdamW; for training from scratch"
    )
    muon_lr: float = Field(0.01, gt=0, description="peak of Muon's own learning rate")
    weight_decay: float = Field(0.05, ge=0, description="of matrices only")
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = Field(1.0, gt=0, description="of gradients")
    augment: Augment = Augment()
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of the arithmetic; weights stay fp32")
    save: Literal["fp32", "fp16"] = Field("fp32", description="of the weights that are written")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0, description="of torch; null: its default")
    checkpoint_every: int = Field(500, gt=0, description="steps between checkpoints")
    evaluate_every: int | None = Field(None, gt=0, description="steps between evaluations; null: at the end only")
    evaluation_images: int = Field(1000, gt=1, description="held-out images that are measured, at most")

    @model_validator(mode="after")
    def _one_of(self) -> FitConfig:
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give either model (a checkpoint to start from) or scratch")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self

    def step_count(self, rows: int) -> int:
        """Optimizer steps for so many training images."""
        images = min(self.batch, rows) * self.accumulate
        return self.steps or max(1, round((self.epochs or 0) * rows / images))


@dataclass(frozen=True)
class TrainProgress:
    """One report: step of steps, the loss, steps a second, seconds left; `stage` says doing what."""

    stage: str
    step: int
    steps: int
    loss: float = math.nan
    rate: float = math.nan
    seconds_left: float = math.nan


Report = Callable[[TrainProgress], None]


class Task(ABC):
    """What is trained, and how its losses are computed."""

    model: nn.Module

    @abstractmethod
    def losses(self, batch: TrainBatch, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The terms of the loss, and ``loss``, their sum. `step` counts forward passes and seeds `generator`."""

    def after_update(self, step: int) -> None:  # noqa: B027 - a hook that a task may leave empty
        """Called after each optimizer step."""

    def extra_state(self) -> dict[str, torch.Tensor]:
        """What the next step depends on besides model and optimizer."""
        return {}

    def load_extra_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """The inverse of `extra_state`."""

    @abstractmethod
    def evaluate(self, samples: Samples, rows: Any) -> dict[str, float]:
        """Figures on held-out rows."""


@dataclass(frozen=True)
class Fitted:
    """What `fit` did."""

    steps: int
    history: list[dict[str, float]]
    """step, lr and each loss term, means of some steps; evaluations under ``eval_...``."""
    seconds: float
    """Of all calls of an interrupted training together, evaluations included."""
    samples_seen: int


def fit(task: Task, samples: Samples, config: FitConfig, side: int, report: Report) -> Fitted:
    """Train a task's model on a source's training rows; goes on from a checkpoint of the same config and data.

    Args:
        side: of the model's input, pixels.
        report: told about once a second; may raise to interrupt.

    Raises:
        ConfigError: a checkpoint of another config or of other data lies in the work folder.
        PairmillError: the loss or its gradient is no number any more; the last checkpoint stays.
    """
    train, held = samples.split(config.holdout)
    view = Rows(samples, train)
    steps = config.step_count(len(view))
    trainer = _Trainer(task, config, steps, samples.fingerprint())
    checkpoint = (config.work or config.out) / CHECKPOINT_NAME
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer.resume(checkpoint)
    begun, first, told = time.monotonic(), trainer.step, 0.0
    every = max(1, steps // 400)
    with _interrupts_between_steps() as interrupted:
        while trainer.step < steps:
            lr, terms = trainer.update(view, side)
            if trainer.step % every == 0 or trainer.step == steps:
                trainer.history.append({"step": trainer.step, "lr": lr, **trainer.means()})
            if config.evaluate_every and trainer.step % config.evaluate_every == 0 and len(held):
                figures = measure(task, samples, held, config)
                if figures:
                    trainer.history.append({"step": trainer.step, **{f"eval_{k}": v for k, v in figures.items()}})
            if trainer.step % config.checkpoint_every == 0:
                trainer.save(checkpoint, time.monotonic() - begun)
            now = time.monotonic()
            if now - told >= REPORT_EVERY_S or trainer.step == steps:
                told = now
                rate = (trainer.step - first) / (now - begun)
                left = (steps - trainer.step) / rate
                with _kept(trainer, checkpoint, begun):
                    report(TrainProgress("train", trainer.step, steps, terms["loss"], rate, left))
            if interrupted():
                with _kept(trainer, checkpoint, begun):
                    raise KeyboardInterrupt
    seconds = trainer.seconds_before + time.monotonic() - begun
    trainer.save(checkpoint, time.monotonic() - begun)
    return Fitted(steps, trainer.history, round(seconds, 1), steps * config.accumulate * min(config.batch, len(view)))


@contextmanager
def _kept(trainer: _Trainer, checkpoint: Path, begun: float) -> Iterator[None]:
    """Between two steps: whatever ends the training here, what it did is saved first."""
    try:
        yield
    except BaseException:
        trainer.save(checkpoint, time.monotonic() - begun)
        raise


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, so that nothing is lost; a second one does not wait. Yields whether there
    was one. Only the main thread can ask for this; elsewhere nothing changes."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def once(number: int, frame: Any) -> None:  # noqa: ARG001 (the signature of a handler)
        signal.signal(signal.SIGINT, before)
        seen.set()

    signal.signal(signal.SIGINT, once)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def forget_checkpoint(config: FitConfig) -> None:
    """Remove the checkpoint of a training whose result is written."""
    ((config.work or config.out) / CHECKPOINT_NAME).unlink(missing_ok=True)


def measure(task: Task, samples: Samples, held: Any, config: FitConfig) -> dict[str, float]:
    """The task's figures on held-out rows, with the model in evaluation mode. Where there are more rows than are to be
    measured, the same ones are drawn each time."""
    chosen = np.sort(np.random.default_rng(len(held)).permutation(held)[: config.evaluation_images])
    task.model.eval()
    try:
        with torch.inference_mode():
            return task.evaluate(samples, chosen)
    finally:
        task.model.train()


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """torch's number of threads, for a while."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision as the config says."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def device_of(config: FitConfig) -> str:
    """The device that the config asks for.

    Raises:
        ConfigError: cuda, and there is none.
    """
    return resolve_device(config.device, "device")


class Rows(Samples):
    """Some rows of a source, in rising order. Its groups are those of the source that are there as a whole."""

    def __init__(self, samples: Samples, rows: Any) -> None:
        self._samples = samples
        self._rows = rows
        self.ids = samples.ids[rows]
        self.texts = samples.texts
        groups = samples.groups()
        whole = np.isin(groups, rows).all(axis=1)
        self._groups = np.searchsorted(rows, groups[whole])

    def groups(self) -> Any:
        """Those of the source, as positions here."""
        return self._groups

    def draw(self, rows: Any, rng: Any, side: int, augment: Augment | None) -> TrainBatch:
        """Some of the rows."""
        return self._samples.draw(self._rows[rows], rng, side, augment)


class _Trainer:
    """Model, optimizer, step, history and time spent; a checkpoint holds them all."""

    def __init__(self, task: Task, config: FitConfig, steps: int, data: str) -> None:
        self.task, self.config, self.steps = task, config, steps
        self.data = data
        """The fingerprint of what is trained on."""
        self.step = 0
        self.seconds_before = 0.0
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}
        self._summed = 0
        named = [(name, value) for name, value in task.model.named_parameters() if value.requires_grad]
        self.parameters = [value for _, value in named]
        muon = [
            entry for entry in named if config.optimizer == "muon" and _HIDDEN.search(entry[0]) and entry[1].ndim == 2
        ]
        by_muon = {name for name, _ in muon}
        rest = [entry for entry in named if entry[0] not in by_muon]
        matrices, others = ([entry for entry in rest if (entry[1].ndim >= 2) == wide] for wide in (True, False))
        groups = [
            {"params": [value for _, value in matrices], "weight_decay": config.weight_decay},
            {"params": [value for _, value in others], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        self.optimizers: list[tuple[torch.optim.Optimizer, float, list[str]]] = [
            (adamw, config.lr, [name for name, _ in (*matrices, *others)])
        ]
        if muon:
            values = [value for _, value in muon]
            hidden = torch.optim.Muon(values, lr=config.muon_lr, weight_decay=config.weight_decay)
            self.optimizers.append((hidden, config.muon_lr, [name for name, _ in muon]))

    def rate(self) -> float:
        """The learning rate of the coming step, as a share of its peak."""
        config = self.config
        if self.step < config.warmup:
            return (self.step + 1) / config.warmup
        done = (self.step - config.warmup) / max(1, self.steps - config.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def means(self) -> dict[str, float]:
        """The mean of each loss term over the steps since the last call."""
        found = {name: value / self._summed for name, value in self._sums.items()}
        self._sums, self._summed = {}, 0
        return found

    def update(self, samples: Samples, side: int) -> tuple[float, dict[str, float]]:
        """One optimizer step; the learning rate, and the mean of each loss term.

        Raises:
            PairmillError: the loss or its gradient is no number; nothing is changed then.
        """
        config = self.config
        device = next(self.task.model.parameters()).device
        self.task.model.train()
        rate = self.rate()
        for optimizer, peak, _ in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * peak
        terms: dict[str, float] = {}
        for micro in range(config.accumulate):
            count = self.step * config.accumulate + micro
            batch = samples.batch(seed=config.seed, step=count, size=config.batch, side=side, augment=config.augment)
            chance = torch.Generator().manual_seed(config.seed * 1_000_003 + count)
            torch.manual_seed(config.seed * 1_000_003 + count)  # dropout draws from here
            with autocast(device.type, config.precision):
                losses = self.task.losses(batch, count, chance)
            (losses["loss"] / config.accumulate).backward()
            for name, value in losses.items():
                terms[name] = terms.get(name, 0.0) + float(value.detach()) / config.accumulate
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.clip_norm or math.inf))
        if not (math.isfinite(terms["loss"]) and math.isfinite(norm)):
            raise PairmillError(
                f"training diverged: at step {self.step + 1} of {self.steps} the loss is {terms['loss']} and the norm "
                f"of its gradient {norm}. Lower lr (or muon_lr) or raise warmup and start anew; a checkpoint in "
                f"{config.work or config.out} is of an earlier step"
            )
        for optimizer, _, _ in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._summed += 1
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self.task.after_update(self.step)
        return rate * config.lr, terms

    def save(self, path: Path, seconds: float) -> None:
        """Write everything the next step depends on, atomically; `seconds` is the time this call took so far."""
        from safetensors.torch import save_file

        tensors = {f"model.{name}": value for name, value in _untied(self.task.model).items()}
        tensors |= {f"extra.{name}": value for name, value in self.task.extra_state().items()}
        for optimizer, _, names in self.optimizers:
            for number, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{names[number]}:{key}"] = value
        partial = path.with_name(path.name + ".partial")
        metadata = {
            "step": str(self.step),
            "config": digest(self.config),
            "data": self.data,
            "seconds": f"{self.seconds_before + seconds:.1f}",
            "history": json.dumps(self.history),
            "sums": json.dumps([self._sums, self._summed]),
        }
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Load a checkpoint if there is one.

        Raises:
            ConfigError: it is of another config or of other data, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return
        way_out = "delete it or choose another work folder"
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("config") != digest(self.config):
                    raise ConfigError(f"{path} is a checkpoint of another config: {way_out}")
                if metadata.get("data") != self.data:
                    raise ConfigError(f"{path} is a checkpoint of other data, whose images or texts differ: {way_out}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged or cut off ({error}): {way_out}") from error
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "extra": {}, "optimizer": {}}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = value
        self.task.model.load_state_dict(parts["model"], strict=False)
        self.task.load_extra_state(parts["extra"])
        for optimizer, _, names in self.optimizers:
            place = {name: number for number, name in enumerate(names)}
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in parts["optimizer"].items():
                parameter, key = name.rsplit(":", 1)
                if parameter in place:
                    state.setdefault(place[parameter], {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.step = int(metadata["step"])
        self.seconds_before = float(metadata["seconds"])
        self.history = json.loads(metadata["history"])
        self._sums, self._summed = json.loads(metadata["sums"])


def _untied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each tensor under its first name only (tied weights have two)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


_NO_PART = (
    "out",
    "work",
    "cache",
    "checkpoint_every",
    "evaluate_every",
    "evaluation_images",
    "device",
    "threads",
    "save",
)


def digest(config: FitConfig) -> str:
    """What must be equal for a checkpoint to fit: everything but folders, hardware and how the result is measured."""
    parts = config.model_dump(mode="json", exclude=set(_NO_PART))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
