from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captioners.blip import Captions, writer_of
from pairmill.blip import cross_attention_cache, load_captioner
from pairmill.errors import ConfigError
from pairmill.models import ModelRef
from pairmill.stage import Batch, ErrorBudget, Kernel, apply
from schemas import fields
from schemas.config import Caption, RunConfig
from schemas.reasons import Reason
from tests.blip_models import QUERIES, library, write_blip
from tests.filters.rows import noise

KINDS = ["blip", "blip2-opt", "blip2-t5", "instructblip-opt", "instructblip-t5"]
PROMPT = "a picture of "


def table(count: int, first: int = 0) -> pa.Table:
    uids = [f"{n:064x}" for n in range(first, first + count)]
    return pa.table({"uid": uids, "image": [noise(n) for n in range(first, first + count)]})


def texts(kernel: Kernel, rows: pa.Table, size: int = 1000) -> dict[str, list[Any]]:
    """The captions of each uid, in kernel calls of so many rows."""
    found = {}
    for start in range(0, rows.num_rows, size):
        part = rows.slice(start, size)
        captions = kernel(Batch(part))["captions"].to_pylist()
        found |= {uid: [c["text"] for c in row] for uid, row in zip(part["uid"].to_pylist(), captions, strict=True)}
    return found


def stage(ref: ModelRef, **options: Any) -> Captions:
    return Captions(ref, **{"device": "cpu", "batch": 8, **options})


@pytest.fixture(scope="module")
def nucleus(captioners: dict[str, ModelRef]) -> Kernel:
    return stage(captioners["blip"], count=2).open()


# -- the same as transformers' own ------------------------------------------------------------------------------------


def plain(ref: ModelRef, kind: str, images: list[Image.Image], options: dict[str, Any]) -> list[str]:
    """Captions by a model's own processor and `generate`, all images in one batch."""
    transformers = library()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ref.path)
    pictures = transformers.AutoImageProcessor.from_pretrained(ref.path, backend="pil")
    prompt = [PROMPT if kind == "blip" else PROMPT.strip()] * len(images)
    if kind == "blip":
        model = transformers.BlipForConditionalGeneration.from_pretrained(ref.path)
        inputs = transformers.BlipProcessor(pictures, tokenizer)(images, prompt, return_tensors="pt")
    elif kind.startswith("blip2"):
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(ref.path)
        inputs = transformers.Blip2Processor(pictures, tokenizer, QUERIES)(images, prompt, return_tensors="pt")
    else:
        model = transformers.InstructBlipForConditionalGeneration.from_pretrained(ref.path)
        second = transformers.AutoTokenizer.from_pretrained(Path(ref.path) / "qformer_tokenizer")
        processor = transformers.InstructBlipProcessor(pictures, tokenizer, second, QUERIES)
        inputs = processor(images, prompt, return_tensors="pt")
    words = len(tokenizer(prompt[0])["input_ids"])
    inner = kind.endswith("opt")
    lengths = {"max_new_tokens": 20 - words, "min_new_tokens": max(0, 8 - words)} if inner else {}
    lengths = lengths or {"max_length": 20, "min_length": 8}
    inputs.pop("token_type_ids", None)
    inputs.pop("qformer_token_type_ids", None)
    tokens = model.eval().generate(**inputs, do_sample=False, repetition_penalty=1.1, **lengths, **options)
    found = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.removeprefix(PROMPT.strip()).strip() for text in found]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_and_beam_write_what_transformers_writes(captioners: dict[str, ModelRef], kind: str) -> None:
    rows = table(5)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in rows["image"].to_pylist()]
    greedy = texts(stage(captioners[kind], method="greedy", min_length=8).open(), rows)
    assert [row[0] for row in greedy.values()] == plain(captioners[kind], kind, images, {})
    assert len({row[0] for row in greedy.values()}) > 2, "the images make a difference"
    beam = texts(stage(captioners[kind], method="beam", count=2, beams=3, min_length=8).open(), rows)
    expected = plain(captioners[kind], kind, images, {"num_beams": 3, "num_return_sequences": 2})
    assert [text for row in beam.values() for text in row] == expected


