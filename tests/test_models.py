from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pairmill.errors import ConfigError
from pairmill.models import ModelRef, folder_sha256, load_clip
from pairmill.weights import tiny_clip_dir
from schemas.config import ModelChoice
from tests.filters.random_clip import write_random_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_clip(tmp_path_factory.mktemp("clip"))


def test_identity_of_a_folder_is_its_content_and_not_its_path(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("says nothing about the model")
    ref = ModelRef(path=str(copy))
    assert ref.identity() == ModelRef(path=str(folder)).identity()
    assert str(copy) not in json.dumps(ref.identity())
    before = folder_sha256(str(copy))
    weights = copy / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(1, 1))
    assert folder_sha256(str(copy)) != before


def test_identity_of_a_name_is_name_tag_and_revision() -> None:
    ref = ModelRef.of(ModelChoice(name="ViT-B-32", pretrained="openai", revision="abc"))
    assert ref.identity() == {"name": "ViT-B-32", "pretrained": "openai", "revision": "abc"}
    assert str(ref) == "ViT-B-32 openai@abc"


def test_the_word_tiny_is_the_shipped_folder() -> None:
    assert ModelRef.of(ModelChoice.model_validate("tiny")).path == str(tiny_clip_dir())


def test_a_folder_loads_and_embeds(folder: Path) -> None:
    clip = load_clip(ModelRef(path=str(folder)), "cpu")
    images = [Image.new("RGB", (30, 20), color) for color in ("red", "blue", "white")]
    vectors = clip.embed_images(images)
    assert vectors.shape == (3, 64)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert clip.embed_texts(["a red circle"]).shape == (1, 64)
    assert len(clip.embed_texts([])) == 0
    assert not clip.model.training


@pytest.mark.parametrize("missing", ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_a_config_error(folder: Path, tmp_path: Path, missing: str) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    for name in {missing} | ({"tokenizer_config.json"} if missing == "tokenizer.json" else set()):
        (copy / name).unlink()
    with pytest.raises(ConfigError, match=r"models\.clip"):
        load_clip(ModelRef(path=str(copy)), "cpu")


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    (copy / "open_clip_model.safetensors").rename(copy / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors"):
        load_clip(ModelRef(path=str(copy)), "cpu")
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        ModelRef(path=str(copy)).identity()


def test_weights_that_do_not_fit_are_a_config_error(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 32
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_clip(ModelRef(path=str(copy)), "cpu")


@pytest.mark.parametrize("kind", ["CoCa", "SigLIP"])
def test_towers_that_open_clip_cannot_cast_compute_in_bf16(folder: Path, tmp_path: Path, kind: str) -> None:
    import open_clip
    import torch
    from safetensors.torch import save_file

    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "open_clip_config.json").read_text())
    settings = config["model_cfg"]
    if kind == "CoCa":
        settings["text_cfg"] |= {"pool_type": "argmax", "embed_cls": True, "output_tokens": True}
        settings["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        settings["multimodal_cfg"] = {"context_length": 16, "vocab_size": 18, "width": 64, "heads": 2, "layers": 1}
        model = open_clip.CoCa(**settings)
    else:
        settings["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        model = open_clip.CustomTextCLIP(**settings)
    settings["custom_text"] = True
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in model.state_dict().items()}
    save_file(state, copy / "open_clip_model.safetensors")
    images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    both = [load_clip(ModelRef(path=str(copy)), "cpu", precision) for precision in ("fp32", "bf16")]
    for vectors in ([clip.embed_images(images) for clip in both], [clip.embed_texts(["a red photo"]) for clip in both]):
        assert 0 < np.abs(vectors[0] - vectors[1]).max() < 0.05


@pytest.mark.parametrize("left", [0.5, 0.0])
def test_weights_that_are_cut_off_are_a_config_error(folder: Path, tmp_path: Path, left: float) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    weights = copy / "open_clip_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(ConfigError, match="damaged or cut off"):
        load_clip(ModelRef(path=str(copy)), "cpu")


def test_a_config_of_another_kind_of_model_is_a_config_error(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["experts"] = 8
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"cannot be loaded.*experts"):
        load_clip(ModelRef(path=str(copy)), "cpu")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "ViT-L14", "pretrained": "openai"}, "did you mean ViT-L-14"),
        ({"name": "ViT-B-32"}, "needs a pretrained tag, one of: openai"),
        ({"name": "ViT-B-32", "pretrained": "open_ai"}, "did you mean openai"),
        ({"path": "/no/such/folder"}, "does not exist"),
    ],
)
def test_wrong_names_are_told_apart(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_clip(ModelRef.of(ModelChoice.model_validate(choice)), "cpu")


def test_weights_that_cannot_be_fetched_are_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match=r"cannot be fetched.*models\.clip: tiny"):
        load_clip(ModelRef("ViT-B-32", "openai"), "cpu")
    with pytest.raises(ConfigError, match="cannot be fetched"):
        load_clip(ModelRef("hf-hub:someone/some-clip"), "cpu")


def test_a_hub_repository_loads_from_its_local_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def local_copy(repository: str, **settings: object) -> str:
        asked.update(settings, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_copy)
    clip = load_clip(ModelRef("hf-hub:someone/some-clip", revision="abc"), "cpu")
    assert asked["repository"] == "someone/some-clip"
    assert asked["revision"] == "abc"
    assert clip.embed_texts(["photo"]).shape == (1, 64)


def test_a_published_tag_brings_its_preprocessing_and_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights need QuickGELU, which open_clip only warns about: a silent loss of quality."""
    import huggingface_hub
    import open_clip
    from safetensors.torch import save_file

    small = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    small["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    weights = tmp_path / "open_clip_model.safetensors"
    save_file({k: v.clone() for k, v in open_clip.CLIP(**small).state_dict().items()}, weights)
    monkeypatch.setattr("open_clip.factory.get_model_config", lambda name: json.loads(json.dumps(small)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(weights))
    clip = load_clip(ModelRef("ViT-B-32", "openai"), "cpu")
    assert any(isinstance(module, open_clip.transformer.QuickGELU) for module in clip.model.modules())
    assert tuple(clip.preprocess.transforms[-1].mean) == open_clip.OPENAI_DATASET_MEAN  # type: ignore[attr-defined]
