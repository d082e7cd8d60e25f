"""Mixing recipes: which texts of a pair are kept, in which order, and why not the others.

The texts of a pair are those that came with it (source ``web`` or ``human``) and those that a captioner wrote (any
other source). A recipe of `RECIPES` is a pure function over one pair's texts and their stored scores, so changing the
recipe or a threshold runs no model. `mix_step` makes of it the verdict that judges a dataset.

What holds for every recipe:

- A text with a reason of its own (a rule of `keep` that the web text breaks, a captioner's failure) or without words
  is not kept, and not ranked.
- A text that says the same as one that ranks before it (`same_text`) is not kept, and takes no place of ``mix.top``.
- ``mix.clip``, where it is set, is asked of every web and synthetic text that the recipe considers. ``keep.itm`` is
  asked by `capfilt`, `web_only` and `synthetic_only` only, since the other methods were published without a matching
  filter. A text without the score fails.
- A share, such as ``top 30%``, is a share of the web texts of all live pairs; the score at which it ends is then the
  cut for every text, equal scores on the same side.
- Human texts are curated: no threshold and no rule over texts is asked of them. They rank as the recipe says.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from filters.threshold import NO_SCORE, Comparison, Operator, Share, parse_condition
from pairmill.stage import KEPT, GlobalVerdict, Judgement, Step, TextOutcomes, Verdict
from schemas import fields
from schemas.config import Mix
from schemas.reasons import Reason

WEB, HUMAN = "web", "human"
"""Sources of texts that came with a pair; all others are synthetic."""

Score = Literal["itm", "clip"]

_COMPARE: dict[Operator, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a pair with all that is known of it."""

    ordinal: int
    """Its position among the texts of the pair, from 0."""
    text: str | None
    source: str
    clip: float | None = None
    """Cosine of its CLIP embedding with the image's."""
    itm: float | None = None
    """Probability that the image matches it."""
    reason: str | None = None
    """Why it cannot be kept whatever the recipe: the rule that the web text breaks, or the captioner's failure."""
    detail: str | None = None

    @property
    def synthetic(self) -> bool:
        """Whether a captioner wrote it."""
        return self.source not in (WEB, HUMAN)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a text is not kept."""

    reason: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What became of the texts of one pair: of each, by ordinal, either a rank among the kept ones or a rejection."""

    outcomes: tuple[int | Rejection, ...]

    @property
    def kept(self) -> list[int]:
        """Ordinals of the kept texts, by rank."""
        ranked = [(rank, ordinal) for ordinal, rank in enumerate(self.outcomes) if isinstance(rank, int)]
        return [ordinal for _, ordinal in sorted(ranked)]


@dataclass(frozen=True)
class Cut:
    """What a score must be: ``itm >= 0.5``. Compared in single precision, as scores are stored."""

    score: Score
    operator: Operator
    value: float | None
    """Null for a share where no web text has a score: then no text passes."""
    share: str | None = None
    """The share that `value` was made from, such as ``top 30%``."""

    def rejection(self, text: Text) -> Rejection | None:
        """Why a text fails, such as ``itm = 0.12, not >= 0.5``; null when it passes."""
        score: float | None = getattr(text, self.score)
        if score is None or math.isnan(score):
            return Rejection(self._reason, NO_SCORE)
        if self.value is not None and _COMPARE[self.operator](np.float32(score), np.float32(self.value)):
            return None
        wanted = f"{self.operator} {self.value:.4g}" if self.value is not None else "to be told without web texts"
        return Rejection(self._reason, f"{self.score} = {score:.4g}, not {wanted}{self._note}")

    @property
    def _note(self) -> str:
        return f" ({self.share})" if self.share else ""

    @property
    def _reason(self) -> str:
        if self.score == "itm":
            return Reason.ITM_BELOW_THRESHOLD.value
        return (Reason.CLIP_BELOW_QUANTILE if self.share else Reason.CLIP_BELOW_THRESHOLD).value


@dataclass(frozen=True)
class Limits:
    """What a recipe asks of texts: null asks nothing."""

    itm: Cut | None = None
    clip: Cut | None = None
    top: int | None = None
    """Texts kept at most; null: as the recipe was published."""


