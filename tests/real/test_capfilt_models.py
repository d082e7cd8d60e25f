"""Captions and matching scores of real photographs, by checkpoints of BLIP-base's real size with random weights (none
can be fetched here) and by the shipped tiny models, which know no photographs: shapes and laws, not quality.

The photographs lie beside the project (../shared); the tests are skipped where they do not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest

from captioners.blip import Captions
from filters.itm import ItmScore
from pairmill.models import ModelRef
from pairmill.stage import Batch, ErrorBudget, apply
from pairmill.weights import tiny_captioner_dir, tiny_itm_dir
from schemas import fields
from tests.blip_models import REAL, write_blip

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason="the COCO photographs are not beside the project")


def photographs(count: int) -> pa.Table:
    """Rows of the first photographs with all their captions."""
    data = json.loads((COCO / "captions.json").read_text())
    texts: dict[int, list[dict[str, str]]] = {image["id"]: [] for image in data["images"][:count]}
    for row in data["annotations"]:
        if row["image_id"] in texts:
            texts[row["image_id"]].append({"text": row["caption"].strip(), "source": "human"})
    return pa.table(
        {
            "uid": [f"{image['id']:064x}" for image in data["images"][:count]],
            "image": [(COCO / "images" / image["file_name"]).read_bytes() for image in data["images"][:count]],
            "texts": pa.array(list(texts.values()), fields.TEXTS.type),
        }
    )


def caption_and_match(rows: pa.Table, captions: Captions, scores: ItmScore) -> pa.Table:
    """Both stages over the rows, with their laws checked; what `scores` wrote."""
    written = apply(captions, captions.open(), Batch(rows), ErrorBudget())
    assert written["reason"].null_count == len(written)
    for row in written["captions"].to_pylist():
        assert len(row) == captions.count
        for entry in row:
            assert (entry["text"] is None) == (entry["reason"] is not None)
            assert entry["source"] == "blip"
            assert entry["text"] is None or (entry["text"].strip() == entry["text"] != "")
    both = rows.append_column("captions", written["captions"])
    found = apply(scores, scores.open(), Batch(both), ErrorBudget())
    for texts, probabilities in (("texts", "itm_scores"), ("captions", "caption_itm_scores")):
        for row, values in zip(both[texts].to_pylist(), found[probabilities].to_pylist(), strict=True):
            assert [v is None for v in values] == [entry["text"] is None for entry in row]
            assert all(0 <= v <= 1 for v in values if v is not None)
    return found


def test_checkpoints_of_the_real_size() -> None:
    with tempfile.TemporaryDirectory() as folder:  # 2 GB that pytest would keep
        captioner = write_blip(Path(folder) / "captioner", "captioner", **REAL["base"])
        matcher = write_blip(Path(folder) / "itm", "itm", seed=1, **REAL["base"])
        assert (captioner / "model.safetensors").stat().st_size > 850e6
        captions = Captions(ModelRef(path=str(captioner)), count=2, device="cpu", batch=4)
        scores = ItmScore(ModelRef(path=str(matcher)), captions=True, device="cpu", batch=4)
        found = caption_and_match(photographs(2), captions, scores)
    flat = [p for row in found["itm_scores"].to_pylist() for p in row]
    assert len(set(flat)) == len(flat) == 10


def test_the_tiny_models_over_all_photographs() -> None:
    rows = photographs(80)
    captions = Captions(ModelRef(path=str(tiny_captioner_dir())), count=2, device="cpu")
    found = caption_and_match(rows, captions, ItmScore(ModelRef(path=str(tiny_itm_dir())), captions=True, device="cpu"))
    assert len(found) == 80
    again = caption_and_match(
        rows.slice(40, 7), captions, ItmScore(ModelRef(path=str(tiny_itm_dir())), captions=True, device="cpu")
    )
    assert again.equals(found.slice(40, 7).combine_chunks())
