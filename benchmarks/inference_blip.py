"""BLIP's part of `benchmarks.inference`: JPEGs to captions, and JPEGs with texts to matching probabilities.

Checkpoints have the sizes of Salesforce/blip-image-captioning-base and blip-itm-base-coco (on a GPU of -large, too) and
random weights, which seldom end a caption: each has nearly `MAX_LENGTH` tokens, a trained model's fewer.

The plain loop of the captioner is that of its documentation, with nucleus sampling as CapFilt has it: processor,
`generate(do_sample=True, top_p=0.9, num_return_sequences=...)`, `batch_decode`. That of the matcher gives processor and
model one image and one text a row, so an image is encoded again for each of its texts; "image once" is the loop of one
who knows the model's parts, encodes images first and repeats their features. Both run on torch's default threads.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from benchmarks.inference import Case
from benchmarks.inference_clip import LENGTHS, picture
from pairmill._torchvision import ensure_torchvision
from schemas import fields

SIZES = {"cpu": ("base",), "cuda": ("base", "large")}
IMAGES = {"cpu": 8, "cuda": 512}
PLAIN_BATCH = {"cpu": 8, "cuda": 64}
PROMPT = "a picture of"
MAX_LENGTH, MIN_LENGTH, PENALTY, TOP_P = 20, 5, 1.1, 0.9
CAPTIONS = 2
"""Captions an image that the matcher scores beside the alt text."""
CAPTION_WORDS = 9
PIECES = 1.25
"""Tokens a word: the made-up vocabulary has one for each, BERT's has some more."""


def rows(count: int, seed: int = 0) -> pa.Table:
    """Pictures as JPEG, each with an alt text and captions, as the stages read them."""
    rng = np.random.default_rng(seed)

    def text(words: float) -> str:
        return " ".join(f"word{n}" for n in rng.integers(0, 20_000, max(1, round(words * PIECES))))

    alt = [text(min(70, words)) for words in np.exp(rng.normal(*LENGTHS, count))]
    captions = [[text(rng.normal(CAPTION_WORDS, 2)) for _ in range(CAPTIONS)] for _ in range(count)]
    entry = {"source": "blip", "reason": None, "detail": None}
    return pa.table(
        {
            "uid": [f"{n:064x}" for n in range(count)],
            "image": [picture(rng) for _ in range(count)],
            "texts": pa.array([[{"text": one, "source": "web"}] for one in alt], fields.TEXTS.type),
            "captions": pa.array([[entry | {"text": c} for c in row] for row in captions], fields.CAPTIONS.type),
        }
    )


def texts_of(table: pa.Table) -> list[list[str]]:
    """Alt text and captions of each row."""
    both = zip(table["texts"].to_pylist(), table["captions"].to_pylist(), strict=True)
    return [[entry["text"] for entry in (*left, *right)] for left, right in both]


def opened(data: list[bytes]) -> list[Image.Image]:
    """Decoded pictures."""
    return [Image.open(io.BytesIO(one)).convert("RGB") for one in data]


def plain_parts(folder: Path, kind: str, device: str, precision: str) -> tuple[Any, Any, Any]:
    """transformers' processor and model, as a user loads them, and the dtype."""
    ensure_torchvision()
    import transformers

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pictures = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")  # torchvision's resizes otherwise
    return transformers.BlipProcessor(pictures, tokenizer), model, dtype


Way = Callable[[], Any]


def plain_captions(folder: Path, table: pa.Table, device: str, precision: str, count: int) -> Way:
    """The captioner's documented loop; returns captions."""
    processor, model, dtype = plain_parts(folder, "BlipForConditionalGeneration", device, precision)
    data, batch = table["image"].to_pylist(), PLAIN_BATCH[device]

    def way() -> list[str]:
        found: list[str] = []
        for start in range(0, len(data), batch):
            images = opened(data[start : start + batch])
            inputs = processor(images, [PROMPT] * len(images), return_tensors="pt").to(device, dtype)
            with torch.inference_mode():
                tokens = model.generate(
                    **inputs,
                    do_sample=True,
                    top_p=TOP_P,
                    num_return_sequences=count,
                    repetition_penalty=PENALTY,
                    max_length=MAX_LENGTH,
                    min_length=MIN_LENGTH,
                )
            found += processor.batch_decode(tokens, skip_special_tokens=True)
        return [text.removeprefix(PROMPT).strip() for text in found]

    return way


def stage_captions(folder: Path, table: pa.Table, device: str, precision: str, count: int) -> Way:
    """The stage `captions`, rows in and columns out; returns captions."""
    from captioners.blip import Captions
    from pairmill.models import ModelRef
    from pairmill.stage import Batch

    stage = Captions(
        ModelRef(path=str(folder)),
        count,
        top_p=TOP_P,
        repetition_penalty=PENALTY,
        max_length=MAX_LENGTH,
        min_length=MIN_LENGTH,
        prompt=PROMPT + " ",
        precision=precision,
        device=device,
    )
    kernel = stage.open()
    return lambda: [entry["text"] for row in kernel(Batch(table))["captions"].to_pylist() for entry in row]


