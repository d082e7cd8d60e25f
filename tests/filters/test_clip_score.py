from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from filters.clip_score import CaptionClipScore, ClipScore
from pairmill.models import ModelRef, load_clip
from pairmill.stage import Batch, ErrorBudget, Kernel, apply
from schemas import fields
from schemas.config import Models
from schemas.reasons import Reason
from tests.filters.rows import noise, pairs_table

TEXTS = ["a red circle", "blue square and the small triangle", "photo", "green on the left"]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    texts = [[TEXTS[i % 4], TEXTS[(i + 1) % 4]][: 1 + i % 2] for i in range(70)]
    return pairs_table([noise(i) for i in range(70)], texts)


def run(stage: ClipScore, kernel: Kernel, table: pa.Table, rows: int) -> pa.Table:
    parts = [apply(stage, kernel, Batch(table.slice(i, rows)), ErrorBudget()) for i in range(0, table.num_rows, rows)]
    return pa.concat_tables(parts).combine_chunks()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bits_depend_on_neither_kernel_batch_nor_threads_nor_order(
    random_clip: ModelRef, table: pa.Table, precision: str
) -> None:
    stage = ClipScore(random_clip, precision, device="cpu", batch=16)
    kernel = stage.open()
    expected = run(stage, kernel, table, 256)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 7, 64, 256):
                assert run(stage, kernel, table, rows).equals(expected), (count, rows)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    order = np.random.default_rng(0).permutation(table.num_rows)
    assert run(stage, kernel, table.take(order), 64).equals(expected.take(order).combine_chunks())


def test_odd_micro_batches_are_bitwise_stable_too(random_clip: ModelRef, table: pa.Table) -> None:
    stage = ClipScore(random_clip, device="cpu", batch=7)
    kernel = stage.open()
    few = table.slice(0, 20)
    assert run(stage, kernel, few, 3).equals(run(stage, kernel, few, 20))


def test_scores_are_those_of_open_clip(random_clip: ModelRef, table: pa.Table) -> None:
    import io

    from PIL import Image

    stage = ClipScore(random_clip, device="cpu")
    few = table.slice(0, 3)
    found = run(stage, stage.open(), few, 3)
    clip = load_clip(random_clip, "cpu")
    with torch.inference_mode():
        for image, texts, scores, vector in zip(
            few["image"].to_pylist(),
            few["texts"].to_pylist(),
            found["clip_scores"].to_pylist(),
            found["clip_image"].to_pylist(),
            strict=True,
        ):
            pixels = clip.preprocess(Image.open(io.BytesIO(image)).convert("RGB"))
            left = clip.model.encode_image(pixels[None], normalize=True)[0]
            right = clip.model.encode_text(clip.tokenizer([t["text"] for t in texts]), normalize=True)
            assert np.allclose(vector, left.numpy(), atol=1e-5)
            assert np.allclose(scores, (right @ left).numpy(), atol=1e-5)
            assert np.isclose(np.linalg.norm(vector), 1, atol=1e-6)


def test_missing_images_and_texts(random_clip: ModelRef) -> None:
    image = noise(1)
    table = pairs_table([image, None, image, image, image], [["photo"], ["photo"], [], None, [None, "a red circle"]])
    stage = ClipScore(random_clip, device="cpu")
    found = run(stage, stage.open(), table, 5)
    assert found["reason"].to_pylist() == [None, Reason.IMAGE_MISSING, None, None, None]
    assert [v is None for v in found["clip_image"].to_pylist()] == [False, True, False, False, False]
    first = found["clip_score"].to_pylist()
    assert first[0] is not None
    assert first[1:] == [None] * 4
    assert found["clip_scores"].to_pylist()[1:4] == [None] * 3
    assert found["clip_scores"].to_pylist()[4][0] is None


def test_a_batch_without_any_image(random_clip: ModelRef) -> None:
    stage = ClipScore(random_clip, device="cpu")
    found = run(stage, stage.open(), pairs_table([None, None], [["photo"], []]), 2)
    assert found["reason"].to_pylist() == [Reason.IMAGE_MISSING] * 2


