"""Boxes: rectangles with a label, in float pixels of an image whose width and height are known (xyxy)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from schemas.reasons import Reason

MIN_SIDE = 1.0
"""Pixels; a box whose visible part is narrower or lower shows nothing."""


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled rectangle; x grows to the right, y downwards, both in pixels from the image's upper left corner."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    score: float | None = None
    """A detector's confidence, 0 to 1; null for a person's box."""
    source: str | None = None
    """Who drew it: ``human``, or a detector's name."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Box:
        """From a value of `schemas.fields.BOX`."""
        return cls(row["label"], row["x1"], row["y1"], row["x2"], row["y2"], row["score"], row["source"])

    def to_row(self) -> dict[str, Any]:
        """As a value of `schemas.fields.BOX`."""
        return {
            "label": self.label,
            "x1": self.x1,
            "y1": self.y1,
            "x2": self.x2,
            "y2": self.y2,
            "score": self.score,
            "source": self.source,
        }

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.x1, self.y1, self.x2, self.y2

    @property
    def width(self) -> float:
        """Pixels."""
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        """Pixels."""
        return self.y2 - self.y1

    @property
    def area(self) -> float:
        """Square pixels."""
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        """x and y."""
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    def iou(self, other: Box) -> float:
        """Intersection over union, 0 to 1."""
        across = min(self.x2, other.x2) - max(self.x1, other.x1)
        down = min(self.y2, other.y2) - max(self.y1, other.y1)
        if across <= 0 or down <= 0:
            return 0.0
        shared = across * down
        return shared / (self.area + other.area - shared)

    def moved(self, transform: Sequence[float]) -> Box:
        """The box after ``[sx, sy, dx, dy]`` (`schemas.fields.TRANSFORM`)."""
        sx, sy, dx, dy = transform
        return replace(self, x1=self.x1 * sx + dx, y1=self.y1 * sy + dy, x2=self.x2 * sx + dx, y2=self.y2 * sy + dy)

    def clipped(self, width: float, height: float) -> Box:
        """The part inside an image of this size; perhaps nothing (see `refusal`)."""

        def inside(value: float, most: float) -> float:
            return min(max(value, 0.0), float(most))

        return replace(
            self,
            x1=inside(self.x1, width),
            y1=inside(self.y1, height),
            x2=inside(self.x2, width),
            y2=inside(self.y2, height),
        )

    def refusal(self, width: float, height: float, min_side: float = MIN_SIDE) -> Reason | None:
        """Why an image of this size cannot have this box; null when its clipped part can be kept.

        A box is refused when it has no label or no finite corners, when its corners are out of order, when nothing of
        it lies in the image, or when what does is narrower or lower than `min_side` pixels.
        """
        if not self.label.strip():
            return Reason.BOX_NO_LABEL
        if not all(math.isfinite(value) for value in self.xyxy):
            return Reason.BOX_NOT_FINITE
        if self.x2 <= self.x1 or self.y2 <= self.y1:
            return Reason.BOX_DEGENERATE
        part = self.clipped(width, height)
        if part.x2 <= part.x1 or part.y2 <= part.y1:
            return Reason.BOX_OUTSIDE
        return Reason.BOX_TOO_SMALL if min(part.width, part.height) < min_side else None
