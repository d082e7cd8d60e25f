from __future__ import annotations

import math
from fractions import Fraction

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.threshold import (
    Comparison,
    Intersection,
    Quantile,
    Share,
    Threshold,
    clip_verdicts,
    parse_condition,
    score_verdicts,
)
from pairmill.errors import ConfigError
from schemas.config import Keep
from schemas.reasons import Reason

SCORES = st.lists(st.one_of(st.none(), st.floats(-1, 1, width=32), st.just(float("nan"))), max_size=40)


def table(scores: list[float | None], start: int = 0) -> pa.Table:
    uids = [f"{start + i:04d}" for i in range(len(scores))]
    return pa.table({"uid": uids, "clip_score": pa.array(scores, pa.float32())})


def known(scores: list[float | None]) -> list[int]:
    return [i for i, s in enumerate(scores) if s is not None and not math.isnan(s)]


def clip_threshold(value: float, operator: str = ">=") -> Threshold:
    return Threshold("clip", "clip_score", operator, value, Reason.CLIP_BELOW_THRESHOLD)  # type: ignore[arg-type]


def kept(judgement_reasons: pa.Array) -> set[int]:
    return {i for i, reason in enumerate(judgement_reasons.to_pylist()) if reason is None}


@pytest.mark.parametrize(
    ("condition", "parsed"),
    [
        (">= 0.28", Comparison(">=", 0.28)),
        ("<3", Comparison("<", 3.0)),
        (" > -1.5 ", Comparison(">", -1.5)),
        ("<= .5", Comparison("<=", 0.5)),
        ("top 30%", Share("top", "30")),
        ("bottom 0.1 %", Share("bottom", "0.1")),
    ],
)
def test_conditions_are_parsed(condition: str, parsed: Comparison | Share) -> None:
    assert parse_condition(condition, "keep.clip_score") == parsed


@pytest.mark.parametrize("condition", ["0.28", "= 3", ">= 1.2.3", "top 0%", "top 101%", "middle 3%", ">= x", ">= ."])
def test_what_is_no_condition_is_refused_by_its_key(condition: str) -> None:
    with pytest.raises(ConfigError, match=r"keep\.itm"):
        parse_condition(condition, "keep.itm")


def test_a_dropped_row_tells_its_value() -> None:
    judged = clip_threshold(0.28).judge(table([0.3, 0.1234567, None, float("nan"), 0.28]))
    reason = Reason.CLIP_BELOW_THRESHOLD.value
    assert judged.reason.to_pylist() == [None, reason, reason, reason, None]
    assert judged.detail is not None
    assert judged.detail.to_pylist() == [None, "clip_score = 0.1235, not >= 0.28", "no score", "no score", None]


def test_values_are_compared_in_the_columns_type() -> None:
    assert kept(clip_threshold(0.7).judge(table([0.7])).reason) == {0}  # float32(0.7) is below 0.7
    words = pa.table({"words": pa.array([2, 3], pa.int32())})
    assert kept(Threshold("w", "words", ">=", 2.5, Reason.TEXT_TOO_FEW_WORDS).judge(words).reason) == {1}


@given(SCORES, st.floats(-1, 1), st.floats(-1, 1))
def test_a_higher_threshold_keeps_a_subset(scores: list[float | None], a: float, b: float) -> None:
    low, high = (kept(clip_threshold(value).judge(table(scores)).reason) for value in sorted((a, b)))
    assert high <= low <= set(known(scores))


@given(SCORES, st.floats(-1, 1))
def test_a_comparison_and_its_opposite_share_out_the_scored_rows(scores: list[float | None], value: float) -> None:
    at_least = kept(clip_threshold(value).judge(table(scores)).reason)
    below = kept(clip_threshold(value, "<").judge(table(scores)).reason)
    assert at_least | below == set(known(scores))
    assert not at_least & below


@given(SCORES, st.integers(1, 100), st.sampled_from(["top", "bottom"]))
def test_a_quantile_keeps_exactly_its_share_and_the_best(scores: list[float | None], percent: int, side: str) -> None:
    quantile = Quantile("q", "clip_score", side, str(percent), Reason.CLIP_BELOW_QUANTILE)  # type: ignore[arg-type]
    judged = quantile.judge(table(scores))
    stays, there = kept(judged.reason), known(scores)
    assert len(stays) == math.ceil(Fraction(percent, 100) * len(there))
    assert stays <= set(there)
    worse = [scores[i] for i in there if i not in stays]
    if stays and worse:
        if side == "top":
            assert min(scores[i] for i in stays) >= max(worse)  # type: ignore[type-var]
        else:
            assert max(scores[i] for i in stays) <= min(worse)  # type: ignore[type-var]


@given(st.lists(st.sampled_from([0.1, 0.2, None]), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_a_quantile_breaks_ties_by_uid_whatever_the_order(scores: list[float | None], random: object) -> None:
    quantile = Quantile("q", "clip_score", "top", "50", Reason.CLIP_BELOW_QUANTILE)
    rows = table(scores)
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = rows.take(pa.array(order))
    uids, again = ({t["uid"][i].as_py() for i in kept(quantile.judge(t).reason)} for t in (rows, shuffled))
    assert uids == again


def test_a_share_as_written_is_exact() -> None:
    quantile = Quantile("q", "clip_score", "top", "0.1", Reason.CLIP_BELOW_QUANTILE)
    assert len(kept(quantile.judge(table([i / 5000 for i in range(3000)])).reason)) == 3


def test_an_intersection_asks_each_part_about_all_rows() -> None:
    rows = table([0.9, 0.8, 0.2, 0.1])
    parts = (
        Quantile("low", "clip_score", "bottom", "75", Reason.CONCEPT_NOT_NEAR),
        Quantile("high", "clip_score", "top", "50", Reason.CLIP_BELOW_QUANTILE),
    )
    judged = Intersection("both", parts).judge(rows)
    below = Reason.CLIP_BELOW_QUANTILE
    assert judged.reason.to_pylist() == [Reason.CONCEPT_NOT_NEAR, None, below, below]
    assert judged.detail is not None
    assert judged.detail.to_pylist()[2] == "clip_score = 0.2, not in the top 50%"


def test_keep_names_the_clip_rule_and_further_scores() -> None:
    keep = Keep.model_validate({"clip_score": "top 30%", "aesthetic": ">= 5", "nsfw": "bottom 90%"})
    (clip,) = clip_verdicts(keep)
    assert clip == Quantile("keep_clip_score", "clip_score", "top", "30", Reason.CLIP_BELOW_QUANTILE)
    score = Reason.SCORE_BELOW_THRESHOLD
    assert score_verdicts(keep) == (
        Threshold("keep_aesthetic", "aesthetic", ">=", 5.0, score),
        Quantile("keep_nsfw", "nsfw", "bottom", "90", score),
    )
    assert clip_verdicts(Keep(clip_score=None)) == ()
    assert score_verdicts(Keep()) == ()
