"""Heads over embeddings: what torch computes, whatever the batch, from real-world state dicts; and keep judges them."""

from __future__ import annotations

import math
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.heads import EmbeddingHead, load_head
from filters.threshold import score_verdicts
from pairmill.errors import ConfigError
from pairmill.models import ModelRef, load_clip
from pairmill.plan import Recipe, compile_plan
from pairmill.procedural.scene import render, sample_scene
from pairmill.report.progress import Silent
from pairmill.run import parse_config, refresh
from pairmill.stage import Batch, ErrorBudget, Kernel, Resources, Stage, apply
from pairmill.store import Dataset, read_files
from schemas import fields
from schemas.config import ModelChoice, Models, RunConfig
from tests.steps import write_urls

WIDTH = 24


def save(path: Path, tensors: dict[str, Any], **metadata: str) -> Path:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, metadata or None)
    return path


def laion(width: int = WIDTH) -> Any:
    """The layers of LAION's aesthetic predictor: Linear and Dropout, no activation."""
    from torch import nn

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(width, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2), nn.Linear(16, 1)
            )

        def forward(self, x: Any) -> Any:
            return self.layers(x)

    return Predictor().eval()


def stage(path: Path, column: str = "aesthetic", **choice: Any) -> EmbeddingHead:
    (found,) = EmbeddingHead.all_of(Models.model_validate({"heads": {column: {"path": str(path), **choice}}}))
    return found


def batch(embeddings: Any) -> Batch:
    rows = [None if e is None else list(e) for e in embeddings]
    column = pa.array(rows, fields.CLIP_IMAGE.type)
    return Batch(pa.table({"uid": [f"{i:04d}" for i in range(len(rows))], "clip_image": column}))


def scores(head: EmbeddingHead, embeddings: Any) -> list[float | None]:
    output = apply(head, head.open(), batch(embeddings), ErrorBudget())
    assert output.column(head.column).type == pa.float32()
    return output.column(head.column).to_pylist()


