"""What captioners and filters are trained on: pictures with their texts, from a dataset of ours, COCO files or scenes.

Every source becomes a `Samples`: pictures decoded once to small squares, some texts for each, and an identity, so that
texts of one image (or of its duplicates) never count as wrong for it. A batch is a function of seed and step alone, so
a resumed training sees the same batches.
"""

from __future__ import annotations

import io
import json
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from captioners.text import prepare_text
from pairmill.errors import ConfigError
from pairmill.procedural.captions import CORRUPTIONS, FORMS, as_typed, corrupt, describe
from pairmill.procedural.scene import Scene, render, sample_scene
from pairmill.procedural.truth import claim_table, scene_table, truth_matrix
from pairmill.train.clip_data import small_picture, twin
from pairmill.train.views import make_views
from schemas.config import Section

_MARGIN = 1.25
"""Pictures are kept this much larger than the model's input, so that crops stay sharp."""

Progress = Callable[[int, int], None]


# -- config -----------------------------------------------------------------------------------------------------------


class ProceduralData(Section):
    """Procedural scenes, drawn from a seed. The oracle says which texts of a batch are true of which scene."""

    kind: Literal["procedural"] = "procedural"
    scenes: int = Field(20000, ge=2, multiple_of=2, description="half of them twins that differ in one respect")
    captions: int = Field(4, ge=1, description="true captions a scene, and a corruption of each")
    relations: float | None = Field(
        None, ge=0, le=1, description="share of captions that say how objects stand to each other; null: as they come"
    )
    located: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of captions that list all objects with column and row of their centres, 0 to 7: who writes "
        "them learns to look where things are",
    )
    seed: int = 0


class CocoData(Section):
    """A folder of images with COCO captions."""

    kind: Literal["coco"] = "coco"
    images: Path = Field(description="folder of the image files")
    captions: Path = Field(description="COCO captions JSON")


class DatasetData(Section):
    """The kept texts of a dataset of ours. Texts of one group of duplicates count as right for all its images."""

    kind: Literal["dataset"] = "dataset"
    path: str = Field(description="the dataset")
    snapshot: int | None = Field(None, description="null: the latest")
    where: str | None = Field(None, description="SQL condition over the view pairs")


SingleData = Annotated[ProceduralData | CocoData | DatasetData, Field(discriminator="kind")]


class SeveralData(Section):
    """Several sources together; an epoch sees each image of each of them once."""

    kind: Literal["several"] = "several"
    parts: tuple[SingleData, ...] = Field(min_length=1)


TrainData = Annotated[ProceduralData | CocoData | DatasetData | SeveralData, Field(discriminator="kind")]


class Augment(Section):
    """How views of pictures are made for training."""

    crop: float = Field(0.25, ge=0, lt=1, description="share of a side that a crop may take off")
    flip: bool = Field(False, description="mirror half of the views; wrong where texts say left and right")
    strength: float = Field(1.0, ge=0, le=1, description="of cropping, recolouring and noise")


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainBatch:
    """Some pictures, one text for each.

    Args:
        pixels: (n, 3, side, side) float32 in [-1, 1].
        texts: n prepared texts.
        negatives: n texts that are known to be false of their picture, or None where there is none.
        ids: (n,) int64, equal for pictures that share their texts.
        fits: (n, n) bool, `fits[i, j]`: text j is right for picture i; the diagonal is true.
    """

    pixels: torch.Tensor
    texts: list[str]
    negatives: list[str | None]
    ids: torch.Tensor
    fits: torch.Tensor


