"""Builds a small real dataset with the store's own writers: known pairs, images, scores and verdicts."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pairmill.boxes import Box
from pairmill.instructions import Instruction, Turn
from pairmill.store import LEDGER_TABLE, PAIRS_TABLE, Dataset, Snapshot
from schemas import fields
from schemas.reasons import status_of
from schemas.snapshot import SnapshotRecord

IMAGES_TABLE = "download-00000001"
CLIP_TABLE = "clip-00000002"
CAPTIONS_TABLE = "captions-00000003"
CAPTION_SCORES_TABLE = "scores-00000004"
INSTRUCT_TABLE = "instruct-00000005"


def uid(url: str, text: str) -> str:
    return hashlib.sha256(f"{url}\n{text}".encode()).hexdigest()


@dataclass(frozen=True)
class Pair:
    """What the builder knows of a pair."""

    number: int
    shard: int
    text: str | None = "a photo"
    more_texts: tuple[str, ...] = ()
    boxes: tuple[tuple[str, float, float, float, float], ...] = ()
    extra: dict[str, Any] | None = None
    format: str | None = "jpeg"
    size: tuple[int, int] = (32, 24)
    transform: tuple[float, float, float, float] = (0.5, 0.5, 0.0, 0.0)
    score: float | None = 0.3
    reason: str | None = None
    malformed: bool = False
    captions: tuple[tuple[str | None, str | None], ...] | None = None
    """Text and reason of each synthetic text; null: the recipe wrote none."""
    choice: tuple[int | str, ...] | None = None
    """Of each text, its rank or its reason; null: no recipe chose."""
    instructions: tuple[Instruction, ...] | None = None
    """Its conversations, and why there are none of other kinds; null: no stage wrote any."""

    @property
    def url(self) -> str:
        return f"http://images.example/{self.number}.jpg"

    @property
    def uid(self) -> str:
        return uid(self.url, self.text or "")

    @property
    def mark(self) -> str:
        """What its conversations say and no other's."""
        return f"mark-{self.number:04d}"

    @property
    def image(self) -> bytes | None:
        if self.format is None:
            return None
        pixels = np.random.default_rng(self.number).integers(0, 255, (*self.size[::-1], 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, self.format.upper())
        return file.getvalue()

    def texts(self) -> list[dict[str, str]]:
        web = [{"text": self.text, "source": "web"}] if self.text is not None else []
        return web + [{"text": t, "source": "human"} for t in self.more_texts]


def instructed(pair: Pair) -> Pair:
    """The same pair with a conversation of each kind; of odd pairs the detail could not be written."""
    (width, height), mark = pair.size, pair.mark
    talk = [Turn("user", "What is this?"), Turn("assistant", f"It is [the thing](box:0) {mark}, schön.")]
    more = [Turn("user", "And where?"), Turn("assistant", "To the left.")]
    box = Box("thing", 1.25, 2.5, width / 2, height - 0.75, 0.5, "human")
    other = Box("thing", width / 2, 0, width, height, None, "human")
    asked = [Turn("user", "What is at [](box:1)?"), Turn("assistant", f"[Two things](box:0,1), {mark}.")]
    long = [Turn("user", "Describe it."), Turn("assistant", f"Two things, {mark}.")]
    detail = Instruction("detail", writer="offline", reason="check.length", detail=f"too short: {mark}")
    written = (
        Instruction("conversation", (*talk, *more), (box,), "offline"),
        detail if pair.number % 2 else Instruction("detail", tuple(long), (), "offline"),
        Instruction("complex", (Turn("user", "Why?"), Turn("assistant", f"Because of {mark}.")), (), "offline"),
        Instruction("grounding", tuple(asked), (box, other), "offline"),
    )
    return Pair(**{**vars(pair), "instructions": written})


@dataclass
class Built:
    """A dataset and what went into it."""

    dataset: Dataset
    pairs: list[Pair]
    tables: dict[str, int] = field(default_factory=dict)

    @property
    def snapshot(self) -> Snapshot:
        return self.dataset.snapshot()

    def kept(self) -> list[Pair]:
        return sorted((p for p in self.pairs if p.reason is None), key=lambda p: (p.shard, p.uid))


def build(url: str, pairs: Sequence[Pair], *, clip: bool = True, ledger: pa.Schema = fields.LEDGER) -> Built:
    """Write all tables and publish a snapshot. The next call with more pairs publishes the next one."""
    built = Built(Dataset(url), list(pairs))
    columns = dict.fromkeys([f.name for f in fields.PAIRS if f.name not in ("reason", "detail")], PAIRS_TABLE)
    _write(built, PAIRS_TABLE, fields.PAIRS, [_pair(p) for p in pairs])
    measured = [p for p in pairs if not p.malformed]
    schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, *fields.IMAGES])
    _write(built, IMAGES_TABLE, schema, [_image(p) for p in measured])
    columns |= dict.fromkeys([f.name for f in fields.IMAGES], IMAGES_TABLE)
    if clip:
        mine = (fields.CLIP_IMAGE, fields.CLIP_SCORES, fields.CLIP_SCORE)
        schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, *mine])
        _write(built, CLIP_TABLE, schema, [_clip(p) for p in measured if p.format])
        columns |= dict.fromkeys([f.name for f in mine], CLIP_TABLE)
    if any(p.captions is not None for p in pairs):
        schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, fields.CAPTIONS])
        _write(built, CAPTIONS_TABLE, schema, [_captions(p) for p in measured if p.captions is not None])
        mine = (fields.CAPTION_CLIP_SCORES, fields.ITM_SCORES, fields.ITM_SCORE, fields.CAPTION_ITM_SCORES)
        schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, *mine])
        _write(built, CAPTION_SCORES_TABLE, schema, [_caption_scores(p) for p in measured if p.captions is not None])
        columns |= {fields.CAPTIONS.name: CAPTIONS_TABLE} | dict.fromkeys([f.name for f in mine], CAPTION_SCORES_TABLE)
    if any(p.instructions is not None for p in pairs):
        schema = pa.schema([fields.UID, fields.REASON, fields.DETAIL, fields.INSTRUCTIONS])
        told = [p for p in measured if p.instructions is not None]
        rows = [{"uid": p.uid, "instructions": [i.to_row() for i in p.instructions or ()]} for p in told]
        _write(built, INSTRUCT_TABLE, schema, rows)
        columns |= {fields.INSTRUCTIONS.name: INSTRUCT_TABLE}
    _write(built, LEDGER_TABLE, ledger, [_ledger(p) for p in pairs], replace=True)
    count = {
        status: sum(status_of(p.reason).value == status for p in pairs) for status in ("kept", "dropped", "deferred")
    }
    number = len(built.dataset.snapshots()) + 1
    built.dataset.publish(
        SnapshotRecord(
            number, number, "2026-01-01T00:00:00Z", "test", "dataset: x", len(pairs), count["kept"], count["dropped"],
            count["deferred"], {}, [], built.tables, columns, {}, {}, 1.0,
        )
    )  # fmt: skip
    return built


