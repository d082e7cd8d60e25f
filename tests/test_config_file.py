"""A wrong config is answered with one line a key: which key, what was expected, what was given."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pairmill.config_file import parse_config, read_config
from pairmill.errors import ConfigError
from schemas.config import RunConfig

GOOD: dict[str, Any] = {"dataset": "d", "source": [{"kind": "url_table", "path": "p"}]}


def complaint(data: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(RunConfig, data, "c.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == "c.yaml is wrong:"
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"datset": "x"}, ["datset: unknown key; did you mean 'dataset'?"]),
        ({"download": {"concurency": 3}}, ["download.concurency: unknown key; did you mean 'concurrency'?"]),
        (
            {"source": [{"kind": "url_table", "path": "p", "urll": "u"}]},
            ["source.0.urll: unknown key; did you mean 'url'?"],
        ),
        (
            {"source": [{"kind": "url_tabel", "path": "p"}]},
            [
                "source.0.kind: expected one of 'url_table', 'image_folder', 'webdataset', 'img2dataset_parquet'",
            ],
        ),
        ({"download": {"timeout_s": -1}}, ["download.timeout_s: expected a value greater than 0 (given: -1)"]),
        (
            {"keep": {"clip_score": "high"}},
            ["keep.clip_score: expected a condition such as '>= 0.28', '< 3' or 'top 30%' (given: 'high')"],
        ),
        (
            {"keep": {"clip_score": 0.3}},
            ["keep.clip_score: expected a condition such as '>= 0.28', '< 3' or 'top 30%' (given: 0.3)"],
        ),
        (
            {"keep": {"aesthetic": 5}},
            ["keep.aesthetic: expected a condition such as '>= 0.28', '< 3' or 'top 30%' (given: 5)"],
        ),
        ({"keep": {"min_sid": 3}}, ["keep.min_sid: unknown key; did you mean 'min_side'?"]),
        ({"keep": {"language": "en"}}, ["keep.language: expected a list (given: 'en')"]),
        ({"keep": None}, ["keep: expected keys and values (given: None)"]),
        ({"source": []}, ["source: expected at least 1 of them (given: [])"]),
        ({"engine": {"kind": "spark"}}, ["engine.kind: expected 'local', 'ray' or 'beam' (given: 'spark')"]),
        ({"models": {"clip": {}}}, ["models.clip: give either name (and pretrained) or path, or the word tiny"]),
        ({"models": {"batch": -1}}, ["models.batch: expected auto or a number greater than 0 (given: -1)"]),
        ({"models": {"batch": "many"}}, ["models.batch: expected auto or a number greater than 0 (given: 'many')"]),
        ({"shard_size": "many", "seed": "x"}, ["shard_size: ", "seed: "]),
    ],
)
def test_each_wrong_key_has_one_line(change: dict[str, Any], lines: list[str]):
    found = complaint({**GOOD, **change})
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(expected)


def test_an_unknown_key_without_a_near_one_lists_those_there_are():
    (line,) = complaint({**GOOD, "errors": {"zzz": 1}})
    assert line == "errors.zzz: unknown key; known: max_fraction, min_rows"


def test_a_missing_key_is_named():
    assert complaint({"dataset": "d"}) == ["source: missing"]


def test_broken_yaml_names_the_line(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("dataset: d\nsource: [1,\nkeep: }\n")
    with pytest.raises(ConfigError, match=r"c.yaml is not valid YAML: line 3, column 7"):
        read_config(RunConfig, str(path))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("common: &common {min_side: 9}\ndataset: d\nkeep:\n  <<: *common\n  min_side: 3\ndataset: e\n")
    with pytest.raises(ConfigError, match=r"line 6, column 1: the key 'dataset' stands there twice"):
        read_config(RunConfig, str(path))
    path.write_text("keep: &keep {min_side: 9}\ndataset: d\nsource: {kind: url_table, path: p}\n")
    assert read_config(RunConfig, str(path)).keep.min_side == 9


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_config(RunConfig, str(path))


def test_overrides_reach_into_sections_and_lists(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    config = read_config(RunConfig, str(path), ["source.0.url=link", "keep.min_side=9", "keep.clip_score=top 30%"])
    assert (config.source[0].url, config.keep.min_side, config.keep.clip_score) == ("link", 9, "top 30%")  # type: ignore[union-attr]


@pytest.mark.parametrize("condition", [">= 0.3", "> 0.3", ">0.3", "<= 0.3", "top 30%", '">= 0.3"'])
def test_an_override_takes_a_condition_as_it_stands(tmp_path: Path, condition: str):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    config = read_config(RunConfig, str(path), [f"keep.clip_score={condition}"])
    assert config.keep.clip_score == condition.strip('"')


@pytest.mark.parametrize("override", ["keep", "=3", "dataset.x=1", "source.4.url=x", "source.x=1", "seed=[1"])
def test_overrides_that_cannot_be_applied_are_quoted(tmp_path: Path, override: str):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(ConfigError) as caught:
        read_config(RunConfig, str(path), [override])
    assert repr(override) in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*RunConfig.model_fields, "other"]), VALUES, max_size=6))
def test_whatever_a_config_holds_it_is_read_or_explained(data: dict[str, Any]):
    with contextlib.suppress(ConfigError):  # any other exception is the failure
        assert isinstance(parse_config(RunConfig, data), RunConfig)