def embeddings(rows: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@settings(max_examples=25)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=11),
    between=st.sampled_from(["none", "relu", "gelu"]),
    end=st.sampled_from(["none", "sigmoid", "softmax"]),
    bias=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_head_computes_what_torch_computes(
    tmp_path_factory: pytest.TempPathFactory,
    widths: list[int],
    between: str,
    end: str,
    bias: bool,
    half: bool,
    seed: int,
):
    import torch
    from torch import nn

    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip([WIDTH, *widths], widths, strict=False)):
        if number:
            modules += {"none": [nn.Dropout(0.5)], "relu": [nn.ReLU()], "gelu": [nn.GELU()]}[between]
        modules.append(nn.Linear(inputs, outputs, bias))
    modules += {"none": [], "sigmoid": [nn.Sigmoid()], "softmax": [nn.Softmax(-1)]}[end]
    model = nn.Sequential(*modules).eval()
    if half:
        model = model.half().float()  # weights as a half-precision file holds them
    state = {k: v.half() if half else v for k, v in model.state_dict().items()}
    path = save(tmp_path_factory.mktemp("head") / "head.safetensors", state, activation=between, output_activation=end)
    output = seed % widths[-1]
    x = embeddings(7, seed)
    with torch.no_grad():
        expected = model(torch.from_numpy(x))[:, output].numpy()
    np.testing.assert_allclose(scores(stage(path, output=output), x), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_of_the_aesthetic_predictor(tmp_path: Path):
    import torch

    model = laion()
    x = embeddings(9)
    with torch.no_grad():
        expected = model(torch.from_numpy(x))[:, 0].numpy()
    path = save(tmp_path / "sac+logos+ava1-l14-linearMSE.safetensors", model.state_dict())
    assert set(model.state_dict()) >= {"layers.0.weight", "layers.2.weight", "layers.4.bias"}
    np.testing.assert_allclose(scores(stage(path), x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scores(stage(tmp_path), x), expected, rtol=1e-5, atol=1e-6)  # a folder with one


def test_a_linear_layer_alone_and_its_output_activation(tmp_path: Path):
    import torch

    layer = torch.nn.Linear(WIDTH, 1)
    x = embeddings(5)
    with torch.no_grad():
        logits = layer(torch.from_numpy(x))[:, 0].numpy()
    path = save(tmp_path / "linear.safetensors", layer.state_dict(), output_activation="sigmoid")
    np.testing.assert_allclose(scores(stage(path), x), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    np.testing.assert_allclose(scores(stage(path, activation="none"), x), logits, rtol=1e-5, atol=1e-6)


def test_layers_follow_numbers_not_letters(tmp_path: Path):
    import torch
    from torch import nn

    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(12)))
    x = embeddings(3)
    with torch.no_grad():
        expected = model(torch.from_numpy(x))[:, 4].numpy()
    found = scores(stage(save(tmp_path / "deep.safetensors", model.state_dict()), output=4), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_batch(tmp_path: Path):
    head = stage(save(tmp_path / "head.safetensors", laion(512).state_dict(), activation="gelu"), activation="sigmoid")
    kernel = head.open()
    x = embeddings(65, width=512)
    whole = kernel(batch(x)).column("aesthetic")
    for size in (1, 7, 64):
        parts = [kernel(batch(x[at : at + size])).column("aesthetic") for at in range(0, len(x), size)]
        assert pa.chunked_array([c for part in parts for c in part.chunks]).equals(whole)
    assert kernel(batch(x[::-1])).column("aesthetic").to_pylist() == whole.to_pylist()[::-1]


def test_no_embedding_has_no_score_and_extremes_are_finite(tmp_path: Path):
    import torch

    path = save(tmp_path / "h.safetensors", {"weight": torch.full((2, WIDTH), 1e4), "bias": torch.tensor([-1e5, 1e5])})
    nan, one = [math.nan] * WIDTH, [1.0] * WIDTH
    rows = [None, nan, one, [-v for v in one], [1.0] * (WIDTH - 1) + [None], [math.inf] * WIDTH]
    for activation, output, expected in (
        ("sigmoid", 0, [None, None, 1.0, 0.0, None, None]),
        ("softmax", 1, [None, None, 1.0, 1.0, None, None]),
        ("none", 1, [None, None, 340000.0, -140000.0, None, None]),
    ):
        found = scores(stage(path, activation=activation, output=output), rows)
        assert found == pytest.approx(expected), activation


def test_identity_is_content_not_place(tmp_path: Path):
    import torch

    first = save(tmp_path / "a.safetensors", torch.nn.Linear(WIDTH, 2).state_dict())
    copy = tmp_path / "b.safetensors"
    copy.write_bytes(first.read_bytes())
    other = save(tmp_path / "c.safetensors", torch.nn.Linear(WIDTH, 2).state_dict())
    same = stage(first).fingerprint()
    assert stage(copy).fingerprint() == same
    changed = [stage(other), stage(first, activation="sigmoid"), stage(first, output=1), stage(first, "nsfw")]
    assert len({same, *(s.fingerprint() for s in changed)}) == 5
    assert pickle.loads(pickle.dumps(stage(first))) == stage(first)


@pytest.mark.parametrize(
    ("tensors", "choice", "says"),
    [
        ({"0.weight": (8, WIDTH), "2.weight": (1, 9)}, {}, "'0' gives 8 values, but '2' after it takes 9"),
        ({"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}, {}, "linear layers only"),
        ({"0.weight": (1, WIDTH), "0.running_mean": (3,)}, {}, "'0.running_mean'"),
        ({"0.weight": (1, WIDTH), "0.bias": (2,)}, {}, "its bias (2,)"),
        ({"kernel": (WIDTH, 1)}, {}, "'kernel'"),
        ({"weight": (2, WIDTH)}, {"output": 2}, "models.heads.aesthetic.output is 2, but the head has 2 outputs"),
        ({}, {}, "no layer"),
    ],
)
def test_a_file_that_is_no_head(tmp_path: Path, tensors: dict[str, tuple[int, ...]], choice: Any, says: str):
    import torch

    path = save(tmp_path / "h.safetensors", {name: torch.zeros(shape) for name, shape in tensors.items()})
    with pytest.raises(ConfigError) as caught:
        stage(path, **choice)
    assert says in str(caught.value) and str(caught.value).startswith("models.heads.aesthetic")


def test_files_that_cannot_be_read(tmp_path: Path):
    import torch

    with pytest.raises(ConfigError, match="no file"):
        stage(tmp_path / "missing.safetensors")
    torch.save({"weight": torch.zeros(1, WIDTH)}, tmp_path / "head.pth")
    (tmp_path / "pickled.safetensors").write_bytes(pickle.dumps({"weight": [0.0] * WIDTH}))
    for name in ("head.pth", "pickled.safetensors"):
        with pytest.raises(ConfigError, match="no safetensors file"):
            stage(tmp_path / name)
    save(tmp_path / "half.safetensors", {"weight": torch.zeros(1, WIDTH, dtype=torch.bfloat16)})
    with pytest.raises(ConfigError, match="BF16 tensors; save them as float32"):
        stage(tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match=r"holds 2 \.safetensors files"):
        stage(tmp_path)
    save(tmp_path / "odd.safetensors", {"weight": torch.zeros(1, WIDTH)}, activation="tanh")
    with pytest.raises(ConfigError, match="activation 'tanh'; known are none, relu, gelu"):
        stage(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", ["Aesthetic", "a-b", "../x", "", "1st", "min_side", "clip_score"])
def test_names_that_are_no_columns(tmp_path: Path, name: str):
    import torch

    path = save(tmp_path / "h.safetensors", {"weight": torch.zeros(1, WIDTH)})
    with pytest.raises(ConfigError, match=r"give the head another name|becomes a column"):
        stage(path, name)


def test_embeddings_of_another_width_stop_the_run(tmp_path: Path):
    head = stage(save(tmp_path / "h.safetensors", laion().state_dict()))
    budget = ErrorBudget()
    with pytest.raises(ConfigError, match=r"models\.heads\.aesthetic: the head takes embeddings of width 24, .* 23;"):
        apply(head, head.open(), batch(embeddings(4, width=23)), budget)
    assert budget.errors == 0


@dataclass(frozen=True)
class Embed(Stage):
    """Embeddings from texts: a stand-in for CLIP."""

    name = "clip"
    reads = ("text",)
    writes = (fields.CLIP_IMAGE,)
    resources = Resources(rows=16)

    def open(self) -> Kernel:
        def kernel(rows: Batch) -> pa.Table:
            vectors = [embeddings(1, len(text))[0].tolist() for text in rows.pylist("text")]
            return pa.table({"clip_image": pa.array(vectors, fields.CLIP_IMAGE.type)})

        return kernel


def recipe(config: RunConfig) -> Recipe:
    """Embed, heads, keep."""
    return Recipe("heads", (Embed(), *EmbeddingHead.all_of(config.models), *score_verdicts(config.keep)))


def test_keep_judges_the_score_of_a_head(tmp_path: Path):
    aesthetic = save(tmp_path / "a.safetensors", laion().state_dict())
    nsfw = save(tmp_path / "n.safetensors", laion().state_dict(), output_activation="sigmoid")
    texts = ["x" * n for n in range(1, 61)]
    config = parse_config(
        {
            "dataset": str(tmp_path / "dataset"),
            "recipe": "tests.filters.test_heads:recipe",
            "source": {"kind": "url_table", "path": str(write_urls(tmp_path / "urls.parquet", texts))},
            "engine": {"kind": "local"},
            "models": {"heads": {"aesthetic": {"path": str(aesthetic)}, "nsfw": {"path": str(nsfw)}}},
            "keep": {"nsfw": "< 0.5", "aesthetic": "top 40%"},
        }
    )
    names = [step.name for step in compile_plan(recipe(config)).steps]
    assert names == ["clip", "head_aesthetic", "head_nsfw", "keep_nsfw", "keep_aesthetic"]
    report = refresh(config, Silent())
    record = report.snapshot
    assert record is not None and set(report.computed) == {"clip", "head_aesthetic", "head_nsfw"}
    assert record.reasons == {"score.below_threshold": record.dropped}
    assert {"head_aesthetic.file", "head_nsfw.file"} <= set(record.models)
    first, second = (load_head(p, "", None if p == aesthetic else "sigmoid") for p in (aesthetic, nsfw))
    safe = [len(t) for t in texts if np.float32(second.score(embeddings(1, len(t))[0]) or 0) < np.float32(0.5)]
    assert 0 < len(safe) < 60
    ranked = sorted(safe, key=lambda n: -(first.score(embeddings(1, n)[0]) or 0))
    expected = set(ranked[: math.ceil(0.4 * len(safe))])
    snapshot = Dataset(config.dataset).snapshot()
    ledger = read_files(snapshot.dataset, snapshot.files("ledger"), fields.LEDGER, ["uid", "status"]).to_pylist()
    pairs = read_files(snapshot.dataset, snapshot.files("pairs"), fields.PAIRS, ["uid", "text"]).to_pylist()
    lengths = {pair["uid"]: len(pair["text"]) for pair in pairs}
    assert {lengths[row["uid"]] for row in ledger if row["status"] == "kept"} == expected


def test_the_head_of_the_examples_counts_objects():
    clip = load_clip(ModelRef.of(ModelChoice(name="tiny")))
    rng = random.Random(7)
    scenes = [sample_scene(rng, objects=1 + i % 3) for i in range(48)]
    vectors = clip.embed_images([render(scene) for scene in scenes])
    told = scores(stage(Path("examples/heads"), "objects"), vectors)
    right = [(score or 0) >= 1.5 for score in told] == [len(scene.objects) > 1 for scene in scenes]
    assert right and np.corrcoef(np.array(told, float), [len(s.objects) for s in scenes])[0, 1] > 0.9
