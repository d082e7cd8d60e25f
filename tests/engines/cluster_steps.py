"""Steps that write down where they ran and what they held there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pairmill.plan import Recipe
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import RunConfig

FREE: dict[str, Any] = {"compare": False, "metadata": {"identity": False}}


@dataclass(frozen=True)
class Placed(Stage):
    """Appends a line to a file for each kernel call: stage, node, GPUs, resources, process."""

    log: str = field(default="", **FREE)
    pause_s: float = field(default=0.0, **FREE)
    nodes: int = field(default=1000, **FREE)
    """From so many nodes that it has run on, a call takes no time any more."""
    resources: Resources = field(default=Resources(rows=64), **FREE)

    def measuring(self, measure: Callable[[Batch], pa.Array]) -> Kernel:
        """A kernel that writes its line and then measures."""

        def kernel(batch: Batch) -> pa.Table:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(json.dumps({"stage": self.name, **_here()}) + "\n")
            if len({line.get("node") for line in lines(Path(self.log), self.name)}) < self.nodes:
                time.sleep(self.pause_s)
            return pa.table({self.writes[0].name: measure(batch)})

        return kernel


def _here() -> dict[str, Any]:
    """Where this is; in a child of a worker, which tries a shard again that a worker died of, only its process."""
    import ray

    if not ray.is_initialized():
        return {"pid": os.getpid(), "child": True}
    context = ray.get_runtime_context()
    return {
        "node": context.get_node_id(),
        "gpus": ray.get_gpu_ids(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "environment": os.environ.get("PLACED"),
        "held": context.get_assigned_resources(),
        "pid": os.getpid(),
    }


@dataclass(frozen=True)
class Words(Placed):
    """Writes `words`, as a task; a text with the word `typo` runs into a defect of the code."""

    name = "words"
    reads = ("text",)
    writes = (fields.WORDS,)

    def open(self) -> Kernel:
        def count(batch: Batch) -> pa.Array:
            texts = batch.pylist("text")
            if any("typo" in t for t in texts):
                raise NameError("name 'wrods' is not defined")
            return pa.array([len(t.split()) for t in texts], pa.int32())

        return self.measuring(count)


@dataclass(frozen=True)
class Contrast(Placed):
    """Writes `contrast`, as a task of its own group."""

    resources: Resources = field(default=Resources(rows=16), **FREE)
    name = "contrast"
    reads = ("text", "words")
    writes = (fields.CONTRAST,)

    def open(self) -> Kernel:
        return self.measuring(lambda batch: pa.array([float(w) for w in batch.pylist("words")], pa.float32()))


@dataclass(frozen=True)
class Chars(Placed):
    """Writes `chars`, in a long-lived worker."""

    resources: Resources = field(default=Resources(rows=32, actor=True), **FREE)
    name = "chars"
    reads = ("text", "contrast")
    writes = (fields.CHARS,)

    def open(self) -> Kernel:
        return self.measuring(lambda batch: pa.array([len(t) for t in batch.pylist("text")], pa.int32()))


def recipe(config: RunConfig) -> Recipe:
    """words, contrast, chars."""
    log, pauses = config.options["log"], config.options.get("pauses", {})
    nodes = config.options.get("nodes", 1000)
    return Recipe("placed", tuple(kind(log, pauses.get(kind.name, 0.0), nodes) for kind in (Words, Contrast, Chars)))


def lines(log: Path, stage: str) -> list[dict[str, Any]]:
    """What a stage wrote down."""
    said = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [line for line in said if line["stage"] == stage]