def same_text(text: str) -> str:
    """A key that texts share which differ in case, spaces, punctuation or Unicode form only."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or " ".join(folded.split())


# -- the recipes ------------------------------------------------------------------------------------------------------


def capfilt(texts: Sequence[Text], limits: Limits) -> Choice:
    """CapFilt (BLIP, Li et al. 2022, section 3.3): the filter judges the web text and each synthetic text on its own,
    and all that pass stay.

    Human texts always stay. Order: human texts, the web text, synthetic texts by ITM probability (by CLIP where ITM is
    not asked), equal ones as they were written.
    """
    pair = _Pair(texts)
    passed = pair.passing(pair.usable, limits.itm, limits.clip)
    synthetic = [t for t in passed if t.synthetic]
    best = _by(synthetic, "itm" if limits.itm else "clip")
    ranked = [*(t for t in passed if t.source == HUMAN), *(t for t in passed if t.source == WEB), *best]
    return pair.choose(ranked, limits.top)


def blip2(texts: Sequence[Text], limits: Limits) -> Choice:
    """BLIP-2 (Li et al. 2023, section 4.1): all texts ranked together by CLIP similarity, the best two stay, of which a
    trainer draws one a step. Published with ``caption.count: 10`` of BLIP-large and CLIP ViT-L/14."""
    pair = _Pair(texts)
    return pair.choose(_by(pair.scored(pair.passing(pair.usable, limits.clip)), "clip"), limits.top or 2)


def laion_coco(texts: Sequence[Text], limits: Limits) -> Choice:
    """LAION-COCO (Schuhmann et al. 2022): of the synthetic texts the best one by CLIP stays, no other text does.

    Published with 40 captions of BLIP-large; CLIP ViT-L/14 chose five of them and CLIP RN50x64 the best of these. Here
    one CLIP model does both, so that choosing five first would change nothing.
    """
    pair = _Pair(texts)
    candidates = pair.passing([t for t in pair.usable if t.synthetic], limits.clip)
    return pair.choose(_by(pair.scored(candidates), "clip"), limits.top or 1, "laion_coco keeps synthetic texts only")


def nguyen23(texts: Sequence[Text], limits: Limits) -> Choice:
    """Nguyen et al. 2023 ("Improving multimodal datasets with image captioning", section 4): the web text stays when
    its CLIP score passes the cut; else the synthetic text takes its place, when it passes the same cut.

    The synthetic text is the first one that the captioner wrote; the published captioner is BLIP-2 and the cut the top
    30%, by CLIP ViT-L/14. Human texts stand in the web text's place and always pass.
    """
    pair = _Pair(texts)
    given = pair.passing([t for t in pair.usable if not t.synthetic], limits.clip)
    if given:
        return pair.choose(given, limits.top or 1, "the text that came with the pair passes")
    first = [t for t in pair.usable if t.synthetic][:1]
    return pair.choose(pair.passing(first, limits.clip), 1, "not the first synthetic text")


def recap(texts: Sequence[Text], limits: Limits) -> Choice:
    """Recaptioning (Recap-DataComp, Li et al. 2024, section 4): one long synthetic text stands first, the texts that
    came with the pair stay behind it, so that a trainer can mix real and synthetic text in a ratio of its own.

    The synthetic text is the first that the captioner wrote. Texts that came with the pair keep their order.
    """
    pair = _Pair(texts)
    considered = [*[t for t in pair.usable if t.synthetic][:1], *(t for t in pair.usable if not t.synthetic)]
    return pair.choose(pair.passing(considered, limits.clip), limits.top, "not the first synthetic text")


def web_only(texts: Sequence[Text], limits: Limits) -> Choice:
    """The texts that came with the pair, those that pass, in their order; no synthetic text. With ``keep.itm`` this is
    the row "filter only" of BLIP's ablation (table 1), without it the plain web data."""
    pair = _Pair(texts)
    given = pair.passing([t for t in pair.usable if not t.synthetic], limits.itm, limits.clip)
    return pair.choose(given, limits.top, "web_only keeps no synthetic text")


