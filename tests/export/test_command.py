"""`pairmill export` with the options of formats."""

from __future__ import annotations

import json
import re

import pytest

from pairmill.export import FORMATS
from pairmill.export.dialects import DIALECTS
from pairmill.instructions import KINDS
from tests.export.dataset import Built, Pair, build, instructed
from tests.export.test_verify import command  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), [instructed(Pair(n, n // 5)) for n in range(6)])


def test_formats_and_options_are_in_the_help(command):  # noqa: F811
    said = command("--help").out
    words = set(re.findall(r"[a-z0-9_-]+", said))
    assert {*FORMATS, *DIALECTS, *KINDS, "files", "shards", "none"} <= words
    for option in ("--images", "--kinds", "--boxes", "--where", "--pairs-per-shard"):
        assert option in said


def test_options_reach_the_export(built, tmp_path, command):  # noqa: F811
    out = str(tmp_path / "out")
    asked = (built.dataset.url, "--format", "llava", "--out", out)
    options = ("--kinds", "grounding, conversation", "--boxes", "shikra", "--images", "shards")
    made = command(*asked, *options, "--json")
    assert made.code == 0 and json.loads(made.out)["whole"] == ["llava.json"]
    found = json.loads((tmp_path / "out" / "llava.json").read_text())
    assert {r["id"].rpartition("-")[2] for r in found} == {"conversation", "grounding"}
    assert re.search(r"\[0\.\d{3},", found[0]["conversations"][1]["value"])
    assert command(*asked, *options).code == 0
    assert command(*asked, *options, "--verify").code == 0
    other = command("--verify", "--out", out, "--boxes", "llava", "--kinds", "detail", "--images", "files")
    assert other.code == 1 and len(re.findall(" instead of ", other.out)) == 3
    done = command(*asked)
    assert done.code == 2 and "kinds ['conversation', 'grounding'] instead of" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "llava", "--kinds", "talk"), "there is no 'talk'; choose from conversation, detail"),
        (("--format", "llava", "--boxes", "braille"), "choose from llava, shikra"),
        (("--format", "coco", "--kinds", "detail"), "coco have no such option"),
        (("--format", "nosuch"), "--format"),
        (("--format", "llava", "--images", "zip"), "--images"),
    ],
)
def test_what_there_is_not_is_told(built, tmp_path, command, arguments, message):  # noqa: F811
    done = command(built.dataset.url, "--out", str(tmp_path / "out"), *arguments)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
