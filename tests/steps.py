"""Small real steps for tests of the machinery: they measure texts, so no model and no image is needed."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pairmill.plan import Recipe
from pairmill.stage import (
    Batch,
    GlobalStage,
    GlobalVerdict,
    Judgement,
    Kernel,
    Resources,
    Scatter,
    Stage,
    Verdict,
)
from schemas import fields
from schemas.config import RunConfig
from schemas.reasons import Reason


@dataclass(frozen=True)
class CountWords(Stage):
    """Writes `words`; a text with the word `poison` cannot be counted, one with `abort` kills its process, one with
    `oomkilled` is killed as by the kernel that is out of memory, and one with `balloon` asks for more than there is."""

    pause_s: float = field(default=0.0, compare=False, metadata={"identity": False})
    log: str | None = field(default=None, compare=False, metadata={"identity": False})
    resources: Resources = field(default=Resources(rows=64), compare=False, metadata={"identity": False})
    name = "words"
    reads = ("text",)
    writes = (fields.WORDS,)

    def open(self) -> Kernel:
        def count(batch: Batch) -> pa.Table:
            texts = [t or "" for t in batch.pylist("text")]
            if self.log:
                with open(self.log, "a", encoding="utf-8") as log:
                    log.writelines(f"{uid}\n" for uid in batch.pylist("uid"))
            time.sleep(self.pause_s)
            if any("abort" in t for t in texts):
                os._exit(139)
            if any("oomkilled" in t for t in texts):
                os.kill(os.getpid(), signal.SIGKILL)
            if any("balloon" in t for t in texts):
                _ask_for_too_much()
            if any("poison" in t for t in texts):
                raise ValueError("a poisoned text")
            return pa.table({"words": pa.array([len(t.split()) for t in texts], pa.int32())})

        return count


def _ask_for_too_much() -> None:
    """Fails with a real MemoryError: the address space is limited while it asks."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**33, limits[1]))
    try:
        bytearray(2**40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass(frozen=True)
class CountChars(Stage):
    """Writes `chars`, in a long-lived worker."""

    scale: int = 1
    resources: Resources = field(default=Resources(rows=32, actor=True), compare=False, metadata={"identity": False})
    name = "chars"
    reads = ("text", "words")
    writes = (fields.CHARS,)

    def open(self) -> Kernel:
        def count(batch: Batch) -> pa.Table:
            return pa.table({"chars": pa.array([len(t) * self.scale for t in batch.pylist("text")], pa.int32())})

        return count


@dataclass(frozen=True)
class AtLeast(Verdict):
    """Drops rows whose `words` are fewer."""

    words: int
    name = "at_least"
    reads = ("words",)

    def judge(self, rows: pa.Table) -> Judgement:
        few = pc.less(rows["words"], self.words)
        detail = pc.binary_join_element_wise("words=", rows["words"].cast(pa.string()), "")
        return Judgement(pc.if_else(few, Reason.TEXT_TOO_FEW_WORDS.value, pa.scalar(None, pa.string())), detail)


@dataclass(frozen=True)
class RankChars(GlobalStage):
    """Writes `contrast`: how many live rows have fewer chars (a stand-in for a neighbour search)."""

    name = "rank"
    reads = ("chars",)
    writes = (fields.CONTRAST,)

    def measure(self, live: pa.Table, todo: pa.BooleanArray, scatter: Scatter) -> pa.Table:
        chars = live["chars"].to_pylist()
        ranks = [float(sum(c < mine for c in chars)) for mine in chars]
        return pa.table({"contrast": pa.array(ranks, pa.float32()).filter(todo)})


@dataclass(frozen=True)
class SameText(GlobalVerdict):
    """Drops all but the most senior row of each text."""

    name = "same_text"
    reads = ("text",)

    def judge(self, live: pa.Table) -> Judgement:
        first: dict[str, str] = {}
        order = sorted(zip(live["refresh"].to_pylist(), live["uid"].to_pylist(), live["text"].to_pylist(), strict=True))
        for _, uid, text in order:
            first.setdefault(text, uid)
        senior = [first[t] for t in live["text"].to_pylist()]
        duplicate = [s if s != u else None for s, u in zip(senior, live["uid"].to_pylist(), strict=True)]
        reason = [Reason.DUPLICATE_BYTES.value if d else None for d in duplicate]
        return Judgement(pa.array(reason, pa.string()), duplicate_of=pa.array(duplicate, pa.string()))


def recipe(config: RunConfig) -> Recipe:
    """words, at least N, chars, no repeated text, rank."""
    options = config.options
    rows = options.get("rows")
    words = CountWords(
        options.get("pause_s", 0.0), options.get("log"), **({"resources": Resources(rows=rows)} if rows else {})
    )
    chars = CountChars(options.get("scale", 1), **({"resources": Resources(rows=rows, actor=True)} if rows else {}))
    return Recipe("steps", (words, AtLeast(options.get("words", 3)), chars, SameText(), RankChars()))


@dataclass(frozen=True)
class DiesAtOpen(CountWords):
    """Its model takes the process down while it loads."""

    def open(self) -> Kernel:
        os._exit(139)


def recipe_that_dies_at_open(config: RunConfig) -> Recipe:
    """words, by a stage that cannot be opened."""
    return Recipe("dies", (DiesAtOpen(),))


def write_urls(path: Path, texts: list[str]) -> Path:
    """A URL table of distinct URLs with these texts."""
    import pyarrow.parquet as pq

    urls = [f"http://host{i % 7}.example/{i}.jpg" for i in range(len(texts))]
    pq.write_table(pa.table({"url": urls, "text": texts}), path)
    return path


def texts(count: int) -> list[str]:
    """Texts of 0 to 9 words; every tenth says what an earlier one said."""
    return [" ".join(f"word{(i - i % 10 if i % 10 == 9 else i) + k}" for k in range(i % 10)) for i in range(count)]


def config(root: Path, table: Path, **changes: object) -> RunConfig:
    """A run of `recipe` over a URL table, in this process."""
    from pairmill.run import parse_config

    data = {
        "dataset": str(root / "dataset"),
        "recipe": "tests.steps:recipe",
        "source": {"kind": "url_table", "path": str(table)},
        "engine": {"kind": "local"},
        "shard_size": 100,
        **changes,
    }
    return parse_config(data)
