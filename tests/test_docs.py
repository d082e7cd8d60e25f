"""What the docs say of the config is true."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pairmill.config_file import parse_config, read_config
from pairmill.loop import LoopConfig, noisy_run
from pairmill.plan import compile_plan
from pairmill.run import load_config, load_recipe
from pairmill.train.captioner import TrainCaptionerConfig
from pairmill.train.fit import Scratch
from pairmill.train.itm import TrainFilterConfig
from pairmill.train.samples import Augment, CocoData, DatasetData, ProceduralData
from schemas.config import RunConfig

TEXT = Path("docs/config.md").read_text(encoding="utf-8")


def documented() -> dict[str, Any]:
    block = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    found: dict[str, Any] = yaml.safe_load(block[1])
    return found


def test_the_documented_config_is_valid_and_holds_the_defaults():
    data = documented()
    config = RunConfig.model_validate(data)
    defaults = RunConfig.model_validate({"dataset": data["dataset"], "source": data["source"]})
    assert config == defaults


def test_every_key_is_documented():
    missing = []

    def walk(model: type[BaseModel], given: dict[str, Any], place: str) -> None:
        for name, info in model.model_fields.items():
            key = info.alias or name
            if key not in given:
                missing.append(f"{place}{key}")
            kind = info.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(given.get(key), dict):
                walk(kind, given[key], f"{place}{key}.")

    data = documented()
    walk(RunConfig, data, "")
    union = typing.get_args(typing.get_args(RunConfig.model_fields["source"].annotation)[0])[0]
    for source in typing.get_args(union):
        kind = source.model_fields["kind"].default
        walk(source, next(s for s in data["source"] if s["kind"] == kind), f"source.{kind}.")
    assert missing == []


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_config_whose_recipe_compiles(path: Path):
    config = load_config(str(path))
    assert compile_plan(load_recipe(config)).steps


@pytest.mark.parametrize(
    ("name", "model"),
    [("captioner", TrainCaptionerConfig), ("filter", TrainFilterConfig), ("loop", LoopConfig)],
)
def test_every_training_example_is_a_config(name: str, model: type[BaseModel]):
    config = read_config(model, f"examples/train/{name}.yaml")
    if isinstance(config, LoopConfig):
        assert noisy_run(config).models.itm.path == "out/loop/filter"
        parse_config(TrainCaptionerConfig, {**config.captioner, "out": "x"})
        parse_config(TrainFilterConfig, {**config.filter, "out": "x"})
        parse_config(TrainCaptionerConfig, {**config.again, "out": "x"})


@pytest.mark.parametrize("name", ["captioner-tiny/train", "itm-tiny/pretrain", "itm-tiny/train"])
def test_the_configs_of_the_shipped_models_are_valid(name: str):
    model: type[BaseModel] = TrainFilterConfig if name == "itm-tiny/train" else TrainCaptionerConfig
    assert read_config(model, f"pairmill/weights/{name}.yaml")


@pytest.mark.parametrize(
    "model",
    [TrainCaptionerConfig, TrainFilterConfig, LoopConfig, Scratch, Augment, CocoData, DatasetData, ProceduralData],
)
def test_every_key_of_a_training_is_documented(model: type[BaseModel]):
    text = Path("docs/training.md").read_text(encoding="utf-8")
    missing = [n for n, f in model.model_fields.items() if n != "kind" and f"| `{n}` |" not in text]
    assert missing == []
    stale = [f.description for f in model.model_fields.values() if f.description and f.description not in text]
    assert stale == []
