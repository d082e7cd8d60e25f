"""A recipe with captions and scores made from the alt text alone: no model and no image is needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import pyarrow as pa

from captioners.mixing import mix_step
from filters.threshold import text_verdicts
from pairmill.plan import Recipe
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import fields
from schemas.config import RunConfig
from tests.steps import CountChars, CountWords, SameText


def chance(*what: object) -> float:
    """A number from 0 to 1 that depends on what it is made from."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:8], 16) / 2**32


@dataclass(frozen=True)
class Describe(Stage):
    """Three captions a pair; the last repeats the alt text, and of some pairs the second one failed."""

    resources: Resources = field(default=Resources(), metadata={"identity": False})
    name = "describe"
    reads = ("text",)
    writes = (fields.CAPTIONS,)

    def open(self) -> Kernel:
        def describe(batch: Batch) -> pa.Table:
            rows = []
            for text in batch.pylist("text"):
                failed = chance("fails", text) < 0.3
                second = (None, "caption.empty") if failed else (f"again {text}", None)
                said = [(f"this is {text}", None), second, (f"{text.upper()}!", None)]
                rows.append([{"text": t, "source": "blip", "reason": r, "detail": None} for t, r in said])
            return pa.table({"captions": pa.array(rows, fields.CAPTIONS.type)})

        return describe


@dataclass(frozen=True)
class ScoreTexts(Stage):
    """Scores by chance."""

    resources: Resources = field(default=Resources(), metadata={"identity": False})
    name = "score"
    reads = ("texts", "captions")
    writes = (
        fields.CLIP_SCORES,
        fields.CAPTION_CLIP_SCORES,
        fields.ITM_SCORES,
        fields.CAPTION_ITM_SCORES,
    )

    def open(self) -> Kernel:
        def score(batch: Batch) -> pa.Table:
            def scores(column: str, kind: str) -> pa.Array:
                rows = [
                    [None if t["text"] is None else chance(kind, t["text"]) for t in row]
                    for row in batch.pylist(column)
                ]
                return pa.array(rows, pa.list_(pa.float32()))

            columns = {
                f.name: scores("captions" if "caption" in f.name else "texts", "clip" if "clip" in f.name else "itm")
                for f in self.writes
            }
            return pa.table(columns)

        return score


def recipe(config: RunConfig) -> Recipe:
    """words, chars, captions, scores, mix, no repeated text."""
    rules = tuple(rule for rule in text_verdicts(config.keep) if set(rule.reads) <= {"words", "chars"})
    mix = mix_step(config.mix, config.keep.itm, rules)
    steps = (CountWords(), CountChars(), Describe(), ScoreTexts(), mix, SameText())
    return Recipe("mixing", steps)