class Samples(ABC):
    """Pictures with texts."""

    ids: NDArray[np.int64]
    """Identity of each picture."""

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator, side: int, augment: Augment | None) -> TrainBatch:
        """Some rows, each with one of its texts; as they are, with their first text, when `augment` is None."""

    def batch(self, *, seed: int, step: int, size: int, side: int, augment: Augment) -> TrainBatch:
        """The batch of a step; all rows once an epoch, in an order of the epoch's own."""
        size = min(size, len(self))
        epoch, place = divmod(step, len(self) // size)
        order = np.random.default_rng((seed, 1 << 40, epoch)).permutation(len(self))
        rows = order[place * size : (place + 1) * size]
        return self.draw(rows, np.random.default_rng((seed, step)), side, augment)

    def split(self, share: float, least: int = 2) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to train on and rows to hold out, parted by identity, the same for the same data."""
        unique = np.unique(self.ids)
        count = min(len(unique) - 1, max(least, round(share * len(unique)))) if share > 0 else 0
        chosen = np.random.default_rng(len(unique)).permutation(unique)[:count]
        held = np.isin(self.ids, chosen)
        return np.flatnonzero(~held), np.flatnonzero(held)


def open_samples(data: TrainData, side: int, progress: Progress | None = None) -> Samples:
    """Read a source.

    Args:
        side: of the model's input, pixels.
        progress: called with (pictures read, pictures in all).

    Raises:
        ConfigError: a path is wrong, or there is nothing to train on.
    """
    if isinstance(data, SeveralData):
        return SeveralSamples([open_samples(part, side, progress) for part in data.parts])
    if isinstance(data, ProceduralData):
        return ProceduralSamples(data, side, progress)
    rows = _coco_rows(data) if isinstance(data, CocoData) else _dataset_rows(data)
    return PictureSamples(rows, side, progress)


# -- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureRow:
    """One image: how to read its bytes, its texts, and its identity."""

    read: Callable[[], bytes]
    texts: tuple[str, ...]
    identity: str


class PictureSamples(Samples):
    """Image files with texts. Pictures are decoded once and kept as squares of 1.25 x `side`.

    Args:
        rows: the images.
        side: of the model's input, pixels.
        progress: called with (pictures read, pictures in all).

    Raises:
        ConfigError: no row has a text.
    """

    def __init__(self, rows: Sequence[PictureRow], side: int, progress: Progress | None = None) -> None:
        prepared = [tuple(t for t in (prepare_text(text) for text in row.texts) if t) for row in rows]
        kept = [(row, texts) for row, texts in zip(rows, prepared, strict=True) if texts]
        if not kept:
            raise ConfigError("data: no image has a text to train on; look at the data with `pairmill sql`")
        self.texts = [texts for _, texts in kept]
        _, self.ids = np.unique([row.identity for row, _ in kept], return_inverse=True)
        stored = round(side * _MARGIN)
        self.pictures = torch.empty((len(kept), 3, stored, stored), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for place, pixels in enumerate(pool.map(lambda entry: _decode(entry[0].read(), stored), kept)):
                self.pictures[place] = pixels
                if progress is not None and ((place + 1) % 500 == 0 or place + 1 == len(kept)):
                    progress(place + 1, len(kept))

    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator, side: int, augment: Augment | None) -> TrainBatch:
        """Some rows."""
        count = len(rows)
        pictures = self.pictures[torch.from_numpy(rows)]
        if augment is None:
            pixels = torch.nn.functional.interpolate(
                pictures.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
            )
            pixels = pixels / 127.5 - 1
            texts = [self.texts[row][0] for row in rows]
        else:
            limits = np.full((count, 4), augment.crop)
            mirrored = (rng.random(count) < 0.5) & augment.flip
            pixels = make_views(rng, pictures, limits, mirrored, side, augment.strength, max(augment.crop, 1e-6))
            texts = [self.texts[row][int(rng.integers(len(self.texts[row])))] for row in rows]
        ids = torch.from_numpy(self.ids[rows])
        return TrainBatch(pixels, texts, [None] * count, ids, ids[:, None] == ids[None, :])


def _decode(data: bytes, side: int) -> torch.Tensor:
    """(3, side, side) uint8, squashed as BLIP's own preprocessing does."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (side, side))
        small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def _coco_rows(data: CocoData) -> list[PictureRow]:
    try:
        record = json.loads(data.captions.read_text(encoding="utf-8"))
        images = {entry["id"]: entry["file_name"] for entry in record["images"]}
        texts: dict[int, list[str]] = {}
        for entry in record["annotations"]:
            texts.setdefault(entry["image_id"], []).append(entry["caption"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data.captions: {data.captions} is no file of COCO captions ({error!r})") from error
    rows = []
    for key, name in sorted(images.items()):
        path = data.images / Path(name).name
        if not path.is_file():
            raise ConfigError(f"data.images: there is no {path}, which {data.captions} names; correct data.images")
        rows.append(PictureRow(path.read_bytes, tuple(texts.get(key, ())), str(key)))
    return rows


def _dataset_rows(data: DatasetData) -> list[PictureRow]:
    from pairmill.export.selection import Selection
    from pairmill.store import Dataset

    rows = []
    with Selection(Dataset(data.path).snapshot(data.snapshot), data.where, 1000) as selection:
        for group in selection.groups:
            for metadata, images in selection.images(selection.metadata(group)):
                for row, image in zip(metadata.to_pylist(), images, strict=True):
                    texts = tuple(entry["text"] for entry in row["texts"] or () if entry["text"])
                    identity = row.get("cluster") or row["uid"]
                    # the bytes are copied once, so that no table of a shard is held for them
                    rows.append(PictureRow(image.to_pybytes, texts, identity))
    return rows


class SeveralSamples(Samples):
    """Sources one after the other. Identities of different sources are different."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        offsets = np.cumsum([0, *(int(part.ids.max()) + 1 for part in parts)])
        self._offsets = offsets
        self.ids = np.concatenate([part.ids + offset for part, offset in zip(parts, offsets, strict=False)])

    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator, side: int, augment: Augment | None) -> TrainBatch:
        """Some rows, those of one source next to each other."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        batches = []
        for place, part in enumerate(self._parts):
            chosen = rows[owner == place]
            if len(chosen):
                batch = part.draw(chosen - self._starts[place], rng, side, augment)
                batches.append(replace(batch, ids=batch.ids + int(self._offsets[place])))
        return TrainBatch(
            torch.cat([b.pixels for b in batches]),
            [text for b in batches for text in b.texts],
            [text for b in batches for text in b.negatives],
            torch.cat([b.ids for b in batches]),
            torch.block_diag(*(b.fits for b in batches)).bool(),
        )


# -- procedural scenes ------------------------------------------------------------------------------------------------

_NEGATIVE_WEIGHTS = np.array([{"shape": 1.5, "relation": 4.0}.get(kind, 1.0) for kind in CORRUPTIONS])
"""How often a caption is corrupted in each way that it allows: few captions speak of relations, and a changed relation
is the hardest to see."""
_CELLS = 8
_PLACE = re.compile(r"\b(\d) (\d)\b")
_RELATION_FORMS = ("relation", "relation", "sentence", "full", "referring", "chain")
_PLAIN_FORMS = tuple(form for form in FORMS if form not in _RELATION_FORMS)
_LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b")


class ProceduralSamples(Samples):
    """Scenes in twins (rows 2n and 2n + 1 differ in one respect) with true captions, and a corruption of each caption.

    Views are mirrored half of the time, the words left and right with them.
    """

    def __init__(self, data: ProceduralData, side: int, progress: Progress | None = None) -> None:
        rng = random.Random(f"samples:{data.seed}")
        stored = round(side * _MARGIN)
        self.ids = np.arange(data.scenes)
        self.pictures = torch.empty((data.scenes, 3, stored, stored), dtype=torch.uint8)
        self._margins = np.empty((data.scenes, 4), dtype=np.float32)
        self._true = np.empty((data.scenes, data.captions), dtype=np.int64)
        self._false = np.full((data.scenes, data.captions, len(CORRUPTIONS)), -1, dtype=np.int64)
        self.texts: list[str] = []
        claims: list[str] = []
        drawn: list[Scene] = []
        for row in range(data.scenes):
            scene = sample_scene(rng) if row % 2 == 0 else twin(drawn[-1], rng)
            drawn.append(scene)
            self.pictures[row] = small_picture(scene_image=render(scene, stored, stored), rng=rng)
            boxes = np.array(scene.boxes(1, 1))
            self._margins[row] = (*boxes[:, :2].min(axis=0), *(1 - boxes[:, 2:].max(axis=0)))
            for column in range(data.captions):
                if data.located and rng.random() < data.located:
                    caption, shown = _located(scene, rng)
                else:
                    caption = shown = prepare_text(as_typed(describe(scene, rng, _form(data.relations, rng)), rng))
                self._true[row, column] = len(claims)
                claims.append(caption)
                self.texts.append(shown)
                for place, kind in enumerate(CORRUPTIONS):
                    changed = corrupt(caption, scene, kind, rng)
                    if changed is not None:
                        self._false[row, column, place] = len(claims)
                        claims.append(prepare_text(changed))
                        self.texts.append(claims[-1])
            if progress is not None and (row + 1) % 1000 == 0:
                progress(row + 1, data.scenes)
        self._scenes = scene_table(drawn)
        self._claims = claim_table(claims)

    def batch(self, *, seed: int, step: int, size: int, side: int, augment: Augment) -> TrainBatch:
        """As `Samples.batch`, with twins in one batch."""
        pairs = len(self) // 2
        wanted = max(1, min(size // 2, pairs))
        epoch, place = divmod(step, pairs // wanted)
        order = np.random.default_rng((seed, 1 << 40, epoch)).permutation(pairs)
        chosen = order[place * wanted : (place + 1) * wanted]
        rows = np.concatenate([2 * chosen, 2 * chosen + 1])
        return self.draw(rows, np.random.default_rng((seed, step)), side, augment)

    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator, side: int, augment: Augment | None) -> TrainBatch:
        """Some rows."""
        count = len(rows)
        augment_ = augment or Augment(strength=0.0)
        mirrored = rng.random(count) < (0.5 if augment else 0.0)
        column = rng.integers(self._true.shape[1], size=count) if augment else np.zeros(count, dtype=np.int64)
        true, choices = self._true[rows, column], self._false[rows, column]
        # weighted choice without replacement's first draw: Efraimidis and Spirakis (2006)
        chance = np.where(choices >= 0, rng.random(choices.shape) ** (1 / _NEGATIVE_WEIGHTS), -1)
        false = choices[np.arange(count), chance.argmax(axis=1)]
        limits = np.minimum(self._margins[rows], 0.12)
        pictures = self.pictures[torch.from_numpy(rows)]
        pixels = make_views(rng, pictures, limits, mirrored, side, augment_.strength)
        claims = self._claims.take(true).mirrored(mirrored)
        fits = truth_matrix(self._scenes.take(rows, mirrored), claims)
        texts = [_mirrored(self.texts[place], flip) for place, flip in zip(true, mirrored, strict=True)]
        negatives = [
            _mirrored(self.texts[place], flip) if place >= 0 else None
            for place, flip in zip(false, mirrored, strict=True)
        ]
        return TrainBatch(pixels, texts, negatives, torch.from_numpy(self.ids[rows]), torch.from_numpy(fits))


def _form(relations: float | None, rng: random.Random) -> str | None:
    """A form of caption: one with relations in so many of all cases; None leaves the choice to `describe`."""
    if relations is None:
        return None
    return rng.choice(_RELATION_FORMS if rng.random() < relations else _PLAIN_FORMS)


def _located(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A list of all objects, and the same with column and row behind each."""
    things = rng.sample(list(zip(scene.objects, scene.boxes(1, 1), strict=True)), len(scene.objects))
    plain, shown = [], []
    for thing, (x1, y1, x2, y2) in things:
        name = f"a {thing.size} {thing.colour} {thing.shape}"
        column, row = (min(_CELLS - 1, int((a + b) / 2 * _CELLS)) for a, b in ((x1, x2), (y1, y2)))
        plain.append(name)
        shown.append(f"{name} {column} {row}")
    return ", ".join(plain), ", ".join(shown)


def _mirrored(text: str, flip: Any) -> str:
    if not flip:
        return text
    text = _PLACE.sub(lambda match: f"{_CELLS - 1 - int(match[1])} {match[2]}", text)
    return _LEFT_OR_RIGHT.sub(lambda match: "right" if match[1] == "left" else "left", text)
