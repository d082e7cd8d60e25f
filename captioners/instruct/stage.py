"""The stage that has conversations written of each kept pair: which kinds, from which texts and boxes, and judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from filters.instruct import CHECKS_VERSION, check
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.instructions import KINDS, Context, Instruction, Task
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import InstructKind, Price, RunConfig
from schemas.reasons import DEFERRED_VALUES, Reason

if TYPE_CHECKING:
    from captioners.instruct.endpoint import Questions

Write = Callable[[Sequence[Task]], list[Instruction]]
"""Writes one conversation for each task, in order; where there is none, says why."""


class Writer(Protocol):
    """Who writes conversations: plain data with an identity, which a worker opens. One that asks for another answer
    when the checks find fault with one (``judges``) has its conversations judged already."""

    judges: ClassVar[bool]

    @property
    def resources(self) -> Resources:
        """What one worker of it occupies."""

    def identity(self) -> Mapping[str, Any]:
        """What determines its answers, as JSON."""

    def open(self) -> Write:
        """Make ready to write; called once in each worker."""


@dataclass(frozen=True)
class Instructions(Stage):
    """Conversations about each kept pair, of the kinds that `kinds` has it take part in.

    What a writer is told is the kept texts by rank and the boxes. Where a mixing recipe chooses among texts, which ones
    are kept is a verdict, so it may change without any stage running: the ranks are stored beside the conversations,
    and rows whose ranks are others now are written anew. So are, once a run, rows of which an answer is outstanding.

    Conversations that fail do not cost a pair anything: each has a reason of its own.
    """

    name = "instructions"
    writes = (fields.INSTRUCTIONS, fields.INSTRUCTED_RANKS, fields.INSTRUCTION_OUTCOMES)

    writer: Any
    """A `Writer`."""
    kinds: tuple[tuple[InstructKind, float], ...]
    """Share of the images, by kind."""
    seed: int = 0
    max_texts: int = 5
    max_boxes: int = 30
    labels: tuple[str, ...] = ()
    """Labels that were looked for in every image."""
    captions: bool = False
    """The recipe writes captions and chooses among texts."""
    detections: bool = False
    """The recipe has a detector."""
    checks: int = CHECKS_VERSION
    price: Price = field(default=Price(), metadata={"identity": False})
    """Of a million tokens; for `estimate`."""
    resources: Resources = field(default=Resources(rows=256), metadata={"identity": False})

    @classmethod
    def of(cls, config: RunConfig, *, captions: bool) -> Instructions:
        """The stage that a config asks for.

        Raises:
            ConfigError: the section ``instruct.writer`` does not fit.
        """
        asked = config.instruct
        writer = writer_of(config)
        return cls(
            writer,
            tuple((kind, asked.kinds[kind]) for kind in KINDS if kind in asked.kinds),
            seed=config.seed,
            max_texts=asked.max_texts,
            max_boxes=asked.max_boxes,
            labels=config.boxes.labels,
            captions=captions,
            detections=config.models.detector is not None,
            price=asked.price,
            resources=writer.resources,
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """Texts, boxes, the size of the stored image, and the shard."""
        columns = [fields.TEXTS, fields.REGIONS, fields.REJECTED_BOXES, fields.CROWDED]
        columns += [fields.WIDTH, fields.HEIGHT, fields.SHARD]
        columns += [fields.CAPTIONS, fields.TEXT_RANKS] if self.captions else []
        columns += [fields.DETECTIONS] if self.detections else []
        return tuple(column.name for column in columns)

    def open(self) -> Kernel:
        """Open the writer."""
        write = self.writer.open()

        def kernel(batch: Batch) -> pa.Table:
            rows = [
                dict(zip(self.reads, values, strict=True))
                for values in zip(*map(batch.pylist, self.reads), strict=True)
            ]
            uids = batch.pylist(fields.UID.name)
            tasks = [self._tasks(uid, row) for uid, row in zip(uids, rows, strict=True)]
            written = iter(write([task for of_row in tasks for task in of_row]))
            believe = self.writer.judges
            found = [[next(written) if believe else judged(next(written), task) for task in r] for r in tasks]
            outcomes = [[{"kind": i.kind, "reason": i.reason} for i in of_row] for of_row in found]
            ranks = [row.get(fields.TEXT_RANKS.name) for row in rows]
            return pa.table(
                {
                    fields.INSTRUCTIONS.name: pa.array(
                        [[i.to_row() for i in r] for r in found], fields.INSTRUCTIONS.type
                    ),
                    fields.INSTRUCTED_RANKS.name: pa.array(ranks, fields.INSTRUCTED_RANKS.type),
                    fields.INSTRUCTION_OUTCOMES.name: pa.array(outcomes, fields.INSTRUCTION_OUTCOMES.type),
                }
            )

        return kernel

    def _tasks(self, uid: str, row: Mapping[str, Any]) -> list[Task]:
        context = self._context(uid, row)
        return [
            Task(context, kind, row[fields.SHARD.name])
            for kind, share in self.kinds
            if takes_part(self.seed, uid, kind, share)
        ]

    def _context(self, uid: str, row: Mapping[str, Any]) -> Context:
        given = [text["text"] for text in row[fields.TEXTS.name] or ()]
        written = [text["text"] for text in row.get(fields.CAPTIONS.name) or ()]
        texts = kept_texts([*given, *written], row.get(fields.TEXT_RANKS.name))
        boxes = [Box.from_row(box) for box in row[fields.REGIONS.name] or ()]
        boxes += [Box.from_row(box) for box in row.get(fields.DETECTIONS.name) or ()]
        crowded = set(row[fields.CROWDED.name] or ()) | unboxed(row[fields.REJECTED_BOXES.name] or (), boxes)
        if len(boxes) > self.max_boxes:  # of labels that lose boxes here, none may be counted
            largest = sorted(range(len(boxes)), key=lambda n: (-boxes[n].area, n))[: self.max_boxes]
            crowded |= {box.label for n, box in enumerate(boxes) if n not in set(largest)}
            boxes = [boxes[n] for n in sorted(largest)]
        return Context(
            uid,
            tuple(texts[: self.max_texts]),
            tuple(boxes),
            row[fields.WIDTH.name] or 0,
            row[fields.HEIGHT.name] or 0,
            frozenset(crowded),
            self.labels,
        )

    def estimate(self, rows: int) -> str:
        """Requests, tokens and money, if each is answered once and at full length. The prompt is taken at four bytes a
        token, with 300 tokens for an image's own texts and boxes."""
        asked: Questions | None = getattr(self.writer, "questions", None)
        if asked is None or not rows:
            return ""
        requests = prompt = 0.0
        for kind, share in self.kinds:
            blank = Task(Context("", (), (), 1, 1), kind)
            sent = asked.prompts.messages(blank, self.max_texts, self.max_boxes)
            requests += rows * share
            prompt += rows * share * (sum(len(m["content"].encode()) for m in sent) / 4 + 300)
        completion = requests * asked.max_tokens
        cost = (prompt * self.price.prompt + completion * self.price.completion) / 1e6
        money = f", {cost:,.2f} of money" if cost else ""
        return f"at most {requests:,.0f} requests, {prompt + completion:,.0f} tokens{money}, if each is answered once"

    @property
    def revises(self) -> tuple[str, ...]:
        """The ranks as they were and as they are, and what is outstanding."""
        ranks = (fields.INSTRUCTED_RANKS.name, fields.TEXT_RANKS.name) if self.captions else ()
        return (fields.INSTRUCTION_OUTCOMES.name, *ranks)

    def outdated(self, rows: pa.Table, *, retry: bool) -> pa.Array:
        """Rows whose texts are chosen otherwise now, and with `retry` those of which an answer is outstanding."""
        marks = [False] * len(rows)
        if retry:
            outcomes = rows.column(fields.INSTRUCTION_OUTCOMES.name).combine_chunks()
            reasons = pc.struct_field(pc.list_flatten(outcomes), "reason")
            waiting = pc.is_in(reasons, value_set=pa.array(self._awaited(), pa.string()))
            for row in pc.list_parent_indices(outcomes).filter(waiting).to_pylist():
                marks[row] = True
        if self.captions:
            before, now = (rows.column(f.name).to_pylist() for f in (fields.INSTRUCTED_RANKS, fields.TEXT_RANKS))
            marks = [mark or old != new for mark, old, new in zip(marks, before, now, strict=True)]
        return pa.array(marks, pa.bool_())

    def _awaited(self) -> list[str]:
        """Reasons of conversations that are worth another try now."""
        worth = getattr(self.writer, "worth_asking", None)
        return [reason for reason in sorted(DEFERRED_VALUES) if worth is None or worth(reason)]


