"""What holds for every format: same bytes, updates in place, verify, takedowns, and what cannot be chosen."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairmill.commands.export import ExportFormat, ImagePlace
from pairmill.errors import ConfigError
from pairmill.export import FORMATS, ExportReport, Options, export, holds_pairs, remove_pairs, verify_export
from pairmill.export.folder import Folder
from pairmill.export.manifest import WHOLE_FILES
from pairmill.store import Snapshot
from tests.export.dataset import INSTRUCT_TABLE, Built, Pair, build, instructed
from tests.export.folders import assert_true, changed, data, files, forget, from_scratch, manifest, stamps

ENDINGS = ("jpeg", "png", "webp")


class Case(NamedTuple):
    format: str
    options: Options = Options()


CASES = [
    *(Case(name) for name in FORMATS),
    Case("webdataset", Options(kinds=("conversation", "grounding"), boxes="llava")),
    Case("parquet", Options(kinds=("detail",))),
    Case("llava", Options(images="shards", kinds=("grounding",), boxes="shikra")),
    Case("llava", Options(images="none", boxes="kosmos2")),
    Case("minigpt4", Options(images="shards")),
]
EVERY = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([c.format, *map(str, c.options.stated().values())]).replace(" ", "")
)
BEFORE = [
    instructed(
        Pair(
            n,
            n // 5,
            f"picture {n:04d}.",
            ("a second text",) * (n % 2),
            (("thing", 2, 4, 20, 30),),
            format=ENDINGS[n % 3],
            size=(32, 24 + n % 2 * 16),
        )
    )
    for n in range(13)
]
AFTER = [changed(p, reason="text.language") if p.number == 10 else p for p in BEFORE] + [
    instructed(Pair(n, 3, f"picture {n:04d}.")) for n in range(13, 16)
]
"""Snapshot 2: a pair of the second group dropped, a shard more, which is a group of its own."""
GONE = [BEFORE[0], BEFORE[2], BEFORE[12]]
"""Two of the first group, one of the second."""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    url = str(tmp_path_factory.mktemp("dataset") / "data")
    build(url, BEFORE)
    return build(url, AFTER)


def write(snapshot: Snapshot, out: Path, case: Case) -> ExportReport:
    return export(snapshot, str(out), case.format, pairs_per_shard=10, options=case.options)


@pytest.fixture(scope="module")
def first(built, tmp_path_factory) -> Callable[[Case, Path], ExportReport]:
    """Copies an export of the first snapshot to a folder."""
    folder = tmp_path_factory.mktemp("exports")
    reports: dict[Case, ExportReport] = {}

    def copy(case: Case, out: Path) -> ExportReport:
        of = folder / str(CASES.index(case))
        if case not in reports:
            reports[case] = write(built.dataset.snapshot(1), of, case)
        shutil.copytree(of, out)
        return reports[case]

    return copy


def traces(out: Path, pairs: list[Pair]) -> list[tuple[str, str]]:
    """Where bytes of pairs are: in files as they are, in decoded columns, and in names."""
    found = []
    for name in files(out):
        raw = (out / name).read_bytes()
        decoded = repr(pq.read_table(out / name).to_pylist()).encode() if name.endswith(".parquet") else b""
        for pair in pairs:
            for trace in (pair.uid.encode(), pair.url.encode(), pair.mark.encode(), pair.image, pair.text.encode()):
                if trace in raw or trace in decoded or repr(trace).encode() in decoded or trace in name.encode():
                    found.append((name, trace[:80].decode("latin-1")))
    return found


def test_the_command_names_every_format():
    assert [f.value for f in ExportFormat] == list(FORMATS)
    assert {place.value for place in ImagePlace} == {"files", "shards", "none"}
    assert all(re.fullmatch(r"[a-zA-Z0-9_]+\.(json|md)", name) for name in WHOLE_FILES)
    assert all(name == kind.name and kind.ending.startswith(".") for name, kind in FORMATS.items())


@EVERY
def test_it_is_whole_and_an_update_is_as_if_written_from_scratch(built, first, tmp_path, case):
    out = tmp_path / "out"
    report = first(case, out)
    assert report.samples > 5 and report.written == 2 and set(report.whole) <= files(out)
    assert_true(out)
    assert verify_export(str(out), {"format": case.format, "snapshot": 1}).ok
    before = stamps(out)
    report = write(built.dataset.snapshot(2), out, case)
    assert (report.written, report.unchanged, len(report.new)) == (2, 1, 1)
    assert all(stamps(out)[name] == before[name] for name in before if re.match(r"(images/)?00000", name))
    assert_true(out)
    assert data(from_scratch(built.dataset.snapshot(2), out, tmp_path / "new")) == data(out)


@EVERY
def test_a_takedown_leaves_no_byte(built, first, tmp_path, case):
    out, uids = tmp_path / "out", [pair.uid for pair in GONE]
    first(case, out)
    held = {pair.uid for pair in GONE if traces(out, [pair])}
    assert held and set(holds_pairs(str(out), uids).files) == held
    told = remove_pairs(str(out), uids, dry_run=True)
    removal = remove_pairs(str(out), uids, dataset=built.dataset.url)
    assert removal == told and removal.complete
    assert (set(removal.uids), removal.samples) == (held, len(held))
    assert traces(out, GONE) == []
    assert_true(out)
    assert verify_export(str(out)).ok
    assert holds_pairs(str(out), uids).files == {}
    left = stamps(out)
    assert remove_pairs(str(out), uids).samples == 0 and stamps(out) == left
    rest = [pair for pair in BEFORE if pair not in GONE and traces(out, [pair])]
    assert len(rest) == manifest(out)["pairs"] > 3


@pytest.mark.parametrize("case", [Case("llava"), Case("qwen-vl", Options(images="shards"))], ids=["files", "shards"])
def test_an_unfinished_export_keeps_nothing_either(tmp_path, case, monkeypatch):
    built, out, uids = build(str(tmp_path / "data"), BEFORE), tmp_path / "out", [pair.uid for pair in GONE]
    plain = Folder.create

    def failing(self, name, **more):
        if name == "manifest.json":
            raise KeyboardInterrupt
        return plain(self, name, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "create", failing)
        with pytest.raises(KeyboardInterrupt):
            write(built.snapshot, out, case)
    assert traces(out, GONE)
    removal = remove_pairs(str(out), uids)
    assert removal.complete and not removal.rewritten
    assert traces(out, GONE) == []
    after = forget(built, set(uids))
    write(after, out, case)
    assert traces(out, GONE) == []
    assert_true(out)


# -- what can be chosen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
def test_options_that_it_does_not_take_are_refused(built, tmp_path, name):
    defaults = FORMATS[name].defaults
    values = {"images": "shards", "kinds": ("conversation",), "boxes": "shikra"}
    for option, value in values.items():
        if getattr(defaults, option) is None:
            with pytest.raises(ConfigError, match=f"{option}: exports as {name} have no such option"):
                export(built.snapshot, str(tmp_path / "out"), name, options=Options(**{option: value}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nosuch", Options(), "choose from webdataset"),
        ("llava", Options(images="zip"), "images: there is no 'zip'; choose from files, shards, none"),
        ("llava", Options(kinds=("talk",)), "kinds: there is no 'talk'"),
        ("llava", Options(boxes="braille"), "boxes: there is no 'braille'; choose from llava"),
        ("llava", Options(boxes="plain", kinds=("grounding",)), "writes no boxes"),
        ("minigpt4", Options(kinds=("detail", "complex")), "detail alone, not complex"),
    ],
)
def test_what_there_is_not_is_told(built, tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        export(built.snapshot, str(tmp_path / "out"), name, options=options)
    assert not (tmp_path / "out").exists()


def test_other_options_make_another_export(built, tmp_path):
    out = tmp_path / "out"
    write(built.snapshot, out, Case("llava", Options(kinds=("complex", "detail"))))
    before = data(out)
    assert manifest(out)["export"]["options"] == {"images": "files", "kinds": ["detail", "complex"], "boxes": "llava"}
    with pytest.raises(ConfigError, match=r"kinds \['detail', 'complex'\] instead of \['detail'\]"):
        write(built.snapshot, out, Case("llava", Options(kinds=("detail",))))
    with pytest.raises(ConfigError, match="images 'files' instead of 'none'"):
        write(built.snapshot, out, Case("llava", Options(kinds=("detail", "complex"), images="none")))
    assert data(out) == before
    write(built.snapshot, out, Case("llava", Options(kinds=("detail", "complex"), images="files")))
    assert data(out) == before
    assert not verify_export(str(out), {"boxes": "shikra"}).ok and verify_export(str(out), {"boxes": "llava"}).ok


def test_a_dataset_without_conversations_is_told_what_to_do(tmp_path):
    built = build(str(tmp_path / "data"), [Pair(0, 0)])
    with pytest.raises(ConfigError, match=r"instruct: \{kinds:"):
        export(built.snapshot, str(tmp_path / "out"), "llava")
    assert not (tmp_path / "out").exists()


def test_a_conversation_that_changes_changes_its_group_alone(tmp_path):
    built, out = build(str(tmp_path / "data"), BEFORE), tmp_path / "out"
    write(built.snapshot, out, Case("llava"))
    before, pair = stamps(out), BEFORE[6]
    other = instructed(changed(pair, number=77)).instructions
    rewrite(built, INSTRUCT_TABLE, pair, {"instructions": [i.to_row() for i in other]})
    report = write(built.snapshot, out, Case("llava"))
    assert report.changed == ("00000.jsonl",) and "mark-0077" in (out / "llava.json").read_text()
    untouched = {name for name, stamp in stamps(out).items() if before[name] == stamp}
    assert untouched == {n for n in before if "00000" not in n[:12]} - {"llava.json", "manifest.json"}
    # What is only recorded of a conversation (its cost, its checks) is not exported, so it changes nothing.
    before = stamps(out)
    dearer = [{**i.to_row(), "cost": 0.5, "answers": 3} for i in other]
    rewrite(built, INSTRUCT_TABLE, pair, {"instructions": dearer})
    assert write(built.snapshot, out, Case("llava")).written == 0
    assert {n for n, stamp in stamps(out).items() if before[n] != stamp} == {"manifest.json"}


def rewrite(built: Built, name: str, pair: Pair, values: dict) -> None:
    """Put other values into a pair's row of a table, and publish that."""
    record = built.snapshot.record
    (file,) = [f for f in built.snapshot.files(name) if f.shard == pair.shard]
    schema = pq.read_schema(file.path)
    table = built.dataset.table(name, schema)
    rows = [{**r, **values} if r["uid"] == pair.uid else r for r in pq.read_table(file.path, schema=schema).to_pylist()]
    with table.writer(file.shard, f"other{record.id}") as writer:
        writer.write(pa.Table.from_pylist(rows, schema=schema))
        new = writer.close()
    version = table.commit([new], replace=[file.shard])
    built.dataset.publish(replace(record, id=record.id + 1, tables={**record.tables, name: version}))
