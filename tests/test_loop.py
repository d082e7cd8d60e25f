"""CapFilt's whole loop, small: each part is made from the one before, and done once."""

from __future__ import annotations

import io
import json
import random
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pairmill.config_file import parse_config
from pairmill.errors import ConfigError
from pairmill.loop import LoopConfig, _digest, noisy_run, run_loop
from pairmill.procedural.captions import describe
from pairmill.procedural.scene import render, sample_scene
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.store import Dataset
from pairmill.train.captioner import TrainCaptionerConfig
from pairmill.train.samples import CACHE_BYTES, Augment, DatasetData, SeveralData, open_samples
from tests.blip_models import write_blip
from tests.train.test_train_blip import TINY, coco_folder

FIT: dict[str, Any] = {"batch": 4, "steps": 2, "holdout": 0, "precision": "fp32", "threads": 1, "lr": 1e-3}


def noisy_tar(path: Path, images: int) -> None:
    rng = random.Random(1)
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            scene = sample_scene(rng)
            picture = io.BytesIO()
            render(scene).save(picture, "JPEG")
            for ending, data in (("jpg", picture.getvalue()), ("txt", describe(sample_scene(rng), rng).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def config(folder: Path, **changes: Any) -> LoopConfig:
    curated = coco_folder(folder / "curated") if not (folder / "curated").exists() else None
    noisy = folder / "noisy.tar"
    if curated is not None:
        noisy_tar(noisy, 10)
    data = {"kind": "coco", "images": str(folder / "curated/images"), "captions": str(folder / "curated/captions.json")}
    keys = {
        "out": str(folder / "loop"),
        "curated": data,
        "pretrain": {**FIT, "scratch": TINY, "image_size": 32, "data": data},
        "captioner": FIT,
        "filter": {**FIT, "queue": 8},
        "again": {**FIT, "steps": 3},
        "run": {
            "source": [{"kind": "webdataset", "path": str(noisy)}],
            "caption": {"max_length": 12},
            "keep": {"language": None, "itm": ">= 0"},
            "dedup": {"exact": False, "semantic": None},
            "engine": {"kind": "local"},
        },
    }
    return parse_config(LoopConfig, {**keys, **changes})


def test_the_loop_makes_each_part_from_the_one_before_and_only_once(tmp_path: Path):
    first = run_loop(config(tmp_path), Silent(), lambda _: None)
    assert first.pretrain and first.captioner and first.filter and first.again
    assert first.captioner.metrics["fresh_weights"] == 0 and first.filter.metrics["fresh_weights"] == 6
    sums = {part.metrics["weights_sha256"] for part in (first.pretrain, first.captioner, first.filter, first.again)}
    assert len(sums) == 4, "captioner and filter share no weights"
    snapshot = Dataset(str(tmp_path / "loop" / "dataset")).snapshot()
    kept = query(snapshot, "SELECT source, count(*) AS n FROM texts WHERE kept GROUP BY 1").to_pylist()
    assert {row["source"] for row in kept} <= {"web", "blip"} and sum(row["n"] for row in kept) >= 10
    assert first.again.metrics["images"] == 12 + 10, "the curated set is trained on again"

    data = DatasetData(path=str(tmp_path / "loop" / "dataset"))
    kept, anew = (open_samples(data, 32, cache=cache, work=tmp_path / "loop") for cache in (CACHE_BYTES, 1))
    one, two = (samples.batch(seed=0, step=1, size=4, side=32, augment=Augment()) for samples in (kept, anew))
    assert torch.equal(one.pixels, two.pixels) and one.texts == two.texts and anew.decoded_bytes == 0
    assert kept.fingerprint() == anew.fingerprint()

    again = run_loop(config(tmp_path), Silent(), lambda _: None)
    assert (again.pretrain, again.captioner, again.filter, again.again) == (None, None, None, None)
    assert again.run.computed == {}

    latest = TrainCaptionerConfig.model_validate({**FIT, "out": "x", "model": "tiny", "data": data})
    before = _digest(latest)
    # another threshold: no model runs over the noisy set, but the result is trained on anew
    noisy = config(tmp_path)
    other = run_loop(
        noisy.model_copy(update={"run": {**noisy.run, "mix": {"recipe": "web_only"}}}),
        Silent(),
        lambda _: None,
    )
    assert other.captioner is None and other.run.computed == {} and other.run.published
    assert other.again is not None
    assert _digest(latest) != before, "there is a newer snapshot"
    trained = json.loads((tmp_path / "loop" / "again" / "metrics.json").read_text(encoding="utf-8"))
    assert trained["weights_sha256"] != first.again.metrics["weights_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filter": {**FIT, "queues": 8}}, "queue"),
        ({"again": {**FIT, "queue": 8}}, "queue"),
        ({"run": {"sources": []}}, "source"),
        ({"curated": {"kind": "x"}}, "curated"),
        ({"run": {"dataset": "x"}}, r"run\.dataset: the loop itself"),
        ({"run": {"models": "tiny"}}, r"run\.models"),
        ({"run": {"models": {"captioner": "tiny"}}}, r"run\.models\.captioner: the loop itself"),
        ({"run": {"models": {"itm": "tiny"}}}, r"run\.models\.itm: the loop itself"),
        ({"captioner": {**FIT, "out": "x"}}, r"captioner\.out: the loop itself"),
        ({"again": {**FIT, "data": {"kind": "procedural"}}}, r"again\.data: the loop itself"),
        ({"pretrain": {**FIT, "scratch": TINY, "out": "x"}}, r"pretrain\.out: the loop itself"),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_trained(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run_loop(config(tmp_path, **changes), Silent(), lambda _: None)
    assert not (tmp_path / "loop").exists()


def test_models_of_the_run_may_be_left_empty(tmp_path: Path):
    given = config(tmp_path)
    settings = noisy_run(given.model_copy(update={"run": {**given.run, "models": None}}))
    assert settings.models.captioner.path == str(tmp_path / "loop" / "captioner")


def test_a_training_is_done_again_when_what_it_is_made_from_changes(tmp_path: Path):
    write = partial(write_blip, tmp_path / "model", "captioner")
    write(seed=0)
    data = coco_folder(tmp_path / "curated")
    part = DatasetData(path="missing", snapshot=3)
    given = TrainCaptionerConfig.model_validate({**FIT, "out": "x", "model": {"path": str(tmp_path / "model")}})
    digests = [_digest(given.model_copy(update={"data": SeveralData(parts=(data,))}))]
    record = json.loads(data.captions.read_text(encoding="utf-8"))
    record["annotations"][0]["caption"] = "another text"
    data.captions.write_text(json.dumps(record), encoding="utf-8")
    digests += [_digest(given.model_copy(update={"data": SeveralData(parts=(data,))})) for _ in range(2)]
    assert digests[0] != digests[1] == digests[2]
    write(seed=1)
    assert _digest(given.model_copy(update={"data": SeveralData(parts=(data,))})) != digests[1]
    with pytest.raises(ConfigError, match="missing"):
        _digest(given.model_copy(update={"data": SeveralData(parts=(data, part))}))
    data.captions.unlink()
    with pytest.raises(ConfigError, match=r"data\.captions"):
        _digest(given.model_copy(update={"data": data}))
