"""Checkpoints that do not fit are errors, which name the key and say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pairmill.blip import Checkpoint, load_captioner, load_matcher
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from schemas.config import Models
from tests.blip_models import write_blip, write_blip2


@pytest.fixture(scope="module")
def matcher(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef(path=str(write_blip(tmp_path_factory.mktemp("itm"), "itm")))


@pytest.fixture
def copy(captioners: dict[str, ModelRef], tmp_path: Path) -> Path:
    """A captioner's folder to spoil."""
    return Path(shutil.copytree(str(captioners["blip"].path), tmp_path / "copy"))


def refused(folder: Path, load: Callable[..., Checkpoint] = load_captioner) -> str:
    with pytest.raises(ConfigError) as caught:
        load(ModelRef(path=str(folder)), "cpu")
    return str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the stored weights."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def test_a_filter_is_no_captioner_and_a_captioner_no_filter(
    captioners: dict[str, ModelRef], matcher: ModelRef, tmp_path: Path
) -> None:
    told = refused(Path(str(matcher.path)))
    assert "models.captioner" in told and "is BlipForImageTextRetrieval, an image-text matching head" in told
    assert "needs a captioner: BlipForConditionalGeneration" in told
    told = refused(Path(str(captioners["blip"].path)), load_matcher)
    assert "models.itm" in told and "is BlipForConditionalGeneration, a captioner" in told
    assert "BlipForImageTextRetrieval, Blip2ForImageTextRetrieval" in told
    assert "a captioner" in refused(Path(str(captioners["blip2-opt"].path)), load_matcher)
    assert "is InstructBlipForConditionalGeneration, a captioner" in refused(
        Path(str(captioners["instructblip-t5"].path)), load_matcher
    )
    assert "an image-text matching head" in refused(write_blip2(tmp_path / "blip2", "itm"))


def test_other_models_are_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "clip", "architectures": ["CLIPModel"]}))
    assert "is CLIPModel; models.captioner needs a captioner" in refused(copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "blip", "architectures": ["BlipForQuestionAnswering"]}))
    assert "is BlipForQuestionAnswering; " in refused(copy)
    (copy / "config.json").write_text("{}")
    assert "is a model of type None" in refused(copy)
    (copy / "config.json").write_text("[not json")
    assert "no readable config.json" in refused(copy)
    (copy / "config.json").unlink()
    assert "no readable config.json" in refused(copy)


def test_without_a_named_architecture_the_weights_decide(copy: Path, captioners: dict[str, ModelRef]) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["architectures"]
    (copy / "config.json").write_text(json.dumps(config))
    assert load_captioner(ModelRef(path=str(copy)), "cpu").family == "blip"
    told = refused(copy, load_matcher)
    assert "do not make a whole BlipForImageTextRetrieval" in told and "itm_head" in told


@pytest.mark.parametrize(
    "key", ["text_decoder.bert.encoder.layer.1.output.dense.weight", "vision_model.post_layernorm.bias"]
)
def test_missing_weights(copy: Path, key: str) -> None:
    edit(copy, lambda state: state.pop(key))
    assert f"1 missing (such as {key})" in refused(copy)


def test_superfluous_weights(copy: Path) -> None:
    edit(copy, lambda state: state.update({"text_decoder.extra.weight": torch.zeros(2)}))
    assert "1 not known to it (such as text_decoder.extra.weight)" in refused(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    key = "vision_model.embeddings.position_embedding"
    edit(copy, lambda state: state.update({key: torch.zeros(1, 5, 32)}))
    assert f"1 of another shape (such as {key}" in refused(copy)


def test_constants_that_older_versions_stored_are_allowed(copy: Path) -> None:
    key = "text_decoder.bert.embeddings.position_ids"
    edit(copy, lambda state: state.update({key: torch.arange(64)[None]}))
    assert load_captioner(ModelRef(path=str(copy)), "cpu").family == "blip"


def test_weights_that_are_cut_off(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged or cut off" in refused(copy)


def test_a_shard_that_is_missing(copy: Path) -> None:
    state = load_file(copy / "model.safetensors")
    names = sorted(state)
    half = len(names) // 2
    parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, copy / part, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    assert load_captioner(ModelRef(path=str(copy)), "cpu").family == "blip"
    (copy / "model-00002-of-00002.safetensors").unlink()
    assert "models.captioner" in refused(copy)


def test_pickles_are_not_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refused(copy)


@pytest.mark.parametrize("names", [["preprocessor_config.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_what_prepares_inputs_must_be_there(copy: Path, names: list[str]) -> None:
    for name in names:
        (copy / name).unlink()
    assert "cannot be loaded" in refused(copy)


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["zebra"] = 5000
    path.write_text(json.dumps(tokenizer))
    assert "ids up to 5000, the model only" in refused(copy)


def test_code_beside_the_weights_is_not_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model", "AutoTokenizer": "evil.Tokenizer"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('was run')")
    assert load_captioner(ModelRef(path=str(copy)), "cpu").family == "blip"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist; correct models.itm.path" in refused(tmp_path / "nowhere", load_matcher)


@pytest.mark.parametrize(
    "choice", ["Salesforce/blip-image-captioning-large", "Salesforce/blip-image-captioning-large@main"]
)
def test_a_name_must_be_pinned(choice: str) -> None:
    models = Models.model_validate({"captioner": choice, "itm": choice})
    for load, ref, key in ((load_captioner, models.captioner, "captioner"), (load_matcher, models.itm, "itm")):
        with pytest.raises(ConfigError, match=rf"models.{key}: Salesforce/blip-image-captioning-large .*pin a commit"):
            load(ModelRef.of(ref), "cpu")


def test_a_pinned_name_is_fetched_at_its_revision(
    captioners: dict[str, ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = {}

    def fetch(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.update({"name": name, "revision": revision, "patterns": allow_patterns})
        return str(captioners["blip2-t5"].path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    revision = "89b09ea1789f7addf2f6d6f0dfc4ce10ab58ef84"
    choice = Models.model_validate({"captioner": f"Salesforce/blip2-flan-t5-xl@{revision}"}).captioner
    assert load_captioner(ModelRef.of(choice), "cpu").family == "blip2"
    assert (asked["name"], asked["revision"]) == ("Salesforce/blip2-flan-t5-xl", revision)
    assert not any(pattern.endswith((".bin", ".py", ".pt")) or pattern == "*" for pattern in asked["patterns"])

    def fail(*args: Any, **options: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConfigError, match=r"models.captioner: .*cannot be fetched \(OSError: no network\)"):
        load_captioner(ModelRef.of(choice), "cpu")
