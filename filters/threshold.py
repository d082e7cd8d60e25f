"""Verdicts over measured columns: thresholds, quantiles, and those that the config's `keep` asks for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairmill.errors import ConfigError
from pairmill.stage import GlobalVerdict, Judgement, Step, Verdict
from schemas import fields
from schemas.config import Keep
from schemas.reasons import Reason

Operator = Literal[">=", "<=", ">", "<"]
_COMPARE = {">=": pc.greater_equal, "<=": pc.less_equal, ">": pc.greater, "<": pc.less}
NO_SCORE = "no score"
"""The detail of a row that is dropped because it has no score."""


@dataclass(frozen=True)
class Comparison:
    """``>= 0.28``: a row stays when its value compares so."""

    operator: Operator
    value: float


@dataclass(frozen=True)
class Share:
    """``top 30%``: this share of the rows stays."""

    side: Literal["top", "bottom"]
    percent: str
    """As written, so that 0.1 means a tenth and not the nearest binary number."""


def parse_condition(condition: str, key: str) -> Comparison | Share:
    """A condition of the config's `keep` or `mix`.

    Raises:
        ConfigError: it is none; the message names `key`, such as ``keep.clip_score``.
    """
    if match := re.fullmatch(r"\s*(>=|<=|>|<)\s*(-?(?:\d+\.?\d*|\.\d+))\s*", condition):
        return Comparison(match[1], float(match[2]))  # type: ignore[arg-type]
    match = re.fullmatch(r"\s*(top|bottom)\s+(\d+\.?\d*|\.\d+)\s*%\s*", condition)
    if match and 0 < Fraction(match[2]) <= 100:
        return Share(match[1], match[2])  # type: ignore[arg-type]
    raise ConfigError(
        f"{key}: {condition!r} is no condition; write it like '>= 0.28', '< 3' or 'top 30%' (above 0, at most 100)"
    )


@dataclass(frozen=True)
class Threshold(Verdict):
    """A row stays when its value compares so with `value`; else it is dropped for `reason`, with the value as detail,
    such as ``words = 2, not >= 3``. A row without a value (null or NaN) is dropped for the same reason, with
    detail ``no score``.

    `value` is compared in the column's own type: a float32 score that prints as 0.7 is ``>= 0.7``.
    """

    label: str
    """The step's name in the funnel."""
    column: str
    operator: Operator
    value: float
    reason: Reason

    @property
    def name(self) -> str:  # type: ignore[override]
        """The label."""
        return self.label

    @property
    def reads(self) -> tuple[str, ...]:
        """The column."""
        return (self.column,)

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        column = rows.column(self.column)
        known = _known(column)
        bound = pa.scalar(self.value, column.type if pa.types.is_floating(column.type) else pa.float64())
        passes = pc.and_(known, pc.fill_null(_COMPARE[self.operator](column, bound), False))
        requirement, values = f"{self.operator} {self.value:g}", column.to_pylist()
        return judgement(passes, self.reason, lambda i: _measured(values[i], self.column, requirement))


