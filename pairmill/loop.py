"""The whole loop of CapFilt: train a captioner and a filter on a small curated set, let them mend a noisy set, train
again on the result.

BLIP (arXiv:2201.12086), section 3.3. Each step leaves a folder and is skipped when its folder is there and was made
from the same config, model and data, so an interrupted loop goes on where it stopped:

::

    OUT/pretrained                if wanted: what the other trainings start from
    OUT/captioner  OUT/filter     trained on the curated set, each on its own
    OUT/dataset                   the noisy set after captioning and filtering: a dataset like any other
    OUT/again                     a model trained anew on what is kept, the curated set with it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pairmill.config_file import parse_config
from pairmill.errors import ConfigError
from pairmill.report.progress import Reporter
from pairmill.run import RunReport, refresh
from pairmill.store import Dataset
from pairmill.train.blip import TrainReport, train_captioner, train_filter
from pairmill.train.blip_model import model_ref
from pairmill.train.captioner import TrainCaptionerConfig
from pairmill.train.fit import FitConfig, Report
from pairmill.train.itm import TrainFilterConfig
from pairmill.train.samples import CocoData, DatasetData, SeveralData, SingleData, TrainData
from schemas.config import RunConfig, Section

PRETRAINED = "pretrained"
_DONE = "loop.json"


class LoopConfig(Section):
    """What `pairmill train loop` reads."""

    out: Path = Field(description="folder to write to")
    curated: SingleData = Field(description="the small curated set")
    run: dict[str, Any] = Field(description="the noisy set: keys of a run's config, but dataset and the two models")
    pretrain: dict[str, Any] | None = Field(
        None,
        description="keys of `pairmill train captioner`, but out: a captioner that the trainings below start from when "
        "they name neither model nor scratch; the paper's is trained on the noisy set as it came",
    )
    captioner: dict[str, Any] = Field(description="keys of `pairmill train captioner`, but out and data")
    filter: dict[str, Any] = Field(description="keys of `pairmill train filter`, but out and data")
    again: dict[str, Any] = Field(description="what is trained on the result: keys as of captioner or filter")
    again_kind: Literal["captioner", "filter"] = "captioner"
    with_curated: bool = Field(True, description="the curated set is trained on again, as in the paper")


@dataclass(frozen=True)
class LoopReport:
    """What a loop did; a step that was there already has None."""

    pretrain: TrainReport | None
    captioner: TrainReport | None
    filter: TrainReport | None
    run: RunReport
    again: TrainReport | None


def run_loop(config: LoopConfig, reporter: Reporter, progress: Report) -> LoopReport:
    """Run what is not done yet. All configs are read before the first of it.

    Args:
        reporter: told about the run.
        progress: told about the trainings.

    Raises:
        PairmillError: as `train_captioner`, `train_filter` and `pairmill.run.refresh`.
    """
    settings = noisy_run(config)
    kept = DatasetData(path=settings.dataset)
    pretrain = None if config.pretrain is None else _training(config, "captioner", "pretrain", config.pretrain, None)
    first = _training(config, "captioner", "captioner", config.captioner, config.curated)
    second = _training(config, "filter", "filter", config.filter, config.curated)
    _training(config, config.again_kind, "again", config.again, kept)  # the snapshot is not there yet

    def train(one: FitConfig) -> TrainReport | None:
        return _once(one, reporter, progress)

    pretrained = None if pretrain is None else train(pretrain)
    captioner, filter_ = train(first), train(second)
    reporter.note("captioning and filtering the noisy set")
    run = refresh(settings, reporter)
    kept = DatasetData(path=settings.dataset, snapshot=run.snapshot.id if run.snapshot else None)
    data = SeveralData(parts=(config.curated, kept)) if config.with_curated else kept
    again = train(_training(config, config.again_kind, "again", config.again, data))
    return LoopReport(pretrained, captioner, filter_, run, again)


def noisy_run(config: LoopConfig) -> RunConfig:
    """The config of the run over the noisy set, with the two trained models in it.

    Raises:
        ConfigError: a key of `run` is wrong, or one that the loop itself gives.
    """
    _refuse("run", config.run, "dataset")
    given = config.run.get("models") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"run.models: expected keys such as clip and device (given: {given!r})")
    _refuse("run.models", given, "captioner", "itm")
    models = {
        **given,
        "captioner": {"path": str(config.out / "captioner")},
        "itm": {"path": str(config.out / "filter")},
    }
    data = {"recipe": "capfilt", **config.run, "dataset": str(config.out / "dataset"), "models": models}
    return parse_config(RunConfig, data, "run")


def _refuse(where: str, given: Mapping[str, Any], *reserved: str) -> None:
    """Raise `ConfigError` if a key is given that the loop itself puts in."""
    for key in reserved:
        if key in given:
            raise ConfigError(f"{where}.{key}: the loop itself says what this is; leave it out")


def _training(
    config: LoopConfig, kind: str, section: str, keys: dict[str, Any], data: SingleData | SeveralData | None
) -> FitConfig:
    """The config of one of the trainings.

    Raises:
        ConfigError: a key is wrong, or one that the loop itself gives.
    """
    pretrains = section == "pretrain"
    _refuse(section, keys, *(("out",) if pretrains else ("out", "data")))
    given = {**keys, "out": str(config.out / (PRETRAINED if pretrains else section))}
    if data is not None:
        given["data"] = data.model_dump(mode="json")
    if config.pretrain is not None and not pretrains and not {"model", "scratch"} & set(keys):
        given["model"] = {"path": str(config.out / PRETRAINED)}
    return parse_config(TrainCaptionerConfig if kind == "captioner" else TrainFilterConfig, given, section)


def _once(config: FitConfig, reporter: Reporter, progress: Report) -> TrainReport | None:
    """Train unless the folder holds the result of the same config, model and data."""
    digest = _digest(config)
    done = config.out / _DONE
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["digest"] == digest:
        reporter.note(f"{config.out} is trained already")
        return None
    reporter.note(f"training {config.out}")
    train: Callable[..., TrainReport] = train_captioner if isinstance(config, TrainCaptionerConfig) else train_filter
    report = train(config, progress=progress)
    done.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
    return report


def _digest(config: FitConfig) -> str:
    """sha256 (hex) of a training's config and of what lies where it points: the model, captions, a snapshot.

    Raises:
        ConfigError: something is not there.
    """
    inputs = {
        "config": config.model_dump(mode="json"),
        "model": None if config.model is None else model_ref(config.model).identity(),
        "data": _contents(config.data),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _contents(data: TrainData) -> Any:
    """What the texts of a source are, where its config alone does not say so."""
    if isinstance(data, SeveralData):
        return [_contents(part) for part in data.parts]
    if isinstance(data, CocoData):
        try:
            return hashlib.sha256(data.captions.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(
                f"data.captions: {data.captions} cannot be read ({error.strerror}); correct the path"
            ) from error
    return Dataset(data.path).snapshot(data.snapshot).record.id if isinstance(data, DatasetData) else None
