"""Instruction data of COCO's photographs as LLaVA and Qwen-VL read it: every box in a text is one of the stored boxes.

They lie beside the project (../shared); the test is skipped where they do not.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pairmill.export import Options, export, verify_export
from pairmill.export.dialects import DIALECTS, Located
from pairmill.instructions import Instruction, Mention, instruction_id, parts
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import parse_config, refresh
from pairmill.store import Dataset

DATA = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the COCO photographs are not beside the project")

FORMATS = {"llava": ("llava.json", "llava", "<image>\n"), "qwen-vl": ("qwen_vl.json", "qwen_vl", "</img>\n")}
SLACK = {"llava": 0.0101, "qwen_vl": 0.00101}
"""A box that would be a line is moved by a unit of the frame at most; half of it elsewhere."""


def test_boxes_in_texts_are_the_stored_ones(tmp_path: Path) -> None:
    config = parse_config(
        {
            "dataset": str(tmp_path / "dataset"),
            "recipe": "instruct",
            "source": {
                "kind": "image_folder",
                "path": str(DATA / "images"),
                "captions": str(DATA / "captions.json"),
                "instances": str(DATA / "instances.json"),
            },
            "engine": {"kind": "local"},
            "instruct": {"kinds": {"conversation": 1, "detail": 1, "complex": 1, "grounding": 1}},
        }
    )
    refresh(config, Silent())
    snapshot = Dataset(config.dataset).snapshot()
    rows = query(snapshot, "SELECT * FROM instructions WHERE reason IS NULL").to_pylist()
    stored = {instruction_id(row["uid"], row["kind"]): Instruction.from_row(row) for row in rows}
    sizes = {r["uid"]: (r["width"], r["height"]) for r in query(snapshot, "SELECT * FROM pairs").to_pylist()}
    assert len(stored) > 250
    for name, (file, dialect, start) in FORMATS.items():
        out = tmp_path / name
        export(snapshot, str(out), name, options=Options(images="files"))
        assert verify_export(str(out)).ok
        found = json.loads((out / file).read_text())
        assert len(found) == len(stored) and {r["id"] for r in found} == stored.keys()
        boxes = 0
        for record in found:
            width, height = sizes[record["id"][:64]]
            told = stored[record["id"]]
            said = [turn["value"] for turn in record["conversations"]]
            said[0] = said[0].split(start, 1)[1]
            for turn, text in zip(told.turns, said, strict=True):
                meant = [told.boxes[n] for p in parts(turn.content) if isinstance(p, Mention) for n in p.boxes]
                read = DIALECTS[dialect].parse(text, width, height)
                there = [box for part in read if isinstance(part, Located) for box in part.boxes]
                assert len(there) == len(meant)
                for box, corners in zip(meant, there, strict=True):
                    slack = SLACK[dialect] * max(width, height)
                    assert all(abs(a - b) <= slack for a, b in zip(box.xyxy, corners, strict=True)), record["id"]
                boxes += len(there)
        assert boxes > 100
        if name == "llava":
            for record in found:
                with Image.open(out / record["image"]) as image:
                    assert image.size == sizes[record["id"][:64]]
