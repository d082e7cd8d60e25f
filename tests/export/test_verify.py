"""Is an export whole? In Python and at the command."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import pairmill.cli
from pairmill.errors import ConfigError
from pairmill.export import VerifyReport, export_parquet, export_webdataset, verify_export
from tests.export.dataset import Built, Pair, build
from tests.export.folders import manifest

PAIRS = [Pair(n, n // 5, f"picture {n}") for n in range(12)]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("dataset") / "data"), PAIRS)


@pytest.fixture
def out(built, tmp_path) -> Path:
    export_webdataset(built.snapshot, str(tmp_path / "out"), pairs_per_shard=5)
    return tmp_path / "out"


def problems(report: VerifyReport) -> list[tuple[str, str]]:
    return [(problem.file, problem.wrong.value) for problem in report.problems]


def test_a_whole_one(built, out, tmp_path):
    report = verify_export(str(out))
    assert report.ok and (report.format, report.snapshot, report.pairs, report.files) == ("webdataset", 1, 12, 10)
    assert report.bytes == sum(path.stat().st_size for path in out.iterdir() if path.name != "manifest.json")
    export_parquet(built.snapshot, str(tmp_path / "table"))
    assert verify_export(str(tmp_path / "table")).ok
    export_webdataset(built.snapshot, "memory://verify/one")
    assert verify_export("memory://verify/one").ok


def test_every_file_is_looked_at(out):
    for path in sorted(out.iterdir()):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        wrong = "manifest" if path.name == "manifest.json" else "sha256"
        assert problems(verify_export(str(out))) == [(path.name, wrong)]
        path.write_bytes(before + b"\0")
        assert problems(verify_export(str(out))) == [(path.name, "manifest" if wrong == "manifest" else "size")]
        path.unlink()
        assert problems(verify_export(str(out))) == [(path.name, "manifest" if wrong == "manifest" else "missing")]
        path.write_bytes(before)
    assert verify_export(str(out)).ok


def test_surplus_files(out):
    (out / "notes.txt").write_text("mine")
    (out / "00007.tar").write_bytes(b"")
    (out / ".previous.json").write_text("{}")
    (out / "00001.tar.tmp").write_bytes(b"")
    (out / "more").mkdir()
    names = [".previous.json", "00001.tar.tmp", "00007.tar", "more", "notes.txt"]
    assert problems(verify_export(str(out))) == [(name, "surplus") for name in names]


def test_each_value_in_the_manifest_is_guarded(out):
    known = manifest(out)
    for name in known:
        damaged = {**known, name: 7}
        (out / "manifest.json").write_text(json.dumps(damaged))
        assert problems(verify_export(str(out))) == [("manifest.json", "manifest")], name
        (out / "manifest.json").write_text(json.dumps({k: v for k, v in known.items() if k != name}))
        assert problems(verify_export(str(out))) == [("manifest.json", "manifest")], name


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", '{"export": 3}', "[" * 100_000, "\x00\xff"])
def test_a_manifest_of_anything(out, text):
    (out / "manifest.json").write_bytes(text.encode("latin-1"))
    report = verify_export(str(out))
    assert problems(report) == [("manifest.json", "manifest")] and "damaged" in report.problems[0].detail


@pytest.mark.parametrize(
    ("left", "told"),
    [
        (".previous.json", "update"),
        (".takedown.json", "takedown"),
        (".export.json", "export is going on"),
        (None, "no export"),
    ],
)
def test_an_unfinished_one(out, left, told):
    (out / "manifest.json").unlink()
    if left:
        (out / left).write_text("{}")
    (found,) = verify_export(str(out)).problems
    assert told in found.detail


def test_what_it_should_be(built, out):
    right = {"dataset": built.dataset.url, "format": "webdataset", "where": None, "pairs_per_shard": 5, "snapshot": 1}
    assert verify_export(str(out), right).ok
    for name, value in right.items():
        (found,) = verify_export(str(out), {**right, name: "else"}).problems
        assert found.wrong.value == "other" and found.detail.startswith(f"{name} is {value!r}")


def test_no_folder_and_no_file_system(tmp_path):
    (found,) = verify_export(str(tmp_path / "nowhere")).problems
    assert found.detail == "there is no such folder"
    with pytest.raises(ConfigError, match="nosuch"):
        verify_export("nosuch://bucket/x")


# -- the command ------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys) -> Iterator[Callable[..., Result]]:
    """`pairmill export ...` in this process."""
    root = logging.getLogger()
    before = signal.getsignal(signal.SIGTERM), root.handlers[:], root.level

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["pairmill", "export", *arguments])
        with pytest.raises(SystemExit) as end:
            pairmill.cli.main()
        return Result(int(end.value.code or 0), *capsys.readouterr())

    yield run
    signal.signal(signal.SIGTERM, before[0])
    root.handlers, root.level = before[1:]
    logging.captureWarnings(False)


def test_the_command_verifies(built, out, command):
    done = command("--verify", "--out", str(out))
    assert done.code == 0 and done.out == (
        f"{out} is whole: 12 pairs of snapshot 1 as webdataset, 10 files, {verify_export(str(out)).bytes:,} bytes\n"
    )
    assert command(built.dataset.url, "--verify", "--out", str(out), "--format", "webdataset").code == 0
    other = command("/nowhere", "--verify", "--out", str(out))
    assert other.code == 1 and "dataset is" in other.out
    (out / "00001.tar").unlink()
    (out / "extra").write_text("")
    done = command("--verify", "--out", str(out))
    assert done.code == 1 and "Traceback" not in done.err
    assert done.out.splitlines()[:2] == ["00001.tar: it is not there", "extra: the manifest does not list it"]
    as_json = command("--verify", "--out", str(out), "--json")
    found = json.loads(as_json.out)
    assert as_json.code == 1 and found["ok"] is False
    assert [problem["wrong"] for problem in found["problems"]] == ["missing", "surplus"]


def test_the_command_writes_updates_and_mends(built, tmp_path, command):
    out = tmp_path / "out"
    made = command(built.dataset.url, "--format", "webdataset", "--out", str(out), "--pairs-per-shard", "5", "--json")
    assert made.code == 0 and json.loads(made.out)["new"] == ["00000.tar", "00001.tar", "00002.tar"]
    (out / "00001.tar").unlink()
    mended = command(built.dataset.url, "--format", "webdataset", "--out", str(out), "--pairs-per-shard", "5")
    assert mended.code == 0 and mended.out == "12 pairs in 3 files (1 written, 2 were there already)\n"
    assert command("--verify", "--out", str(out)).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "missing: DATASET and --format"),
        (["data", "--out", "x"], "missing: --format"),
        (["--format", "parquet", "--out", "x"], "missing: DATASET"),
        (["data", "--format", "parquet"], "--out"),
        (["--verify"], "--out"),
    ],
)
def test_what_is_missing_is_told(command, arguments, message):
    done = command(*arguments)
    assert done.code == 2 and message in done.err and done.out == ""
