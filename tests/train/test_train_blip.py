"""Training of captioners and filters: what is learnt from, the losses, and what is written."""

from __future__ import annotations

import json
import random
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
from torch.nn import functional

from pairmill.config_file import parse_config
from pairmill.errors import ConfigError
from pairmill.procedural.captions import describe, is_true
from pairmill.procedural.scene import render, sample_scene
from pairmill.train.blip import train_captioner, train_filter
from pairmill.train.blip_model import CAPTIONER, FILTER, open_blip
from pairmill.train.captioner import CaptionTask, TrainCaptionerConfig
from pairmill.train.fit import TrainProgress
from pairmill.train.itm import FilterTask, TrainFilterConfig, _draw_hard
from pairmill.train.samples import (
    Augment,
    CocoData,
    PictureRow,
    PictureSamples,
    ProceduralData,
    ProceduralSamples,
    SeveralData,
    open_samples,
)

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
    rows = [PictureRow(partial(bytes, data), (f"text {number}",), str(number // 2)) for number in range(20)]
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


# -- losses -----------------------------------------------------------------------------------------------------------


def test_the_caption_loss_is_transformers_own_with_the_prompt_masked(tmp_path: Path, scenes: ProceduralSamples):
    config = captioner_config(tmp_path)
    blip = open_blip(config, CAPTIONER)
    task = CaptionTask(blip, config)
    batch = scenes.batch(seed=0, step=0, size=8, side=32, augment=Augment())
    ours = task.losses(batch, 0, torch.Generator())["loss"]
    ids, mask = blip.tokens([config.prompt + text for text in batch.texts], "[DEC]")
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
    whole = train(config(tmp_path / "whole", optimizer="muon"))

    def stop(progress: TrainProgress) -> None:
        if progress.stage == "train" and progress.step >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("pairmill.train.fit.REPORT_EVERY_S", 0.0)
    halves = config(tmp_path / "halves", optimizer="muon")  # no checkpoint is due: being stopped makes one
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
    rows = [PictureRow(partial(bytes, pictures[n]), ("a red ring",), str(n)) for n in range(8)]
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
        ({"model": {"path": "missing"}, "scratch": None}, "config.json"),
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


def test_a_partial_checkpoint_is_an_error(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    train_captioner(captioner_config(tmp_path / "model", steps=1))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="do not fit"):
        open_blip(captioner_config(tmp_path, model={"path": str(tmp_path / "model")}, scratch=None), CAPTIONER)
