"""The whole loop of CapFilt: train a captioner and a filter on a small curated set, let them mend a noisy set, train
again on the result.

BLIP (arXiv:2201.12086), section 3.3. Each step leaves a folder and is skipped when its folder is there and was made
from the same config, so an interrupted loop goes on where it stopped:

::

    OUT/pretrained                if wanted: what the other trainings start from
    OUT/captioner  OUT/filter     trained on the curated set, each on its own
    OUT/dataset                   the noisy set after captioning and filtering: a dataset like any other
    OUT/again                     a model trained anew on what is kept, the curated set with it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pairmill.config_file import parse_config
from pairmill.report.progress import Reporter
from pairmill.run import RunReport, refresh
from pairmill.train.blip import TrainReport, train_captioner, train_filter
from pairmill.train.captioner import TrainCaptionerConfig
from pairmill.train.fit import FitConfig, Report
from pairmill.train.itm import TrainFilterConfig
from pairmill.train.samples import DatasetData, SeveralData, SingleData
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
    """Run what is not done yet.

    Args:
        reporter: told about the run.
        progress: told about the trainings.

    Raises:
        PairmillError: as `train_captioner`, `train_filter` and `pairmill.run.refresh`.
    """
    out = config.out
    train = _Trainings(config, progress, reporter)
    pretrained = None
    if config.pretrain is not None:
        pretrained = train.one("captioner", config.pretrain, out / PRETRAINED, None)
    captioner = train.one("captioner", config.captioner, out / "captioner", config.curated)
    filter_ = train.one("filter", config.filter, out / "filter", config.curated)
    reporter.note("captioning and filtering the noisy set")
    settings = noisy_run(config)
    run = refresh(settings, reporter)
    kept = DatasetData(path=settings.dataset, snapshot=run.snapshot.id if run.snapshot else None)
    data = SeveralData(parts=(config.curated, kept)) if config.with_curated else kept
    again = train.one(config.again_kind, config.again, out / "again", data)
    return LoopReport(pretrained, captioner, filter_, run, again)


def noisy_run(config: LoopConfig) -> RunConfig:
    """The config of the run over the noisy set, with the two trained models in it.

    Raises:
        ConfigError: a key of `run` is wrong.
    """
    models = {
        **config.run.get("models", {}),
        "captioner": {"path": str(config.out / "captioner")},
        "itm": {"path": str(config.out / "filter")},
    }
    data = {"recipe": "capfilt", **config.run, "dataset": str(config.out / "dataset"), "models": models}
    return parse_config(RunConfig, data, "run")


@dataclass(frozen=True)
class _Trainings:
    """The trainings of a loop, each done once."""

    config: LoopConfig
    progress: Report
    reporter: Reporter

    def one(
        self, kind: str, keys: dict[str, Any], out: Path, data: SingleData | SeveralData | None
    ) -> TrainReport | None:
        """Train unless the folder holds the result of the same config.

        Raises:
            ConfigError: a key is wrong.
        """
        given = {**keys, "out": str(out)}
        if data is not None:
            given["data"] = data.model_dump(mode="json")
        if self.config.pretrain is not None and out.name != PRETRAINED and not {"model", "scratch"} & set(keys):
            given["model"] = {"path": str(self.config.out / PRETRAINED)}
        model: type[FitConfig] = TrainCaptionerConfig if kind == "captioner" else TrainFilterConfig
        config = parse_config(model, given, out.name)
        digest = hashlib.sha256(json.dumps(config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
        done = out / _DONE
        if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["digest"] == digest:
            self.reporter.note(f"{out} is trained already")
            return None
        self.reporter.note(f"training {out}")
        train: Callable[..., TrainReport] = train_captioner if kind == "captioner" else train_filter
        report = train(config, progress=self.progress)
        done.write_text(json.dumps({"digest": digest}) + "\n", encoding="utf-8")
        return report
