"""Some images of the demo with their texts before and after CapFilt, as lines and as a picture."""

from __future__ import annotations

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_SIDE, _COLUMNS, _CELL = 176, 2, 560
_GREEN, _RED, _BLACK = (20, 110, 40), (170, 30, 30), (20, 20, 20)


@dataclass(frozen=True)
class Example:
    """An image's texts: the alt text before, and what became of all texts."""

    uid: str
    before: str
    after: tuple[tuple[str, str, str], ...]
    """(text, source, ``kept`` or the reason) of each text, the kept ones first by rank."""


def choose_examples(texts: list[dict[str, Any]], count: int) -> list[Example]:
    """Kept pairs, in turn: one whose alt text fell and a caption took its place, one whose alt text stayed and a
    caption fell, one with more than one text.

    Args:
        texts: rows of `pairmill.demo.TEXTS_SQL`, sorted by uid.
        count: examples at most.
    """
    pairs: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        if text["status"] == "kept" and text["text"]:
            pairs.setdefault(text["uid"], []).append(text)
    kinds: tuple[list[str], ...] = ([], [], [])
    for uid, found in pairs.items():
        web = next((t for t in found if t["source"] == "web"), None)
        written = [t for t in found if t["source"] != "web"]
        if web is None or not written:
            continue
        if not web["kept"]:
            kinds[0].append(uid)
        elif not all(t["kept"] for t in written):
            kinds[1].append(uid)
        else:
            kinds[2].append(uid)
    turns = [uid for place in range(count) for kind in kinds for uid in kind[place : place + 1]]
    return [_example(uid, pairs[uid]) for uid in turns[:count]]


def _example(uid: str, texts: list[dict[str, Any]]) -> Example:
    ordered = sorted(texts, key=lambda t: (t["rank"] is None, t["rank"] or 0, t["ordinal"]))
    after = tuple((t["text"], t["source"], "kept" if t["kept"] else t["reason"]) for t in ordered)
    return Example(uid, texts[0]["alt_text"], after)


def example_lines(examples: list[Example]) -> list[str]:
    """One block of lines an example."""
    lines = []
    for example in examples:
        lines.append(f'  before  "{example.before}"')
        lines += [
            f'  {"after" if n == 0 else "":7} "{t}" ({source}: {fate})'
            for n, (t, source, fate) in enumerate(example.after)
        ]
        lines.append("")
    return lines


def draw_examples(examples: list[Example], images: dict[str, bytes], path: Path) -> None:
    """Write a sheet: each image beside its alt text and what became of its texts, kept ones green, others red.

    Args:
        examples: what to show.
        images: image files by uid.
        path: the PNG to write.
    """
    rows = -(-len(examples) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, max(1, rows) * (_SIDE + 16)), "white")
    pencil, font = ImageDraw.Draw(sheet), font_of(12)
    for place, example in enumerate(examples):
        left, top = place % _COLUMNS * _CELL + 8, place // _COLUMNS * (_SIDE + 16) + 8
        with Image.open(io.BytesIO(images[example.uid])) as image:
            sheet.paste(image.convert("RGB").resize((_SIDE, _SIDE)), (left, top))
        lines = [("before: " + example.before, _BLACK)]
        lines += [
            (f"{source}, {fate}: {text}", _GREEN if fate == "kept" else _RED) for text, source, fate in example.after
        ]
        y = top
        for text, colour in lines:
            for part in textwrap.wrap(text, 50)[:4]:
                pencil.text((left + _SIDE + 10, y), part, fill=colour, font=font)
                y += 17
            y += 5
    sheet.save(path)


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: it has the letters of more alphabets than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
