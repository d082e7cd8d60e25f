"""Captioning and image-text matching: rate and memory, against the plain transformers loop.

    python -m benchmarks.capfilt_models [--size base|large] [--images N] [--captions N] [--texts N] [--batch N]
                                        [--device cpu|cuda] [--precision fp32|bf16] [--repeats N]

Checkpoints of the published sizes with random weights, written to disk and loaded from there; photographs from
../shared/data/coco-mini where it is, else procedural pictures of 640 x 480. Random weights seldom end a sentence, so
each caption has the full 20 tokens: a lower bound of the rate. `plain` is what the models' documentation shows, in
batches of the same size: the image is encoded again for each caption and each text; on a CPU also on one thread, whose
CPU seconds hold no waiting of threads for each other. All are run in turn; medians of `repeats` runs after a warm-up.
Memory is the peak of the process while one of them runs (CPU: resident, with one model in memory; GPU: allocated by
torch). Prints a table; writes benchmarks/results/capfilt_models-<date>.json, one entry for each size, device and
precision.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from captioners.blip import Captions
from filters.itm import ItmScore
from pairmill.blip import load_captioner, load_matcher
from pairmill.models import ModelRef
from pairmill.stage import Batch
from schemas import fields

ROOT = Path(__file__).resolve().parents[1]
COCO = ROOT.parent / "shared" / "data" / "coco-mini"


def rows(images: int, texts: int) -> pa.Table:
    """Photographs, or pictures, with so many texts each."""
    if COCO.is_dir():
        data = json.loads((COCO / "captions.json").read_text())
        files = [(COCO / "images" / entry["file_name"]).read_bytes() for entry in data["images"][:images]]
        listed = [[a["caption"] for a in data["annotations"] if a["image_id"] == e["id"]] for e in data["images"]]
    else:
        from random import Random

        from pairmill.procedural.captions import describe
        from pairmill.procedural.scene import render, sample_scene

        files, listed = [], []
        for number in range(images):
            rng = Random(number)
            scene = sample_scene(rng)
            buffer = io.BytesIO()
            render(scene, 640, 480).save(buffer, "JPEG")
            files.append(buffer.getvalue())
            listed.append([describe(scene, rng) for _ in range(texts)])
    entries = [[{"text": row[n % len(row)], "source": "human"} for n in range(texts)] for row in listed[:images]]
    uids = [f"{n:064x}" for n in range(len(files))]
    return pa.table({"uid": uids, "image": files, "texts": pa.array(entries, fields.TEXTS.type)})


def checkpoint(folder: Path, kind: str, size: str) -> ModelRef:
    """A checkpoint with random weights, of the published size."""
    sys.path.insert(0, str(ROOT))
    from tests.blip_models import REAL, write_blip

    return ModelRef(path=str(write_blip(folder / kind, kind, **REAL[size])))


def captioning(ref: ModelRef, table: pa.Table, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Both ways to write captions, ready to run."""
    blip = load_captioner(ref, options.device, options.precision)
    stage = Captions(ref, options.captions, precision=options.precision, device=options.device, batch=options.batch)
    from captioners.blip import writer_of

    writer = writer_of(blip, stage)
    images = Batch(table).images()
    uids = table["uid"].to_pylist()
    prompt = blip.tokenizer([stage.prompt] * options.batch, return_tensors="pt")["input_ids"].to(options.device)

    def plain() -> None:
        tasks = [image for image in images for _ in range(options.captions)]
        with torch.inference_mode():
            for start in range(0, len(tasks), options.batch):
                chunk = tasks[start : start + options.batch]
                tokens = blip.model.generate(
                    pixel_values=blip.prepared(chunk),
                    input_ids=prompt[: len(chunk)].clone(),
                    do_sample=True,
                    top_p=stage.top_p,
                    top_k=0,
                    repetition_penalty=stage.repetition_penalty,
                    max_length=stage.max_length,
                    min_length=stage.min_length,
                )
                blip.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    return {"pairmill": lambda: writer.captions(images, uids), "plain": plain}


