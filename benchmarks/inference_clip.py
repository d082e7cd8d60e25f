"""CLIP's part of `benchmarks.inference`: images and alt texts to cosines, ViT-B-32 on a CPU and ViT-L-14 on a GPU.

The plain loop is what open_clip's documentation shows: open, preprocess and stack 32 images, tokenise 32 texts, encode
both, on torch's default threads. Pictures are made up, with the spectrum of photographs and shapes on them, 400 pixels
at their longer side; texts have as many words as alt texts of the web (12 on average, most fewer).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw

from benchmarks.inference import Case
from pairmill._torchvision import ensure_torchvision
from schemas import fields

MODELS = {"cpu": "ViT-B-32", "cuda": "ViT-L-14"}
PAIRS = {"cpu": 96, "cuda": 4096}
PLAIN_BATCH = {"cpu": 32, "cuda": 256}
WORDS = """
the of a and in with for on photo image stock vector black white red blue green old new small large woman man girl boy
dog cat house car street city beach mountain lake forest table kitchen wedding dress shoes leather cotton vintage modern
design pattern background illustration poster print gold silver wooden glass portrait landscape sunset winter summer
flowers birthday cake coffee book by front view close up hand holding sitting standing 2019 set isolated
"""

LENGTHS = (2.25, 0.66)
"""Mean and deviation of the logarithm of a text's number of words. 10,000 alt texts of the web had 2.0 and 0.66."""


def pairs(count: int, seed: int = 0) -> pa.Table:
    """Pictures as JPEG with one text each, as the stage `filters.clip_score.ClipScore` reads them."""
    rng = np.random.default_rng(seed)
    images = [picture(rng) for _ in range(count)]
    lengths = np.clip(np.exp(rng.normal(*LENGTHS, count)), 1, 70).astype(int)
    texts = [" ".join(rng.choice(WORDS.split(), length)) for length in lengths]
    listed = pa.array([[{"text": text, "source": "web"}] for text in texts], fields.TEXTS.type)
    return pa.table({"uid": [f"{n:064x}" for n in range(count)], "image": images, "texts": listed})


