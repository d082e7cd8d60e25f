"""Train a BLIP captioner or filter from a config, and leave a folder that ``models:`` of a run accepts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pairmill.train.blip_card import write_card
from pairmill.train.blip_model import (
    CAPTIONER,
    FILTER,
    TRAINED_BESIDE,
    WEIGHTS_NAME,
    Blip,
    open_blip,
    save_blip,
    write_text,
)
from pairmill.train.captioner import CaptionTask, TrainCaptionerConfig
from pairmill.train.curves import draw_curves
from pairmill.train.fit import (
    FitConfig,
    Fitted,
    Report,
    Task,
    TrainProgress,
    fit,
    forget_checkpoint,
    measure,
    torch_threads,
)
from pairmill.train.itm import FilterTask, TrainFilterConfig
from pairmill.train.samples import ProceduralData, Samples, open_samples

HELD_OUT_SCENES = 1000


@dataclass(frozen=True)
class TrainReport:
    """What a training did.

    Args:
        out: the folder written.
        steps: optimizer steps in all.
        first_loss, last_loss: of the first and last entry of the history.
        seconds: wall time of the training, of all calls of an interrupted one together.
        metrics: what `metrics.json` holds.
    """

    out: Path
    steps: int
    first_loss: float
    last_loss: float
    seconds: float
    metrics: Mapping[str, Any]


def train_captioner(config: TrainCaptionerConfig, *, progress: Report | None = None) -> TrainReport:
    """Train a captioner; goes on from a checkpoint of the same config when there is one.

    Writes into `config.out` the model in transformers' format, its tokenizer and preprocessing, `metrics.json`,
    `curves.png`, `history.json`, `train.yaml` (the config) and a card `README.md`, and removes the checkpoint.

    Args:
        config: what to train.
        progress: called about once a second; may raise to interrupt (the next call resumes).

    Raises:
        ConfigError: the data, the model or a checkpoint in the work folder is not what the config says.
        PairmillError: the loss is no number any more.
    """
    return _train(config, CAPTIONER, lambda blip, rows: CaptionTask(blip, config), progress)  # noqa: ARG005


def train_filter(config: TrainFilterConfig, *, progress: Report | None = None) -> TrainReport:
    """Train an ITM filter, as `train_captioner` trains a captioner."""
    return _train(config, FILTER, lambda blip, rows: FilterTask(blip, config, rows), progress)


def _train(
    config: FitConfig, kind: str, make_task: Callable[[Blip, int], Task], progress: Report | None
) -> TrainReport:
    report = progress or (lambda _: None)
    work = config.work or config.out
    for folder in (config.out, work):
        folder.mkdir(parents=True, exist_ok=True)
    with torch_threads(config.threads):
        blip = open_blip(config, kind)
        samples = open_samples(
            config.data,
            blip.image_size,
            lambda done, total: report(TrainProgress("pictures", done, total)),
            cache=config.cache,
            work=work,
        )
        train, held = samples.split(config.holdout)
        task = make_task(blip, len(train))
        fitted = fit(task, samples, config, blip.image_size, report)
        save_blip(blip, config.out, half=config.save == "fp16")
        report(TrainProgress("evaluate", 0, 1))
        figures = measure(task, samples, held, config) if len(held) else {}
        metrics = _metrics(config, kind, blip, samples, fitted, figures, len(train), len(held))
    write_text(config.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_text(config.out / "history.json", json.dumps(fitted.history) + "\n")
    title = f"{config.out.name}: {fitted.steps:,} steps of {config.batch * config.accumulate} images"
    draw_curves(fitted.history, config.out / "curves.png", title)
    settings = {**config.model_dump(mode="json", exclude={"work"}), "out": f"out/{config.out.name}"}
    write_text(config.out / "train.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_card(config, kind, metrics)
    forget_checkpoint(config)
    losses = [entry["loss"] for entry in fitted.history if "loss" in entry]
    return TrainReport(config.out, fitted.steps, losses[0], losses[-1], fitted.seconds, metrics)


def _metrics(
    config: FitConfig,
    kind: str,
    blip: Blip,
    samples: Samples,
    fitted: Fitted,
    figures: dict[str, float],
    trained_on: int,
    held_out: int,
) -> dict[str, Any]:
    from pairmill.train.blip_quality import measure_captioner, measure_filter

    found: dict[str, Any] = {
        "kind": kind,
        "parameters": sum(
            value.numel() for name, value in blip.model.named_parameters() if not name.startswith(TRAINED_BESIDE)
        ),
        "images": len(samples),
        "trained_on": trained_on,
        "held_out": held_out,
        "steps": fitted.steps,
        "samples_seen": fitted.samples_seen,
        "train_seconds": fitted.seconds,
        "device": next(blip.model.parameters()).device.type,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "weights_sha256": hashlib.sha256((config.out / WEIGHTS_NAME).read_bytes()).hexdigest(),
        "fresh_weights": len(blip.fresh),
        "evaluation": {name: round(value, 5) for name, value in figures.items()},
    }
    if isinstance(config.data, ProceduralData):
        if isinstance(config, TrainCaptionerConfig):
            found["oracle"] = measure_captioner(config.out, scenes=HELD_OUT_SCENES, prompt=config.prompt)
        else:
            found["oracle"] = measure_filter(config.out, scenes=HELD_OUT_SCENES)
    return found