@dataclass(frozen=True)
class Quantile(GlobalVerdict):
    """Of the rows that have a value, the share with the highest (or lowest) stays: exactly
    ``ceil(percent / 100 * rows)``, equal values in order of uid. Rows without a value are dropped,
    with detail ``no score``, and do not count."""

    label: str
    column: str
    side: Literal["top", "bottom"]
    percent: str
    reason: Reason

    @property
    def name(self) -> str:  # type: ignore[override]
        """The label."""
        return self.label

    @property
    def reads(self) -> tuple[str, ...]:
        """The column."""
        return (self.column,)

    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows."""
        column = live.column(self.column)
        known = _known(column)
        positions = np.flatnonzero(known.to_numpy(zero_copy_only=False))
        values = column.to_pylist()
        scores = np.array([values[i] for i in positions], dtype=np.float64)
        uids = live.column(fields.UID.name).take(pa.array(positions)).to_numpy()
        order = positions[np.lexsort((uids, -scores if self.side == "top" else scores))]
        count = math.ceil(Fraction(self.percent) / 100 * len(order))
        passes = np.zeros(live.num_rows, dtype=bool)
        passes[order[:count]] = True
        requirement = f"in the {self.side} {self.percent}%"
        kept = pa.array(passes)
        return judgement(kept, self.reason, lambda i: _measured(values[i], self.column, requirement))


@dataclass(frozen=True)
class Intersection(GlobalVerdict):
    """A row stays when every part, each asked about all live rows, lets it stay; else the first part that drops it
    gives reason and detail. Verdicts one after the other would ask a quantile only about the rows that are left."""

    label: str
    parts: tuple[GlobalVerdict, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The label."""
        return self.label

    @property
    def reads(self) -> tuple[str, ...]:
        """What the parts read."""
        return tuple(dict.fromkeys(column for part in self.parts for column in part.reads))

    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows."""
        judgements = [part.judge(live) for part in self.parts]
        said = zip(*(zip(j.reason.to_pylist(), _details(j), strict=True) for j in judgements), strict=True)
        first = [next((pair for pair in row if pair[0] is not None), (None, None)) for row in said]
        reasons, details = ([pair[i] for pair in first] for i in (0, 1))
        return Judgement(pa.array(reasons, pa.string()), pa.array(details, pa.string()))


def _details(judgement: Judgement) -> list[str | None]:
    return judgement.detail.to_pylist() if judgement.detail is not None else [None] * len(judgement.reason)


def judgement(passes: pa.Array | pa.ChunkedArray, reason: Reason, detail: Any) -> Judgement:
    """A judgement that drops the rows that do not pass; `detail` maps a position to the text beside the reason."""
    kept = passes.to_pylist()
    return Judgement(
        reason=pa.array([None if k else reason.value for k in kept], pa.string()),
        detail=pa.array([None if k else detail(i) for i, k in enumerate(kept)], pa.string()),
    )


def _known(column: pa.ChunkedArray) -> pa.Array:
    """Which values are there: neither null nor NaN."""
    known = pc.is_valid(column)
    if pa.types.is_floating(column.type):
        known = pc.and_(known, pc.invert(pc.fill_null(pc.is_nan(column), True)))
    return pa.array(known.to_pylist(), pa.bool_())


def _measured(value: float | None, column: str, requirement: str) -> str:
    return NO_SCORE if value is None or math.isnan(value) else f"{column} = {value:.4g}, not {requirement}"


@dataclass(frozen=True)
class NotBoilerplate(Verdict):
    """Drops texts that match a boilerplate rule; the detail is the rule's name."""

    name = "boilerplate"
    reads = (fields.BOILERPLATE.name,)

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        rules = rows.column(fields.BOILERPLATE.name)
        return judgement(pc.is_null(rules), Reason.TEXT_BOILERPLATE, lambda i: rules[i].as_py())


@dataclass(frozen=True)
class InLanguage(Verdict):
    """Drops texts whose language is known and none of `languages`; the detail is the language and its probability.

    Known means: with a probability of at least `min_score`. Short texts full of names give no language away, and one in
    twenty English ones would go were every guess believed; so below `min_score` a text has the benefit of the doubt,
    and so has a text without letters. ``min_score=0`` believes every guess.
    """

    name = "language"
    reads = (fields.LANGUAGE.name, fields.LANGUAGE_SCORE.name)

    languages: tuple[str, ...]
    min_score: float = 0.5

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        language, score = (rows.column(name).to_pylist() for name in self.reads)
        passes = [
            code is None or code in self.languages or probability < self.min_score
            for code, probability in zip(language, score, strict=True)
        ]
        return judgement(pa.array(passes, pa.bool_()), Reason.TEXT_LANGUAGE, lambda i: f"{language[i]} {score[i]:.2f}")


@dataclass(frozen=True)
class ShortSide(Verdict):
    """Drops images whose shorter side, as fetched, is below `min_side` pixels, or unknown; the detail is its size."""

    name = "min_side"
    reads = (fields.ORIGINAL_WIDTH.name, fields.ORIGINAL_HEIGHT.name)

    min_side: int

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        sizes = _sizes(rows)
        passes = [size is not None and min(size) >= self.min_side for size in sizes]
        return judgement(pa.array(passes, pa.bool_()), Reason.IMAGE_TOO_SMALL, lambda i: _size(sizes[i]))