def picture(rng: np.random.Generator, longest: int = 400) -> bytes:
    """A JPEG with detail at all sizes, weaker the finer, and some shapes."""
    other = int(longest * rng.uniform(0.55, 1.0))
    size = (longest, other) if rng.random() < 0.6 else (other, longest)
    canvas = np.zeros((size[1], size[0], 3), dtype=np.float32)
    for cells in (3, 8, 25, 80, 400):
        noise = rng.normal(0, 1, (max(2, cells * size[1] // longest), max(2, cells * size[0] // longest), 3))
        layers = [
            Image.fromarray(noise[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC) for c in range(3)
        ]
        canvas += np.stack([np.asarray(layer) for layer in layers], axis=-1) * 60 / cells**0.5
    image = Image.fromarray(np.clip(canvas + 128, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, side = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(30, 150)
        box = [int(x), int(y), int(x + side), int(y + side)]
        draw.ellipse(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def random_model(folder: Path, name: str) -> Path:
    """A model of open_clip with random weights, in a folder that open_clip and pairmill load."""
    ensure_torchvision()
    import open_clip
    from open_clip.factory import get_model_config
    from open_clip.transform import PreprocessCfg
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model(name)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": PreprocessCfg().mean, "std": PreprocessCfg().std, "interpolation": "bicubic"}
    config = {"model_cfg": get_model_config(name), "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def plain(folder: Path, table: pa.Table, device: str, precision: str) -> Callable[[], np.ndarray]:
    """The loop that a user would write; returns cosines."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", precision=precision, device=device, require_pretrained=True
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    dtype = open_clip.get_input_dtype(precision)
    data = table["image"].to_pylist()
    texts = [row[0]["text"] for row in table["texts"].to_pylist()]
    batch = PLAIN_BATCH[device]

    def way() -> np.ndarray:
        found = []
        for start in range(0, len(data), batch):
            opened = [Image.open(io.BytesIO(one)) for one in data[start : start + batch]]
            pixels = torch.stack([preprocess(image) for image in opened]).to(device, dtype)
            ids = tokenizer(texts[start : start + batch]).to(device)
            with torch.no_grad():
                left = model.encode_image(pixels, normalize=True)
                right = model.encode_text(ids, normalize=True)
                found.append((left.float() * right.float()).sum(dim=-1).cpu().numpy())
        return np.concatenate(found)

    return way


def stage(folder: Path, table: pa.Table, device: str, precision: str) -> Callable[[], np.ndarray]:
    """The stage `clip`, rows in and columns out; returns cosines."""
    from filters.clip_score import ClipScore
    from pairmill.models import ModelRef
    from pairmill.stage import Batch

    clip = ClipScore(ModelRef(path=str(folder)), precision, device)
    kernel, rows = clip.open(), clip.resources.rows

    def way() -> np.ndarray:
        starts = range(0, table.num_rows, rows)
        return np.concatenate([kernel(Batch(table.slice(start, rows)))["clip_score"].to_numpy() for start in starts])

    return way


def encoding(folder: Path, device: str, precision: str, images: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The image tower alone, on inputs that are on the device already: plain, and as the stage's passes run it."""
    import open_clip

    from pairmill.models import ModelRef, load_clip

    model, _, _ = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", precision=precision, device=device, require_pretrained=True
    )
    model.eval()
    clip = load_clip(ModelRef(path=str(folder)), device, precision)
    side = model.visual.image_size[0]
    pixels = torch.randn(PLAIN_BATCH[device], 3, side, side).to(device, open_clip.get_input_dtype(precision))
    inputs = torch.randint(0, 256, (clip.image_rows, side, side, 3), dtype=torch.uint8).to(device)

    def plainly() -> None:
        with torch.inference_mode():
            for _ in range(0, images, len(pixels)):
                model.encode_image(pixels)

    def ours() -> None:
        chunks = list(range(0, images, clip.image_rows))
        clip._image_passes.run(chunks, 1, lambda _: clip._encode_images(inputs)[:1])

    return plainly, ours


def image_flops(folder: Path) -> float:
    """Floating point operations of encoding one image, as torch counts them (two a multiplication with addition)."""
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    side = model.visual.image_size[0]
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops())


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Pairs end to end, and the image tower alone."""
    device = options.device
    name, count = MODELS[device], max(8, int(PAIRS[device] * options.scale))
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_model(Path(temporary) / "clip", name)
        table = pairs(count)
        ways = {
            f"{who} {precision}": make(folder, table, device, precision)
            for precision in ("fp32", "bf16")
            for who, make in (("plain", plain), ("pairmill", stage))
        }
        yield Case(f"{name}, image and text to cosine", "pairs", count, ways, apart, details=_told(table))
        flops = image_flops(folder)
        images = max(1, count * 2 // 3 // PLAIN_BATCH[device]) * PLAIN_BATCH[device]
        towers = {precision: encoding(folder, device, precision, images) for precision in ("fp32", "bf16")}
        ways = {
            f"{who} {p}": way
            for p, both in towers.items()
            for who, way in zip(("plain", "pairmill"), both, strict=True)
        }
        shares = {way: (flops, way.split()[1]) for way in ways}
        yield Case(f"{name}, image tower alone", "images", images, ways, flops=shares)


def apart(cosines: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest and mean differences of cosines to the plain loop in fp32."""
    found = {}
    for name, values in cosines.items():
        if name != "plain fp32":
            difference = np.abs(values - cosines["plain fp32"])
            found[f"cosines of {name}, largest difference to plain fp32"] = float(difference.max())
            found[f"cosines of {name}, mean difference to plain fp32"] = float(difference.mean())
    return found


def _told(table: pa.Table) -> dict[str, float]:
    words = [len(row[0]["text"].split()) for row in table["texts"].to_pylist()]
    sizes = [len(image) / 1000 for image in table["image"].to_pylist()]
    return {"mean_words": float(np.mean(words)), "mean_image_kb": float(np.mean(sizes))}