def writer_of(config: RunConfig) -> Writer:
    """The writer that ``instruct.writer`` names.

    Raises:
        ConfigError: what it needs is missing from the config.
    """
    if config.instruct.writer.kind == "endpoint":
        from captioners.instruct.endpoint import EndpointWriter

        return EndpointWriter.of(config)
    if config.instruct.writer.kind == "batch":
        from captioners.instruct.batch import BatchWriter

        return BatchWriter.of(config)
    from captioners.instruct.offline import OfflineWriter

    if config.instruct.writer.name or config.instruct.writer.base_url:
        raise ConfigError(
            "instruct.writer has a name or base_url, but its kind is offline, which asks no model; "
            "set instruct.writer.kind to endpoint or batch"
        )
    return OfflineWriter.of(config)


def kept_texts(texts: Sequence[str | None], ranks: Sequence[int | None] | None) -> list[str]:
    """The kept texts by rank; all of them, in their order, where no recipe chose."""
    if ranks is None:
        return [text for text in texts if text]
    ranked = sorted((rank, text) for rank, text in zip(ranks, texts, strict=False) if rank is not None and text)
    return [text for _, text in ranked]


def unboxed(rejected: Sequence[Mapping[str, Any]], boxes: Sequence[Box]) -> set[str]:
    """Labels of which there may be something without a box, since its box was rejected: there is no counting them. A
    rejected box without a label may have been of any."""
    labels = {entry["box"]["label"] for entry in rejected if entry["reason"] != Reason.BOX_REPEATED}
    return labels if all(labels) else labels | {box.label for box in boxes}


def takes_part(seed: int, uid: str, kind: str, share: float) -> bool:
    """Whether an image is among the `share` that gets conversations of a kind: a hash decides, so a larger share has
    all the images of a smaller one, and kinds are drawn apart from one another."""
    digest = hashlib.sha256(json.dumps([seed, uid, kind]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def judged(written: Instruction, task: Task) -> Instruction:
    """What a writer wrote, or why it is not stored."""
    if written.reason is not None:
        return written
    findings = check(written.turns, written.boxes, task.kind, task.context)
    if not findings:
        return written
    last = findings[-1]
    return replace(
        written,
        turns=(),
        boxes=(),
        findings=(*written.findings, *findings),
        reason=last.reason,
        detail=last.detail,
    )
