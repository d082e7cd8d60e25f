"""Training of captioners and filters: what is learnt from, the losses, and what is written."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch.nn import functional

from pairmill.cli import _TrainingLines
from pairmill.config_file import parse_config
from pairmill.errors import ConfigError, PairmillError
from pairmill.procedural.captions import describe, is_true
from pairmill.procedural.scene import COLOURS, SHAPES, render, sample_scene
from pairmill.report.progress import Silent
from pairmill.train.blip import train_captioner, train_filter
from pairmill.train.blip_model import CAPTIONER, FILTER, open_blip
from pairmill.train.captioner import CaptionTask, TrainCaptionerConfig
from pairmill.train.fit import Rows, TrainProgress, measure
from pairmill.train.itm import FilterTask, TrainFilterConfig, _draw_hard
from pairmill.train.samples import (
    CACHE_BYTES,
    Augment,
    CocoData,
    PictureRow,
    PictureSamples,
    ProceduralData,
    ProceduralSamples,
    SeveralData,
    SeveralSamples,
    open_samples,
)
from pairmill.train.views import make_views

TINY = {
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
    },
    "text": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
    },
    "projection": 16,
}
DROPOUT = {**TINY, "text": {**TINY["text"], "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1}}
COMMON: dict[str, Any] = {
    "data": {"kind": "procedural", "scenes": 48, "captions": 2},
    "holdout": 0,
    "scratch": TINY,
    "image_size": 32,
    "steps": 6,
    "batch": 8,
    "lr": 2e-3,
    "precision": "fp32",
    "threads": 1,
}


def captioner_config(out: Path, **keys: Any) -> TrainCaptionerConfig:
    return parse_config(TrainCaptionerConfig, {**COMMON, "out": str(out), **keys})


def filter_config(out: Path, **keys: Any) -> TrainFilterConfig:
    return parse_config(TrainFilterConfig, {**COMMON, "queue": 24, "out": str(out), **keys})


@pytest.fixture(autouse=True)
def small_measures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pairmill.train.blip.HELD_OUT_SCENES", 12)


@pytest.fixture(scope="module")
def scenes() -> ProceduralSamples:
    return ProceduralSamples(ProceduralData(scenes=60, captions=2, seed=3), 32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a captioner, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "model"
    return train_captioner(captioner_config(folder, steps=1, data={"kind": "procedural", "scenes": 4})).out


def checkpoint_metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return dict(file.metadata())


def coco_folder(folder: Path, images: int = 12) -> CocoData:
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    record: dict[str, Any] = {"images": [], "annotations": []}
    for number in range(images):
        scene = sample_scene(rng)
        name = f"{number:04d}.jpg"
        render(scene).save(folder / "images" / name)
        record["images"].append({"id": number, "file_name": name})
        for _ in range(2):
            record["annotations"].append({"image_id": number, "caption": describe(scene, rng).capitalize() + "."})
    (folder / "captions.json").write_text(json.dumps(record), encoding="utf-8")
    return CocoData(images=folder / "images", captions=folder / "captions.json")


# -- samples ----------------------------------------------------------------------------------------------------------


def test_scenes_have_true_texts_and_false_negatives_also_when_mirrored(scenes: ProceduralSamples):
    """Judged through `fits`, whose truth the oracle of mirrored scenes computes."""
    mirrored, upright = 0, {scenes.texts[place] for place in scenes._true.flat}
    for step in range(4):
        batch = scenes.batch(seed=0, step=step, size=20, side=32, augment=Augment())
        assert bool(batch.fits.diagonal().all())
        assert batch.pixels.shape == (20, 3, 32, 32) and float(batch.pixels.abs().max()) <= 1
        mirrored += sum(text not in upright for text in batch.texts)
    assert mirrored > 0


def test_a_view_without_augmentation_is_judged_as_its_own_scene():
    rng = random.Random("samples:5")
    first = sample_scene(rng)
    found = ProceduralSamples(ProceduralData(scenes=2, captions=3, seed=5), 32)
    batch = found.draw(np.array([0, 1]), np.random.default_rng(0), 32, None)
    assert is_true(batch.texts[0], first)
    assert batch.negatives[0] is not None and is_true(batch.negatives[0], first) is False


def test_a_batch_is_a_function_of_seed_and_step(scenes: ProceduralSamples):
    one, two, other = (scenes.batch(seed=1, step=step, size=8, side=32, augment=Augment()) for step in (3, 3, 4))
    assert torch.equal(one.pixels, two.pixels) and one.texts == two.texts
    assert not torch.equal(one.pixels, other.pixels)


def test_coco_files_become_samples_and_an_epoch_sees_each_image_once(tmp_path: Path):
    samples = open_samples(coco_folder(tmp_path), 32)
    seen = [
        int(row)
        for step in range(3)
        for row in samples.batch(seed=0, step=step, size=4, side=32, augment=Augment()).ids
    ]
    assert sorted(seen) == list(range(12))
    texts = samples.batch(seed=0, step=0, size=4, side=32, augment=Augment()).texts
    assert all(text == text.lower() and not text.endswith(".") for text in texts)


def test_texts_of_one_identity_fit_each_other_and_are_held_out_together():
    picture = Image.new("RGB", (40, 30), (200, 30, 30))
    data = _png(picture)
    rows = [PictureRow("a", partial(bytes, data), (f"text {number}",), str(number // 2)) for number in range(20)]
    samples = PictureSamples(rows, 32)
    batch = samples.draw(np.array([0, 1, 2]), np.random.default_rng(0), 32, None)
    assert batch.fits.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    train, held = samples.split(0.3)
    assert len(held) == 6 and not set(samples.ids[train]) & set(samples.ids[held])


def _png(picture: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_several_sources_keep_their_identities_apart(tmp_path: Path):
    data = SeveralData(parts=(coco_folder(tmp_path), ProceduralData(scenes=4, captions=1)))
    samples = open_samples(data, 32)
    assert len(samples) == 16 and len(set(samples.ids)) == 16
    batch = samples.draw(np.array([0, 13, 5, 15]), np.random.default_rng(0), 32, Augment())
    assert sorted(batch.ids.tolist()) == sorted(samples.ids[[0, 13, 5, 15]]) and len(batch.texts) == 4
    assert bool(batch.fits.diagonal().all()) and not batch.fits[0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": "missing.json"}, "data.captions"),
        ({"images": "missing"}, "data.images"),
    ],
)
def test_wrong_coco_paths_name_the_key(tmp_path: Path, change: dict[str, str], message: str):
    data = coco_folder(tmp_path).model_dump()
    with pytest.raises(ConfigError, match=message):
        open_samples(CocoData.model_validate({**data, **change}), 32)


def test_batches_are_the_same_whether_pictures_are_kept_or_decoded_anew(tmp_path: Path):
    data = coco_folder(tmp_path)
    kept, anew = (open_samples(data, 32, cache=cache) for cache in (12 * 3 * 40 * 40, 12 * 3 * 40 * 40 - 1))
    assert kept.decoded_bytes == 12 * 3 * 40 * 40 and anew.decoded_bytes == 0
    for augment in (Augment(), Augment(flip=True)):
        one, two = (s.batch(seed=0, step=1, size=5, side=32, augment=augment) for s in (kept, anew))
        assert torch.equal(one.pixels, two.pixels) and one.texts == two.texts
    plain, same = (s.draw(np.arange(12), np.random.default_rng(0), 32, None) for s in (kept, anew))
    assert torch.equal(plain.pixels, same.pixels)


def test_several_sources_share_the_memory_for_pictures(tmp_path: Path):
    data = coco_folder(tmp_path)
    several = SeveralData(parts=(data, data))
    assert open_samples(several, 32, cache=2 * 12 * 3 * 40 * 40).decoded_bytes == 2 * 12 * 3 * 40 * 40
    assert open_samples(several, 32, cache=2 * 12 * 3 * 40 * 40 - 1).decoded_bytes == 12 * 3 * 40 * 40


def test_twins_are_held_out_together_and_stand_in_one_batch(scenes: ProceduralSamples):
    for samples in (scenes, SeveralSamples([scenes, scenes])):
        train, held = samples.split(0.2)
        assert len(held) == len(samples) // 5
        for rows in (train, held):
            assert {row ^ 1 for row in rows.tolist()} == set(rows.tolist())
    train, _ = scenes.split(0.2)
    rows = Rows(scenes, train)
    seen = []
    for step in range(6):
        ids = rows.batch(seed=0, step=step, size=8, side=32, augment=Augment()).ids.tolist()
        assert len(ids) == 8 and {row ^ 1 for row in ids} == set(ids)
        seen += ids
    assert sorted(seen) == train.tolist()


def test_a_view_of_strength_0_is_the_picture():
    pictures = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    views = make_views(np.random.default_rng(0), pictures, np.full((6, 4), 0.1), np.zeros(6, dtype=bool), 32, 0.0)
    assert torch.allclose(views, pictures / 127.5 - 1, atol=1e-4)
    noised = make_views(np.random.default_rng(0), pictures, np.full((6, 4), 0.1), np.zeros(6, dtype=bool), 32, 1e-9)
    assert not torch.allclose(noised, pictures / 127.5 - 1, atol=1e-2)


def test_coco_names_may_have_folders_null_captions_are_left_out_and_photographs_stand_upright(tmp_path: Path):
    images = tmp_path / "images"
    (images / "train").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    lying = Image.new("RGB", (64, 32), (0, 0, 0))
    lying.paste((255, 255, 255), (0, 0, 32, 32))  # white on the left: on top when turned
    lying.save(images / "train" / "a.png", exif=exif)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(images / "a.png")
    Image.new("RGB", (32, 32), (90, 90, 90)).save(images / "b.png")
    names = ["train/a.png", "train2014/b.png", "train/a.png"]
    record = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": 0, "caption": "a"},
            {"image_id": 0, "caption": None},
            {"image_id": 1, "caption": "b"},
            {"image_id": 2, "caption": None},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(record), encoding="utf-8")
    samples = open_samples(CocoData(images=images, captions=tmp_path / "captions.json"), 32)
    assert list(samples.texts) == [("a",), ("b",)]
    batch = samples.draw(np.array([0, 1]), np.random.default_rng(0), 32, None)
    assert batch.pixels[0, :, :12].min() > 0.9 and batch.pixels[0, :, 20:].max() < -0.9
    assert batch.pixels[1].mean() == pytest.approx(90 / 127.5 - 1, abs=0.01)


@pytest.mark.parametrize("cache", [CACHE_BYTES, 1])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, cache: int):
    data = coco_folder(tmp_path)
    (data.images / "0003.jpg").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"0003\.jpg.*take it out"):
        open_samples(data, 32, cache=cache).draw(np.arange(12), np.random.default_rng(0), 32, None)


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a picture of ", "a picture of"])
def test_the_caption_loss_is_transformers_own_with_the_prompt_masked(
    tmp_path: Path, scenes: ProceduralSamples, prompt: str
):
    config = captioner_config(tmp_path, prompt=prompt)
    blip = open_blip(config, CAPTIONER)
    task = CaptionTask(blip, config)
    batch = scenes.batch(seed=0, step=0, size=8, side=32, augment=Augment())
    ours = task.losses(batch, 0, torch.Generator())["loss"]
    ids, mask = blip.tokens(["a picture of " + text for text in batch.texts], "[DEC]")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100  # [DEC] a picture of
    image = blip.model.vision_model(pixel_values=batch.pixels).last_hidden_state
    theirs = blip.model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=image, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_contrast_uses_albefs_soft_targets(tmp_path: Path, scenes: ProceduralSamples):
    config = filter_config(tmp_path, alpha_steps=1)
    blip = open_blip(config, FILTER)
    task = FilterTask(blip, config, len(scenes))
    first, batch = (scenes.batch(seed=0, step=step, size=8, side=32, augment=Augment()) for step in (0, 1))
    task.losses(first, 0, torch.Generator())  # fills part of the queue
    with torch.no_grad():
        vision, text = blip.model.vision_model, blip.model.text_encoder
        ids, mask = blip.tokens(batch.texts)

        def vectors(pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor):
            image = functional.normalize(blip.model.vision_proj(vision(pixel_values=pixels)[0][:, 0]), dim=-1)
            words = functional.normalize(blip.model.text_proj(text(ids, attention_mask=mask)[0][:, 0]), dim=-1)
            return image, words

        image, words = vectors(batch.pixels, ids, mask)
        old_image, old_words = vectors(first.pixels, *blip.tokens(first.texts))
        tau, alpha = config.temperature, config.alpha
        expected = 0.0
        for query, keys, fits in (
            (image, torch.cat([words, old_words]), batch.fits),
            (words, torch.cat([image, old_image]), batch.fits.T),
        ):
            scores = query @ keys.T / tau
            same = batch.ids[:, None] == first.ids[None, :]
            right = torch.cat([fits, same], 1).float()
            target = alpha * scores.softmax(1) + (1 - alpha) * right / right.sum(1, keepdim=True)
            expected -= float((target * scores.log_softmax(1)).sum(1).mean()) / 2
    assert task.losses(batch, 1, torch.Generator())["itc"].item() == pytest.approx(expected, abs=1e-4)


def test_the_queue_takes_the_last_of_a_batch_that_is_larger(tmp_path: Path, scenes: ProceduralSamples):
    config = filter_config(tmp_path, queue=5)
    task = FilterTask(open_blip(config, FILTER), config, len(scenes))
    for step in range(2):
        batch = scenes.batch(seed=0, step=step, size=8, side=32, augment=Augment())
        task.losses(batch, step, torch.Generator())
    queue = task.extra_state()
    assert queue["queue.ids"].tolist() == batch.ids[-5:].tolist() and int(queue["queue.next"]) == 0
    with torch.no_grad():
        image = task.model.vision_model(pixel_values=batch.pixels)[0][:, 0]
        expected = functional.normalize(task.model.vision_proj(image), dim=-1)
    assert torch.allclose(queue["queue.image"], expected[-5:], atol=1e-5)


@pytest.mark.parametrize(
    ("identities", "measured"), [([7, 7, 7, 7], False), ([1, 2, 1, 2], True), ([1, 1, 1, 2], True), ([3], False)]
)
def test_a_filter_is_measured_on_what_can_be_wrong(tmp_path: Path, identities: list[int], measured: bool):
    rows = [
        PictureRow(
            str(n), partial(bytes, _png(Image.new("RGB", (32, 32), (60 * n, 0, 0)))), (f"{n} red",), str(identity)
        )
        for n, identity in enumerate(identities)
    ]
    samples = PictureSamples(rows, 32)
    config = filter_config(tmp_path)
    task = FilterTask(open_blip(config, FILTER), config, 4)
    with torch.inference_mode():
        figures = task.evaluate(samples, np.arange(len(rows)))
    assert set(figures) == ({"itm_auc", "itm_loss", "recall_at_1"} if measured else set())
    assert all(math.isfinite(value) for value in figures.values())


def test_averaged_encoders_follow_with_the_momentum(tmp_path: Path, scenes: ProceduralSamples):
    config = filter_config(tmp_path, momentum=0.9)
    blip = open_blip(config, FILTER)
    task = FilterTask(blip, config, len(scenes))
    before = blip.model.vision_proj.weight.detach().clone()
    with torch.no_grad():
        blip.model.vision_proj.weight.add_(1.0)
    task.after_update(1)
    assert torch.allclose(task.extra_state()["vision_proj.weight"], before + 0.1, atol=1e-6)


def test_hard_negatives_never_fit_and_are_alike():
    similarity = torch.zeros(64, 64)
    similarity[:, 7] = 9.0
    fits = torch.eye(64, dtype=torch.bool)
    fits[:, 3] = True
    chosen, has = _draw_hard(similarity, fits, torch.Generator().manual_seed(0))
    rows = torch.arange(64)
    assert bool(has.all()) and not bool(fits[rows, chosen].any())
    assert int((chosen == 7).sum()) > 55
    chosen, has = _draw_hard(similarity, torch.ones_like(fits), torch.Generator().manual_seed(0))
    assert not bool(has.any())


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "train"), [(captioner_config, train_captioner), (filter_config, train_filter)])
def test_an_interrupted_training_ends_with_the_same_weights(
    tmp_path: Path, config: Any, train: Any, monkeypatch: pytest.MonkeyPatch
):
    config = partial(config, optimizer="muon", scratch=DROPOUT)
    whole = train(config(tmp_path / "whole"))

    def stop(progress: TrainProgress) -> None:
        if progress.stage == "train" and progress.step >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("pairmill.train.fit.REPORT_EVERY_S", 0.0)
    halves = config(tmp_path / "halves")  # no checkpoint is due: being stopped makes one
    with pytest.raises(KeyboardInterrupt):
        train(halves, progress=stop)
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)

        def press_ctrl_c(progress: TrainProgress) -> None:
            if progress.stage == "train" and progress.step == 4:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train(halves, progress=press_ctrl_c)
        assert signal.getsignal(signal.SIGINT) is before
    again = train(halves)
    assert again.metrics["weights_sha256"] == whole.metrics["weights_sha256"]
    assert not (tmp_path / "halves" / "checkpoint.safetensors").exists()


def test_the_history_of_an_interrupted_training_is_that_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With more than 400 steps an entry is the mean of several; the interrupt falls between two entries."""
    monkeypatch.setattr("pairmill.train.fit.REPORT_EVERY_S", 0.0)
    keys = {"steps": 800, "batch": 2, "data": {"kind": "procedural", "scenes": 4, "captions": 1}}
    stopped = []

    def stop(progress: TrainProgress) -> None:
        if progress.stage == "train" and progress.step in (3, 5):
            stopped.append(progress.step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_captioner(captioner_config(tmp_path / "halves", **keys), progress=stop)
    with pytest.raises(KeyboardInterrupt):
        train_captioner(captioner_config(tmp_path / "halves", **keys), progress=stop)

    def late(progress: TrainProgress) -> None:
        if progress.stage == "train" and progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_captioner(captioner_config(tmp_path / "whole", **keys), progress=late)
    found = [checkpoint_metadata(tmp_path / name) for name in ("halves", "whole")]
    assert stopped == [3, 5] and found[0]["history"] == found[1]["history"] and found[0]["sums"] == found[1]["sums"]
    assert [entry["step"] for entry in json.loads(found[0]["history"])] == [2, 4]


def test_a_loss_that_is_no_number_ends_the_training_before_it_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = captioner_config(tmp_path, checkpoint_every=1)
    right = CaptionTask.losses

    def wrong(self: CaptionTask, batch: Any, step: int, generator: Any) -> dict[str, torch.Tensor]:
        return {"loss": right(self, batch, step, generator)["loss"] * (math.nan if step == 3 else 1)}

    monkeypatch.setattr(CaptionTask, "losses", wrong)
    with pytest.raises(PairmillError, match=r"step 4 of 6.*nan.*Lower lr.*warmup"):
        train_captioner(config)
    assert checkpoint_metadata(tmp_path)["step"] == "3"
    from safetensors.torch import load_file

    assert all(bool(value.isfinite().all()) for value in load_file(tmp_path / "checkpoint.safetensors").values())


def test_epochs_are_counted_in_batches_that_there_are(tmp_path: Path):
    few = captioner_config(tmp_path, steps=None, epochs=5, batch=64)
    assert few.step_count(16) == 5 and few.step_count(64) == 5 and few.step_count(640) == 50


def test_the_model_is_there_before_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> dict[str, float]:
        raise ZeroDivisionError

    monkeypatch.setattr(CaptionTask, "evaluate", fails)
    with pytest.raises(ZeroDivisionError):
        train_captioner(captioner_config(tmp_path, holdout=0.2))
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "checkpoint.safetensors").is_file()