def synthetic_only(texts: Sequence[Text], limits: Limits) -> Choice:
    """The synthetic texts that pass, in the order of `capfilt`; no text that came with the pair."""
    pair = _Pair(texts)
    passed = pair.passing([t for t in pair.usable if t.synthetic], limits.itm, limits.clip)
    ranked = _by(passed, "itm" if limits.itm else "clip")
    return pair.choose(ranked, limits.top, "synthetic_only keeps synthetic texts only")


RECIPES: dict[str, Callable[[Sequence[Text], Limits], Choice]] = {
    recipe.__name__: recipe for recipe in (capfilt, blip2, nguyen23, laion_coco, recap, web_only, synthetic_only)
}
"""The recipes by the name that ``mix.recipe`` takes. Texts are given in the order of their ordinals, 0, 1, 2 ..."""

ASKS_ITM = frozenset({"capfilt", "web_only", "synthetic_only"})
"""Recipes that ask ``keep.itm``."""


class _Pair:
    """The texts of a pair while a recipe chooses among them."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self._outcomes: dict[int, int | Rejection] = {}
        self._count = len(texts)
        self.usable: list[Text] = []
        """Texts with words and without a reason of their own."""
        for text in texts:
            if text.reason is not None:
                self._outcomes[text.ordinal] = Rejection(text.reason, text.detail)
            elif text.text is None or not text.text.strip():
                empty = Reason.CAPTION_EMPTY if text.synthetic else Reason.TEXT_EMPTY
                self._outcomes[text.ordinal] = Rejection(empty.value)
            else:
                self.usable.append(text)

    def passing(self, texts: Iterable[Text], *cuts: Cut | None) -> list[Text]:
        """The texts that pass all cuts; human ones always do. The others are rejected by the first they fail."""
        passed = []
        for text in texts:
            asked = () if text.source == HUMAN else cuts
            failed = next((f for cut in asked if cut and (f := cut.rejection(text))), None)
            if failed is None:
                passed.append(text)
            else:
                self._outcomes[text.ordinal] = failed
        return passed

    def scored(self, texts: Iterable[Text]) -> list[Text]:
        """The texts that have a CLIP score, without which there is no place for them in a ranking."""
        found = []
        for text in texts:
            if text.clip is None or math.isnan(text.clip):
                self._outcomes[text.ordinal] = Rejection(Reason.TEXT_NOT_CHOSEN.value, NO_SCORE)
            else:
                found.append(text)
        return found

    def choose(self, ranked: Sequence[Text], top: int | None, others: str | None = None) -> Choice:
        """Keep the first `top` texts that differ from each other; `others` says why texts without a rank or a reason
        are not chosen."""
        kept: dict[str, int] = {}
        for text in ranked:
            assert text.text is not None
            key = same_text(text.text) if len(ranked) > 1 else ""
            if key in kept:
                outcome: int | Rejection = Rejection(Reason.TEXT_REPEATED.value, f"as text {kept[key]}")
            elif top is not None and len(kept) >= top:
                outcome = Rejection(Reason.TEXT_NOT_CHOSEN.value, f"not among the first {top}")
            else:
                outcome = len(kept)
                kept[key] = text.ordinal
            self._outcomes[text.ordinal] = outcome
        rest = Rejection(Reason.TEXT_NOT_CHOSEN.value, others)
        return Choice(tuple(self._outcomes.get(ordinal, rest) for ordinal in range(self._count)))


def _by(texts: Iterable[Text], score: Score) -> list[Text]:
    """Highest score first, texts without one last, equal ones by ordinal."""

    def key(text: Text) -> tuple[float, int]:
        value: float | None = getattr(text, score)
        return (math.inf if value is None or math.isnan(value) else -value, text.ordinal)

    return sorted(texts, key=key)


# -- the verdict ------------------------------------------------------------------------------------------------------


def mix_step(mix: Mix, itm: str | None = None, rules: Sequence[Verdict] = ()) -> Step:
    """The verdict that chooses among the texts of each pair, and drops pairs of which no text is kept
    (``text.none_kept``; the detail is what was against the best of the texts).

    Args:
        mix: The section of the config.
        itm: The condition ``keep.itm``; null asks nothing of ITM probabilities.
        rules: Verdicts over measures of the first text, such as `filters.threshold.text_verdicts` gives. They judge
            that text, when its source is web, and not the pair: synthetic texts may take its place.

    Raises:
        ConfigError: a condition cannot be read.
    """
    shared = any(isinstance(c, Share) for c in _conditions(mix, itm).values())
    return (MixTextsByShare if shared else MixTexts)(mix, itm, tuple(rules))


@dataclass(frozen=True)
class _Mixing:
    """What both verdicts share. ITM scores are read only where the recipe asks for them."""

    mix: Mix
    itm: str | None = None
    rules: tuple[Verdict, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Texts, their scores, and what the rules read."""
        columns = [fields.TEXTS, fields.CAPTIONS, fields.CLIP_SCORES, fields.CAPTION_CLIP_SCORES]
        if "itm" in _conditions(self.mix, self.itm):
            columns += [fields.ITM_SCORES, fields.CAPTION_ITM_SCORES]
        measured = chain.from_iterable(rule.reads for rule in self.rules)
        return tuple(dict.fromkeys([*(f.name for f in columns), *measured]))