def test_logits_with_shared_keys_and_values_are_those_of_the_plain_forward(captioners: dict[str, ModelRef]) -> None:
    blip = load_captioner(captioners["blip"], "cpu")
    writer = writer_of(blip, stage(captioners["blip"]))
    pixels = blip.prepared([Image.open(io.BytesIO(noise(n))).convert("RGB") for n in range(3)])
    rows = [0, 0, 2, 1, 2]
    ids = torch.randint(7, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = list(writer.encode(pixels))
        expected = blip.model(pixel_values=pixels[rows], input_ids=ids)
        assert torch.allclose(torch.stack(states)[rows], expected.image_embeds, atol=1e-5)
        decoder = blip.model.text_decoder
        cache = cross_attention_cache(decoder.bert.encoder.layer, states, rows)
        found = decoder(
            ids, encoder_hidden_states=states[0].expand(5, -1, -1), past_key_values=cache, use_cache=True
        ).logits
    assert expected.logits.abs().max() > 1
    assert torch.allclose(found, expected.logits, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"count": 1},
        {"count": 3, "min_length": 12},
        {"count": 2, "repetition_penalty": 1.0, "temperature": 0.7, "top_p": 0.6, "prompt": None},
        {"method": "greedy", "min_length": 10},
        {"count": 11},
    ],
)
def test_the_loop_writes_the_tokens_that_generate_writes(
    captioners: dict[str, ModelRef], options: dict[str, Any]
) -> None:
    blip = load_captioner(captioners["blip"], "cpu")
    writer = writer_of(blip, stage(captioners["blip"], **options))
    uids, samples = [f"{n:064x}" for n in range(6)], writer.samples
    tasks = [(image, first) for image in (3, 0, 5) for first in range(0, options.get("count", 1), samples)]
    with torch.inference_mode():
        states = list(writer.encode(blip.prepared([Image.open(io.BytesIO(noise(n))) for n in range(6)])))
        found = writer.write(states, uids, tasks)
        rows = [image for image, _ in tasks for _ in range(samples)]
        expected = writer.generate(states, rows, writer._options(uids, tasks))
    width = max(found.shape[1], expected.shape[1])
    pad = blip.model.config.text_config.pad_token_id
    assert [[*row, *[pad] * (width - len(row))] for row in found.tolist()] == [
        [*row, *[pad] * (width - len(row))] for row in expected.tolist()
    ]
    assert len({tuple(row) for row in found.tolist()}) > len(rows) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_nucleus_is_greedy(captioners: dict[str, ModelRef], kind: str) -> None:
    rows = table(4)
    narrow = texts(stage(captioners[kind], top_p=1e-6).open(), rows)
    assert narrow == texts(stage(captioners[kind], method="greedy").open(), rows)
    cold = texts(stage(captioners[kind], top_p=1.0, temperature=1e-4).open(), rows)
    assert cold == narrow


# -- the same whatever is around --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_captions_depend_on_neither_kernel_calls_nor_order_nor_threads(
    captioners: dict[str, ModelRef], kind: str
) -> None:
    rows = table(9)
    kernel = stage(captioners[kind], count=2).open()
    expected = texts(kernel, rows)
    assert len({text for row in expected.values() for text in row}) > 12
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (1, 3, 8):
                assert texts(kernel, rows, size) == expected, (count, size)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert texts(kernel, rows.take(list(range(8, -1, -1))), 4) == expected


@settings(max_examples=8)
@given(st.permutations(range(7)), st.integers(1, 7), st.integers(0, 2**31))
def test_any_order_any_batch_any_global_seed(nucleus: Kernel, order: list[int], size: int, seed: int) -> None:
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    rows = table(7)
    assert texts(nucleus, rows.take(order), size) == texts(nucleus, rows)
    assert torch.equal(torch.get_rng_state(), state), "global random state is neither used nor changed"


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_beams_of_one_image_do_not_depend_on_others(captioners: dict[str, ModelRef], method: str) -> None:
    rows = table(7)
    for kind in ("blip", "blip2-opt", "blip2-t5"):
        kernel = stage(captioners[kind], method=method, max_length=14).open()
        assert texts(kernel, rows, 1) == texts(kernel, rows, 7) == texts(kernel, rows.take([6, 5, 4, 3, 2, 1, 0]), 3)