def test_a_part_of_the_held_out_images_is_drawn_from_all_of_them(tmp_path: Path, scenes: ProceduralSamples):
    seen: list[np.ndarray] = []

    class Looks(CaptionTask):
        def evaluate(self, samples: Any, rows: Any) -> dict[str, float]:
            seen.append(rows)
            return {}

    config = captioner_config(tmp_path, evaluation_images=20)
    task = Looks(open_blip(config, CAPTIONER), config)
    for _ in range(2):
        measure(task, scenes, np.arange(60), config)
    assert np.array_equal(*seen) and len(set(seen[0].tolist())) == 20 and seen[0].max() > 40
    measure(task, scenes, np.arange(11), config)
    assert seen[2].tolist() == list(range(11))


def test_a_captioner_learns_and_its_folder_is_whole(tmp_path: Path):
    config = captioner_config(tmp_path / "out", steps=40, accumulate=2, evaluate_every=20, holdout=0.2, warmup=5)
    report = train_captioner(config)
    assert report.last_loss < report.first_loss - 0.5
    assert report.metrics["samples_seen"] == 40 * 16 and report.metrics["held_out"] == 10
    from transformers import BlipForConditionalGeneration

    _, info = BlipForConditionalGeneration.from_pretrained(config.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with Image.open(config.out / "curves.png") as curves:
        assert curves.width > 600 and np.unique(np.asarray(curves.convert("L"))).size > 10
    again = yaml.safe_load((config.out / "train.yaml").read_text(encoding="utf-8"))
    assert TrainCaptionerConfig.model_validate({**again, "out": str(config.out)}) == config
    card = (config.out / "README.md").read_text(encoding="utf-8")
    assert "BlipForConditionalGeneration" in card and str(tmp_path) not in card
    history = json.loads((config.out / "history.json").read_text(encoding="utf-8"))
    assert {"eval_loss"} <= {key for entry in history for key in entry}


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path: Path):
    """With one text each and no augmentation, two halves of a batch and the whole give the same first step."""
    pictures = [_png(Image.new("RGB", (32, 32), (n * 20, 0, 0))) for n in range(8)]
    rows = [PictureRow(str(n), partial(bytes, pictures[n]), ("a red ring",), str(n)) for n in range(8)]
    gradients = []
    for batch, accumulate in ((8, 1), (4, 2)):
        config = captioner_config(tmp_path, batch=batch, accumulate=accumulate)
        task = CaptionTask(open_blip(config, CAPTIONER), config)
        samples = PictureSamples(rows, 32)
        for part in range(accumulate):
            some = samples.draw(np.arange(part * batch, (part + 1) * batch), np.random.default_rng(0), 32, None)
            (task.losses(some, 0, torch.Generator())["loss"] / accumulate).backward()
        gradients.append(task.model.vision_model.embeddings.patch_embedding.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.allclose(*gradients, atol=1e-6)


def test_a_filter_starts_from_a_captioner(tmp_path: Path):
    train_captioner(captioner_config(tmp_path / "captioner", steps=2))
    config = filter_config(tmp_path / "filter", model={"path": str(tmp_path / "captioner")}, scratch=None)
    blip = open_blip(config, FILTER)
    captioner = open_blip(
        captioner_config(tmp_path, model={"path": str(tmp_path / "captioner")}, scratch=None), CAPTIONER
    )
    ours, theirs = blip.model.state_dict(), captioner.model.state_dict()
    key = "encoder.layer.0.crossattention.self.key.weight"
    assert torch.equal(ours["text_encoder." + key], theirs["text_decoder.bert." + key])
    assert set(blip.fresh) == {
        *(f"{head}.{part}" for head in ("itm_head", "vision_proj", "text_proj") for part in ("weight", "bias"))
    }
    report = train_filter(config)
    assert report.metrics["fresh_weights"] == 6


def test_another_input_size_interpolates_positions(tmp_path: Path):
    train_captioner(captioner_config(tmp_path / "small", steps=1))
    config = captioner_config(
        tmp_path / "large", model={"path": str(tmp_path / "small")}, scratch=None, image_size=48, steps=1
    )
    train_captioner(config)
    settings = json.loads((tmp_path / "large" / "config.json").read_text(encoding="utf-8"))
    assert settings["vision_config"]["image_size"] == 48
    from transformers import BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "large")
    assert model.vision_model.embeddings.position_embedding.shape[1] == 37


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scratch": None}, "either model"),
        ({"steps": None}, "either steps"),
        ({"model": {"path": "missing"}, "scratch": None}, r"model: .*missing.*model\.path"),
        ({"model": {"name": "Salesforce/blip-image-captioning-base"}, "scratch": None}, "model: .*pin a commit"),
        ({"seed": -1}, "seed"),
        ({"image_size": 33}, "image_size: 33 is no multiple of the patch size 8; 32 is one"),
        (
            {"scratch": {**TINY, "vision": {**TINY["vision"], "hiden_size": 8}}},
            r"scratch\.vision\.hiden_size.*hidden_size",
        ),
        ({"scratch": {**TINY, "text": {**TINY["text"], "hidden_dropout": 0.1}}}, r"scratch\.text.*hidden_dropout_prob"),
        ({"scratch": {**TINY, "text": {**TINY["text"], "num_attention_heads": 5}}}, r"scratch\.text\.hidden_size"),
        ({"scratch": {**TINY, "text": {**TINY["text"], "vocab_size": 9}}}, r"scratch\.text\.vocab_size"),
        ({"scratch": {**TINY, "vision": {**TINY["vision"], "hidden_act": "no"}}}, "scratch: "),
        ({"batchs": 3}, "batch"),
        ({"scratch": {**TINY, "tokenizer": "missing"}}, "scratch.tokenizer"),
    ],
)
def test_wrong_configs_say_what_is_wrong(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        open_blip(captioner_config(tmp_path, **change), CAPTIONER)


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path):
    config = captioner_config(tmp_path, checkpoint_every=1)

    def stop(progress: TrainProgress) -> None:
        if progress.stage == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_captioner(config, progress=stop)
    with pytest.raises(ConfigError, match="another config"):
        train_captioner(captioner_config(tmp_path, lr=1e-3))


