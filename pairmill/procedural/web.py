"""A procedural web: a list of URLs with alt texts, what is true of each, and a loopback server that serves them.

The list is a function of the number of pairs, the seed and the server's address alone. It has the faults, lies and
copies of a real crawl in realistic proportions (`Kind`, `PROPORTIONS`). Pictures are rendered when they are asked
for, so 2,000 pairs cost nothing to set up.

    with ProceduralWeb(pairs=2000, seed=0) as web:
        web.write(folder)          # urls.parquet for the pipeline, truth.parquet for the judge
        ...
        web.requests               # Counter: requests by URL
        web.change(urls)           # these URLs show something else from now on

The list has boxes of most pictures' objects, a few of them faulty (`BoxFault`).

The truth is never read by a pipeline; tests and the demo compare results with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import io
import math
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web
from PIL import Image

from pairmill.procedural import junk
from pairmill.procedural.captions import as_typed, describe, is_true
from pairmill.procedural.scene import Box, Scene, SceneObject, render, sample_scene


class Kind(str, Enum):
    """What a row of the web is."""

    TRUE = "true"
    MISMATCHED = "mismatched"
    BOILERPLATE = "boilerplate"
    FOREIGN = "foreign"
    TOO_SHORT = "too_short"
    NOT_FOUND = "not_found"
    GONE = "gone"
    TIMEOUT = "timeout"
    TRICKLE = "trickle"
    SERVER_ERROR = "server_error"
    UNAVAILABLE = "unavailable"
    HTML = "html"
    EMPTY = "empty"
    TINY = "tiny"
    TRUNCATED = "truncated"
    BROKEN = "broken"
    BLANK = "blank"
    RESET = "reset"
    COPY_EXACT = "copy_exact"
    COPY_RESIZED = "copy_resized"
    COPY_RECOMPRESSED = "copy_recompressed"
    COPY_CROPPED = "copy_cropped"
    COPY_MIRRORED = "copy_mirrored"
    COPY_RECAPTIONED = "copy_recaptioned"

    @property
    def is_copy(self) -> bool:
        """Whether the picture is a copy of another row's."""
        return self.value.startswith("copy_")

    @property
    def has_picture(self) -> bool:
        """Whether a decodable picture is served (blank and tiny ones included)."""
        return self not in _WITHOUT_PICTURE


_WITHOUT_PICTURE = frozenset(
    {
        Kind.NOT_FOUND, Kind.GONE, Kind.TIMEOUT, Kind.TRICKLE, Kind.SERVER_ERROR, Kind.UNAVAILABLE, Kind.HTML,
        Kind.EMPTY, Kind.TRUNCATED, Kind.BROKEN, Kind.RESET,
    }
)  # fmt: skip

PROPORTIONS: Mapping[Kind, float] = {
    Kind.MISMATCHED: 0.12,
    Kind.BOILERPLATE: 0.04,
    Kind.FOREIGN: 0.03,
    Kind.TOO_SHORT: 0.02,
    Kind.NOT_FOUND: 0.03,
    Kind.GONE: 0.01,
    Kind.TIMEOUT: 0.003,
    Kind.TRICKLE: 0.002,
    Kind.SERVER_ERROR: 0.007,
    Kind.UNAVAILABLE: 0.006,
    Kind.HTML: 0.01,
    Kind.EMPTY: 0.005,
    Kind.TINY: 0.015,
    Kind.TRUNCATED: 0.01,
    Kind.BROKEN: 0.007,
    Kind.BLANK: 0.01,
    Kind.RESET: 0.005,
    Kind.COPY_EXACT: 0.03,
    Kind.COPY_RESIZED: 0.03,
    Kind.COPY_RECOMPRESSED: 0.03,
    Kind.COPY_CROPPED: 0.03,
    Kind.COPY_MIRRORED: 0.02,
    Kind.COPY_RECAPTIONED: 0.02,
}
"""The share of each kind; what is left is `Kind.TRUE`."""

WITHOUT_BOXES = 0.2
"""Share of the rows that show a scene and come without boxes."""

FAULTY_BOXES = 0.04
"""Share of the rows that show a scene and come with a box that is none."""