def test_more_captions_begin_with_the_fewer(captioners: dict[str, ModelRef]) -> None:
    rows = table(3)
    one = texts(stage(captioners["blip"], count=1).open(), rows)
    five = texts(stage(captioners["blip"], count=5, batch=4).open(), rows)
    assert {uid: row[:1] for uid, row in five.items()} == one
    assert all(len(row) == 5 == len(set(row)) for row in five.values())


@pytest.mark.parametrize(
    ("count", "batch", "samples"), [(1, "auto", 1), (16, "auto", 16), (17, "auto", 9), (40, "auto", 14), (11, 8, 6)]
)
def test_many_captions_are_written_in_equal_parts(
    captioners: dict[str, ModelRef], count: int, batch: Any, samples: int
) -> None:
    writer = writer_of(load_captioner(captioners["blip"], "cpu"), stage(captioners["blip"], count=count, batch=batch))
    assert writer.samples == samples


def test_seed_and_uid_make_the_difference(captioners: dict[str, ModelRef], nucleus: Kernel) -> None:
    rows = table(3)
    here = texts(nucleus, rows)
    assert not set(map(tuple, here.values())) & set(
        map(tuple, texts(stage(captioners["blip"], count=2, seed=1).open(), rows).values())
    )
    same_image = pa.table({"uid": ["a", "b"], "image": [noise(0), noise(0)]})
    assert len({tuple(row) for row in texts(nucleus, same_image).values()}) == 2