@dataclass(frozen=True)
class MixTexts(_Mixing, Verdict):
    """Chooses among the texts of each pair by thresholds; see `mix_step`."""

    name = "mix"
    outcomes = (fields.TEXT_RANKS.name,)

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        cuts = {score: _cut(score, condition, ()) for score, condition in _conditions(self.mix, self.itm).items()}
        return _judge(rows, self.mix, self.rules, Limits(**cuts, top=self.mix.top))


@dataclass(frozen=True)
class MixTextsByShare(_Mixing, GlobalVerdict):
    """The same where a condition is a share of all live rows' web texts; see `mix_step`."""

    name = "mix"
    outcomes = (fields.TEXT_RANKS.name,)

    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows."""
        columns = {"itm": fields.ITM_SCORES.name, "clip": fields.CLIP_SCORES.name}
        cuts = {
            score: _cut(score, condition, _web_scores(live, columns[score]) if isinstance(condition, Share) else ())
            for score, condition in _conditions(self.mix, self.itm).items()
        }
        return _judge(live, self.mix, self.rules, Limits(**cuts, top=self.mix.top))


BLOCK = 16_384
"""Rows that are Python objects at a time."""


def _conditions(mix: Mix, itm: str | None) -> dict[Score, Comparison | Share]:
    """What the recipe asks of scores."""
    clip = mix.clip
    if clip is None and mix.recipe == "nguyen23":
        clip = "top 30%"
    asked: dict[Score, str | None] = {"itm": itm if mix.recipe in ASKS_ITM else None, "clip": clip}
    keys = {"itm": "keep.itm", "clip": "mix.clip"}
    return {score: parse_condition(text, keys[score]) for score, text in asked.items() if text is not None}


def _cut(score: Score, condition: Comparison | Share, web: Sequence[float]) -> Cut:
    """A condition as a cut; a share ends at a score of the web texts."""
    if isinstance(condition, Comparison):
        return Cut(score, condition.operator, condition.value)
    top = condition.side == "top"
    ordered = sorted(web, reverse=top)
    end = math.ceil(Fraction(condition.percent) / 100 * len(ordered))
    value = ordered[end - 1] if ordered else None
    return Cut(score, ">=" if top else "<=", value, f"{condition.side} {condition.percent}%")


def _web_scores(live: pa.Table, column: str) -> list[float]:
    """The scores of all web texts that have one."""
    found = []
    for rows in _blocks(live.select([fields.TEXTS.name, column])):
        for texts, scores in zip(*(c.to_pylist() for c in rows.columns), strict=True):
            for text, score in zip(texts or (), scores or (), strict=False):
                if text["source"] == WEB and score is not None and not math.isnan(score):
                    found.append(score)
    return found


def _blocks(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, BLOCK):
        yield rows.slice(start, BLOCK)


def _judge(rows: pa.Table, mix: Mix, rules: Sequence[Verdict], limits: Limits) -> Judgement:
    """Choose among the texts of each row."""
    recipe = RECIPES[mix.recipe]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    columns: dict[str, list[pa.Array]] = defaultdict(list)
    kinds = {"reason": pa.string(), "detail": pa.string()}
    kinds |= {"ranks": fields.TEXT_RANKS.type, "reasons": fields.TEXT_REASONS.type, "details": fields.TEXT_DETAILS.type}
    for block in _blocks(rows):
        found: dict[str, list[Any]] = {name: [] for name in kinds}
        for texts in _pairs(block, rules):
            outcomes = recipe(texts, limits).outcomes
            against = [None if isinstance(o, int) else o for o in outcomes]
            found["ranks"].append([o if isinstance(o, int) else None for o in outcomes])
            found["reasons"].append([r and r.reason for r in against])
            found["details"].append([r and r.detail for r in against])
            none_kept = all(against)
            found["reason"].append(Reason.TEXT_NONE_KEPT.value if none_kept else None)
            found["detail"].append(_best(texts, against, "itm" if limits.itm else "clip") if none_kept else None)
            for text, rejected in zip(texts, against, strict=True):
                counts[text.source][rejected.reason if rejected else KEPT] += 1
        for name, kind in kinds.items():
            columns[name].append(pa.array(found[name], kind))
    whole = {name: pa.chunked_array(columns[name], kind) for name, kind in kinds.items()}
    outcomes_of_texts = TextOutcomes(whole["ranks"], whole["reasons"], whole["details"], counts)
    return Judgement(whole["reason"], whole["detail"], texts=outcomes_of_texts)


def _pairs(rows: pa.Table, rules: Sequence[Verdict]) -> Iterator[list[Text]]:
    """The texts of each row."""

    def lists(f: pa.Field) -> list[list[Any] | None]:
        return rows.column(f.name).to_pylist() if f.name in rows.column_names else [None] * rows.num_rows

    given = (fields.TEXTS, fields.CLIP_SCORES, fields.ITM_SCORES)
    written = (fields.CAPTIONS, fields.CAPTION_CLIP_SCORES, fields.CAPTION_ITM_SCORES)
    broken = _broken(rows, rules)
    for first, *of_pair in zip(broken, *(lists(f) for f in (*given, *written)), strict=True):
        texts: list[Text] = []
        for values, clip, itm in (of_pair[:3], of_pair[3:]):
            for i, value in enumerate(values or ()):
                reason, detail = value.get("reason"), value.get("detail")
                if not texts and first and value["source"] == WEB:
                    reason, detail = first
                texts.append(
                    Text(len(texts), value["text"], value["source"], _at(clip, i), _at(itm, i), reason, detail)
                )
        yield texts


def _at(scores: Sequence[float | None] | None, position: int) -> float | None:
    return scores[position] if scores is not None and position < len(scores) else None


def _broken(rows: pa.Table, rules: Sequence[Verdict]) -> list[tuple[str, str | None] | None]:
    """The first rule that each row's first text breaks: reason and detail."""
    found: list[tuple[str, str | None] | None] = [None] * rows.num_rows
    for rule in rules:
        judged = rule.judge(rows)
        details = judged.detail.to_pylist() if judged.detail is not None else [None] * rows.num_rows
        for i, (reason, detail) in enumerate(zip(judged.reason.to_pylist(), details, strict=True)):
            if reason is not None and found[i] is None:
                found[i] = (reason, detail)
    return found


def _best(texts: Sequence[Text], against: Sequence[Rejection | None], score: Score) -> str:
    """What was against the text that came nearest, of those that the recipe considered: source, reason and detail."""
    if not texts:
        return "no text"
    said = {i: r for i, r in enumerate(against) if r is not None}
    considered = [t for t in texts if said[t.ordinal].reason != Reason.TEXT_NOT_CHOSEN.value]
    best = _by(considered or texts, score)[0]
    rejection = said[best.ordinal]
    told = f"{best.source}: {rejection.reason}"
    return f"{told}: {rejection.detail}" if rejection.detail else told