def matching(ref: ModelRef, table: pa.Table, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Both ways to score texts, ready to run."""
    blip = load_matcher(ref, options.device, options.precision)
    from filters.itm import matcher_of

    stage = ItmScore(ref, precision=options.precision, device=options.device, batch=options.batch)
    matcher = matcher_of(blip, stage)
    images = Batch(table).images()
    texts = [[entry["text"] for entry in row] for row in table["texts"].to_pylist()]

    def plain() -> list[float]:
        tasks = [(image, text) for image, row in zip(images, texts, strict=True) for text in row]
        found: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(tasks), options.batch):
                chunk = tasks[start : start + options.batch]
                ids, mask = matcher.tokenized([text for _, text in chunk])
                pixels = blip.prepared([image for image, _ in chunk])
                scores = blip.model(input_ids=ids, pixel_values=pixels, attention_mask=mask).itm_score
                found += scores.float().softmax(dim=-1)[:, 1].tolist()
        return found

    ours = [p for row in matcher.scores(images, texts) for p in row]
    difference = float(np.abs(np.array(ours) - np.array(plain())).max())
    print(f"itm: largest difference to plain {difference:.2e}", flush=True)
    options.itm_difference = difference
    return {"pairmill": lambda: matcher.scores(images, texts), "plain": plain}


def measure(ways: dict[str, Callable[[], Any]], items: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of each way, run in turn, and the peak of memory."""
    plain = ways["plain"]

    def one_thread() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        plain()
        torch.set_num_threads(threads)

    if options.device == "cpu":
        ways = ways | {"plain, 1 thread": one_thread}
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(options.repeats + 1):
        for name, way in ways.items():
            reset_peak(options.device)
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - wall, time.process_time() - cpu
            if number:  # the first run warms up
                taken[name].append((*seconds, peak_mb(options.device)))
    found = {}
    for name, runs in taken.items():
        wall, cpu, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        walls = [run[0] for run in runs]
        found[name] = {
            "wall_s": wall,
            "wall_min_s": min(walls),
            "wall_max_s": max(walls),
            "cpu_s": cpu,
            "peak_mb": peak,
        }
        found[name] |= {"per_s": items / wall, "per_cpu_s": items / cpu}
    for row in found.values():
        row["wall_ratio"] = row["wall_s"] / found["pairmill"]["wall_s"]
        row["cpu_ratio"] = row["cpu_s"] / found["pairmill"]["cpu_s"]
    return found


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform != "linux":
        return float("nan")
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def show(title: str, found: dict[str, dict[str, float]], unit: str) -> None:
    head = f"{'wall s':>8} {unit + '/s':>12} {unit + '/CPU s':>16} {'peak MB':>9} {'x wall':>7} {'x CPU':>7}"
    print(f"\n{title:<16} {head}")
    for name, row in found.items():
        rates = f"{row['wall_s']:8.2f} {row['per_s']:12.3f} {row['per_cpu_s']:16.3f} {row['peak_mb']:9.0f}"
        print(f"{name:<16} {rates} {row['wall_ratio']:7.2f} {row['cpu_ratio']:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["base", "large"], default="base")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--captions", type=int, default=3)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    table = rows(options.images, options.texts)
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, prepare, count, unit in (
            ("captioning", "captioner", captioning, options.captions, "captions"),
            ("matching", "itm", matching, options.texts, "texts"),
        ):
            ways = prepare(checkpoint(Path(folder), kind, options.size), table, options)
            results[name] = measure(ways, table.num_rows * count, options)
            show(name, results[name], unit)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    out = Path(__file__).parent / "results" / f"capfilt_models-{today}.json"
    out.parent.mkdir(exist_ok=True)
    key = f"{options.size} {options.device} {options.precision}"
    entry = {
        **vars(options),
        "pictures": "coco-mini" if COCO.is_dir() else "procedural",
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "results": {
            name: {way: {k: float(f"{v:.4g}") for k, v in row.items()} for way, row in found.items()}
            for name, found in results.items()
        },
    }
    known = json.loads(out.read_text()) if out.is_file() else {"date": today}
    out.write_text(json.dumps(known | {key: entry}, indent=1) + "\n")
    print(f"\nwrote {out.name}: {key}")


if __name__ == "__main__":
    main()
