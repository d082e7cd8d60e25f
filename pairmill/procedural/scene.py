"""Seeded scenes of one to three coloured shapes, with exact boxes, rendered at any size.

A scene is plain data: its native size in pixels, a background and its objects. Copies of a picture that a web
makes (mirrored, cropped, resized) are scenes too, so the truth about a copy is computed, never guessed:
`render(scene.mirrored())` is `render(scene)` mirrored.

Guarantees of `sample_scene`, which make every caption of the grammar plainly true or plainly false:

- no two objects share both colour and shape;
- objects keep apart from each other and from the border, and stand out from the background;
- sizes leave a gap: a small object's extent is at most 0.23 of the image's shorter side, a large one's at least 0.35;
- for each two objects and each axis, their box centres are either nearly aligned (within 0.05 of the image's side)
  or clearly apart (at least 0.15), so a relation, which asks for `RELATION_MARGIN`, is never a close call.
"""

from __future__ import annotations

import colorsys
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]

COLOURS: Mapping[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 30),
    "yellow": (247, 214, 48),
    "green": (44, 148, 64),
    "blue": (42, 88, 214),
    "purple": (134, 52, 168),
    "black": (22, 22, 24),
    "white": (248, 248, 248),
}
"""The eight colour words and the RGB each is drawn in, before a jitter of at most 10 in each channel."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
"""The six shape words."""

SIZES: Mapping[str, tuple[float, float]] = {"small": (0.19, 0.23), "large": (0.35, 0.42)}
"""The two size words and the range of an object's extent, as a fraction of the image's shorter side."""

RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
"""The four relations, between box centres."""

RELATION_MARGIN = 0.10
"""Box centres must differ by this fraction of the image's width (or height) for a relation to hold."""

GRADIENTS: tuple[str, ...] = ("flat", "linear", "radial")
TEXTURES: tuple[str, ...] = ("plain", "stripes", "checks", "dots", "clouds")

_ALIGNED, _APART = 0.05, 0.15
_BORDER, _GAP = 0.025, 0.035
_CONTRAST = 85.0
_JITTER = 10
_MAX_TILT = 12.0
_RING_HOLE = 0.54
_BACKGROUND_SIDE = 128
_SUPERSAMPLING = 4
_NATIVE_STEP = 16


