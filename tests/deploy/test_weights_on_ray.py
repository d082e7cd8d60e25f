"""A Ray cluster of two nodes: the second has none of the driver's models, and gets each of them once."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pairmill.engines.ray import weights
from pairmill.errors import StoreError
from pairmill.plan import Recipe
from pairmill.procedural.scene import render, sample_scene
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset
from pairmill.weights import tiny_clip_dir
from pairmill.weights_cache import CACHE_ENV, file_sha256, folder_sha256
from pipelines import clip_filter
from schemas.config import RunConfig

HEAD = Path("examples/heads/objects.safetensors").resolve()
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a cluster whose first node has no CPU, and the cache of models of the second one, where all work is
    done. They share this disk: what the second must not find has a path that means something to the driver only."""
    from ray.cluster_utils import Cluster

    cache = tmp_path_factory.mktemp("far")
    with tempfile.TemporaryDirectory(prefix="pm-") as ray_folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", ray_folder)  # `address: auto` of other processes must not find this cluster
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "node_ip_address": "127.0.0.2", "include_dashboard": False},
        )
        try:
            cluster.add_node(num_cpus=3, node_ip_address="127.0.0.3", env_vars={CACHE_ENV: str(cache)})
            yield cluster.address, cache / "models"
        finally:
            cluster.shutdown()


def measured(config: RunConfig) -> Recipe:
    """What `pipelines.clip_filter` measures with a model, without its verdicts: one segment."""
    road = clip_filter.recipe(config).steps
    return Recipe("measured", tuple(s for s in road if s.name in ("images", "clip", "head_objects")))


def settings(folder: Path, dataset: str, engine: dict[str, Any], **models: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "dataset": str(folder / dataset),
            "source": {"kind": "image_folder", "path": str(folder / "photos")},
            "shard_size": 4,
            "models": {"device": "cpu", **models},
            "recipe": f"{__name__}:measured",
            "engine": engine,
        }
    )


def scores(run: RunConfig) -> list[dict[str, Any]]:
    return query(Dataset(run.dataset).snapshot(), "SELECT uid, clip_score, objects FROM pairs ORDER BY uid").to_pylist()


@pytest.mark.timeout(600)  # seconds on a quiet machine
def test_models_of_the_driver_come_to_a_node_once(
    far: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    address, cache = far
    (tmp_path / "photos").mkdir()
    for seed in range(8):
        render(sample_scene(random.Random(seed))).save(tmp_path / "photos" / f"{seed}.png")
        (tmp_path / "photos" / f"{seed}.txt").write_text(f"a drawing of some shapes, number {seed}")
    shutil.copytree(tiny_clip_dir(), tmp_path / "clip")
    shutil.copy(HEAD, tmp_path / "head.safetensors")
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "near"))
    monkeypatch.setattr(weights, "CHUNK", 2**18)
    monkeypatch.chdir(tmp_path)  # so that these paths mean nothing to workers
    names = {"clip": {"path": "clip"}, "heads": {"objects": {"path": "head.safetensors"}}}
    ray = {"kind": "ray", "address": address, "workers": 1}

    by_ray = settings(tmp_path, "by_ray", ray, **names)
    refresh(by_ray, Silent())
    clip, head = folder_sha256("clip"), file_sha256("head.safetensors")
    assert {p.name for p in cache.iterdir() if p.is_dir()} == {clip, head}
    assert folder_sha256(str(cache / clip)) == clip
    assert not (tmp_path / "near").exists()

    by_hand = settings(tmp_path, "by_hand", {"kind": "local"}, **names)
    refresh(by_hand, Silent())
    assert scores(by_ray) == scores(by_hand) and len(scores(by_ray)) == 8


def test_a_node_that_cannot_keep_models_is_named(
    far: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    address, cache = far
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("no folder")
    (tmp_path / "photos").mkdir()
    render(sample_scene(random.Random(0))).save(tmp_path / "photos" / "0.png")
    (tmp_path / "photos" / "0.txt").write_text("a drawing of some shapes")
    shutil.copytree(tiny_clip_dir(), tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    run = settings(tmp_path, "dataset", {"kind": "ray", "address": address, "workers": 1}, clip={"path": "clip"})
    with pytest.raises(StoreError, match=r"node 127\.0\.0\.3: cannot keep models in .* make room"):
        refresh(run, Silent())
