"""What is wrong with a recipe is said before anything runs, with the names of the step and the column."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from pairmill.errors import PlanError
from pairmill.plan import Recipe, compile_plan
from pairmill.stage import Resources
from schemas import fields
from tests.steps import AtLeast, CountChars, CountWords, RankChars, SameText


def compiled(*steps: object):
    return compile_plan(Recipe("test", steps))  # type: ignore[arg-type]


def test_unknown_column_names_verdict_and_column_and_the_near_miss():
    @dataclass(frozen=True)
    class Typo(AtLeast):
        reads = ("wrods",)

    with pytest.raises(PlanError, match=r"verdict 'at_least' reads the unknown column 'wrods'; did you mean 'words'"):
        compiled(CountWords(), Typo(3))


def test_input_written_only_later_says_where_to_move_it():
    with pytest.raises(PlanError, match=r"'at_least' reads 'words', but stage 'words' that writes it comes later"):
        compiled(AtLeast(3), CountWords())


def test_two_writers_of_a_column_are_both_named():
    @dataclass(frozen=True)
    class Other(CountWords):
        name = "other"

    with pytest.raises(PlanError, match=r"column 'words' has two writers: stage 'words' and stage 'other'"):
        compiled(CountWords(), Other())


def test_a_stage_cannot_write_a_column_of_the_pairs():
    @dataclass(frozen=True)
    class Renames(CountWords):
        writes = (fields.TEXT,)

    with pytest.raises(PlanError, match=r"stage 'words' writes 'text', which belongs to the pairs table"):
        compiled(Renames())


def test_a_verdict_cannot_read_pixels():
    @dataclass(frozen=True)
    class Images(CountWords):
        name = "images"
        writes = (fields.IMAGE,)

    @dataclass(frozen=True)
    class Looks(AtLeast):
        reads = ("image",)

    with pytest.raises(PlanError, match=r"'at_least' reads 'image'; only map stages see pixels"):
        compiled(Images(), Looks(3))


def test_an_empty_recipe_is_refused():
    with pytest.raises(PlanError, match="has no steps"):
        compiled()


def test_segments_are_cut_at_global_steps_and_groups_at_unequal_resources():
    plan = compiled(CountWords(), AtLeast(3), CountChars(), SameText(), RankChars())
    assert [segment.title for segment in plan.segments] == ["words > chars", "same_text", "rank"]
    assert [[s.name for s in g.steps] for g in plan.segments[0].groups] == [["words", "at_least"], ["chars"]]
    fused = compiled(CountWords(), AtLeast(3), CountChars(resources=Resources(rows=64, actor=True)))
    assert [g.title for g in fused.segments[0].groups] == ["words+chars"]
    assert fused.segments[0].groups[0].resources.actor


def test_fingerprints_follow_parameters_and_inputs_and_nothing_else():
    def tables(*steps: object) -> dict[str, str]:
        return {s.name: s.table for s in compiled(*steps).steps if s.table}

    base = tables(CountWords(), AtLeast(3), CountChars())
    assert tables(CountWords(), AtLeast(7), CountChars()) == base, "a threshold is no part of what was measured"
    assert tables(CountWords(resources=Resources(rows=7)), AtLeast(3), CountChars()) == base
    assert tables(CountWords(log="elsewhere"), AtLeast(3), CountChars()) == base

    scaled = tables(CountWords(), AtLeast(3), CountChars(scale=2))
    assert scaled["words"] == base["words"] and scaled["chars"] != base["chars"]

    @dataclass(frozen=True)
    class CountWords2(CountWords):
        version = 2

    newer = tables(CountWords2(), AtLeast(3), CountChars())
    assert newer["words"] != base["words"] and newer["chars"] != base["chars"], "chars reads words"
    assert replace(CountChars(), scale=1) == CountChars()
