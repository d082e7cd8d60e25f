from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filters.clip_score import ClipScore
from filters.threshold import Intersection, Quantile, Threshold
from pairmill.errors import ConfigError
from pairmill.plan import Recipe, compile_plan
from pairmill.run import load_recipe
from schemas.config import RunConfig
from schemas.reasons import Reason
from tests.filters.random_clip import write_random_clip

DATACOMP = ("clip_l14_30", "clip_b32_25", "laion2b", "image_based", "image_based_and_clip_l14_30")


def config(recipe: str, **settings: Any) -> RunConfig:
    source = {"kind": "url_table", "path": "urls.parquet"}
    return RunConfig.model_validate({"dataset": "out", "recipe": recipe, "source": source, **settings})


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("options")
    (folder / "words.txt").write_text("dog\ncar\n")
    np.save(folder / "references.npy", np.eye(4, dtype=np.float32))
    return {"concept_words": str(folder / "words.txt"), "concept_images": str(folder / "references.npy")}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_random_clip(tmp_path_factory.mktemp("clip")))


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.steps]


def test_clip_filter_measures_text_first_and_dedups_last(clip_folder: str) -> None:
    recipe = load_recipe(config("clip_filter", models={"clip": {"path": clip_folder}}))
    plan = compile_plan(recipe)
    order = names(recipe)
    for before, after in (
        ("text_stats", "images"),
        ("language", "images"),
        ("min_side", "image_stats"),
        ("min_contrast", "clip"),
    ):
        assert order.index(before) < order.index(after)
    assert order.index("keep_clip_score") < order.index("exact") < order.index("semantic")
    assert {"clip_score", "image", "words", "neighbours"} <= set(plan.columns)


def test_clip_filter_follows_keep_and_dedup(clip_folder: str) -> None:
    keep = {"clip_score": "top 30%", "contrast": "< 100", "language": None, "min_side": None}
    settings = {"models": {"clip": {"path": clip_folder}}, "keep": keep, "dedup": {"exact": False, "semantic": None}}
    recipe = load_recipe(config("clip_filter", **settings))
    compile_plan(recipe)
    assert names(recipe)[-2:] == ["keep_clip_score", "keep_contrast"]
    assert not {"language", "min_side", "exact", "semantic"} & set(names(recipe))


def test_text_only_downloads_nothing() -> None:
    plan = compile_plan(load_recipe(config("text_only")))
    assert "image" not in plan.columns
    assert {"words", "language"} <= set(plan.columns)


@pytest.mark.parametrize("name", ["basic", "text_based", *DATACOMP])
def test_datacomp_recipes_compile(name: str, options: dict[str, Any], clip_folder: str) -> None:
    recipe = load_recipe(config(f"datacomp_{name}", options=options, models={"clip": {"path": clip_folder}}))
    assert recipe.name == f"datacomp_{name}"
    assert compile_plan(recipe).columns


@pytest.mark.parametrize("name", DATACOMP)
def test_datacomp_recipes_name_the_published_model(name: str, options: dict[str, Any], clip_folder: str) -> None:
    def model(**settings: Any) -> Any:
        steps = load_recipe(config(f"datacomp_{name}", options=options, **settings)).steps
        (stage,) = [step for step in steps if isinstance(step, ClipScore)]
        return stage.model

    published = "ViT-B-32" if name in ("clip_b32_25", "laion2b") else "ViT-L-14"
    assert (model().name, model().pretrained) == (published, "openai")
    assert model(models={"clip": {"path": clip_folder}}).path == clip_folder


def test_datacomp_figures_are_the_published_ones(options: dict[str, Any]) -> None:
    def steps(name: str) -> dict[str, Any]:
        return {step.name: step for step in load_recipe(config(f"datacomp_{name}", options=options)).steps}

    below = Reason.CLIP_BELOW_THRESHOLD
    score = "keep_clip_score"
    assert steps("clip_b32_25")[score] == Threshold(score, "clip_score", ">=", 0.25, below)
    assert steps("laion2b")[score] == Threshold(score, "clip_score", ">=", 0.28, below)
    top = Quantile(score, "clip_score", "top", "30", Reason.CLIP_BELOW_QUANTILE)
    assert steps("clip_l14_30")[score] == top
    both = steps("image_based_and_clip_l14_30")["image_based_and_clip"]
    assert isinstance(both, Intersection)
    assert top in both.parts
    basic = steps("basic")
    assert (basic["min_words"].operator, basic["min_words"].value) == (">", 2)
    assert (basic["min_chars"].operator, basic["min_chars"].value) == (">", 5)
    assert (basic["min_side"].min_side, basic["max_aspect"].max_aspect) == (200, 3.0)
    assert (basic["language"].languages, basic["language"].min_score) == (("en",), 0.0)


def test_concept_recipes_ask_for_their_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"options\.concept_words"):
        load_recipe(config("datacomp_text_based"))
    with pytest.raises(ConfigError, match=r"options\.concept_images"):
        load_recipe(config("datacomp_image_based"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(config("datacomp_image_based", options={"concept_images": str(tmp_path / "none.npy")}))
