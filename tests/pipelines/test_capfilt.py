"""The recipe capfilt end to end: real images, real models with random weights."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioners.blip import Captions
from captioners.endpoint import EndpointCaptions
from captioners.mixing import RECIPES, MixTexts, MixTextsByShare
from pairmill.export import export_webdataset
from pairmill.plan import compile_plan
from pairmill.query import query
from pairmill.report.funnel import check_funnel
from pairmill.report.progress import Silent
from pairmill.run import RunReport, load_recipe, parse_config, refresh
from pairmill.store import Dataset
from schemas.config import RunConfig
from tests.blip_models import write_blip
from tests.filters.random_clip import write_random_clip

TEXTS = [
    "a red circle on the left",
    "IMG_0001.jpg",
    "",
    "two blue squares in a row",
    "photo",
    "ein roter Kreis ist hier",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": {"path": str(write_random_clip(folder / "clip"))},
        "captioner": {"path": str(write_blip(folder / "captioner", "captioner"))},
        "itm": {"path": str(write_blip(folder / "itm", "itm"))},
        "batch": 4,
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for n in range(24):
        pixels = np.kron(random.integers(0, 255, (4, 4, 3)), np.ones((16, 16, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02d}.png")
    return str(folder)


def config(dataset: Path | str, table: str, models: dict[str, Any], **changes: Any) -> RunConfig:
    keep = {"min_side": None, **changes.pop("keep", {})}
    data = {
        "dataset": str(dataset),
        "recipe": "capfilt",
        "source": {"kind": "url_table", "path": table},
        "engine": {"kind": "local"},
        "models": models,
        "caption": {"count": 3},
        "dedup": {"semantic": None},
        "keep": keep,
        **changes,
    }
    return parse_config(data)


def names(run: RunConfig) -> list[str]:
    return [step.name for step in load_recipe(run).steps]


def test_every_mixing_recipe_has_the_same_stages(models: dict[str, Any]) -> None:
    plans = {name: compile_plan(load_recipe(config("out", "x", models, mix={"recipe": name}))) for name in RECIPES}
    assert len({plan.tables for plan in plans.values()}) == 1
    order = [s.name for s in plans["capfilt"].steps]
    assert order.index("text_stats") < order.index("images") < order.index("captions") < order.index("itm")
    assert order.index("itm") < order.index("mix") < order.index("exact")
    assert not {"language", "min_words", "keep_clip_score"} & set(order), "they judge texts here, not pairs"
    kinds = {name: type(plan.steps[order.index("mix")].step) for name, plan in plans.items()}
    assert kinds.pop("nguyen23") is MixTextsByShare and set(kinds.values()) == {MixTexts}


def test_an_endpoint_takes_the_captioners_place(models: dict[str, Any]) -> None:
    def captioner(choice: dict[str, Any]) -> Any:
        return next(
            s for s in load_recipe(config("out", "x", {**models, "captioner": choice})).steps if s.name == "captions"
        )

    endpoint = captioner({"name": "some-vlm", "base_url": "http://127.0.0.1:1/v1"})
    assert isinstance(endpoint, EndpointCaptions)
    assert isinstance(captioner(models["captioner"]), Captions)


def test_further_conditions_of_keep_drop_pairs(models: dict[str, Any]) -> None:
    order = names(config("out", "x", models, keep={"contrast": "< 100"}))
    assert order[order.index("mix") + 1] == "keep_contrast"


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory, photos: str, models: dict[str, Any]) -> Any:
    """A function that refreshes one dataset over the photos, with changes to its config."""
    for n in range(24):
        (Path(photos) / f"{n:02d}.txt").write_text(TEXTS[n % len(TEXTS)])
    dataset = tmp_path_factory.mktemp("dataset") / "data"

    def run(**changes: Any) -> RunReport:
        source = {"kind": "image_folder", "path": photos}
        return refresh(config(dataset, "", models, source=source, **changes), Silent())

    return run, Dataset(str(dataset))


def test_changing_recipe_and_thresholds_runs_no_model(folder_run: Any, tmp_path: Path) -> None:
    run, dataset = folder_run
    first = run()
    assert first.computed["captions"] == first.computed["itm"] == 24
    assert first.snapshot is not None
    revisions = first.snapshot.models
    assert set(revisions) == {"clip.model", "captions.model", "caption_clip.model", "itm.model"}
    choices = set()
    for changes in (
        {"mix": {"recipe": "blip2"}},
        {"mix": {"recipe": "capfilt"}, "keep": {"itm": None}},
        {"mix": {"recipe": "recap", "clip": "bottom 50%"}},
        {"mix": {"recipe": "synthetic_only"}, "keep": {"itm": "< 0.6"}},
    ):
        report = run(**changes)
        assert report.published and report.computed == {} and report.snapshot is not None
        check_funnel(report.snapshot)
        rows = query(dataset.snapshot(), "FROM texts ORDER BY uid, ordinal").to_pylist()
        choices.add(str([r["rank"] for r in rows]))
        assert all(r["kept"] == (r["rank"] is not None) == (r["reason"] is None) for r in rows)
    assert len(choices) == 4


def test_the_export_holds_the_chosen_texts(folder_run: Any, tmp_path: Path) -> None:
    run, dataset = folder_run
    run(mix={"recipe": "blip2"})
    snapshot = dataset.snapshot()
    report = export_webdataset(snapshot, str(tmp_path / "out"))
    kept = query(snapshot, "SELECT uid, text, source, clip_score FROM texts WHERE kept ORDER BY uid, rank").to_pylist()
    assert report.samples == len({r["uid"] for r in kept}) > 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    for name, data in content.items():
        if name.endswith(".json"):
            row = json.loads(data)
            mine = [r for r in kept if r["uid"] == row["uid"]]
            assert [t["text"] for t in row["texts"]] == [r["text"] for r in mine]
            assert content[name.replace(".json", ".txt")].decode() == row["caption"] == mine[0]["text"]
            assert mine == sorted(mine, key=lambda r: -r["clip_score"]) and len(mine) <= 2