def test_a_checkpoint_of_other_data_or_a_cut_one_is_refused(tmp_path: Path):
    data = coco_folder(tmp_path / "coco")
    config = captioner_config(tmp_path / "out", checkpoint_every=1, data=data.model_dump(mode="json"))

    def stop(progress: TrainProgress) -> None:
        if progress.stage == "train":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_captioner(config, progress=stop)
    record = json.loads(data.captions.read_text(encoding="utf-8"))
    record["annotations"][0]["caption"] = "another text"
    data.captions.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other data.*delete it"):
        train_captioner(config)
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"damaged.*delete it"):
        train_captioner(config)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "no readable config.json"),
        ("config.json", b'{"architectures": ["Other"]}', "holds a Other"),
        ("preprocessor_config.json", None, "preprocessor_config.json"),
        ("preprocessor_config.json", b'{"image_mean": [0.5], "image_std": [0.5]}', "three numbers"),
        ("tokenizer.json", None, "no tokenizer"),
        ("model.safetensors", b"cut", "damaged or cut off"),
        ("model.safetensors", None, "safetensors"),
    ],
)
def test_an_incomplete_checkpoint_is_named_with_what_it_lacks(
    tmp_path: Path, finished: Path, name: str, content: bytes | None, message: str
):
    folder = tmp_path / "model"
    shutil.copytree(finished, folder)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"(?s)^model: .*{message}"):
        open_blip(captioner_config(tmp_path, model={"path": str(folder)}, scratch=None), CAPTIONER)