class BoxFault(str, Enum):
    """What is wrong with a box of the list."""

    OUTSIDE = "outside"
    """It lies beside the picture."""
    SWAPPED = "swapped"
    """Its corners are exchanged: x1 > x2 and y1 > y2."""
    NOT_FINITE = "not_finite"
    """A corner is NaN."""
    UNLABELLED = "unlabelled"
    STALE = "stale"
    """It was right for what the URL showed before (`ProceduralWeb.change`)."""


_CONTENT_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_LONGEST_CROP = 0.12
_LEAST_CROP = 0.05
_SHORTEST_SIDE = 224
_CACHE = 256
_EXIF_ORIENTATION = 0x0112
_FIRST_DAY = datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)
"""Last-Modified of every image; a day later each time it changes."""
_UPRIGHT_AGAIN = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class Picture:
    """How a picture's bytes are made.

    Args:
        scene: what is rendered.
        format: "JPEG", "PNG" or "WEBP".
        quality: of the encoder (ignored for PNG).
        orientation: EXIF orientation of the stored pixels, 1 for none.
        of: for a copy, the picture it was made from: those bytes are decoded and changed as by any copyist.
        crop: for a cropped copy, (left, top, right, bottom) in pixels of the original.
        side: longer side in pixels to render at instead of the scene's own (tiny pictures).
    """

    scene: Scene
    format: str = "JPEG"
    quality: int = 88
    orientation: int = 1
    of: Picture | None = None
    crop: tuple[int, int, int, int] | None = None
    side: int | None = None

    def draw(self) -> Image.Image:
        """The upright picture before encoding."""
        if self.of is None:
            if self.side is None:
                return render(self.scene)
            scale = self.side / max(self.scene.width, self.scene.height)
            return render(self.scene, round(self.scene.width * scale), round(self.scene.height * scale))
        source = decode(self.of.encode())
        if self.crop is not None:
            return source.crop(self.crop)
        if self.scene == self.of.scene.mirrored():
            return source.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return source.resize((self.scene.width, self.scene.height), Image.Resampling.BICUBIC)

    def encode(self) -> bytes:
        """The bytes that are served; the same at every call."""
        return _encode(self)


