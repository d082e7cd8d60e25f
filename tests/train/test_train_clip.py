"""Training a CLIP: it learns, resumes, saves what open_clip loads; the shipped one is as good as its card says."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from pairmill.errors import ConfigError
from pairmill.procedural.scene import COLOURS, SHAPES, sample_scene
from pairmill.train import clip as training
from pairmill.train.clip import TrainClipConfig, train_clip
from pairmill.train.clip_data import Corpus, twin
from pairmill.train.clip_quality import area_under_curve, best_threshold, load_clip, measure_captions, measure_webs
from pairmill.train.fit import TrainProgress
from pairmill.weights import tiny_clip_dir

pytestmark = pytest.mark.filterwarnings("default")


def small(out: Path, **changes: object) -> TrainClipConfig:
    settings: dict[str, object] = {
        "out": out,
        "scenes": 96,
        "captions": 2,
        "steps": 40,
        "batch": 16,
        "warmup": 4,
        "embed_dim": 32,
        "vision_width": 8,
        "vision_layers": (1, 1, 1, 1),
        "text_width": 32,
        "text_layers": 1,
        "threads": 1,
        "late_views_weight": 1.0,
        "bf16": False,
        "checkpoint_every": 5,
        "evaluation_scenes": 50,
        "evaluation_pairs": 100,
    }
    return TrainClipConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    seen: list[TrainProgress] = []
    report = train_clip(small(tmp_path_factory.mktemp("trained")), progress=seen.append)
    return report, seen


@pytest.fixture(scope="module")
def shipped():
    return load_clip(tiny_clip_dir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / training.WEIGHTS_NAME)


def test_training_lowers_the_loss_and_tells_how_far_it_is(trained):
    report, seen = trained
    assert report.last_loss < 0.9 * report.first_loss
    assert {"train", "evaluate"} <= {progress.stage for progress in seen}
    last = [progress for progress in seen if progress.stage == "train"][-1]
    assert (last.step, last.steps) == (40, 40)
    assert last.rate > 0
    assert last.seconds_left == 0


def test_the_folder_is_complete_and_reloads_with_equal_embeddings(trained):
    report, _ = trained
    names = {path.name for path in report.out.iterdir()}
    expected = {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == expected | {"README.md", "metrics.json", "train.yaml"}
    first, second = load_clip(report.out), load_clip(report.out)
    picture = Image.effect_noise((300, 240), 80).convert("RGB")
    assert np.array_equal(first.images([picture]), second.images([picture]))
    texts = ["a red circle", "something else, in 7 words or so", "\u0434\u043e\u043c"]
    assert np.array_equal(first.texts(texts), second.texts(texts))
    stored = weights(report.out)
    assert all(tensor.dtype is torch.float16 for tensor in stored.values() if tensor.is_floating_point())
    assert yaml.safe_load((report.out / "train.yaml").read_text())["steps"] == 40
    assert json.loads((report.out / "metrics.json").read_text()) == json.loads(json.dumps(report.metrics))


def test_text_without_padding_gives_the_same_embeddings(trained):
    report, _ = trained
    clip = load_clip(report.out)
    texts = ["a red circle", "a large red circle left of a small blue square", "ring", "two shapes: a star and a cross"]
    tokens = clip.tokenize(texts)
    with torch.inference_mode():
        whole = clip.model.encode_text(tokens)
        grouped = training._encode_text(clip.model, tokens)
    assert torch.allclose(whole, grouped, atol=1e-5)


def test_an_interrupted_training_ends_like_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    report, _ = trained
    update = training._Trainer.update

    def interrupted(trainer, batch):
        if trainer.step == 12:
            raise KeyboardInterrupt
        return update(trainer, batch)

    monkeypatch.setattr(training._Trainer, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_clip(small(tmp_path))
    assert (tmp_path / training.CHECKPOINT_NAME).exists()
    with pytest.raises(ConfigError, match="another config"):
        train_clip(small(tmp_path, lr=1e-3))
    monkeypatch.setattr(training._Trainer, "update", update)
    steps = []
    train_clip(small(tmp_path), progress=lambda progress: steps.append((progress.stage, progress.step)))
    assert min(step for stage, step in steps if stage == "train") > 10
    assert not (tmp_path / training.CHECKPOINT_NAME).exists()
    ours, theirs = weights(tmp_path), weights(report.out)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_batches_hold_true_captions_first_then_false_ones(trained):
    report, _ = trained
    clip = load_clip(report.out)
    corpus = Corpus(seed=1, scenes=64, captions=2, side=96, encode=clip.tokenize)
    batch = corpus.batch(seed=1, step=3, scenes=32, junk_texts=5, side=64)
    again = corpus.batch(seed=1, step=3, scenes=32, junk_texts=5, side=64)
    assert torch.equal(batch.views, again.views)
    assert torch.equal(batch.tokens, again.tokens)
    assert batch.views.shape == (64, 3, 64, 64)
    assert batch.views.abs().max() <= 1
    own = torch.arange(32)
    assert batch.truth[own, own].all()
    assert not batch.truth[own, own + 32].any()
    assert not batch.truth[:, 64:].any()


def test_twins_differ_in_one_respect():
    rng = random.Random(3)
    seen = set()
    for _ in range(60):
        scene = sample_scene(rng)
        other = twin(scene, rng)
        before, after = (
            [(thing.colour, thing.shape, thing.size) for thing in drawn.objects] for drawn in (scene, other)
        )
        changed = [
            name
            for one, two in zip(before, after, strict=True)
            for name, a, b in zip(("colour", "shape", "size"), one, two, strict=True)
            if a != b
        ]
        assert len(changed) <= 1
        assert scene != other
        assert scene.background == other.background or changed != ["shape"]
        seen.update(changed or ["layout"])
    assert seen == {"shape", "size", "layout"}


def test_settings_are_checked():
    with pytest.raises(ValidationError, match="steps"):
        TrainClipConfig(out=Path("x"), steps=0)
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainClipConfig(out=Path("x"), learning_rate=1)  # type: ignore[call-arg]
    assert all(field.description for field in TrainClipConfig.model_fields.values())


def test_measures_on_known_scores():
    assert area_under_curve(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert area_under_curve(np.array([1.0]), np.array([0.0, 1.0, 2.0, 3.0])) == 0.375
    assert best_threshold(np.array([0.8, 0.9]), np.array([0.1, 0.2])) == pytest.approx(0.5)
    positive, negative = np.array([0.5, 0.7, 0.9]), np.array([0.1, 0.6])
    assert 0.1 < best_threshold(positive, negative) <= 0.5


def test_shipped_tokenizer_spells_any_ascii_text(shipped):
    tokenizer = shipped.tokenize.tokenizer
    unknown = tokenizer.unk_token_id
    for text in ("IMG_2034.jpg", "click here!", "".join(chr(code) for code in range(33, 127)), "zebra crossing"):
        assert unknown not in tokenizer(text)["input_ids"]
    for word in (*COLOURS, *SHAPES, "left", "above"):
        assert len(tokenizer(word)["input_ids"]) == 3
    assert tokenizer("A Red CIRCLE")["input_ids"] == tokenizer("a red circle")["input_ids"]
    assert {"[DEC]", "[ENC]"} <= set(tokenizer.get_vocab())
    long = tokenizer("a red circle and " * 40, truncation=True)["input_ids"]
    assert long[-1] == tokenizer.sep_token_id


def test_shipped_model_is_as_good_as_promised_on_new_scenes(shipped):
    auc = measure_captions(shipped, scenes=300, seed=77)["auc"]
    assert auc["random"] >= 0.99
    assert auc["colour"] >= 0.95
    assert auc["size"] >= 0.88
    assert auc["shape"] >= 0.88


def test_shipped_thresholds_hold_on_webs_of_the_measured_size(shipped):
    metrics = json.loads((tiny_clip_dir() / "metrics.json").read_text())
    for use, least in (("mismatch", 0.95), ("dedup", 0.98)):
        assert min(metrics[use]["precision"], metrics[use]["recall"]) >= least
    found = measure_webs(shipped, pairs=400)
    assert min(found["mismatch"]["precision"], found["mismatch"]["recall"]) >= 0.9
    assert min(found["dedup"]["precision"], found["dedup"]["recall"]) >= 0.95


def test_shipped_folder_is_small_and_its_card_matches_its_metrics():
    folder = tiny_clip_dir()
    files = list(folder.iterdir())
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    metrics = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"**{metrics['mismatch']['threshold']}**" in card
    assert f"**{metrics['dedup']['threshold']}**" in card
    assert f"{metrics['captions']['auc']['random']:.4f}" in card
    config = TrainClipConfig(**yaml.safe_load((folder / "train.yaml").read_text()))
    assert (config.steps, config.seed) == (metrics["steps"], metrics["seed"])


def test_torchvision_is_importable_without_its_operators():
    from pairmill._torchvision import ensure_torchvision

    ensure_torchvision()
    ensure_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchvision.transforms import functional

    assert functional.pil_to_tensor(Image.new("RGB", (4, 3))).shape == (3, 3, 4)