def test_captions_are_drawn_from_the_models_own_distribution(captioners: dict[str, ModelRef]) -> None:
    """The first token after the prompt, over many uids of one image, against the nucleus of the plain logits."""
    from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

    ref = captioners["blip"]
    blip = load_captioner(ref, "cpu")
    image = Image.open(io.BytesIO(noise(0))).convert("RGB")
    ids = blip.tokenizer(PROMPT, return_tensors="pt")["input_ids"][:, :-1]
    ids[:, 0] = blip.model.config.text_config.bos_token_id
    with torch.inference_mode():
        logits = blip.model(pixel_values=blip.prepared([image]), input_ids=ids).logits[:, -1]
        logits[:, blip.model.config.text_config.sep_token_id] = float("-inf")  # min_length
    nucleus = TopPLogitsWarper(0.9)(ids, RepetitionPenaltyLogitsProcessor(1.1)(ids, logits))[0].softmax(-1)
    count = 1500
    short = stage(ref, max_length=5, min_length=5, batch=256, count=count)
    writer = writer_of(blip, short)
    seen: list[int] = []
    writer.text = lambda tokens: seen.append(tokens[4]) or ""  # type: ignore[method-assign, func-returns-value]
    writer.captions([image], ["uid"])
    counts = torch.bincount(torch.tensor(seen[:count]), minlength=len(nucleus)).double()
    kept = nucleus > 0
    assert counts[~kept].sum() == 0
    expected = nucleus[kept].double() * count
    freedom = int(kept.sum()) - 1
    assert freedom > 3
    assert ((counts[kept] - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_encoded_once_for_all_its_captions(captioners: dict[str, ModelRef], kind: str) -> None:
    blip = load_captioner(captioners[kind], "cpu")
    writer = writer_of(blip, stage(captioners[kind], count=6))
    encoded = dict.fromkeys(("vision_model", "qformer"), 0)

    def count(name: str, module: Any) -> None:
        def add(module: Any, inputs: Any, output: Any) -> None:
            encoded[name] += len(output.last_hidden_state)

        module.register_forward_hook(add)

    for name, module in blip.model.named_children():
        if name in encoded:
            count(name, module)
    images = [Image.open(io.BytesIO(noise(n))).convert("RGB") for n in range(8)]
    found = writer.captions(images, [str(n) for n in range(8)])
    assert [len(row) for row in found] == [6] * 8
    assert encoded == {"vision_model": 8, "qformer": 0 if kind == "blip" else 8}


def test_every_thread_writes(captioners: dict[str, ModelRef]) -> None:
    """A machine of many cores has as many passes at a time."""
    blip = load_captioner(captioners["blip"], "cpu")
    writer = writer_of(blip, stage(captioners["blip"]))
    threads, write, together = torch.get_num_threads(), writer.write, threading.Barrier(6)

    def waiting(*arguments: Any) -> torch.Tensor:
        together.wait(20)
        return write(*arguments)

    writer.write = waiting  # type: ignore[method-assign]
    try:
        torch.set_num_threads(6)
        images = [Image.open(io.BytesIO(noise(n))).convert("RGB") for n in range(6 * writer.tasks)]
        assert len(writer.captions(images, [str(n) for n in range(len(images))])) == len(images)
    finally:
        torch.set_num_threads(threads)


def test_rows_without_an_image_or_with_a_broken_one(captioners: dict[str, ModelRef]) -> None:
    rows = pa.table({"uid": ["a", "b", "c"], "image": pa.array([noise(0), None, b"no image"], pa.binary())})
    captions = stage(captioners["blip"])
    found = apply(captions, captions.open(), Batch(rows), ErrorBudget())
    assert found["reason"].to_pylist() == [None, Reason.IMAGE_MISSING, Reason.ERROR_KERNEL]
    written = found["captions"].to_pylist()
    assert written[0][0]["text"] and written[1:] == [None, None]
    none = apply(captions, captions.open(), Batch(rows.slice(1, 1)), ErrorBudget())
    assert none["captions"].to_pylist() == [None]


@pytest.mark.parametrize("kind", KINDS)
def test_the_source_is_the_family(captioners: dict[str, ModelRef], kind: str) -> None:
    captions = stage(captioners[kind])
    (entry,) = captions.open()(Batch(table(1)))["captions"].to_pylist()[0]
    assert entry["source"] == kind.partition("-")[0]
    assert entry["reason"] is None and entry["detail"] is None
    assert not entry["text"].startswith("a picture of")


def test_a_caption_without_a_word_is_null_with_a_reason(tmp_path: Path) -> None:
    folder = write_blip(tmp_path / "mute", "captioner")
    model = library().BlipForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[model.config.text_config.sep_token_id] = 1e4
    model.save_pretrained(folder)
    mute = stage(ModelRef(path=str(folder)), count=2, min_length=0)
    (row,) = mute.open()(Batch(table(1)))["captions"].to_pylist()
    assert [entry["text"] for entry in row] == [None, None]
    assert [entry["reason"] for entry in row] == [Reason.CAPTION_EMPTY] * 2
    # min_length counts the prompt's four tokens, so three words at least are forced here
    talks = stage(ModelRef(path=str(folder)), min_length=7)
    assert len(texts(talks.open(), table(1)).popitem()[1][0].split()) >= 1


@pytest.mark.parametrize("part", ["vision_model.post_layernorm.bias", "text_decoder.cls.predictions.bias"])
def test_a_model_that_says_nothing_writes_nothing(tmp_path: Path, part: str) -> None:
    folder = write_blip(tmp_path / "damaged", "captioner")
    model = library().BlipForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(part)[3] = float("nan")
    model.save_pretrained(folder)
    captions = stage(ModelRef(path=str(folder)))
    found = apply(captions, captions.open(), Batch(table(2)), ErrorBudget())
    assert found["reason"].to_pylist() == [Reason.ERROR_KERNEL] * 2
    assert "not finite" in found["detail"][0].as_py()


def test_lengths_count_the_prompt(captioners: dict[str, ModelRef]) -> None:
    blip = load_captioner(captioners["blip"], "cpu")
    for prompt, tokens in ((PROMPT, 4), (None, 1), ("a small red circle on the left", 8)):
        captions = stage(captioners["blip"], prompt=prompt, max_length=10, min_length=10)
        writer = writer_of(blip, captions)
        assert writer.start == tokens
        lengths: list[int] = []
        writer.text = lambda row, lengths=lengths: lengths.append(len(row)) or ""  # type: ignore[method-assign]
        writer.captions([Image.open(io.BytesIO(noise(0))).convert("RGB")], ["uid"])
        assert set(lengths) == {10}


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_stable(captioners: dict[str, ModelRef], kind: str) -> None:
    rows = table(5)
    kernel = stage(captioners[kind], precision="bf16", count=2).open()
    expected = texts(kernel, rows)
    assert texts(kernel, rows.take([4, 2, 0, 1, 3]), 2) == expected
    assert len({text for row in expected.values() for text in row}) > 5


# -- the stage --------------------------------------------------------------------------------------------------------


def test_the_config_names_the_stage(captioners: dict[str, ModelRef]) -> None:
    path = captioners["blip"].path
    config = RunConfig.model_validate(
        {
            "dataset": "d",
            "source": {"kind": "url_table", "path": "x.csv"},
            "models": {"captioner": {"path": path}, "precision": "bf16", "device": "cpu", "batch": 4},
            "caption": {"count": 3, "method": "beam", "beams": 5, "prompt": None, "max_length": 30, "min_length": 10},
            "seed": 7,
        }
    )
    captions = Captions.of(config)
    assert captions == Captions(
        ModelRef(path=path), 3, "beam", 0.9, 1.0, 5, 1.1, 30, 10, None, 7, "bf16", "cpu", 4, captions.resources
    )
    assert captions.writes == (fields.CAPTIONS,) and captions.resources.actor
    cuda = config.models.model_copy(update={"device": "cuda"})
    assert Captions.of(config.model_copy(update={"models": cuda})).resources.gpus == 1
    defaults = Captions.of(RunConfig.model_validate({"dataset": "d", "source": {"kind": "url_table", "path": "x.csv"}}))
    caption = Caption()
    assert (defaults.count, defaults.top_p, defaults.prompt) == (caption.count, caption.top_p, caption.prompt)
    assert Path(str(defaults.model.path)).name == "captioner-tiny"


def test_identity_holds_what_changes_captions_and_nothing_else(captioners: dict[str, ModelRef]) -> None:
    ref = captioners["blip"]
    here = stage(ref).fingerprint()
    assert here == Captions(ref, device="cuda", batch=64).fingerprint()
    changes: list[dict[str, Any]] = [{"seed": 1}, {"count": 2}, {"top_p": 0.8}, {"prompt": None}, {"max_length": 30}]
    changes += [{"temperature": 0.5}, {"precision": "bf16"}, {"method": "greedy"}, {"repetition_penalty": 1.0}]
    assert len({stage(ref, **change).fingerprint() for change in changes} | {here}) == len(changes) + 1
    assert stage(ref, beams=9).fingerprint() == here
    for method in ("greedy", "beam"):
        assert stage(ref, method=method, seed=1).fingerprint() == stage(ref, method=method, top_p=0.5).fingerprint()
    assert stage(captioners["blip2-opt"]).fingerprint() != here


def test_instructblips_second_tokenizer_is_part_of_the_identity(
    captioners: dict[str, ModelRef], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(str(captioners["instructblip-t5"].path), folder)
    copy = ModelRef(path=str(folder))
    assert stage(copy).fingerprint() == stage(captioners["instructblip-t5"]).fingerprint()
    tokenizer = folder / "qformer_tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"lowercase": true', '"lowercase": false'))
    assert stage(copy).fingerprint() != stage(captioners["instructblip-t5"]).fingerprint()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "beam", "beams": 2, "count": 3}, "caption.beams is 2, but 3 captions"),
        ({"method": "greedy", "count": 2}, "caption.count"),
        ({"min_length": 21}, "caption.min_length"),
    ],
)
def test_options_that_do_not_fit_together(captioners: dict[str, ModelRef], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        stage(captioners["blip"], **options)


@pytest.mark.parametrize("kind", ["blip", "blip2-opt"])
def test_a_prompt_that_leaves_no_room(captioners: dict[str, ModelRef], kind: str) -> None:
    with pytest.raises(ConfigError, match=r"caption.prompt is \d+ tokens long"):
        stage(captioners[kind], prompt="a picture of " * 7).open()


def test_more_tokens_than_the_model_reads(captioners: dict[str, ModelRef]) -> None:
    with pytest.raises(ConfigError, match=r"caption.max_length is 65"):
        stage(captioners["blip"], max_length=65).open()
