"""Boxes as tables and JSON members hold them: a list of objects with label, x1, y1, x2, y2, and perhaps score and
source. They are untrusted: what cannot be used goes on as a box with nulls, which `captioners.boxes.regions` rejects
with a reason, so that nothing is lost and no other box suffers."""

from __future__ import annotations

import json
from typing import Any

from pairmill.sources.rows import EXCERPT, clean
from schemas import fields

MAX_BOXES = 1_000
"""Boxes of a row that are read; further ones are counted. OpenImages and LVIS have at most some hundreds an image."""
MAX_NAME = 1_024
"""Characters of a label or source that are read."""
HUMAN, MACHINE = "human", "detector"
"""The source of a box that names none: without and with a score."""

_NAMES = tuple(field.name for field in fields.BOX)
_CORNERS = ("x1", "y1", "x2", "y2")


LEFT_OUT_KEY = "boxes_left_out"
"""Among a row's other columns: how many boxes were beyond `MAX_BOXES`."""


def take_boxes(others: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The boxes of the column `key`, taken out of a row's other columns, as values of `schemas.fields.BOX`.

    The column holds a list of objects, or a text that is such a list as JSON; null and an empty text are no boxes. A
    coordinate or score that is no number, a label that is no text and what is no object become nulls; numbers beyond
    float64 are infinite; other keys are left out. Of a value that is no list at all there is one box of nulls, and an
    excerpt stays in its column.
    """
    value = others.pop(key, None)
    if value is None or value != value:  # NaN, which is what tables made with pandas hold for null
        return []
    found = _parsed(value) if isinstance(value, (str, bytes)) else value
    if not isinstance(found, list):
        others[key] = clean(value, EXCERPT)
        return [_box({})]
    if len(found) > MAX_BOXES:
        others[LEFT_OUT_KEY] = len(found) - MAX_BOXES
    return [_box(entry if isinstance(entry, dict) else {}) for entry in found[:MAX_BOXES]]


def are_boxes(value: Any) -> bool:
    """Whether a value of unknown make is a list of boxes in this form, as pairmill's own exports have it."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, dict) and {"label", *_CORNERS} <= entry.keys() for entry in value)


def _parsed(text: str | bytes) -> Any:
    """JSON's value; null where it is none."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(text) if text.strip() not in ("", "null") else []
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or an integer of thousands of digits
        return None


def _box(entry: dict[str, Any]) -> dict[str, Any]:
    box: dict[str, Any] = {name: _number(entry.get(name)) for name in (*_CORNERS, "score")}
    box |= {name: _name(entry.get(name)) for name in ("label", "source")}
    box["source"] = box["source"] or (HUMAN if box["score"] is None else MACHINE)
    return {name: box[name] for name in _NAMES}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _name(value: Any) -> str | None:
    return clean(value, MAX_NAME) if isinstance(value, str) else None
