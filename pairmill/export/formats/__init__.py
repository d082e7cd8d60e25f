"""The formats of exports, each in a module of its own; `FORMATS` is the one list of them.

A format is a `pairmill.export.format.Format`. To add one, write its module and name it in `FORMATS`: the command, the
manifest, updates, `--verify`, takedowns and the tests of all formats take it from there.
"""

from __future__ import annotations

from collections.abc import Mapping

from pairmill.export.format import Format
from pairmill.export.formats.blip import BLIP
from pairmill.export.formats.coco import COCO
from pairmill.export.formats.hf import HF
from pairmill.export.formats.instructblip import INSTRUCTBLIP
from pairmill.export.formats.llava import LLAVA
from pairmill.export.formats.minigpt4 import MINIGPT4
from pairmill.export.formats.parquet import PARQUET
from pairmill.export.formats.qwen_vl import QWEN_VL
from pairmill.export.formats.sharegpt import SHAREGPT
from pairmill.export.formats.webdataset import WEBDATASET

FORMATS: Mapping[str, Format] = {
    f.name: f for f in (WEBDATASET, PARQUET, HF, LLAVA, SHAREGPT, QWEN_VL, MINIGPT4, INSTRUCTBLIP, COCO, BLIP)
}
"""By name."""
