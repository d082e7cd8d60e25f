"""What the contract is held against: small real inputs, models and servers, and configs that use them on any engine."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pairmill.procedural.web import ProceduralWeb, WebRow, make_rows, served_bytes
from pairmill.run import parse_config
from schemas.config import RunConfig
from tests.blip_models import write_blip2, write_instructblip
from tests.captioners.boxes import models
from tests.hostile.endpoint_server import Answer, Asked, good
from tests.hostile.writer_server import kind_of, texts_of, writes

EMBEDDING = 128
"""Width of the shipped tiny CLIP's embeddings."""


# -- inputs -----------------------------------------------------------------------------------------------------------


def local_sources(folder: Path, samples: int = 8) -> list[dict[str, Any]]:
    """WebDataset, img2dataset's Parquet and a folder with COCO files, of `samples` pictures each."""
    rows = [r for r in make_rows(6 * samples, 9, "web.invalid", 80) if r.kind.has_picture and r.boxes]
    parts = [rows[n * samples : (n + 1) * samples] for n in range(3)]
    assert all(len(part) == samples for part in parts)
    return [
        {"kind": "webdataset", "path": str(_webdataset(folder / "00000.tar", parts[0]))},
        {"kind": "img2dataset_parquet", "path": str(_img2dataset(folder / "00000.parquet", parts[1]))},
        _coco(folder / "coco", parts[2]),
    ]