@dataclass(frozen=True)
class Aspect(Verdict):
    """Drops images whose longer side is more than `max_aspect` times the shorter; the detail is its size."""

    name = "max_aspect"
    reads = (fields.ORIGINAL_WIDTH.name, fields.ORIGINAL_HEIGHT.name)

    max_aspect: float

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        sizes = _sizes(rows)
        passes = [size is not None and max(size) <= self.max_aspect * min(size) for size in sizes]
        return judgement(pa.array(passes, pa.bool_()), Reason.IMAGE_ASPECT, lambda i: _size(sizes[i]))


def _sizes(rows: pa.Table) -> list[tuple[int, int] | None]:
    """Width and height as fetched, or None where one of them is unknown."""
    width, height = (rows.column(f.name).to_pylist() for f in (fields.ORIGINAL_WIDTH, fields.ORIGINAL_HEIGHT))
    return [None if w is None or h is None else (w, h) for w, h in zip(width, height, strict=True)]


def _size(size: tuple[int, int] | None) -> str:
    return NO_SCORE if size is None else f"{size[0]}x{size[1]}"


def text_verdicts(keep: Keep) -> tuple[Verdict, ...]:
    """The rules of `keep` over what `filters.text_rules.TextStats` measures; the first that speaks gives the reason."""
    words, chars = fields.WORDS.name, fields.CHARS.name
    rules: list[Verdict] = [Threshold("empty", chars, ">=", 1, Reason.TEXT_EMPTY)]
    if not keep.boilerplate:
        rules.append(NotBoilerplate())
    if keep.min_words is not None:
        rules.append(Threshold("min_words", words, ">=", keep.min_words, Reason.TEXT_TOO_FEW_WORDS))
    if keep.max_words is not None:
        rules.append(Threshold("max_words", words, "<=", keep.max_words, Reason.TEXT_TOO_MANY_WORDS))
    if keep.min_chars is not None:
        rules.append(Threshold("min_chars", chars, ">=", keep.min_chars, Reason.TEXT_TOO_FEW_CHARS))
    if keep.max_chars is not None:
        rules.append(Threshold("max_chars", chars, "<=", keep.max_chars, Reason.TEXT_TOO_MANY_CHARS))
    if keep.max_repetition is not None:
        repetition = fields.REPETITION.name
        rules.append(Threshold("max_repetition", repetition, "<=", keep.max_repetition, Reason.TEXT_REPETITION))
    if keep.language is not None:
        rules.append(InLanguage(keep.language, keep.min_language_score))
    return tuple(rules)


def size_verdicts(keep: Keep) -> tuple[Verdict, ...]:
    """The rules of `keep` over the sides of the image as fetched; they need no pixels."""
    rules: list[Verdict] = []
    if keep.min_side is not None:
        rules.append(ShortSide(keep.min_side))
    if keep.max_aspect is not None:
        rules.append(Aspect(keep.max_aspect))
    return tuple(rules)


def blank_verdicts(keep: Keep) -> tuple[Verdict, ...]:
    """The rule of `keep` over what `filters.image_rules.ImageStats` measures."""
    if keep.min_contrast is None:
        return ()
    return (Threshold("min_contrast", fields.CONTRAST.name, ">=", keep.min_contrast, Reason.IMAGE_BLANK),)


def clip_verdicts(keep: Keep) -> tuple[Step, ...]:
    """The rule of `keep` over ``clip_score``: a threshold, or a share of all live rows."""
    if keep.clip_score is None:
        return ()
    return (clip_verdict(keep.clip_score),)


def clip_verdict(condition: str) -> Step:
    """A rule over ``clip_score`` from a condition such as ``>= 0.28`` or ``top 30%``."""
    return _verdict(
        fields.CLIP_SCORE.name, condition, below=Reason.CLIP_BELOW_THRESHOLD, outside=Reason.CLIP_BELOW_QUANTILE
    )


def score_verdicts(keep: Keep) -> tuple[Step, ...]:
    """The further conditions of `keep`, in their order, on any score column: ``keep: {aesthetic: ">= 5"}``."""
    reason = Reason.SCORE_BELOW_THRESHOLD
    return tuple(_verdict(column, c, below=reason, outside=reason) for column, c in (keep.model_extra or {}).items())


def _verdict(column: str, condition: str, below: Reason, outside: Reason) -> Step:
    parsed = parse_condition(condition, f"keep.{column}")
    if isinstance(parsed, Comparison):
        return Threshold(f"keep_{column}", column, parsed.operator, parsed.value, below)
    return Quantile(f"keep_{column}", column, parsed.side, parsed.percent, outside)
