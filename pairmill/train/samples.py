"""What captioners and filters are trained on: pictures with their texts, from a dataset of ours, COCO files or scenes.

Every source becomes a `Samples`: pictures as small squares, some texts for each, and an identity, so that texts of one
image (or of its duplicates) never count as wrong for it. A batch is a function of seed and step alone, so a resumed
training sees the same batches. Pictures are decoded once where they fit into the memory that the config allows, and
else for each batch; the batches are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
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

CACHE_BYTES = 4_000_000_000
"""Decoded pictures that are kept in memory, at most."""

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
    texts: Sequence[Any]
    """All texts, in the source's own form."""
    decoded_bytes = 0
    """Of the pictures that are kept in memory."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kin(self) -> NDArray[np.int64]:
        """(n,): rows of one kin are trained on together or held out together."""
        return self.ids

    def groups(self) -> NDArray[np.int64]:
        """(groups, size): rows that always stand in one batch together. Here each row is on its own."""
        return np.arange(len(self))[:, None]

    def fingerprint(self) -> str:
        """sha256 (hex) of identities and texts: the data that a checkpoint was made with."""
        digest = hashlib.sha256(self.ids.astype(np.int64).tobytes())
        for entry in self.texts:
            digest.update(repr(entry).encode())
        return digest.hexdigest()

    @abstractmethod
    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator, side: int, augment: Augment | None) -> TrainBatch:
        """Some rows, each with one of its texts; as they are, with their first text, when `augment` is None."""

    def batch(self, *, seed: int, step: int, size: int, side: int, augment: Augment) -> TrainBatch:
        """The batch of a step; all rows once an epoch, in an order of the epoch's own."""
        groups = self.groups()
        wanted = max(1, min(size // groups.shape[1], len(groups)))
        epoch, place = divmod(step, len(groups) // wanted)
        order = np.random.default_rng((seed, 1 << 40, epoch)).permutation(len(groups))
        rows = groups[order[place * wanted : (place + 1) * wanted]].T.ravel()
        return self.draw(rows, np.random.default_rng((seed, step)), side, augment)

    def split(self, share: float, least: int = 2) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows to train on and rows to hold out, parted by kin, the same for the same data."""
        kin = self.kin
        unique = np.unique(kin)
        count = min(len(unique) - 1, max(least, round(share * len(unique)))) if share > 0 else 0
        chosen = np.random.default_rng(len(unique)).permutation(unique)[:count]
        held = np.isin(kin, chosen)
        return np.flatnonzero(~held), np.flatnonzero(held)


def open_samples(
    data: TrainData,
    side: int,
    progress: Progress | None = None,
    *,
    cache: int = CACHE_BYTES,
    work: Path | None = None,
) -> Samples:
    """Read a source.

    Args:
        side: of the model's input, pixels.
        progress: called with (pictures read, pictures in all), for each of several sources anew.
        cache: bytes of decoded pictures that are kept in memory, at most; scenes always are.
        work: folder for the image files of a dataset, which lie there without a name; null: the system's own.

    Raises:
        ConfigError: a path is wrong, an image cannot be read, or there is nothing to train on.
    """
    if isinstance(data, SeveralData):
        parts: list[Samples] = []
        for part in data.parts:
            left = cache - sum(opened.decoded_bytes for opened in parts)
            parts.append(open_samples(part, side, progress, cache=left, work=work))
        return SeveralSamples(parts)
    if isinstance(data, ProceduralData):
        return ProceduralSamples(data, side, progress)
    rows = _coco_rows(data) if isinstance(data, CocoData) else _dataset_rows(data, work)
    return PictureSamples(rows, side, progress, cache)


# -- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureRow:
    """One image: what to call it, how to read its bytes, its texts, and its identity."""

    name: str
    read: Callable[[], bytes]
    texts: tuple[str, ...]
    identity: str


class PictureSamples(Samples):
    """Image files with texts. Pictures are squares of 1.25 x `side`, decoded once and kept if all of them fit into
    `cache`, else decoded for each batch.

    Args:
        rows: the images.
        side: of the model's input, pixels.
        progress: called with (pictures read, pictures in all).
        cache: bytes.

    Raises:
        ConfigError: no row has a text, or an image cannot be read.
    """

    def __init__(
        self,
        rows: Sequence[PictureRow],
        side: int,
        progress: Progress | None = None,
        cache: int = CACHE_BYTES,
    ) -> None:
        prepared = [tuple(t for t in (prepare_text(text) for text in row.texts) if t) for row in rows]
        kept = [(row, texts) for row, texts in zip(rows, prepared, strict=True) if texts]
        if not kept:
            raise ConfigError("data: no image has a text to train on; look at the data with `pairmill sql`")
        self.texts = [texts for _, texts in kept]
        _, self.ids = np.unique([row.identity for row, _ in kept], return_inverse=True)
        self._stored = round(side * _MARGIN)
        self._rows = [row for row, _ in kept]
        self._pool = ThreadPoolExecutor()
        self._pictures: torch.Tensor | None = None
        if len(kept) * 3 * self._stored**2 <= cache:
            self._pictures = self._decoded(self._rows, progress)
            self.decoded_bytes = self._pictures.nbytes
            self._rows = []

    def _decoded(self, rows: Sequence[PictureRow], progress: Progress | None = None) -> torch.Tensor:
        pictures = torch.empty((len(rows), 3, self._stored, self._stored), dtype=torch.uint8)
        for place, pixels in enumerate(self._pool.map(partial(_decode, side=self._stored), rows)):
            pictures[place] = pixels
            if progress is not None and ((place + 1) % 500 == 0 or place + 1 == len(rows)):
                progress(place + 1, len(rows))
        return pictures

    def draw(self, rows: NDArray[np.int64], rng: np.random.Generator, side: int, augment: Augment | None) -> TrainBatch:
        """Some rows."""
        count = len(rows)
        if self._pictures is None:
            pictures = self._decoded([self._rows[row] for row in rows])
        else:
            pictures = self._pictures[torch.from_numpy(rows)]
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


def _decode(row: PictureRow, side: int) -> torch.Tensor:
    """(3, side, side) uint8, upright and squashed as BLIP's own preprocessing does."""
    try:
        with Image.open(io.BytesIO(row.read())) as image:
            image.draft("RGB", (side, side))
            ImageOps.exif_transpose(image, in_place=True)
            small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise ConfigError(
            f"data: the image {row.name} cannot be read ({type(error).__name__}: {error}); mend it or take it out of "
            "the data"
        ) from error
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)


def _coco_rows(data: CocoData) -> list[PictureRow]:
    try:
        record = json.loads(data.captions.read_text(encoding="utf-8"))
        images = sorted({entry["id"]: Path(entry["file_name"]) for entry in record["images"]}.items())
        texts: dict[int, list[str]] = {}
        for entry in record["annotations"]:
            if entry["caption"] is not None:
                texts.setdefault(entry["image_id"], []).append(str(entry["caption"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.captions: {data.captions} is no file of COCO captions ({error!r}); it must hold images with id and "
            "file_name, and annotations with image_id and caption"
        ) from error
    rows = []
    for key, name in images:
        inside = not name.is_absolute() and ".." not in name.parts
        places = [data.images / name, data.images / name.name] if inside else [data.images / name.name]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise ConfigError(f"data.images: there is no {places[0]}, which {data.captions} names; correct data.images")
        rows.append(PictureRow(str(path), path.read_bytes, tuple(texts.get(key, ())), str(key)))
    return rows


class _Spool:
    """Image files one after the other in a file without a name, which is gone when nothing reads it any more.

    Raises:
        ConfigError: by `put`, the file cannot grow.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        with tempfile.TemporaryFile(dir=folder) as file:
            self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)
        self._end = 0

    def put(self, data: Any) -> Callable[[], bytes]:
        """Append the bytes of a buffer; how to read them again, from any thread."""
        start, view = self._end, memoryview(data)
        while view:
            try:
                written = os.write(self._handle, view)
            except OSError as error:
                raise ConfigError(
                    f"work: the image files of the dataset do not fit into {self._folder} ({error.strerror}); name "
                    "another folder as work"
                ) from error
            view, self._end = view[written:], self._end + written
        return partial(self._read, start, self._end - start)

    def _read(self, start: int, size: int) -> bytes:
        return os.pread(self._handle, size, start)


def _dataset_rows(data: DatasetData, work: Path | None) -> list[PictureRow]:
    from pairmill.export.selection import Selection
    from pairmill.store import Dataset

    rows = []
    spool = _Spool(work)
    with Selection(Dataset(data.path).snapshot(data.snapshot), data.where, 1000) as selection:
        for group in selection.groups:
            for metadata, images in selection.images(selection.metadata(group)):
                for row, image in zip(metadata.to_pylist(), images, strict=True):
                    texts = tuple(entry["text"] for entry in row["texts"] or () if entry["text"])
                    identity = row.get("cluster") or row["uid"]
                    rows.append(PictureRow(f"{row['uid']} of {data.path}", spool.put(image), texts, identity))
    return rows


class SeveralSamples(Samples):
    """Sources one after the other. Identities of different sources are different."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        offsets = np.cumsum([0, *(int(part.ids.max()) + 1 for part in parts)])
        self._offsets = offsets
        self.ids = np.concatenate([part.ids + offset for part, offset in zip(parts, offsets, strict=False)])
        self.texts = [part.texts for part in parts]
        self.decoded_bytes = sum(part.decoded_bytes for part in parts)

    @property
    def kin(self) -> NDArray[np.int64]:
        """That of each source; of different sources it is different."""
        return np.concatenate([part.kin + offset for part, offset in zip(self._parts, self._offsets, strict=False)])

    def fingerprint(self) -> str:
        """Of all sources, in their order."""
        return hashlib.sha256(" ".join(part.fingerprint() for part in self._parts).encode()).hexdigest()

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
        self.decoded_bytes = self.pictures.nbytes
        self._scenes = scene_table(drawn)
        self._claims = claim_table(claims)

    @property
    def kin(self) -> NDArray[np.int64]:
        """Twins are of one kin."""
        return self.ids // 2

    def groups(self) -> NDArray[np.int64]:
        """(pairs, 2): twins stand in one batch."""
        return np.arange(len(self)).reshape(-1, 2)

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