def _webdataset(path: Path, rows: list[WebRow]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            ending = row.path.rpartition(".")[2]
            for name, data in ((f"{number}.{ending}", served_bytes(row)), (f"{number}.txt", row.text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def _img2dataset(path: Path, rows: list[WebRow]) -> Path:
    columns = {
        "url": [row.url for row in rows],
        "caption": [row.text for row in rows],
        "key": [f"{number:09d}" for number in range(len(rows))],
        "status": ["success"] * len(rows),
        "jpg": [served_bytes(row) for row in rows],
    }
    pq.write_table(pa.table(columns), path)
    return path


def _coco(folder: Path, rows: list[WebRow]) -> dict[str, Any]:
    (folder / "images").mkdir(parents=True)
    images, captions, instances = [], [], []
    labels = sorted({box.label for row in rows for box in row.boxes or ()})
    for number, row in enumerate(rows):
        name, data = row.path.rpartition("/")[2], served_bytes(row)
        (folder / "images" / name).write_bytes(data)
        with Image.open(io.BytesIO(data)) as opened:
            images.append({"id": number, "file_name": name, "width": opened.width, "height": opened.height})
        captions.append({"image_id": number, "caption": row.text})
        for box in row.boxes or ():
            corners = [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1]
            instances.append({"image_id": number, "category_id": labels.index(box.label), "bbox": corners})
    categories = [{"id": number, "name": label} for number, label in enumerate(labels)]
    for key, of_images in (("captions", captions), ("instances", instances)):
        content = {"images": images, "annotations": of_images, "categories": categories}
        (folder / f"{key}.json").write_text(json.dumps(content))
    files = {key: str(folder / f"{key}.json") for key in ("captions", "instances")}
    return {"kind": "image_folder", "path": str(folder / "images"), **files}


# -- models -----------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> dict[str, dict[str, str]]:
    """Tiny random checkpoints of every kind that no shipped model is of, and a head over the shipped CLIP."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn((1, EMBEDDING), generator=generator), "bias": torch.zeros(1)}
    save_file(weights, folder / "head.safetensors")
    return {
        "captioners": {
            "blip2": str(write_blip2(folder / "blip2", "opt")),
            "instructblip": str(write_instructblip(folder / "instructblip", "t5")),
        },
        "matchers": {"blip2": str(write_blip2(folder / "blip2-itm", "itm"))},
        "detectors": {"dino": str(models.grounding_dino(folder / "dino"))},
        "owlv2": {"path": str(models.owlv2(folder / "owlv2"))},
        "sam": {"path": str(models.sam(folder / "sam"))},
        "head": {"path": str(folder / "head.safetensors")},
    }


# -- servers ----------------------------------------------------------------------------------------------------------


def captions(asked: Asked) -> Answer:
    """An endpoint's caption, which depends on the picture and on the seed."""
    return good(f"A picture of {len(asked.image)} bytes, seen {asked.body['seed'] % 7} times.")


def said(asked: Asked) -> str:
    """A writer that needs no model: it says what the texts say. Of pointing it knows nothing, and fails."""
    texts, kind = texts_of(asked), kind_of(asked)
    if kind == "detail":
        return " ".join(texts)
    if kind == "complex":
        return json.dumps([{"question": "Why might they be together?", "answer": " ".join(texts[:2])}])
    questions = ("What does the picture show?", "What else can be seen?")
    return json.dumps([{"question": q, "answer": t} for q, t in zip(questions, texts, strict=False)])


def writer(asked: Asked) -> Answer:
    """An endpoint that writes `said`, and bills it."""
    return writes(said(asked))


# -- configs ----------------------------------------------------------------------------------------------------------

KINDS = {"conversation": 1, "detail": 0.5, "complex": 1, "grounding": 0.7}


@dataclass(frozen=True)
class Material:
    """All that the configs name."""

    folder: Path
    web: ProceduralWeb
    sources: list[dict[str, Any]]
    models: dict[str, dict[str, str]]
    endpoint: str
    batches: str


Case = Callable[[Material, Path, dict[str, Any], int], RunConfig]
"""Makes the config of a dataset, for an engine and a number of rows a kernel call."""


def everything(material: Material, dataset: Path, engine: dict[str, Any], rows: int) -> RunConfig:
    """Every kind of source, the download, and every model; cells by the engine; conversations that cost money."""
    table = {"kind": "url_table", "path": str(material.folder / "urls.parquet"), "boxes": "boxes"}
    models = material.models
    return parse_config(
        {
            "dataset": str(dataset),
            "recipe": "tests.contract.recipes:everything",
            "source": [table, *material.sources],
            "shard_size": 24,
            "engine": engine,
            "download": {"allow_private_addresses": True, "retries": 0, "per_host": 32},
            "models": {
                "device": "cpu",
                "batch": 8,
                "heads": {"taste": models["head"]},
                "detector": models["owlv2"],
                "segmenter": models["sam"],
            },
            "caption": {"count": 2, "max_length": 12},
            "mix": {"recipe": "nguyen23", "clip": "top 80%"},
            "keep": {"taste": "top 90%", "itm": None, "min_side": 32},
            "dedup": {"semantic": 0.9, "floor": 0.6, "cells": 8, "probe": 2},
            "boxes": {"threshold": 0.3, "most": 4},
            "instruct": {
                "kinds": KINDS,
                "writer": {"kind": "endpoint", "name": "paid", "base_url": material.endpoint, "concurrency": 8},
                "price": {"prompt": 1.0, "completion": 2.0},
            },
            "options": {
                "rows": rows,
                "captions_url": material.endpoint,
                **{key: models[key] for key in ("captioners", "matchers", "detectors")},
            },
        }
    )


def main_road(material: Material, dataset: Path, engine: dict[str, Any], rows: int) -> RunConfig:
    """The recipe clip_filter over local sources, by img2dataset's stage; conversations by batches."""
    return parse_config(
        {
            "dataset": str(dataset),
            "recipe": "tests.contract.recipes:clip_filter",
            "source": material.sources,
            "shard_size": 8,
            "engine": engine,
            "download": {"with": "img2dataset"},
            "models": {"device": "cpu"},
            "keep": {"clip_score": "top 80%", "min_side": 32},
            "instruct": {"kinds": KINDS, "writer": {"kind": "batch", "name": "m", "base_url": material.batches}},
            "options": {"rows": rows},
        }
    )


def visited(material: Material, dataset: Path, engine: dict[str, Any], rows: int) -> RunConfig:
    """Images of the web and the boxes of their things: what is asked for again without any model."""
    table = {"kind": "url_table", "path": str(material.folder / "urls.parquet"), "boxes": "boxes"}
    return parse_config(
        {
            "dataset": str(dataset),
            "recipe": "tests.captioners.boxes.recipe:recipe",
            "source": table,
            "shard_size": 24,
            "engine": engine,
            "download": {"allow_private_addresses": True, "retries": 0, "per_host": 32},
        }
    )


CASES: dict[str, Case] = {"everything": everything, "main_road": main_road, "visited": visited}
