from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from filters.itm import ItmScore, enc_token, matcher_of
from pairmill.blip import load_matcher
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from pairmill.stage import Batch, ErrorBudget, Kernel, apply
from schemas import fields
from schemas.config import Models
from schemas.reasons import Reason
from tests.blip_models import library, write_blip, write_blip2
from tests.filters.rows import noise, pairs_table

TEXTS = [
    "a red circle",
    "blue square and the small triangle",
    "photo",
    "the large green square on the left",
    "a of red",
]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef(path=str(write_blip(tmp_path_factory.mktemp("itm"), "itm")))


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef(path=str(write_blip2(tmp_path_factory.mktemp("itm2"), "itm")))


@pytest.fixture(scope="module")
def kernel(blip: ModelRef) -> Kernel:
    return stage(blip).open()


def stage(ref: ModelRef, **options: Any) -> ItmScore:
    return ItmScore(ref, **{"device": "cpu", "batch": 8, **options})


def table(count: int = 9) -> pa.Table:
    return pairs_table([noise(n) for n in range(count)], [TEXTS[n % 3 : n % 3 + 1 + n % 4] for n in range(count)])


def with_captions(rows: pa.Table, captions: list[list[str | None] | None]) -> pa.Table:
    listed = [row and [{"text": t, "source": "blip", "reason": None, "detail": None} for t in row] for row in captions]
    return rows.append_column("captions", pa.array(listed, fields.CAPTIONS.type))


def run(scores: ItmScore, opened: Kernel, rows: pa.Table, size: int) -> pa.Table:
    parts = [apply(scores, opened, Batch(rows.slice(i, size)), ErrorBudget()) for i in range(0, rows.num_rows, size)]
    return pa.concat_tables(parts).combine_chunks()


# -- the same as transformers' own ------------------------------------------------------------------------------------


