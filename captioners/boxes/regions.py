"""Boxes that came with a pair, moved into its stored image."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pairmill.boxes import Box
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import Reason

MAX_LABEL = 100
"""Characters of a label that are kept; the longest of COCO, LVIS and Objects365 have about 40."""

CROWDED_KEY = "crowded"
"""Key of `schemas.fields.EXTRA` with a list of labels: see `schemas.fields.CROWDED`."""
SIZE_KEY = "annotated_size"
"""Key of `schemas.fields.EXTRA` with ``[width, height]`` of the image that was annotated, pixels."""

_JOINERS = "\u200c\u200d"
"""Invisible, but they change how letters (Persian) and emoji beside them look."""
_ROUND = str.maketrans("[]", "()")
_CORNERS = ("x1", "y1", "x2", "y2")
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Regions(Stage):
    """The boxes of the source in pixels of the stored image, clipped to it, in their order; and those that cannot be
    kept, each with its reason.

    Boxes of a source are in pixels of the *upright* image: as shown by a browser, a labelling tool or cv2, and as
    `schemas.fields.ORIGINAL_WIDTH` counts them. COCO's own images carry no EXIF orientation, so the question does not
    arise for them; of files that do, some tools annotate the unturned pixel matrix. Where the source says the size of
    the image that was annotated (`SIZE_KEY`, which COCO files do), it is compared with the image that came: another
    size of the same shape scales the boxes, another shape (an image turned by 90 degrees, or another picture) rejects
    them all.

    A label is cleaned (`clean_label`). The exact repeat of an earlier box of the source, label and corners, is
    rejected; boxes that merely overlap are not, since a person drew both: ``boxes.overlap`` is for detections. A score
    that is no number from 0 to 1 is null.

    Columns are null where there is no image.
    """

    name = "regions"
    reads = (
        fields.BOXES.name,
        fields.TRANSFORM.name,
        fields.WIDTH.name,
        fields.HEIGHT.name,
        fields.ORIGINAL_WIDTH.name,
        fields.ORIGINAL_HEIGHT.name,
        fields.EXTRA.name,
    )
    writes = (fields.REGIONS, fields.REJECTED_BOXES, fields.CROWDED)

    min_side: float = 4.0
    """Pixels of the stored image; a box whose visible part is narrower or lower is rejected."""
    resources: Resources = field(default=Resources(), metadata={"identity": False})

    @classmethod
    def of(cls, config: RunConfig) -> Regions:
        """The stage that a config asks for."""
        return cls(config.boxes.min_side)

    def open(self) -> Kernel:
        """Nothing to load."""

        def kernel(batch: Batch) -> pa.Table:
            columns = [batch.pylist(name) for name in self.reads]
            measured = [self._row(dict(zip(self.reads, row, strict=True))) for row in zip(*columns, strict=True)]
            return pa.table({f.name: pa.array([row[f.name] for row in measured], f.type) for f in self.writes})

        return kernel

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["transform"] is None:
            return dict.fromkeys(f.name for f in self.writes)
        extra = _extra(row["extra"])
        regions: list[dict[str, Any]] = []
        rejected: list[dict[str, Any]] = []
        seen: set[tuple[Any, ...]] = set()
        width, height = row["width"], row["height"]
        scale, mismatch = _scale(extra.get(SIZE_KEY), row["original_width"], row["original_height"])
        for value in row["boxes"] or ():
            drawn = Box.from_row(value | {"label": clean_label(value["label"]), "score": _score(value["score"])})
            detail = _unusable(value)
            if detail is not None:
                rejected.append(_rejection(drawn, Reason.BOX_MALFORMED, detail))
                continue
            box = drawn.moved(scale).moved(row["transform"])
            part = _single(box.clipped(width, height))
            reason = box.refusal(width, height, self.min_side) or part.refusal(width, height, self.min_side)
            if reason is not None:
                rejected.append(_rejection(box, reason, _detail(box, drawn, reason, width, height, self.min_side)))
            elif mismatch is not None:
                rejected.append(_rejection(box, Reason.BOX_SIZE_MISMATCH, mismatch))
            elif (drawn.label, drawn.xyxy) in seen:
                rejected.append(_rejection(box, Reason.BOX_REPEATED, "the same label and corners as an earlier box"))
            else:
                seen.add((drawn.label, drawn.xyxy))
                regions.append(part.to_row())
        return {
            fields.REGIONS.name: regions,
            fields.REJECTED_BOXES.name: rejected,
            fields.CROWDED.name: _crowded(extra.get(CROWDED_KEY)),
        }


def clean_label(label: str | None) -> str:
    """A label as it is stored: NFC, control, bidirectional and other invisible characters taken out, white space
    single, square brackets round (they mark mentions of boxes, see `pairmill.instructions`), at most `MAX_LABEL`
    characters. Cleaning a clean label changes nothing. Null is empty."""
    shown = "".join(
        " " if c.isspace() else c
        for c in (label or "")[: 100 * MAX_LABEL]
        if c.isspace() or c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs")
    )
    return " ".join(unicodedata.normalize("NFC", shown).translate(_ROUND).split())[:MAX_LABEL].strip()


def _extra(extra: str | None) -> dict[str, Any]:
    """The keys that concern boxes, where the source left some."""
    if extra is None or not (CROWDED_KEY in extra or SIZE_KEY in extra):
        return {}
    try:
        content = json.loads(extra)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _crowded(labels: Any) -> list[str]:
    """Labels, each once; a text column of a table may hold the list as JSON."""
    if isinstance(labels, str):
        try:
            labels = json.loads(labels)
        except (ValueError, RecursionError):
            return []
    names = [clean_label(label) for label in labels if isinstance(label, str)] if isinstance(labels, list) else []
    return list(dict.fromkeys(name for name in names if name))


def _scale(size: Any, width: int, height: int) -> tuple[tuple[float, float, float, float], str | None]:
    """From pixels of the annotated image to those of the original one, and what is wrong if their shapes differ."""
    same = (1.0, 1.0, 0.0, 0.0)
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and v > 0 for v in size)):
        return same, None
    across, down = size
    if (across, down) == (width, height):
        return same, None
    # of two sizes of one image either side is right to half a pixel
    if abs(across * height - down * width) * 2 > max(across + down, width + height):
        return same, f"the source annotated an image of {across} x {down} pixels, this one has {width} x {height}"
    return (width / across, height / down, 0.0, 0.0), None


def _single(box: Box) -> Box:
    """The box as float32 holds it: what is judged is what is stored."""
    x1, y1, x2, y2 = np.array(box.xyxy, np.float32).tolist()
    return replace(box, x1=x1, y1=y1, x2=x2, y2=y2)


def _score(score: float | None) -> float | None:
    return score if score is not None and 0 <= score <= 1 else None


def _unusable(value: Mapping[str, Any]) -> str | None:
    """What a box of the source lacks."""
    missing = [name for name in _CORNERS if value[name] is None]
    return f"without a number: {', '.join(missing)}" if missing else None


def _rejection(box: Box, reason: Reason, detail: str) -> dict[str, Any]:
    """A value of `schemas.fields.REJECTED_BOXES`; a corner that no finite float32 can hold is null, and in the
    detail."""
    corners = {name: _finite(getattr(box, name)) for name in _CORNERS}
    return {"box": box.to_row() | corners, "reason": reason.value, "detail": detail}


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) <= _FLOAT32_MAX else None


def _detail(box: Box, drawn: Box, reason: Reason, width: int, height: int, min_side: float) -> str:
    """What is wrong, in numbers."""
    if reason is Reason.BOX_NO_LABEL:
        return "the label is empty"
    if reason is Reason.BOX_NOT_FINITE:
        wrong = [f"{name} = {getattr(drawn, name)}" for name in _CORNERS if not math.isfinite(getattr(drawn, name))]
        return ", ".join(wrong)
    if reason is Reason.BOX_DEGENERATE:
        return f"{_numbers(drawn.xyxy)} of the source has no area"
    if reason is Reason.BOX_OUTSIDE:
        return f"{_numbers(box.xyxy)} is outside of {width} x {height} pixels"
    part = box.clipped(width, height)
    return f"{part.width:g} x {part.height:g} pixels, at least {min_side:g} are asked for"


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