def plain_matching(folder: Path, table: pa.Table, device: str, precision: str, again: bool) -> Way:
    """The matcher's loop, its images encoded again for each text or once; returns probabilities."""
    processor, model, dtype = plain_parts(folder, "BlipForImageTextRetrieval", device, precision)
    first = model.config.text_config.vocab_size - 1  # [ENC], as the stage reads texts
    pairs = [(n, text) for n, row in enumerate(texts_of(table)) for text in row]
    data, batch = table["image"].to_pylist(), PLAIN_BATCH[device]

    def tokenized(texts: list[str]) -> Any:
        tokens = processor.tokenizer(texts, padding=True, truncation=True, max_length=35, return_tensors="pt")
        tokens["input_ids"][:, 0] = first
        return tokens.to(device)

    def repeatedly() -> list[float]:
        found: list[float] = []
        for start in range(0, len(pairs), batch):
            chunk = pairs[start : start + batch]
            images = opened([data[n] for n, _ in chunk])
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device, dtype)
            tokens = tokenized([text for _, text in chunk])
            with torch.inference_mode():
                scores = model(tokens["input_ids"], pixels, attention_mask=tokens["attention_mask"]).itm_score
                found += scores.float().softmax(dim=-1)[:, 1].tolist()
        return found

    def once() -> list[float]:
        states, found = [], []
        with torch.inference_mode():
            for start in range(0, len(data), batch):
                images = opened(data[start : start + batch])
                pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(device, dtype)
                states.append(model.vision_model(pixel_values=pixels).last_hidden_state)
            features = torch.cat(states)
            for start in range(0, len(pairs), batch):
                chunk = pairs[start : start + batch]
                tokens = tokenized([text for _, text in chunk])
                read = model.text_encoder(
                    input_ids=tokens["input_ids"],
                    attention_mask=tokens["attention_mask"],
                    encoder_hidden_states=features[[n for n, _ in chunk]],
                ).last_hidden_state
                found += model.itm_head(read[:, 0]).float().softmax(dim=-1)[:, 1].tolist()
        return found

    return repeatedly if again else once


def stage_matching(folder: Path, table: pa.Table, device: str, precision: str) -> Way:
    """The stage `itm`, rows in and columns out; returns probabilities."""
    from filters.itm import ItmScore
    from pairmill.models import ModelRef
    from pairmill.stage import Batch

    stage = ItmScore(ModelRef(path=str(folder)), captions=True, prepare=False, precision=precision, device=device)
    kernel = stage.open()

    def way() -> list[float]:
        scores = kernel(Batch(table))
        both = zip(scores["itm_scores"].to_pylist(), scores["caption_itm_scores"].to_pylist(), strict=True)
        return [p for left, right in both for p in (*left, *right)]

    return way


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One caption an image, four, and an alt text with captions to be matched; for each size and precision."""
    device = options.device
    count = max(2, int(IMAGES[device] * options.scale))
    many = rows(count * (4 if device == "cpu" else 1))  # a pass writes 16 captions there, and two run side by side
    table = many.slice(0, count)
    tokens = [min(35, len(text.split()) + 2) for row in texts_of(table) for text in row]
    for size in SIZES[device]:
        with tempfile.TemporaryDirectory() as temporary:
            from tests.blip_models import REAL, write_blip

            captioner, matcher = (
                write_blip(Path(temporary) / kind, kind, **REAL[size]) for kind in ("captioner", "itm")
            )
            for precision in ("fp32", "bf16"):
                for wanted, some in ((1, many), (4, table)):
                    ways = {
                        "plain": plain_captions(captioner, some, device, precision, wanted),
                        "pairmill": stage_captions(captioner, some, device, precision, wanted),
                    }
                    name = f"BLIP {size} captioner {precision}, {wanted} a picture"
                    yield Case(name, "pictures", some.num_rows, ways, lengths)
                how = table, device, precision
                ways = {
                    "plain, image again for each text": plain_matching(matcher, *how, again=True),
                    "plain, image once": plain_matching(matcher, *how, again=False),
                    "pairmill": stage_matching(matcher, *how),
                }
                name = f"BLIP {size} matcher {precision}, {CAPTIONS + 1} texts a picture"
                details = {"mean_tokens": float(np.mean(tokens))}
                yield Case(name, "pictures", count, ways, differences, details=details)


def lengths(captions: dict[str, list[str]]) -> dict[str, float]:
    """Mean words: whether all ways wrote as much."""
    return {
        f"words a caption, {way}": float(np.mean([len((c or "").split()) for c in row]))
        for way, row in captions.items()
    }


def differences(scores: dict[str, list[float]]) -> dict[str, float]:
    """Largest and mean difference of probabilities."""
    plain = np.array(next(iter(scores.values())))
    apart = np.abs(np.array(scores["pairmill"]) - plain)
    return {
        "probabilities, largest difference to plain": float(apart.max()),
        "probabilities, mean difference to plain": float(apart.mean()),
        "probabilities, standard deviation": float(plain.std()),
    }