def plain(ref: ModelRef, rows: pa.Table, first: int | None) -> list[list[float]]:
    """Probabilities by the model's own forward, one pair a call, without padding; `first` replaces [CLS]."""
    transformers = library()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ref.path)
    pictures = transformers.AutoImageProcessor.from_pretrained(ref.path, backend="pil")
    kind = transformers.AutoConfig.from_pretrained(ref.path).architectures[0]
    model = getattr(transformers, kind).from_pretrained(ref.path).eval()
    found = []
    for data, texts in zip(rows["image"].to_pylist(), rows["texts"].to_pylist(), strict=True):
        found.append([])
        for text in texts:
            pixels = pictures(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")
            inputs = tokenizer(text["text"], return_tensors="pt", return_token_type_ids=False)
            if first is not None:
                inputs["input_ids"][:, 0] = first
            with torch.inference_mode():
                if kind.startswith("Blip2"):
                    logits = model(**inputs, **pixels, use_image_text_matching_head=True).logits_per_image
                else:
                    logits = model(**inputs, **pixels).itm_score
            found[-1].append(float(logits.softmax(dim=-1)[0, 1]))
    return found


def assert_close(found: pa.Table, expected: list[list[float]]) -> None:
    scores = found["itm_scores"].to_pylist()
    assert [len(row) for row in scores] == [len(row) for row in expected]
    differences = [abs(a - b) for x, y in zip(scores, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert max(differences) < 1e-4
    assert [row[0] for row in scores] == found["itm_score"].to_pylist()
    flat = [p for row in expected for p in row]
    assert max(flat) - min(flat) > 0.1, "the pairs make a difference"


@pytest.mark.parametrize("enc", [True, False])
def test_blip_scores_are_those_of_the_plain_forward(blip: ModelRef, enc: bool) -> None:
    tokenizer = library().AutoTokenizer.from_pretrained(blip.path)
    expected = plain(blip, table(6), tokenizer.convert_tokens_to_ids("[ENC]") if enc else None)
    assert_close(run(stage(blip, enc_token=enc), stage(blip, enc_token=enc).open(), table(6), 6), expected)


def test_blip2_scores_are_those_of_the_plain_forward(blip2: ModelRef) -> None:
    assert_close(run(stage(blip2), stage(blip2).open(), table(6), 6), plain(blip2, table(6), None))


def test_enc_is_the_default_also_where_the_tokenizer_does_not_name_it(
    blip: ModelRef, tmp_path: Path, kernel: Kernel
) -> None:
    asked = stage(blip, enc_token=True).open()
    assert run(stage(blip), kernel, table(6), 6).equals(run(stage(blip), asked, table(6), 6))
    published = ModelRef(path=str(write_blip(tmp_path / "published", "itm", special=False)))
    loaded = load_matcher(published, "cpu")
    text = loaded.model.config.text_config
    assert enc_token(loaded, None) == text.vocab_size - 1 == text.bos_token_id + 1 == len(loaded.tokenizer) + 1
    assert enc_token(loaded, False) is None
    assert_close(
        run(stage(published), stage(published).open(), table(6), 6), plain(published, table(6), text.vocab_size - 1)
    )


def test_blip2_has_no_enc_token(blip2: ModelRef) -> None:
    with pytest.raises(ConfigError, match=r"models.itm.enc_token .* BLIP-2"):
        stage(blip2, enc_token=True).open()


def test_an_enc_token_that_is_not_there(blip: ModelRef, tmp_path: Path) -> None:
    """A tokenizer of words alone, and a model with just so many embeddings."""
    ref = ModelRef(path=str(write_blip(tmp_path / "bare", "itm", special=False, vocab_size=400)))
    with pytest.raises(ConfigError, match=r"models.itm.enc_token is true, but the checkpoint has no \[ENC\]"):
        stage(ref, enc_token=True).open()
    assert enc_token(load_matcher(ref, "cpu"), None) is None


# -- the same whatever is around --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["blip", "blip2"])
def test_bits_depend_on_neither_kernel_calls_nor_order_nor_threads(
    blip: ModelRef, blip2: ModelRef, family: str, precision: str
) -> None:
    scores = stage({"blip": blip, "blip2": blip2}[family], precision=precision)
    opened = scores.open()
    rows = table(12)
    expected = run(scores, opened, rows, 12)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (1, 3, 8):
                assert run(scores, opened, rows, size).equals(expected), (count, size)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    order = list(range(11, -1, -1))
    assert run(scores, opened, rows.take(order), 5).equals(expected.take(order).combine_chunks())


@settings(max_examples=15)
@given(st.lists(st.lists(st.sampled_from([*TEXTS, None]), max_size=4), min_size=1, max_size=6), st.integers(1, 6))
def test_a_text_has_the_score_it_has_alone(kernel: Kernel, texts: list[list[str | None]], size: int) -> None:
    rows = pairs_table([noise(n % 2) for n in range(len(texts))], texts)
    found = [
        row for i in range(0, len(texts), size) for row in kernel(Batch(rows.slice(i, size)))["itm_scores"].to_pylist()
    ]
    for n, (row, scores) in enumerate(zip(texts, found, strict=True)):
        assert (scores or []) == [None if text is None else alone(kernel, n % 2, text) for text in row]


def alone(kernel: Kernel, image: int, text: str, seen: dict[tuple[int, str], float] = {}) -> float:  # noqa: B006
    """The score of one pair in a call of its own, computed once."""
    if (image, text) not in seen:
        seen[image, text] = kernel(Batch(pairs_table([noise(image)], [[text]])))["itm_score"][0].as_py()
    return seen[image, text]


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["blip", "blip2"])
def test_an_image_is_encoded_once_for_all_its_texts(blip: ModelRef, blip2: ModelRef, family: str) -> None:
    ref = {"blip": blip, "blip2": blip2}[family]
    loaded = load_matcher(ref, "cpu")
    rows = []
    loaded.model.vision_model.register_forward_hook(lambda m, a, output: rows.append(len(output.last_hidden_state)))
    images = [Image.open(io.BytesIO(noise(n))).convert("RGB") for n in range(8)]
    texts: list[list[str | None]] = [[*TEXTS, *TEXTS[:3]] for _ in range(8)]
    matcher_of(loaded, stage(ref)).scores(images, texts)
    assert sum(rows) == 8
    rows.clear()
    matcher_of(loaded, stage(ref)).scores(images, [[None]] * 8)
    assert not rows, "nothing to read, nothing to encode"


def test_texts_are_prepared_as_for_training(blip: ModelRef, kernel: Kernel) -> None:
    """Case and punctuation count only where texts are read as they are; long texts are cut."""
    plain_, loud = [["a red circle"]], [["A RED circle!!! "]]
    first = kernel(Batch(pairs_table([noise(0)], plain_)))["itm_scores"]
    assert kernel(Batch(pairs_table([noise(0)], loud)))["itm_scores"] == first
    raw = stage(blip, prepare=False).open()
    assert raw(Batch(pairs_table([noise(0)], plain_)))["itm_scores"] == first
    assert raw(Batch(pairs_table([noise(0)], loud)))["itm_scores"] != first
    words = ["red"] * 30
    long = [" ".join([*words, "blue"]), " ".join([*words, "green", "circle"])]
    scores = kernel(Batch(pairs_table([noise(0)], [long])))["itm_scores"].to_pylist()[0]
    assert scores[0] == scores[1]
    longer = " ".join(["red"] * 500)
    assert raw(Batch(pairs_table([noise(0)], [[longer]])))["itm_score"][0].as_py() is not None


def test_captions_are_scored_like_texts(blip: ModelRef, kernel: Kernel) -> None:
    rows = with_captions(table(4), [[TEXTS[0], None, TEXTS[3]], [], None, [TEXTS[4]]])
    scores = stage(blip, captions=True)
    found = run(scores, scores.open(), rows, 3)
    assert found["itm_scores"].equals(run(stage(blip), kernel, table(4), 4)["itm_scores"])
    expected = [
        [alone(kernel, 0, TEXTS[0]), None, alone(kernel, 0, TEXTS[3])],
        None,
        None,
        [alone(kernel, 3, TEXTS[4])],
    ]
    assert found["caption_itm_scores"].to_pylist() == expected


def test_missing_images_and_texts(blip: ModelRef, kernel: Kernel) -> None:
    image = noise(1)
    rows = pairs_table([image, None, image, image, image], [["photo"], ["photo"], [], None, [None, "a red circle"]])
    found = run(stage(blip), kernel, rows, 5)
    assert found["reason"].to_pylist() == [None, Reason.IMAGE_MISSING, None, None, None]
    scores = found["itm_scores"].to_pylist()
    assert 0 <= scores[0][0] <= 1
    assert scores[1:4] == [None] * 3
    assert scores[4][0] is None and 0 <= scores[4][1] <= 1
    assert found["itm_score"].to_pylist()[1:] == [None] * 4
    assert run(stage(blip), kernel, rows.slice(1, 1), 1)["itm_scores"].to_pylist() == [None]


# -- the stage --------------------------------------------------------------------------------------------------------


def test_a_head_that_says_nothing_is_no_score(blip: ModelRef, tmp_path: Path) -> None:
    folder = tmp_path / "blip"
    shutil.copytree(str(blip.path), folder)
    model = library().BlipForImageTextRetrieval.from_pretrained(folder)
    with torch.no_grad():
        model.itm_head.bias[0] = float("nan")
    model.save_pretrained(folder)
    scores = ItmScore(ModelRef(path=str(folder)), device="cpu")
    pairs = pairs_table([noise(0), noise(1)], [["a red circle"], []])
    found = apply(scores, scores.open(), Batch(pairs), ErrorBudget())
    assert found["reason"].to_pylist() == [Reason.ERROR_KERNEL, None]
    assert "not finite" in found["detail"][0].as_py()


def test_columns_follow_what_is_scored(blip: ModelRef) -> None:
    assert stage(blip).reads == ("image", "texts")
    assert stage(blip).writes == (fields.ITM_SCORES, fields.ITM_SCORE)
    assert stage(blip, captions=True).reads == ("image", "texts", "captions")
    assert stage(blip, captions=True).writes == (fields.ITM_SCORES, fields.ITM_SCORE, fields.CAPTION_ITM_SCORES)


def test_the_config_names_the_stage(blip: ModelRef) -> None:
    models = Models.model_validate(
        {"itm": {"path": blip.path, "enc_token": False}, "precision": "bf16", "device": "cpu", "batch": 4}
    )
    scores = ItmScore.of(models, captions=True)
    expected = ItmScore(blip, True, False, precision="bf16", device="cpu", batch=4, resources=scores.resources)
    assert scores == expected
    assert ItmScore.of(Models(device="cuda")).resources.gpus == 1
    assert ItmScore.of(Models()).enc_token is None
    assert Path(str(ItmScore.of(Models()).model.path)).name == "itm-tiny"


def test_identity_holds_what_changes_scores_and_nothing_else(blip: ModelRef) -> None:
    here = stage(blip).fingerprint()
    assert here == ItmScore(blip, device="cuda", batch=64).fingerprint()
    changes: list[dict[str, Any]] = [{"enc_token": False}, {"prepare": False}, {"captions": True}, {"max_tokens": 20}]
    assert len({stage(blip, **change).fingerprint() for change in changes} | {here}) == len(changes) + 1
