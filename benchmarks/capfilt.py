"""CapFilt's loop: does a model trained on the mended set beat the same model trained on the noisy set as it came?

    python -m benchmarks.capfilt [--seeds 0 1 2] [--images N] [--out DIR]

A pool of procedural pictures of one and two objects. 5% are curated: five true captions each. The others have one web
text, and half of those describe another picture. For each seed:

1. a captioner is trained on everything as it came (BLIP's pre-training, for all that follows to start from);
2. a captioner and a filter are trained from it on the curated 5% (`pairmill train loop`);
3. they mend the noisy 95%: `pairmill run` with the recipe capfilt;
4. the same model, an ITC + ITM filter, is trained from 1 on the curated 5% with (a) the noisy texts as they came, (b)
   the texts that CapFilt kept: the same steps, the same batch, so the same number of samples seen.

Both are measured on scenes of a seed that nothing was trained on: retrieval (the best of 500 captions by cosine is true
of the picture) and the matching head's AUC against false captions of five kinds. No training sees the oracle, and there
are no known negatives: only images and texts. Prints a table; writes benchmarks/results/capfilt-<date>.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import multiprocessing
import os
import random
import statistics
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pairmill.config_file import parse_config
from pairmill.loop import LoopConfig, run_loop
from pairmill.procedural.captions import as_typed, describe, is_true
from pairmill.procedural.scene import render, sample_scene
from pairmill.query import query
from pairmill.report.progress import LogReporter
from pairmill.store import Dataset
from pairmill.train.blip import train_filter
from pairmill.train.blip_quality import measure_filter
from pairmill.train.itm import TrainFilterConfig

CURATED = 0.05
FALSE_WEB_TEXTS = 0.5
CURATED_CAPTIONS = 5
OBJECTS = (1, 2)
SIDE = 96

_TOWER = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3, "initializer_range": 0.05}
SCRATCH = {
    "vision": {**_TOWER, "num_hidden_layers": 4, "patch_size": 8},
    "text": {**_TOWER, "num_hidden_layers": 2, "max_position_embeddings": 48},
    "projection": 64,
    "positions": "sincos",
}
FIT: dict[str, Any] = {
    "batch": 64,
    "betas": (0.9, 0.98),
    "optimizer": "muon",
    "precision": "bf16",
    "threads": 1,
    "device": "cpu",
    "holdout": 0,
    "augment": {"crop": 0.12},
    "checkpoint_every": 100_000,
}
STEPS = {"pretrain": 1800, "captioner": 250, "filter": 700, "again": 800}


def make_pool(folder: Path, images: int, seed: int) -> dict[str, Any]:
    """Write curated/ (COCO captions), noisy/ (COCO captions, one each) and noisy.tar (a WebDataset shard)."""
    rng = random.Random(f"capfilt:{seed}")
    curated = round(CURATED * images)
    scenes = [sample_scene(rng, objects=rng.choice(OBJECTS), width=SIDE * 2, height=SIDE * 2) for _ in range(images)]
    records: dict[str, Any] = {name: {"images": [], "annotations": []} for name in ("curated", "noisy")}
    truths = {}
    for name in records:
        (folder / name).mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "noisy.tar", "w") as tar:
        for number, scene in enumerate(scenes):
            name = "curated" if number < curated else "noisy"
            buffer = io.BytesIO()
            render(scene, SIDE, SIDE).save(buffer, "JPEG", quality=90)
            (folder / name / f"{number:06d}.jpg").write_bytes(buffer.getvalue())
            texts = [describe(scene, rng) for _ in range(CURATED_CAPTIONS)]
            if name == "noisy":
                text = as_typed(describe(scene, rng), rng)
                if rng.random() < FALSE_WEB_TEXTS:
                    while is_true(text, scene) is not False:
                        text = as_typed(describe(rng.choice(scenes), rng), rng)
                texts = [text]
                for ending, data in (("jpg", buffer.getvalue()), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                truths[number] = scene
            records[name]["images"].append({"id": number, "file_name": f"{number:06d}.jpg"})
            records[name]["annotations"] += [{"image_id": number, "caption": t} for t in texts]
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    return truths


def coco(folder: Path, name: str) -> dict[str, Any]:
    return {"kind": "coco", "images": str(folder / name), "captions": str(folder / f"{name}.json")}


def loop_config(folder: Path, seed: int, scale: float) -> LoopConfig:
    steps = {name: max(2, round(scale * count)) for name, count in STEPS.items()}
    everything = {"kind": "several", "parts": [coco(folder, "curated"), coco(folder, "noisy")]}
    from_scratch = {"scratch": SCRATCH, "image_size": 64, "lr": 2e-3, "muon_lr": 0.01, "warmup": 100}
    tuned = {"lr": 5e-4, "muon_lr": 0.003, "warmup": 30}
    filter_ = {"queue": 1024, "alpha_steps": 200, "lr": 1e-3, "muon_lr": 0.006, "warmup": 50}
    return parse_config(
        LoopConfig,
        {
            "out": str(folder / "loop"),
            "curated": coco(folder, "curated"),
            "pretrain": {**FIT, **from_scratch, "data": everything, "steps": steps["pretrain"], "seed": seed},
            "captioner": {**FIT, **tuned, "steps": steps["captioner"], "seed": seed},
            "filter": {**FIT, **filter_, "steps": steps["filter"], "seed": seed},
            "again": {**FIT, **filter_, "steps": steps["again"], "seed": seed},
            "again_kind": "filter",
            "run": {
                "source": [{"kind": "webdataset", "path": str(folder / "noisy.tar")}],
                "caption": {"count": 1, "max_length": 40},
                "mix": {"recipe": "capfilt"},
                "keep": {"min_side": None, "language": None, "min_words": None, "itm": ">= 0.5"},
                "dedup": {"exact": False, "semantic": None},
                "engine": {"kind": "local"},
                "seed": seed,
            },
        },
    )


def one_seed(seed: int, images: int, root: str, scale: float) -> dict[str, Any]:
    """Everything for one seed, on one thread; figures of both arms, and of the mending."""
    torch.set_num_threads(1)
    settings = json.dumps([images, scale, STEPS, CURATED, FALSE_WEB_TEXTS, SCRATCH, FIT])
    folder = Path(root) / hashlib.sha256(settings.encode()).hexdigest()[:8] / f"seed-{seed}"
    result = folder / "result.json"
    if result.exists():
        done: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return done
    begin = time.monotonic()
    scenes = make_pool(folder, images, seed)
    config = loop_config(folder, seed, scale)
    with (folder / "log.txt").open("a", encoding="utf-8") as stream:
        log = LogReporter(stream)
        run_loop(config, log, lambda _: None)
        mended = texts_of(Dataset(str(config.out / "dataset")), scenes)
        raw = {
            **config.again,
            "out": str(folder / "raw"),
            "model": {"path": str(config.out / "pretrained")},
            "data": {"kind": "several", "parts": [coco(folder, "curated"), coco(folder, "noisy")]},
        }
        if not (folder / "raw" / "metrics.json").exists():
            train_filter(parse_config(TrainFilterConfig, raw, "raw"))
    found = {name: figures(path) for name, path in (("raw", folder / "raw"), ("mended", config.out / "again"))}
    found["filter"] = figures(config.out / "filter")
    record = {"seed": seed, "texts": mended, **found, "seconds": round(time.monotonic() - begin)}
    result.write_text(json.dumps(record), encoding="utf-8")
    return record


def figures(path: Path) -> dict[str, float]:
    found = measure_filter(path, scenes=1000, objects=OBJECTS)
    return {"recall_at_1": found["recall_at_1"]["share"], **{f"auc_{k}": v for k, v in found["auc"].items()}}


def texts_of(dataset: Dataset, scenes: dict[int, Any]) -> dict[str, float]:
    """The share of true texts before and after, by the oracle."""
    rows = query(
        dataset.snapshot(),
        "SELECT pairs.extra, pairs.url, texts.text, texts.source, texts.kept FROM texts JOIN pairs USING (uid)",
    ).to_pylist()
    judged = []
    for row in rows:
        number = int(Path(row["url"] or "").stem.rsplit("/", 1)[-1][-6:])
        judged.append((row["source"] == "web", bool(row["kept"]), bool(is_true(row["text"] or "", scenes[number]))))

    def share(chosen: list[bool]) -> float:
        return round(sum(chosen) / max(1, len(chosen)), 4)

    return {
        "web": share([true for web, _, true in judged if web]),
        "web_kept": share([true for web, kept, true in judged if web and kept]),
        "captions": share([true for web, _, true in judged if not web]),
        "captions_kept": share([true for web, kept, true in judged if not web and kept]),
        "kept": share([true for _, kept, true in judged if kept]),
        "texts_kept": sum(kept for _, kept, _ in judged),
        "images": sum(web for web, _, _ in judged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=12_000, help="of the pool, the curated ones included")
    parser.add_argument("--out", default="out/bench-capfilt", help="working folder; finished parts are not done again")
    parser.add_argument("--workers", type=int, default=2, help="seeds at a time, one thread each")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps; below 1 for a quick look")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(one_seed, seed, arguments.images, arguments.out, arguments.scale) for seed in arguments.seeds
        ]
        results = [job.result() for job in jobs]
    names = list(results[0]["raw"])
    print(f"{'':16}{'raw':>18}{'mended':>18}{'difference':>18}")
    summary = {}
    for name in names:
        columns = [[r["raw"][name] for r in results], [r["mended"][name] for r in results]]
        columns.append([m - r for r, m in zip(*columns, strict=True)])
        spread = [(statistics.mean(c), statistics.stdev(c) if len(c) > 1 else 0.0) for c in columns]
        summary[name] = dict(zip(("raw", "mended", "difference"), spread, strict=True))
        print(f"{name:16}" + "".join(f"{mean:10.4f} ± {deviation:.4f}" for mean, deviation in spread))
    for result in results:
        print(f"seed {result['seed']}: texts {result['texts']}, {result['seconds']} s")
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpus": os.cpu_count(),
        "images": arguments.images,
        "curated": CURATED,
        "false_web_texts": FALSE_WEB_TEXTS,
        "steps": STEPS,
        "scale": arguments.scale,
        "batch": FIT["batch"],
        "precision": FIT["precision"],
        "seconds": round(time.monotonic() - begin),
        "seconds_of_all_seeds": sum(r["seconds"] for r in results),
        "mean_and_deviation": summary,
        "seeds": results,
    }
    if arguments.scale != 1.0:
        return
    path = Path(__file__).parent / "results" / f"capfilt-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
