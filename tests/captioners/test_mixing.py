"""Which texts a recipe keeps: the rules of each method, and laws that hold for all of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioners.mixing import (
    ASKS_ITM,
    RECIPES,
    Choice,
    Cut,
    Limits,
    MixTexts,
    MixTextsByShare,
    Text,
    mix_step,
    same_text,
)
from filters.threshold import text_verdicts
from pairmill.errors import ConfigError
from pairmill.stage import Judgement
from schemas import fields
from schemas.config import Keep, Mix
from schemas.reasons import Reason

ITM = Cut("itm", ">=", 0.5)
CLIP = Cut("clip", ">=", 0.3)


def texts(*given: tuple[Any, ...]) -> list[Text]:
    """Texts from (text, source, clip, itm)."""
    return [Text(i, *values) for i, values in enumerate(given)]


def told(choice: Choice) -> list[Any]:
    """Ranks and reasons."""
    return [o if isinstance(o, int) else o.reason for o in choice.outcomes]


def details(choice: Choice) -> list[str | None]:
    return [None if isinstance(o, int) else o.detail for o in choice.outcomes]


FIVE = texts(
    ("alt text", "web", 0.20, 0.12),
    ("a dog", "blip", 0.31, 0.60),
    ("a cat", "blip", 0.35, 0.55),
    ("a cow", "blip", 0.25, 0.90),
    ("a pig", "blip", 0.30, 0.49),
)


def test_capfilt_judges_each_text_on_its_own_and_ranks_captions_by_itm():
    choice = RECIPES["capfilt"](FIVE, Limits(itm=ITM))
    below = "itm.below_threshold"
    assert told(choice) == [below, 1, 2, 0, below]
    assert details(choice) == ["itm = 0.12, not >= 0.5", None, None, None, "itm = 0.49, not >= 0.5"]
    assert choice.kept == [3, 1, 2]
    both = RECIPES["capfilt"](FIVE, Limits(itm=ITM, clip=CLIP))
    assert told(both) == [below, 0, 1, "clip.below_threshold", below]
    assert details(both)[3] == "clip = 0.25, not >= 0.3"


def test_capfilt_puts_a_web_text_that_passes_first_and_trusts_human_ones():
    pair = texts(("true", "web", 0.2, 0.5), ("a dog", "blip", 0.3, 0.9), ("checked", "human", None, 0.0))
    assert told(RECIPES["capfilt"](pair, Limits(itm=ITM, clip=Cut("clip", ">=", 0.1)))) == [1, 2, 0]


def test_without_itm_captions_rank_by_clip():
    assert told(RECIPES["capfilt"](FIVE, Limits())) == [0, 2, 1, 4, 3]


def test_blip2_keeps_the_best_two_of_all_texts():
    choice = RECIPES["blip2"](FIVE, Limits())
    no = "text.not_chosen"
    assert told(choice) == [no, 1, 0, no, no] and details(choice)[0] == "not among the first 2"
    assert RECIPES["blip2"](FIVE, Limits(top=3)).kept == [2, 1, 4]
    best = [dataclasses.replace(FIVE[0], clip=0.4), *FIVE[1:]]
    assert RECIPES["blip2"](best, Limits()).kept == [0, 2]
    assert told(RECIPES["blip2"](FIVE, Limits(clip=CLIP, top=9)))[0] == "clip.below_threshold"


def test_laion_coco_keeps_the_best_caption():
    choice = RECIPES["laion_coco"]([dataclasses.replace(FIVE[0], clip=0.9), *FIVE[1:]], Limits())
    assert choice.kept == [2] and told(choice)[0] == "text.not_chosen"


def test_nguyen23_keeps_a_good_web_text_or_else_the_first_caption_by_the_same_cut():
    nguyen23, no = RECIPES["nguyen23"], "text.not_chosen"
    good = [dataclasses.replace(FIVE[0], clip=0.3), *FIVE[1:]]
    assert told(nguyen23(good, Limits(clip=CLIP))) == [0, no, no, no, no]
    choice = nguyen23(FIVE, Limits(clip=CLIP))
    assert told(choice) == ["clip.below_threshold", 0, no, no, no]
    assert details(choice)[2] == "not the first synthetic text"
    bad = [FIVE[0], dataclasses.replace(FIVE[1], clip=0.29), *FIVE[2:]]
    assert nguyen23(bad, Limits(clip=CLIP)).kept == [], "a second caption is no way round the cut"
    failed = [FIVE[0], Text(1, None, "blip", reason="caption.empty"), *FIVE[2:]]
    assert told(nguyen23(failed, Limits(clip=CLIP))) == ["clip.below_threshold", "caption.empty", 0, no, no]
    share = nguyen23(FIVE, Limits(clip=Cut("clip", ">=", 0.3141, "top 30%")))
    assert told(share)[0] == "clip.below_quantile" and details(share)[0] == "clip = 0.2, not >= 0.3141 (top 30%)"


def test_recap_puts_the_synthetic_text_before_those_that_came_with_the_pair():
    pair = texts(("alt", "web", 0.1, 0.1), ("checked", "human", 0.1, 0.1), ("long one", "vlm", 0.2, 0.2), ("b", "vlm"))
    assert told(RECIPES["recap"](pair, Limits())) == [1, 2, 0, "text.not_chosen"]
    assert RECIPES["recap"](pair[:2], Limits()).kept == [0, 1]
    assert RECIPES["recap"](pair, Limits(top=1)).kept == [2]


def test_one_side_only():
    pair = texts(("alt", "web", 0.4, 0.8), ("a", "blip", 0.4, 0.6), ("b", "blip", 0.4, 0.7), ("c", "blip", 0.4, 0.1))
    no = "text.not_chosen"
    assert told(RECIPES["web_only"](pair, Limits(itm=ITM))) == [0, no, no, no]
    assert told(RECIPES["synthetic_only"](pair, Limits(itm=ITM))) == [no, 1, 0, "itm.below_threshold"]
    false = [dataclasses.replace(pair[0], itm=0.2), *pair[1:]]
    assert RECIPES["web_only"](false, Limits(itm=ITM)).kept == []
    assert RECIPES["web_only"](false, Limits()).kept == [0]


def test_a_repetition_makes_room_for_the_next_text():
    pair = texts(
        ("A red  circle.", "web", 0.5, 0.9), ("a red circle", "blip", 0.4, 0.8), ("“A RED—circle”", "blip", 0.3, 0.7),
        ("a ball", "blip", 0.2, 0.6),
    )  # fmt: skip
    choice = RECIPES["blip2"](pair, Limits())
    assert told(choice) == [0, "text.repeated", "text.repeated", 1] and details(choice)[2] == "as text 0"
    assert same_text("!!!") == same_text(" !!! ") != same_text("???")


@pytest.mark.parametrize("score", [None, math.nan])
def test_a_text_without_its_score_is_not_kept(score: float | None):
    pair = texts(("alt", "web", score, score))
    assert details(RECIPES["capfilt"](pair, Limits(itm=ITM))) == ["no score"]
    assert details(RECIPES["blip2"](pair, Limits())) == ["no score"]
    assert details(RECIPES["nguyen23"](pair, Limits(clip=CLIP))) == ["no score"]


def test_empty_texts_say_so():
    pair = texts((None, "web", 0.5, 0.9), ("  ", "blip", 0.5, 0.9))
    assert told(RECIPES["capfilt"](pair, Limits(itm=ITM))) == ["text.empty", "caption.empty"]


# -- laws -------------------------------------------------------------------------------------------------------------

SCORES = st.sampled_from([None, math.nan, 0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)


@st.composite
def pairs(draw: Any, failures: bool = True) -> list[Text]:
    words = st.sampled_from(
        ["a dog", "A dog!", "a cat", "a cow", "two pigs", " ", None] if failures else ["a", "b", "c"]
    )
    sources = draw(st.lists(st.sampled_from(["web", "human"]), max_size=3)) + draw(
        st.lists(st.sampled_from(["blip", "vlm"]), max_size=5)
    )
    reasons = st.sampled_from([None, None, None, "text.language"] if failures else [None])
    return [
        Text(i, draw(words), source, draw(SCORES), draw(SCORES), draw(reasons), None)
        for i, source in enumerate(sources)
    ]


CUTS = st.none() | st.floats(0, 1, width=32)
TOPS = st.none() | st.integers(1, 4)


def limits(itm: float | None, clip: float | None, top: int | None) -> Limits:
    asked = [None if value is None else Cut(score, ">=", value) for score, value in (("itm", itm), ("clip", clip))]  # type: ignore[arg-type]
    return Limits(*asked, top)


@given(pairs(), st.sampled_from(sorted(RECIPES)), CUTS, CUTS, TOPS)
def test_each_text_has_a_rank_or_a_reason_and_ranks_count_from_0(pair, name, itm, clip, top):
    choice = RECIPES[name](pair, limits(itm, clip, top))
    assert len(choice.outcomes) == len(pair)
    ranks = [o for o in choice.outcomes if isinstance(o, int)]
    assert sorted(ranks) == list(range(len(ranks))) and len(ranks) <= (top or len(pair))
    published = {"blip2": 2, "laion_coco": 1, "nguyen23": 1}
    assert len(ranks) <= (top or published.get(name, len(pair)))
    reasons = {r.value for r in Reason}
    for text, outcome in zip(pair, choice.outcomes, strict=True):
        assert isinstance(outcome, int) or outcome.reason in reasons
        if text.reason or not (text.text or "").strip():
            assert not isinstance(outcome, int)
    said = [same_text(pair[i].text) for i in choice.kept]
    assert len(set(said)) == len(said)


@given(pairs(), st.sampled_from(sorted(RECIPES)), CUTS, CUTS, TOPS)
def test_choosing_among_the_kept_texts_keeps_them_all_in_their_order(pair, name, itm, clip, top):
    bounds = limits(itm, clip, top)
    kept = [pair[i] for i in RECIPES[name](pair, bounds).kept]
    again = [dataclasses.replace(t, ordinal=i) for i, t in enumerate(sorted(kept, key=lambda t: t.ordinal))]
    chosen = [again[i] for i in RECIPES[name](again, bounds).kept]
    assert [dataclasses.replace(t, ordinal=0) for t in chosen] == [dataclasses.replace(t, ordinal=0) for t in kept]


@given(pairs(), SCORES.filter(lambda v: v is not None and v == v), SCORES.filter(lambda v: v is not None and v == v))
def test_a_higher_threshold_never_adds_a_text(pair, one, other):
    def kept(threshold: float) -> set[str]:
        chosen = RECIPES["capfilt"](pair, limits(threshold, None, None)).kept
        return {same_text(pair[i].text) for i in chosen}

    low, high = sorted((one, other))
    assert kept(high) <= kept(low)


@given(pairs(failures=False), st.sampled_from(["capfilt", "blip2", "laion_coco", "synthetic_only"]))
def test_equal_scores_keep_the_order_of_the_texts(pair, name):
    level = [dataclasses.replace(t, clip=0.5, itm=0.5) for t in pair]
    kept = RECIPES[name](level, Limits(itm=Cut("itm", ">=", 0.5), top=9)).kept
    synthetic = [i for i in kept if level[i].synthetic]
    assert synthetic == sorted(synthetic)


# -- the verdict ------------------------------------------------------------------------------------------------------


def rows(*pairs: list[Text], stats: dict[str, Any] | None = None) -> pa.Table:
    """Pairs as their stored columns; the first texts that are web or human are those that came with the pair."""
    split = [([t for t in p if not t.synthetic], [t for t in p if t.synthetic]) for p in pairs]

    def scores(side: int, name: str) -> list[list[float | None]]:
        return [[getattr(t, name) for t in s[side]] for s in split]

    given_, written = (
        [[{"text": t.text, "source": t.source, "reason": t.reason, "detail": t.detail} for t in s[side]] for s in split]
        for side in (0, 1)
    )
    columns = {
        fields.TEXTS: [[{"text": t["text"], "source": t["source"]} for t in row] for row in given_],
        fields.CAPTIONS: written,
        fields.CLIP_SCORES: scores(0, "clip"),
        fields.CAPTION_CLIP_SCORES: scores(1, "clip"),
        fields.ITM_SCORES: scores(0, "itm"),
        fields.CAPTION_ITM_SCORES: scores(1, "itm"),
    }
    table = pa.table({f.name: pa.array(values, f.type) for f, values in columns.items()})
    for name, values in (stats or {}).items():
        table = table.append_column(getattr(fields, name.upper()), pa.array(values, getattr(fields, name.upper()).type))
    return table.append_column(fields.UID, pa.array([f"{i:04d}" for i in range(len(pairs))], pa.string()))


def judged(mix: Mix, table: pa.Table, rules: Any = (), itm: str | None = ">= 0.5") -> Judgement:
    step = mix_step(mix, itm, rules)
    assert isinstance(step, (MixTexts, MixTextsByShare))
    return step.judge(table.select(["uid", *step.reads]))


def test_a_pair_without_a_kept_text_is_dropped_with_what_was_against_the_best():
    pair = texts(("alt", "web", 0.1, 0.12), ("a dog", "blip", 0.2, 0.41))
    found = judged(Mix(), rows(FIVE, pair, []))
    assert found.reason.to_pylist() == [None, "text.none_kept", "text.none_kept"]
    assert found.detail.to_pylist() == [None, "blip: itm.below_threshold: itm = 0.41, not >= 0.5", "no text"]
    assert found.texts.ranks.to_pylist() == [[None, 1, 2, 0, None], [None, None], []]
    assert found.texts.counts == {
        "web": {"itm.below_threshold": 2},
        "blip": {"kept": 3, "itm.below_threshold": 2},
    }


def test_what_was_not_considered_is_not_the_best_text():
    pair = texts(("alt", "web", 0.10, 0.9), ("a dog", "blip", 0.28, 0.9), ("a cat", "blip", 0.9, 0.9))
    found = judged(Mix(recipe="nguyen23", clip=">= 0.3"), rows(pair))
    assert found.detail.to_pylist() == ["blip: clip.below_threshold: clip = 0.28, not >= 0.3"]
    found = judged(Mix(recipe="laion_coco"), rows(pair[:1]))
    assert found.detail.to_pylist() == ["web: text.not_chosen: laion_coco keeps synthetic texts only"]


def test_rules_over_texts_judge_the_web_text_and_not_the_pair():
    keep = Keep(min_words=2, boilerplate=True, language=None, max_repetition=None, min_chars=None, max_chars=None)
    web = texts(("alt", "web", 0.5, 0.9), ("a dog", "blip", 0.2, 0.8))
    human = texts(("alt", "human", 0.5, 0.9), ("a dog", "blip", 0.2, 0.8))
    alone = texts(("alt", "web", 0.5, 0.9))
    table = rows(web, human, alone, stats={"words": [1, 1, 1], "chars": [3, 3, 3]})
    found = judged(Mix(), table, text_verdicts(keep))
    assert found.texts.ranks.to_pylist() == [[None, 0], [0, 1], [None]]
    assert found.texts.reasons.to_pylist()[0] == ["text.too_few_words", None]
    assert found.texts.details.to_pylist()[0] == ["words = 1, not >= 2", None]
    assert found.detail.to_pylist()[2] == "web: text.too_few_words: words = 1, not >= 2"


def test_a_share_ends_at_a_score_of_the_web_texts_which_then_holds_for_all():
    many = [texts((f"alt {i}", "web", i / 100, 0.9), (f"a dog {i}", "blip", 0.07, 0.9)) for i in range(10)]
    curated = texts(("checked", "human", 0.99, 0.9))
    found = judged(Mix(recipe="nguyen23"), rows(*many, curated))
    # the top 30% of ten web scores, 0.00 to 0.09, end at 0.07; captions have 0.07
    assert found.texts.ranks.to_pylist() == [*([[None, 0]] * 7), *([[0, None]] * 3), [0]]
    assert found.texts.reasons.to_pylist()[0] == ["clip.below_quantile", None]
    tight = judged(Mix(recipe="nguyen23", clip="top 20%"), rows(*many))
    assert tight.reason.to_pylist() == ["text.none_kept"] * 8 + [None] * 2
    itm = judged(Mix(recipe="capfilt"), rows(*many), itm="bottom 10%")
    assert itm.reason.to_pylist() == [None] * 10, "equal scores are on the same side"


def test_a_share_without_web_texts_keeps_none():
    found = judged(Mix(recipe="nguyen23"), rows(texts(("a dog", "blip", 0.5, 0.9))))
    assert found.reason.to_pylist() == ["text.none_kept"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_itm_is_read_where_it_is_asked(name: str):
    reads = mix_step(Mix(recipe=name), ">= 0.5").reads
    assert ("itm_scores" in reads) is (name in ASKS_ITM)
    assert "itm_scores" not in mix_step(Mix(recipe=name)).reads


def test_nothing_is_judged_as_nothing():
    for mix in (Mix(), Mix(clip="top 30%")):
        found = judged(mix, rows())
        assert len(found.reason) == 0 and found.texts.ranks.type == fields.TEXT_RANKS.type


def test_a_wrong_condition_names_its_key():
    with pytest.raises(ConfigError, match=r"mix\.clip: 'top 0%'"):
        mix_step(Mix(clip="top 0%"))


@given(st.lists(pairs(), max_size=6), st.sampled_from(sorted(RECIPES)), st.sampled_from([None, ">= 0.5", "top 50%"]))
def test_counts_are_those_of_the_lists(found, name, clip):
    answer = judged(Mix(recipe=name, clip=clip), rows(*found))
    flat = [r for row in answer.texts.reasons.to_pylist() for r in row]
    counted = {r: sum(c[r] for c in answer.texts.counts.values()) for c in answer.texts.counts.values() for r in c}
    assert counted == {r or "kept": flat.count(r) for r in set(flat)}
    assert sum(r is None for r in answer.reason.to_pylist()) <= counted.get("kept", 0)