@dataclass(frozen=True)
class Background:
    """A smooth backdrop, defined over the unit square so that it looks the same at every resolution.

    Args:
        first, second: the two RGB colours a gradient runs between (`flat` uses the first only).
        gradient: one of `GRADIENTS`.
        angle: direction of a linear gradient, in radians.
        texture: one of `TEXTURES`, added to the gradient.
        texture_angle: direction of the texture, in radians.
        period: length of one wave of the texture, as a fraction of the unit square.
        phase: offset of the texture, in radians.
        strength: amplitude of the texture, in RGB levels.
        frame: the part of the unit square (x1, y1, x2, y2) that the picture shows; x1 > x2 is a mirror image.
    """

    first: Rgb
    second: Rgb
    gradient: str
    angle: float
    texture: str
    texture_angle: float
    period: float
    phase: float
    strength: float
    frame: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Args:
        colour, shape, size: its words, from `COLOURS`, `SHAPES` and `SIZES`.
        x, y: centre of the untilted shape, in native pixels.
        extent: longer side of the untilted shape, in native pixels.
        tilt: rotation about (x, y), in degrees.
        rgb: the exact fill.
    """

    colour: str
    shape: str
    size: str
    x: float
    y: float
    extent: float
    tilt: float
    rgb: Rgb

    def outline(self) -> list[tuple[float, float]]:
        """The corners (x, y), native pixels; for a circle or ring the four extreme points of the outer edge."""
        turn = math.radians(self.tilt)
        cos, sin = math.cos(turn) * self.extent, math.sin(turn) * self.extent
        return [(self.x + x * cos - y * sin, self.y + x * sin + y * cos) for x, y in _OUTLINES[self.shape]]

    def box(self) -> Box:
        """The tight box (x1, y1, x2, y2), native pixels."""
        columns, rows = zip(*self.outline(), strict=True)
        return min(columns), min(rows), max(columns), max(rows)


@dataclass(frozen=True)
class Scene:
    """A picture as data: native size in pixels, background, objects drawn in order."""

    width: int
    height: int
    background: Background
    objects: tuple[SceneObject, ...]

    def boxes(self, width: int | None = None, height: int | None = None) -> tuple[Box, ...]:
        """Exact (x1, y1, x2, y2) boxes of the objects, in pixels of a rendering of that size (native by default)."""
        sx = (width or self.width) / self.width
        sy = (height or self.height) / self.height
        return tuple((x1 * sx, y1 * sy, x2 * sx, y2 * sy) for x1, y1, x2, y2 in (o.box() for o in self.objects))

    def holds(self, subject: int, relation: str, other: int) -> bool:
        """Whether object `subject` stands in `relation` (one of `RELATIONS`) to object `other` (both are indices).

        Raises:
            ValueError: the relation is not one of `RELATIONS`.
        """
        dx, dy = self._offset(subject, other)
        if relation == "left of":
            return dx >= RELATION_MARGIN
        if relation == "right of":
            return dx <= -RELATION_MARGIN
        if relation == "above":
            return dy >= RELATION_MARGIN
        if relation == "below":
            return dy <= -RELATION_MARGIN
        raise ValueError(f"unknown relation {relation!r}: use one of {', '.join(RELATIONS)}")

    def _offset(self, subject: int, other: int) -> tuple[float, float]:
        """From subject's box centre to the other's, as fractions of width and height."""
        ax1, ay1, ax2, ay2 = self.objects[subject].box()
        bx1, by1, bx2, by2 = self.objects[other].box()
        return (bx1 + bx2 - ax1 - ax2) / 2 / self.width, (by1 + by2 - ay1 - ay2) / 2 / self.height

    def mirrored(self) -> Scene:
        """The scene of the picture flipped left to right."""
        x1, y1, x2, y2 = self.background.frame
        return replace(
            self,
            background=replace(self.background, frame=(x2, y1, x1, y2)),
            objects=tuple(replace(o, x=self.width - o.x, tilt=-o.tilt) for o in self.objects),
        )

    def cropped(self, left: int, top: int, right: int, bottom: int) -> Scene:
        """The scene of the picture's pixels [left, right) x [top, bottom).

        Raises:
            ValueError: the crop is empty, leaves the picture, or cuts an object.
        """
        if not (0 <= left < right <= self.width and 0 <= top < bottom <= self.height):
            raise ValueError(f"crop {left, top, right, bottom} does not lie inside {self.width} x {self.height}")
        for x1, y1, x2, y2 in self.boxes():
            if x1 < left or y1 < top or x2 > right or y2 > bottom:
                raise ValueError(f"crop {left, top, right, bottom} cuts an object at {x1, y1, x2, y2}")
        fx1, fy1, fx2, fy2 = self.background.frame
        spread_x, spread_y = (fx2 - fx1) / self.width, (fy2 - fy1) / self.height
        frame = (fx1 + left * spread_x, fy1 + top * spread_y, fx1 + right * spread_x, fy1 + bottom * spread_y)
        return Scene(
            right - left,
            bottom - top,
            replace(self.background, frame=frame),
            tuple(replace(o, x=o.x - left, y=o.y - top) for o in self.objects),
        )

    def resized(self, sixteenths: int) -> Scene:
        """The scene scaled by sixteenths / 16.

        Raises:
            ValueError: the new width or height is not a whole number (sampled scenes have sides divisible by 16).
        """
        if self.width * sixteenths % 16 or self.height * sixteenths % 16:
            raise ValueError(f"{self.width} x {self.height} times {sixteenths}/16 is not a whole number of pixels")
        scale = sixteenths / 16
        return Scene(
            self.width * sixteenths // 16,
            self.height * sixteenths // 16,
            self.background,
            tuple(replace(o, x=o.x * scale, y=o.y * scale, extent=o.extent * scale) for o in self.objects),
        )

    def to_json(self) -> str:
        """One line of JSON that `from_json` turns into an equal scene; holds the boxes as well, for readers."""
        record = asdict(self)
        for entry, box in zip(record["objects"], self.boxes(), strict=True):
            entry["box"] = box
        return json.dumps(record, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """The scene that `to_json` wrote."""
        record: dict[str, Any] = json.loads(text)
        background = record["background"]
        for key in ("first", "second", "frame"):
            background[key] = tuple(background[key])
        objects = []
        for entry in record["objects"]:
            del entry["box"]
            objects.append(SceneObject(**{**entry, "rgb": tuple(entry["rgb"])}))
        return cls(record["width"], record["height"], Background(**background), tuple(objects))


def _star() -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius = 0.5 if corner % 2 == 0 else 0.21
        angle = math.pi * corner / 5 - math.pi / 2
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    top, bottom = min(y for _, y in points), max(y for _, y in points)
    wide = max(x for x, _ in points) * 2
    return [(x / wide, (y - (top + bottom) / 2) / wide) for x, y in points]


_ARM = 0.17
_ROUND = [(-0.5, 0.0), (0.0, -0.5), (0.5, 0.0), (0.0, 0.5)]
_OUTLINES: Mapping[str, list[tuple[float, float]]] = {
    "circle": _ROUND,
    "ring": _ROUND,
    "square": [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "triangle": [(0.0, -0.5), (0.5, 0.5), (-0.5, 0.5)],
    "star": _star(),
    "cross": [
        (-_ARM, -0.5), (_ARM, -0.5), (_ARM, -_ARM), (0.5, -_ARM), (0.5, _ARM), (_ARM, _ARM),
        (_ARM, 0.5), (-_ARM, 0.5), (-_ARM, _ARM), (-0.5, _ARM), (-0.5, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def sample_scene(
    rng: random.Random,
    *,
    objects: int | None = None,
    kinds: Sequence[tuple[str, str, str]] | None = None,
    width: int | None = None,
    height: int | None = None,
) -> Scene:
    """A random scene that keeps the guarantees of this module.

    Args:
        rng: the only source of chance; equal states give equal scenes.
        objects: how many, 1 to 3 (by default 1, 2 or 3 with weights 1 : 3 : 3).
        kinds: (colour, shape, size) of each object, no two alike in colour and shape (by default drawn too).
        width, height: native size in pixels (by default multiples of 16: shorter side 256 to 400, aspect at most 4/3).
    """
    count = len(kinds) if kinds else objects or rng.choices((1, 2, 3), weights=(1, 3, 3))[0]
    if width is None or height is None:
        shorter = rng.randrange(256, 401, _NATIVE_STEP)
        longest = min(512, int(shorter * 4 / 3))
        longer = rng.randrange(shorter, longest + 1, _NATIVE_STEP)
        width, height = (longer, shorter) if rng.random() < 0.6 else (shorter, longer)
    while True:
        background, fills = _sample_background(rng)
        chosen = kinds
        if chosen is None:
            drawn = rng.sample([(colour, shape) for colour in fills for shape in SHAPES], count)
            chosen = [(colour, shape, rng.choice(tuple(SIZES))) for colour, shape in drawn]
        elif not all(colour in fills for colour, _, _ in chosen):
            continue
        placed = _place(rng, chosen, width, height, fills)
        if placed is not None:
            return Scene(width, height, background, placed)


def _sample_background(rng: random.Random) -> tuple[Background, dict[str, Rgb]]:
    """A background, and a fill that stands out from it for each colour that does."""
    while True:
        first = _muted(rng)
        gradient = rng.choice(GRADIENTS)
        second = first if gradient == "flat" else _muted(rng)
        texture = rng.choice(TEXTURES)
        background = Background(
            first=first,
            second=second,
            gradient=gradient,
            angle=round(rng.uniform(0, 2 * math.pi), 4),
            texture=texture,
            texture_angle=round(rng.uniform(0, math.pi), 4),
            period=round(rng.uniform(0.13, 0.4), 4),
            phase=round(rng.uniform(0, 2 * math.pi), 4),
            strength=0.0 if texture == "plain" else round(rng.uniform(7, 18), 2),
        )
        middle = tuple((a + b) // 2 for a, b in zip(first, second, strict=True))
        fills = {}
        for colour, rgb in COLOURS.items():
            fill = tuple(min(255, max(0, level + rng.randint(-_JITTER, _JITTER))) for level in rgb)
            if min(math.dist(fill, ground) for ground in (first, middle, second)) >= _CONTRAST:
                fills[colour] = (fill[0], fill[1], fill[2])
        if len(fills) >= 5:
            return background, fills


def _muted(rng: random.Random) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.04, 0.38), rng.uniform(0.42, 0.9))
    return round(red * 255), round(green * 255), round(blue * 255)


def _place(
    rng: random.Random, kinds: Sequence[tuple[str, str, str]], width: int, height: int, fills: Mapping[str, Rgb]
) -> tuple[SceneObject, ...] | None:
    """Objects of the kinds that keep the guarantees, or None when a hundred tries did not find room."""
    shorter = min(width, height)
    for _ in range(100):
        placed: list[SceneObject] = []
        boxes: list[Box] = []
        for colour, shape, size in kinds:
            extent = round(shorter * rng.uniform(*SIZES[size]), 2)
            tilt = 0.0 if shape in ("circle", "ring") else round(rng.uniform(-_MAX_TILT, _MAX_TILT), 1)
            reach = 0.61 * extent + _BORDER * shorter
            x = round(rng.uniform(reach, width - reach), 2)
            y = round(rng.uniform(reach, height - reach), 2)
            thing = SceneObject(colour, shape, size, x, y, extent, tilt, fills[colour])
            box = thing.box()
            if not all(_clear(box, other, width, height) for other in boxes):
                break
            placed.append(thing)
            boxes.append(box)
        else:
            return tuple(placed)
    return None


def _clear(a: Box, b: Box, width: int, height: int) -> bool:
    """Whether two boxes keep apart and every relation between them is plain."""
    gap = _GAP * min(width, height)
    if a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap:
        return False
    dx = abs(a[0] + a[2] - b[0] - b[2]) / 2 / width
    dy = abs(a[1] + a[3] - b[1] - b[3]) / 2 / height
    return not (_ALIGNED < dx < _APART or _ALIGNED < dy < _APART)


def render(scene: Scene, width: int | None = None, height: int | None = None) -> Image.Image:
    """The picture, antialiased, RGB, of the given size in pixels (native by default; another aspect squashes it).

    The background is computed at no more than 128 pixels a side and enlarged, since it is smooth; shapes are drawn
    at four times the resolution and averaged down.
    """
    width, height = width or scene.width, height or scene.height
    picture = _render_background(scene.background, width, height)
    sx, sy = width / scene.width, height / scene.height
    for thing, (x1, y1, x2, y2) in zip(scene.objects, scene.boxes(width, height), strict=True):
        left, top = math.floor(x1) - 1, math.floor(y1) - 1
        columns, rows = math.ceil(x2) + 1 - left, math.ceil(y2) + 1 - top
        mask = Image.new("L", (columns * _SUPERSAMPLING, rows * _SUPERSAMPLING))
        pencil = ImageDraw.Draw(mask)
        if thing.shape in ("circle", "ring"):
            _ellipse(pencil, (x1 - left, y1 - top, x2 - left, y2 - top), 255)
            if thing.shape == "ring":
                inset_x, inset_y = (x2 - x1) * (1 - _RING_HOLE) / 2, (y2 - y1) * (1 - _RING_HOLE) / 2
                _ellipse(pencil, (x1 + inset_x - left, y1 + inset_y - top, x2 - inset_x - left, y2 - inset_y - top), 0)
        else:
            corners = [
                ((x * sx - left) * _SUPERSAMPLING - 0.5, (y * sy - top) * _SUPERSAMPLING - 0.5)
                for x, y in thing.outline()
            ]
            pencil.polygon(corners, fill=255)
        picture.paste(thing.rgb, (left, top), mask.reduce(_SUPERSAMPLING))
    return picture


def _ellipse(pencil: ImageDraw.ImageDraw, box: Box, fill: int) -> None:
    x1, y1, x2, y2 = (edge * _SUPERSAMPLING for edge in box)
    pencil.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)


def _render_background(background: Background, width: int, height: int) -> Image.Image:
    shrink = min(1.0, _BACKGROUND_SIDE / max(width, height))
    columns, rows = max(1, round(width * shrink)), max(1, round(height * shrink))
    x1, y1, x2, y2 = background.frame
    u = (x1 + (np.arange(columns, dtype=np.float32) + 0.5) / columns * (x2 - x1))[None, :]
    v = (y1 + (np.arange(rows, dtype=np.float32) + 0.5) / rows * (y2 - y1))[:, None]
    if background.gradient == "linear":
        mix = np.clip(0.5 + (u - 0.5) * math.cos(background.angle) + (v - 0.5) * math.sin(background.angle), 0, 1)
    elif background.gradient == "radial":
        mix = np.clip(np.hypot(u - 0.5, v - 0.5) / 0.7, 0, 1)
    else:
        mix = np.zeros((rows, columns), dtype=np.float32)
    first = np.asarray(background.first, dtype=np.float32)
    second = np.asarray(background.second, dtype=np.float32)
    levels = first + mix[:, :, None] * (second - first) + _texture(background, u, v)[:, :, None]
    picture = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    if (columns, rows) != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture


def _texture(background: Background, u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """The texture in RGB levels, (rows, columns)."""
    wave = 2 * math.pi / background.period
    cos, sin = math.cos(background.texture_angle), math.sin(background.texture_angle)
    along = (u * cos + v * sin) * wave + background.phase
    across = (v * cos - u * sin) * wave + background.phase
    if background.texture == "stripes":
        values = np.sin(along)
    elif background.texture == "checks":
        values = np.clip(3 * np.sin(along) * np.sin(across), -1, 1)
    elif background.texture == "dots":
        values = np.clip(1.5 * (np.cos(along) + np.cos(across)) - 1.2, 0, 1)
    elif background.texture == "clouds":
        values = (np.sin(0.7 * along) + np.sin(0.45 * across + 1.7) + np.sin(0.6 * along - 0.8 * across)) / 3
    else:
        values = np.zeros((v.shape[0], u.shape[1]))
    return np.asarray(background.strength * values)