def test_weights_of_another_shape_and_tokenizers_without_a_vocabulary_are_refused(tmp_path: Path, finished: Path):
    folder = tmp_path / "model"
    shutil.copytree(finished, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["vision_config"]["intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ConfigError, match="of another shape"):
        open_blip(captioner_config(tmp_path, model={"path": str(folder)}, scratch=None), CAPTIONER)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"scratch\.tokenizer.*no tokenizer"):
        open_blip(captioner_config(tmp_path, scratch={**TINY, "tokenizer": str(folder)}), CAPTIONER)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_by_the_key(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^device is cuda"):
        open_blip(captioner_config(tmp_path, device="cuda"), CAPTIONER)


def test_progress_of_several_sources_is_a_segment_each(tmp_path: Path):
    """40 pictures, 40 again and 12: nothing goes back, nothing is lost."""
    told: list[Any] = []

    class Tells(Silent):
        def start(self, title: str, rows: int, unit: str = "rows") -> None:
            told.append((title, rows, unit, []))

        def advance(self, rows: int, dropped: Any) -> None:
            told[-1][3].append(rows)

    parts = [coco_folder(tmp_path / str(n), images) for n, images in enumerate((40, 40, 12))]
    lines = _TrainingLines(Tells())
    open_samples(
        SeveralData(parts=tuple(parts)), 32, lambda done, total: lines.tell(TrainProgress("pictures", done, total))
    )
    for step in (2, 5):
        lines.tell(TrainProgress("train", step, 5))
    pictures = [("pictures", count, "rows", [count]) for count in (40, 40, 12)]
    assert told == [*pictures, ("train", 5, "steps", [2, 3])]


def test_a_card_names_all_sources_and_a_filters_own_parameters(tmp_path: Path):
    coco = coco_folder(tmp_path / "coco").model_dump(mode="json")
    data = {"kind": "several", "parts": [coco, {"kind": "procedural", "scenes": 4, "captions": 1}]}
    report = train_filter(filter_config(tmp_path / "out", data=data, steps=1))
    card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    assert "on COCO captions and 4 procedural scenes:" in card
    from transformers import BlipForImageTextRetrieval

    plain = BlipForImageTextRetrieval.from_pretrained(tmp_path / "out")
    assert report.metrics["parameters"] == sum(value.numel() for value in plain.parameters())


def test_a_partial_checkpoint_is_an_error(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    train_captioner(captioner_config(tmp_path / "model", steps=1))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="do not make a whole"):
        open_blip(captioner_config(tmp_path, model={"path": str(tmp_path / "model")}, scratch=None), CAPTIONER)


def test_located_captions_say_where_things_are_also_when_mirrored():
    samples = ProceduralSamples(ProceduralData(scenes=40, captions=2, seed=4, located=1.0), 32)
    for augment, row in ((None, 3), (Augment(), 3), (Augment(), 8)):
        batch = samples.draw(np.full(20, row), np.random.default_rng(1), 32, augment)
        assert bool(batch.fits.diagonal().all())
        for text, pixels in zip(batch.texts, batch.pixels, strict=True):
            for thing in text.split(", "):
                _, size, colour, shape, column, place_row = thing.split()
                assert size in ("small", "large") and shape in SHAPES
                found = (pixels.permute(1, 2, 0) * 127.5 + 127.5 - torch.tensor(COLOURS[colour])).abs().amax(2) < 40
                if text.count(f" {colour} ") > 1 or int(found.sum()) < 6:
                    continue  # two things of one colour, or one that a background hides
                rows, columns = (found.nonzero().float().mean(0) / 4).tolist()  # 4 pixels a cell
                assert abs(columns - 0.5 - int(column)) < 1.8 and abs(rows - 0.5 - int(place_row)) < 1.8