@lru_cache(maxsize=_CACHE)
def _encode(picture: Picture) -> bytes:
    image = picture.draw()
    extra = {}
    if picture.orientation != 1:
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = picture.orientation
        image = image.transpose(_UPRIGHT_AGAIN[picture.orientation])
        extra["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    if picture.format == "PNG":
        image.save(buffer, "PNG", compress_level=3)
    elif picture.format == "WEBP":
        image.save(buffer, "WEBP", quality=picture.quality, method=1)
    else:
        image.save(buffer, "JPEG", quality=picture.quality, **extra)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    """The upright RGB picture in the bytes."""
    stored = Image.open(io.BytesIO(data))
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    orientation = stored.getexif().get(_EXIF_ORIENTATION, 1)
    image = stored.convert("RGB")
    return image.transpose(turn[orientation]) if orientation in turn else image


@dataclass(frozen=True)
class ListedBox:
    """A box as the list has it.

    Args:
        label: the object's words: "large red circle", "red circle" or "circle", alike within a row.
        x1, y1, x2, y2: pixels of the upright picture that is served, hundredths.
        fault: what is wrong with it; None for a true box.
    """

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    fault: BoxFault | None = None


@dataclass(frozen=True)
class WebRow:
    """One row of the list and the truth about it.

    Args:
        url, text, page: what the pipeline reads.
        kind: what the row is.
        path: the URL's path on the server.
        picture: what is served, or the whole picture behind a truncated or broken one; None where there is none.
        scene: the scene the served picture shows; None where it shows none.
        text_is_true: the oracle's answer for the text and the served scene (a text outside the grammar is not
            true); False for a blank picture; None where no picture is served.
        duplicate_of_url: for a copy, the URL of the row whose picture it copies.
        boxes: what the list says of the picture's objects; None where it says nothing. A true list has a box of each
            object; where one is faulty, that object may have no other.
    """

    url: str
    text: str
    page: str
    kind: Kind
    path: str
    picture: Picture | None
    scene: Scene | None
    text_is_true: bool | None
    duplicate_of_url: str | None
    boxes: tuple[ListedBox, ...] | None = None


@dataclass(frozen=True)
class _Draft:
    kind: Kind
    text: str
    picture: Picture | None
    scene: Scene | None
    original: int | None = None


def counts_by_kind(pairs: int, proportions: Mapping[Kind, float] = PROPORTIONS) -> dict[Kind, int]:
    """How many rows of each kind a web of so many pairs has: largest remainders, the rest true.

    Raises:
        ValueError: the shares add up to more than 1, or there are no pairs.
    """
    total = sum(proportions.values())
    if pairs < 1 or total > 1 + 1e-9:
        raise ValueError(f"{pairs} pairs with shares adding up to {total:.3f}: need at least 1 pair and at most 1.0")
    counts = {kind: math.floor(pairs * share) for kind, share in proportions.items()}
    missing = round(pairs * total) - sum(counts.values())
    by_remainder = sorted(proportions, key=lambda kind: pairs * proportions[kind] - counts[kind], reverse=True)
    for kind in by_remainder[:missing]:
        counts[kind] += 1
    counts[Kind.TRUE] = counts.get(Kind.TRUE, 0) + pairs - sum(counts.values())
    return counts


def make_rows(
    pairs: int, seed: int, host: str, port: int, proportions: Mapping[Kind, float] = PROPORTIONS
) -> tuple[WebRow, ...]:
    """The list, shuffled; a function of the arguments alone.

    Raises:
        ValueError: copies are wanted but no true row is there to copy, or as `counts_by_kind`.
    """
    rng = random.Random(f"web:{seed}:{pairs}")
    counts = counts_by_kind(pairs, proportions)
    copies = [kind for kind, count in counts.items() if kind.is_copy for _ in range(count)]
    if copies and not counts[Kind.TRUE]:
        raise ValueError("copies need at least one true row to copy")
    drafts = [_draft(kind, rng) for kind, count in counts.items() if not kind.is_copy for _ in range(count)]
    originals = [place for place, draft in enumerate(drafts) if draft.kind is Kind.TRUE]
    for kind in copies:
        drafts.append(_draft_copy(kind, drafts, originals, rng))
    order = list(range(len(drafts)))
    rng.shuffle(order)
    paths = {place: _path(seed, rank, drafts[place]) for rank, place in enumerate(order)}
    base = f"http://{host}:{port}"
    rows = []
    for rank, place in enumerate(order):
        draft = drafts[place]
        truth: bool | None = None
        if draft.kind.has_picture:
            truth = draft.scene is not None and bool(is_true(draft.text, draft.scene))
        original = None if draft.original is None else base + paths[draft.original]
        page = f"{base}/pages/{rank // 8}.html"
        rows.append(
            WebRow(
                base + paths[place],
                draft.text,
                page,
                draft.kind,
                paths[place],
                draft.picture,
                draft.scene,
                truth,
                original,
                _listed_boxes(draft, random.Random(f"boxes:{seed}:{paths[place]}")),
            )
        )
    return tuple(rows)


def _path(seed: int, rank: int, draft: _Draft) -> str:
    token = hashlib.sha256(f"{seed}:{rank}".encode()).hexdigest()[:16]
    suffix = "jpg" if draft.picture is None else _SUFFIXES[draft.picture.format]
    return f"/images/{token}.{suffix}"


def _listed_boxes(draft: _Draft, rng: random.Random) -> tuple[ListedBox, ...] | None:
    """The list's boxes of a row, with a chance of their own: they change nothing else of the web."""
    if draft.scene is None or draft.picture is None or rng.random() < WITHOUT_BOXES:
        return None
    scene, side = draft.scene, draft.picture.side
    width, height = scene.width, scene.height
    if side is not None:
        width, height = (round(s * side / max(scene.width, scene.height)) for s in (width, height))
    words = rng.choice((("size", "colour", "shape"), ("size", "colour", "shape"), ("colour", "shape"), ("shape",)))
    found = [
        _listed_box(thing, box, words) for thing, box in zip(scene.objects, scene.boxes(width, height), strict=True)
    ]
    rng.shuffle(found)
    if rng.random() < FAULTY_BOXES:
        fault = rng.choice((BoxFault.OUTSIDE, BoxFault.SWAPPED, BoxFault.NOT_FINITE, BoxFault.UNLABELLED))
        place = rng.randrange(len(found))
        bad = _faulty(found[place], fault, width)
        if rng.random() < 0.5:
            found[place] = bad
        else:
            found.insert(place, bad)
    return tuple(found)


def _listed_box(thing: SceneObject, box: Box, words: Sequence[str]) -> ListedBox:
    label = " ".join(getattr(thing, word) for word in words)
    x1, y1, x2, y2 = (round(edge, 2) for edge in box)
    return ListedBox(label, x1, y1, x2, y2)


def _faulty(box: ListedBox, fault: BoxFault, width: int) -> ListedBox:
    if fault is BoxFault.OUTSIDE:
        return replace(box, x1=box.x1 + width, x2=box.x2 + width, fault=fault)
    if fault is BoxFault.SWAPPED:
        return replace(box, x1=box.x2, y1=box.y2, x2=box.x1, y2=box.y1, fault=fault)
    if fault is BoxFault.NOT_FINITE:
        return replace(box, x2=math.nan, fault=fault)
    return replace(box, label=" ", fault=fault)


def _sample_picture(rng: random.Random, scene: Scene | None = None) -> Picture:
    scene = scene or sample_scene(rng)
    format_ = rng.choices(("JPEG", "PNG", "WEBP"), weights=(0.86, 0.07, 0.07))[0]
    turned = format_ == "JPEG" and rng.random() < 0.03
    orientation = rng.choice(tuple(_UPRIGHT_AGAIN)) if turned else 1
    return Picture(scene, format_, rng.randint(72, 95), orientation)


def _draft(kind: Kind, rng: random.Random) -> _Draft:
    picture = _sample_picture(rng)
    scene = picture.scene
    text = as_typed(describe(scene, rng), rng)
    if kind is Kind.MISMATCHED:
        while is_true(text, scene) is not False:
            text = as_typed(describe(sample_scene(rng), rng), rng)
    elif kind is Kind.BOILERPLATE:
        text = junk.boilerplate(rng)
    elif kind is Kind.FOREIGN:
        text = junk.foreign(rng)
    elif kind is Kind.TOO_SHORT:
        text = junk.too_short(rng)
    elif kind is Kind.TINY:
        picture = Picture(scene, picture.format, picture.quality, side=rng.randint(16, 63))
    elif kind in (Kind.TRUNCATED, Kind.BROKEN, Kind.TRICKLE):
        return _Draft(kind, text, Picture(scene, "JPEG", picture.quality), None)
    elif not kind.has_picture or kind is Kind.BLANK:
        return _Draft(kind, text, None, None)
    return _Draft(kind, text, picture, scene)


def _draft_copy(kind: Kind, drafts: Sequence[_Draft], originals: Sequence[int], rng: random.Random) -> _Draft:
    while True:
        original = rng.choice(originals)
        source = drafts[original].picture
        if source is None:
            raise ValueError("an original without a picture")
        text = drafts[original].text
        if kind is Kind.COPY_EXACT:
            return _Draft(kind, text, source, source.scene, original)
        if kind is Kind.COPY_RECAPTIONED:
            other = _another_caption(source.scene, text, rng)
            return _Draft(kind, other, source, source.scene, original)
        picture = _changed_picture(kind, source, rng)
        if picture is not None:
            if rng.random() < 0.5 or is_true(text, picture.scene) is not True:
                text = as_typed(describe(picture.scene, rng), rng)
            return _Draft(kind, text, picture, picture.scene, original)


def _another_caption(scene: Scene, text: str, rng: random.Random) -> str:
    while True:
        other = as_typed(describe(scene, rng), rng)
        if other.lower().rstrip(".") != text.lower().rstrip("."):
            return other


def _changed_picture(kind: Kind, source: Picture, rng: random.Random) -> Picture | None:
    """A changed copy of a picture, or None when this one does not lend itself (no room to crop or shrink)."""
    scene, quality = source.scene, rng.randint(60, 92)
    if kind is Kind.COPY_RECOMPRESSED:
        lower = rng.randint(45, max(50, source.quality - 8))
        return Picture(scene, rng.choice(("JPEG", "JPEG", "WEBP")), lower, of=source)
    if kind is Kind.COPY_MIRRORED:
        return Picture(scene.mirrored(), "JPEG", quality, of=source)
    if kind is Kind.COPY_RESIZED:
        shorter, longer = sorted((scene.width, scene.height))
        factors = [
            f for f in (10, 11, 12, 13, 14, 18, 20) if f * shorter >= 16 * _SHORTEST_SIDE and f * longer <= 16 * 560
        ]
        return Picture(scene.resized(rng.choice(factors)), "JPEG", quality, of=source) if factors else None
    boxes = scene.boxes()
    left, right = _crop_side(min(box[0] for box in boxes), scene.width - max(box[2] for box in boxes), scene.width, rng)
    top, bottom = _crop_side(
        min(box[1] for box in boxes), scene.height - max(box[3] for box in boxes), scene.height, rng
    )
    crop = (left, top, scene.width - right, scene.height - bottom)
    taken = max((left + right) / scene.width, (top + bottom) / scene.height)
    if taken < _LEAST_CROP or min(crop[2] - crop[0], crop[3] - crop[1]) < _SHORTEST_SIDE:
        return None
    return Picture(scene.cropped(*crop), "JPEG", quality, of=source, crop=crop)


def _crop_side(before: float, after: float, side: int, rng: random.Random) -> tuple[int, int]:
    """Pixels to cut on both ends of one axis: at most 12% of the side together, and no object."""
    total = rng.uniform(0.04, _LONGEST_CROP) * side
    first = rng.random() * total
    return int(min(first, before)), int(min(total - first, after))


_BOXES = pa.list_(pa.struct([("label", pa.string()), *((edge, pa.float64()) for edge in ("x1", "y1", "x2", "y2"))]))


def _box_record(box: ListedBox) -> dict[str, str | float]:
    return {"label": box.label, "x1": box.x1, "y1": box.y1, "x2": box.x2, "y2": box.y2}


class ProceduralWeb:
    """The web and its server, a context manager.

    The server runs in a background thread on its own event loop. It answers `GET` of every row's URL as the row's
    kind says, `/robots.txt` with a rule that allows everything, and 404 to all else. Images (whole or damaged, but not
    those that trickle) carry an ETag and a Last-Modified, and a client that sends one of them back gets 304 while the
    image is the same; `not_modified` counts these answers by URL (`requests` counts them, too).

    Args:
        pairs: rows in the list.
        seed: equal seeds give equal webs (for the same address).
        host: an address of 127.0.0.0/8.
        port: 0 for a free one. URLs hold the port, so give one where runs are to be compared.
        proportions: share of each kind; what is left is true.
        hang_s: how long a `timeout` row keeps silent before it closes.

    Raises:
        ValueError: as `make_rows`; or the host is no loopback address.
        OSError: the port is taken.
    """

    def __init__(
        self,
        pairs: int = 2000,
        seed: int = 0,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        proportions: Mapping[Kind, float] = PROPORTIONS,
        hang_s: float = 120.0,
    ) -> None:
        if not host.startswith("127."):
            raise ValueError(f"host {host!r} is not a loopback address: use one of 127.0.0.0/8")
        self.pairs, self.seed, self.host, self.hang_s = pairs, seed, host, hang_s
        self.requests: Counter[str] = Counter()
        self.not_modified: Counter[str] = Counter()
        self._listener = socket.create_server((host, port))
        self.port: int = self._listener.getsockname()[1]
        try:
            self.rows: tuple[WebRow, ...] = make_rows(pairs, seed, host, self.port, proportions)
        except ValueError:
            self._listener.close()
            raise
        self._by_path = {row.path: (row, 0) for row in self.rows}
        """What is served, and how often it changed: in one value, as the server's thread reads it meanwhile."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> ProceduralWeb:
        if self._thread is not None or self._listener.fileno() < 0:
            raise RuntimeError("this web was started before: make a new ProceduralWeb")
        ready = threading.Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="procedural-picture")
        self._thread = threading.Thread(target=self._run, args=(ready,), name="procedural-web", daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and free the port; hanging answers are cut off. Safe to call twice."""
        if self._loop is not None and self._stop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
        if self._pool is not None:
            self._pool.shutdown()
        self._listener.close()

    def write(self, folder: Path | str) -> None:
        """Write `urls.parquet` (url, text, page, boxes) and `truth.parquet` (url, text, scene, text_is_true, kind,
        duplicate_of_url, box_faults) into the folder, rows in the list's order.

        ``boxes`` are structs of label, x1, y1, x2, y2 in pixels of the served picture; ``box_faults`` has a
        `BoxFault` or null for each of them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = pa.string()
        urls = {name: pa.array([getattr(row, name) for row in self.rows], text) for name in ("url", "text", "page")}
        urls["boxes"] = pa.array(
            [None if row.boxes is None else [_box_record(box) for box in row.boxes] for row in self.rows], _BOXES
        )
        pq.write_table(pa.table(urls), folder / "urls.parquet")
        truth = {
            "url": urls["url"],
            "text": urls["text"],
            "scene": pa.array([None if row.scene is None else row.scene.to_json() for row in self.rows], text),
            "text_is_true": pa.array([row.text_is_true for row in self.rows], pa.bool_()),
            "kind": pa.array([row.kind.value for row in self.rows], text),
            "duplicate_of_url": pa.array([row.duplicate_of_url for row in self.rows], text),
            "box_faults": pa.array(
                [
                    None if row.boxes is None else [box.fault and box.fault.value for box in row.boxes]
                    for row in self.rows
                ],
                pa.list_(text),
            ),
        }
        pq.write_table(pa.table(truth), folder / "truth.parquet")

    def change(self, urls: Iterable[str] | Mapping[str, Scene]) -> tuple[WebRow, ...]:
        """Serve another scene at these URLs from now on: the ones given, or drawn from the seed, the path and how often
        the URL changed before.

        `rows` and what `write` writes follow: picture, scene and truth are those of the new scene, while URL, text and
        boxes stay (so a text that was true is now false, unless the scene given says otherwise, and boxes are stale).
        A copy is no copy any more, and a row that was true or false to its picture is what it is now, `Kind.TRUE` or
        `Kind.MISMATCHED`. Copies of a changed row stay as they are: their `duplicate_of_url` says where they came
        from.

        Returns:
            The changed rows, in the order given.

        Raises:
            ValueError: no row has such a URL, or it shows no scene; nothing has changed then.
        """
        scenes = urls if isinstance(urls, Mapping) else dict.fromkeys(urls)
        by_url = {row.url: row for row in self.rows}
        for url in scenes:
            if url not in by_url or by_url[url].scene is None:
                raise ValueError(f"{url} shows no scene: give URLs of rows whose scene is not None")
        changed = {url: self._changed(by_url[url], scene) for url, scene in scenes.items()}
        self.rows = tuple(changed.get(row.url, row) for row in self.rows)
        for row in changed.values():
            self._by_path[row.path] = row, self._by_path[row.path][1] + 1
        return tuple(changed.values())

    def _changed(self, row: WebRow, scene: Scene | None) -> WebRow:
        if scene is None:
            scene = sample_scene(random.Random(f"change:{self.seed}:{row.path}:{self._by_path[row.path][1]}"))
        old = row.picture
        if old is None:
            raise ValueError(f"{row.url} has a scene but no picture")
        truth = bool(is_true(row.text, scene))
        kind = row.kind
        if kind.is_copy or kind in (Kind.TRUE, Kind.MISMATCHED):
            kind = Kind.TRUE if truth else Kind.MISMATCHED
        picture = Picture(scene, old.format, old.quality, side=old.side)
        boxes = row.boxes and tuple(replace(box, fault=box.fault or BoxFault.STALE) for box in row.boxes)
        return replace(
            row, kind=kind, picture=picture, scene=scene, text_is_true=truth, duplicate_of_url=None, boxes=boxes
        )

    def _run(self, ready: threading.Event) -> None:
        asyncio.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application()
        application.router.add_get("/{path:.*}", self._answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        await web.SockSite(runner, self._listener, backlog=512).start()
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests[f"http://{self.host}:{self.port}{request.path}"] += 1
        if request.path == "/robots.txt":
            return web.Response(text="User-agent: *\nAllow: /\n")
        if request.path not in self._by_path:
            return web.Response(status=404, text="no such page")
        row, changes = self._by_path[request.path]
        if row.kind is Kind.TIMEOUT:
            await asyncio.sleep(self.hang_s)
            return web.Response(status=504)
        if row.kind is Kind.RESET:
            return self._reset(request)
        status = _STATUSES.get(row.kind)
        if status is not None:
            return web.Response(status=status, text=f"<html><body>{status}</body></html>", content_type="text/html")
        if row.kind is Kind.HTML:
            page = "<!doctype html><html><body><h1>This picture has moved</h1></body></html>"
            return web.Response(text=page, content_type="text/html")
        if row.kind is Kind.EMPTY:
            return web.Response(body=b"", content_type="image/jpeg")
        etag, modified = _etag(row), _FIRST_DAY + datetime.timedelta(days=changes)
        if row.kind is not Kind.TRICKLE and _still_holds(request, etag, modified):
            self.not_modified[row.url] += 1
            response = web.Response(status=304)
        else:
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(self._pool, served_bytes, row)
            if row.kind is Kind.TRICKLE:
                return await self._trickle(request, body)
            kind = _CONTENT_TYPES[row.picture.format if row.picture else "JPEG"]
            response = web.Response(body=body, content_type=kind)
        response.headers["ETag"] = f'"{etag}"'
        response.last_modified = modified
        return response

    def _reset(self, request: web.Request) -> web.StreamResponse:
        """Close the connection with a TCP reset."""
        transport = request.transport
        if transport is not None:
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return web.Response()

    async def _trickle(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """One byte a second, until the client has had enough."""
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg", "Content-Length": str(len(body))})
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):
            for place in range(len(body)):
                await response.write(body[place : place + 1])
                await asyncio.sleep(1.0)
        return response


def _etag(row: WebRow) -> str:
    """Stands for what is drawn, so that saying 304 costs no drawing."""
    drawn = repr((row.kind, row.path if row.picture is None else row.picture))
    return hashlib.sha256(drawn.encode()).hexdigest()[:32]


def _still_holds(request: web.Request, etag: str, modified: datetime.datetime) -> bool:
    """Whether a request names the validators of the image as it is (RFC 9110, section 13: the tag counts first)."""
    if request.if_none_match is not None:
        return any(tag.value in (etag, "*") for tag in request.if_none_match)
    since = request.if_modified_since
    return since is not None and modified <= since


_STATUSES: Mapping[Kind, int] = {
    Kind.NOT_FOUND: 404,
    Kind.GONE: 410,
    Kind.SERVER_ERROR: 500,
    Kind.UNAVAILABLE: 503,
}


def served_bytes(row: WebRow) -> bytes:
    """The image bytes the server sends for a row (for a `trickle` row: would send, given hours).

    Raises:
        ValueError: the row's kind serves no image bytes.
    """
    if row.kind is Kind.BLANK:
        digest = hashlib.sha256(row.path.encode()).digest()
        colour = (digest[0], digest[1], digest[2])
        buffer = io.BytesIO()
        Image.new("RGB", (256 + digest[3] % 128, 256 + digest[4] % 128), colour).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()
    if row.picture is None:
        raise ValueError(f"a row of kind {row.kind.value} serves no image bytes")
    body = row.picture.encode()
    if row.kind is Kind.TRUNCATED:
        return body[: len(body) * 2 // 5]
    if row.kind is Kind.BROKEN:
        noise = np.random.default_rng(len(body)).integers(0, 256, len(body), dtype=np.uint8).tobytes()
        return body[:2] + noise[2:]
    return body