def _write(built: Built, name: str, schema: pa.Schema, rows: list[dict[str, Any]], replace: bool = False) -> None:
    table = built.dataset.table(name, schema)
    done = {f.shard for f in table.files()} if not replace else set()
    shards = {p.uid: p.shard for p in built.pairs}
    files = []
    for shard in sorted({shards[r["uid"]] for r in rows} - done):
        with table.writer(shard, f"v{table.version() + 1}") as writer:
            writer.write(pa.Table.from_pylist([r for r in rows if shards[r["uid"]] == shard], schema=schema))
            files.append(writer.close())
    if files:
        built.tables[name] = table.commit(files, replace=[f.shard for f in files] if replace else ())
    elif table.version() >= 0:
        built.tables[name] = table.version()


def _pair(p: Pair) -> dict[str, Any]:
    return {
        "uid": p.uid,
        "url": p.url,
        "text": p.text,
        "texts": p.texts(),
        "boxes": [
            dict(zip(("label", "x1", "y1", "x2", "y2"), b, strict=True), score=1.0, source="human") for b in p.boxes
        ],
        "extra": json.dumps(p.extra) if p.extra else None,
        "source": "url_table:0",
        "refresh": 1,
        "reason": p.reason if p.malformed else None,
    }


def _image(p: Pair) -> dict[str, Any]:
    if p.format is None:
        return {"uid": p.uid, "reason": p.reason, "detail": "gone"}
    width, height = p.size
    return {
        "uid": p.uid,
        "image": p.image,
        "format": p.format,
        "width": width,
        "height": height,
        "original_width": width * 2,
        "original_height": height * 2,
        "transform": p.transform,
        "sha256": hashlib.sha256(p.image or b"").hexdigest(),
        "animated": False,
    }


def _clip(p: Pair) -> dict[str, Any]:
    return {
        "uid": p.uid,
        "clip_image": [1.0, 0.0],
        "clip_scores": [p.score] + [0.1] * len(p.more_texts),
        "clip_score": p.score,
    }


def _captions(p: Pair) -> dict[str, Any]:
    texts = [{"text": text, "source": "blip", "reason": reason, "detail": None} for text, reason in p.captions or ()]
    return {"uid": p.uid, "captions": texts}


def _caption_scores(p: Pair) -> dict[str, Any]:
    known = [text is not None for text, _ in p.captions or ()]
    return {
        "uid": p.uid,
        "caption_clip_scores": [0.5 if there else None for there in known],
        "itm_scores": [0.25] * len(p.texts()),
        "itm_score": 0.25,
        "caption_itm_scores": [0.75 if there else None for there in known],
    }


def _ledger(p: Pair) -> dict[str, Any]:
    duplicate = p.reason is not None and p.reason.startswith("duplicate")
    return {
        "uid": p.uid,
        "status": status_of(p.reason).value,
        "reason": p.reason,
        "duplicate_of": "0" * 64 if duplicate else None,
        "text_ranks": p.choice and [c if isinstance(c, int) else None for c in p.choice],
        "text_reasons": p.choice and [c if isinstance(c, str) else None for c in p.choice],
        "text_details": p.choice and ["said" if isinstance(c, str) else None for c in p.choice],
    }
