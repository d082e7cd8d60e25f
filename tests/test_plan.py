"""What is wrong with a recipe is said before anything runs, with the names of the step and the column."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from pairmill.errors import ConfigError, PlanError
from pairmill.plan import Recipe, compile_plan, placed
from pairmill.stage import Resources
from schemas import fields
from schemas.config import Placement
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
    model = CountChars(resources=Resources(rows=64, actor=True, gpu_if_any=True))
    (group,) = compiled(CountWords(), AtLeast(3), model).segments[0].groups
    assert group.resources.gpu_if_any, "rules of images share a worker with the model, and what was decoded"


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


def test_a_config_places_stages_and_changes_no_fingerprint():
    recipe = Recipe("test", (CountWords(resources=Resources()), AtLeast(3), CountChars(resources=Resources())))
    placement = Placement(gpus=0.5, resources={"fetcher": 1}, labels={"pool": "gpu"}, min_workers=1, max_workers=4)
    moved = compile_plan(placed(recipe, {"chars": placement}))
    still = compile_plan(recipe)
    assert [s.fingerprint for s in moved.steps] == [s.fingerprint for s in still.steps]
    assert [g.title for g in still.segments[0].groups] == ["words+chars"]
    words, chars = moved.segments[0].groups
    assert (words.title, words.resources.gpus) == ("words", 0)
    assert (chars.resources.gpus, chars.resources.custom) == (0.5, (("fetcher", 1.0),))
    assert (chars.resources.labels, chars.resources.max_workers) == ((("pool", "gpu"),), 4)


def test_gpus_said_in_the_config_replace_the_one_that_is_taken_where_there_are_some():
    wanted = Resources(gpu_if_any=True, actor=True)
    assert wanted.placed(Placement(cpus=2)).gpu_if_any
    assert not wanted.placed(Placement(gpus=0)).gpu_if_any


def test_a_placement_of_an_unknown_stage_names_the_near_one():
    recipe = Recipe("test", (CountWords(), AtLeast(3), CountChars()))
    with pytest.raises(ConfigError, match=r"no stage 'char' that is placed; did you mean 'chars'"):
        placed(recipe, {"char": Placement()})


def test_a_placement_has_no_more_workers_at_least_than_at_most():
    with pytest.raises(ValueError, match=r"min_workers \(3\) is above max_workers \(2\)"):
        Placement(min_workers=3, max_workers=2)
    with pytest.raises(ValueError, match=r"1\.5 is neither a part of one GPU nor a whole number"):
        Placement(gpus=1.5)
    with pytest.raises(ValueError, match="GPU is no custom resource; say gpus: 1"):
        Placement(resources={"fetcher": 1, "GPU": 1})
    assert Placement(gpus=2, resources={"fetcher": 1}).gpus == 2
