"""The shipped captioner and filter: as good as their cards say, small, and independent of each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from pairmill.train.blip_quality import measure_captioner, measure_filter
from pairmill.weights import tiny_captioner_dir, tiny_itm_dir


def shipped(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


def test_captions_are_true():
    found = measure_captioner(tiny_captioner_dir(), scenes=200)
    card = shipped(tiny_captioner_dir())["oracle"]
    assert card["greedy"]["true"] >= 0.90 and card["nucleus"]["true"] >= 0.75
    assert found["greedy"]["true"] >= 0.87 and found["nucleus"]["true"] >= 0.70  # of 200 scenes, not 1,000
    assert found["nucleus"]["different"] > 0.7


def test_the_filter_tells_true_from_false():
    found = measure_filter(tiny_itm_dir(), scenes=250)
    least = {"random": 0.99, "colour": 0.97, "shape": 0.95, "relation": 0.90}
    card = shipped(tiny_itm_dir())["oracle"]["auc"]
    assert all(card[kind] >= value for kind, value in least.items())
    assert all(found["auc"][kind] >= value - 0.02 for kind, value in least.items())  # of 250 scenes, not 1,000


def test_both_together_are_at_most_4_mb():
    size = sum(f.stat().st_size for d in (tiny_captioner_dir(), tiny_itm_dir()) for f in d.rglob("*") if f.is_file())
    assert size <= 4_000_000


def test_they_share_no_weights():
    one, other = (load_file(d / "model.safetensors") for d in (tiny_captioner_dir(), tiny_itm_dir()))
    same = [
        name
        for name in set(one) & set(other)
        if one[name].shape == other[name].shape and one[name].std() > 0 and (one[name] == other[name]).all()
    ]
    assert [name for name in one if name.startswith("vision_model.")] and same == []


@pytest.mark.parametrize("folder", [tiny_captioner_dir(), tiny_itm_dir()], ids=["captioner", "itm"])
def test_cards_and_configs_are_there(folder: Path):
    assert {"README.md", "train.yaml", "metrics.json", "curves.png"} <= {f.name for f in folder.iterdir()}
    assert "procedural scenes" in (folder / "README.md").read_text(encoding="utf-8")