def test_a_model_that_says_nothing_is_no_score(random_clip: ModelRef, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(str(random_clip.path), folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.conv1.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, folder / "open_clip_model.safetensors")
    stage = ClipScore(ModelRef(path=str(folder)), device="cpu")
    found = apply(stage, stage.open(), Batch(pairs_table([noise(n) for n in range(3)], [["photo"]] * 3)), ErrorBudget())
    assert found["reason"].to_pylist() == [Reason.ERROR_KERNEL] * 3
    assert "not finite" in found["detail"][0].as_py()


def test_identity_holds_model_and_precision_but_not_hardware(random_clip: ModelRef) -> None:
    stage = ClipScore(random_clip, "fp32", "cpu", 32)
    assert stage.fingerprint() == ClipScore(random_clip, "fp32", "cuda", 64).fingerprint()
    assert stage.fingerprint() != ClipScore(random_clip, "bf16", "cpu", 32).fingerprint()
    assert stage.fingerprint() != ClipScore(ModelRef("ViT-B-32", "openai"), "fp32", "cpu", 32).fingerprint()


def test_a_gpu_is_asked_for_where_the_config_says_cuda() -> None:
    assert ClipScore.of(Models(device="cuda")).resources.gpus == 1
    auto = ClipScore.of(Models(device="auto")).resources
    assert (auto.gpus, auto.gpu_if_any) == (0, True)
    assert not ClipScore.of(Models(device="cpu")).resources.gpu_if_any
    assert ClipScore.of(Models()).resources.actor


def test_the_config_names_the_stage(random_clip: ModelRef) -> None:
    models = Models.model_validate(
        {"clip": {"path": random_clip.path}, "precision": "bf16", "device": "cpu", "batch": 8}
    )
    assert ClipScore.of(models) == ClipScore(random_clip, "bf16", "cpu", 8)
    assert fields.CLIP_SCORE in ClipScore.of(models).writes


def captioned(count: int) -> pa.Table:
    """Rows with an image and captions, the same texts as alt texts."""
    texts = [[TEXTS[(i + n) % 4] for n in range(i % 4)] for i in range(count)]
    rows = pairs_table([noise(i) for i in range(count)], texts)
    listed = [[{"text": t, "source": "blip", "reason": None, "detail": None} for t in row] for row in texts]
    return rows.append_column("captions", pa.array(listed, fields.CAPTIONS.type))


def test_captions_score_from_the_stored_embedding_what_texts_score_with_the_image(random_clip: ModelRef) -> None:
    rows = captioned(30)
    clip = ClipScore(random_clip, device="cpu", batch=16)
    scored = run(clip, clip.open(), rows, 30)
    stage = CaptionClipScore(random_clip, device="cpu", batch=16)
    assert "image" not in stage.reads
    narrow = rows.select(["uid", "captions"]).append_column("clip_image", scored["clip_image"])
    kernel = stage.open()
    found = run(stage, kernel, narrow, 30)
    assert found["caption_clip_scores"].to_pylist() == scored["clip_scores"].to_pylist()
    for size in (1, 7):
        assert run(stage, kernel, narrow, size).equals(found)
    order = np.random.default_rng(0).permutation(30)
    assert run(stage, kernel, narrow.take(order), 8).equals(found.take(order).combine_chunks())


def test_captions_that_are_null_or_have_no_embedding(random_clip: ModelRef) -> None:
    rows = captioned(4).slice(3, 1)
    clip = ClipScore(random_clip, device="cpu")
    vector = run(clip, clip.open(), rows, 1)["clip_image"].to_pylist()[0]
    entry = {"text": "photo", "source": "blip", "reason": None, "detail": None}
    nothing = {"text": None, "source": "blip", "reason": Reason.CAPTION_EMPTY.value, "detail": None}
    table = pa.table(
        {
            "uid": list("abcde"),
            "clip_image": pa.array([vector, vector, None, vector, vector], fields.CLIP_IMAGE.type),
            "captions": pa.array([[nothing, entry], [], [entry, entry], None, [nothing]], fields.CAPTIONS.type),
        }
    )
    stage = CaptionClipScore(random_clip, device="cpu")
    found = run(stage, stage.open(), table, 5)["caption_clip_scores"].to_pylist()
    assert found[0][0] is None and -1 <= found[0][1] <= 1
    assert found[1:] == [None, [None, None], None, [None]]


def test_caption_scores_follow_the_model_of_the_config(random_clip: ModelRef) -> None:
    models = Models.model_validate(
        {"clip": {"path": random_clip.path}, "precision": "bf16", "device": "cpu", "batch": 8}
    )
    stage = CaptionClipScore.of(models)
    assert stage == CaptionClipScore(random_clip, "bf16", "cpu", 8)
    assert stage.fingerprint() != ClipScore.of(models).fingerprint()
    assert CaptionClipScore.of(Models(device="cuda")).resources.gpus == 1
