"""Results do not depend on the engine, the batch size or the number of workers: equal content hashes of every column,
equal ledgers, counts, conversations and exports, for every stage that there is."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import captioners
import filters
import pairmill
from pairmill.engines import open_engine
from pairmill.execute import table_schema
from pairmill.export import export_webdataset
from pairmill.plan import compile_plan
from pairmill.procedural.web import ProceduralWeb
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.revisits import HISTORY, Revisit
from pairmill.run import load_recipe, refresh
from pairmill.stage import GlobalStage, Stage
from pairmill.store import Dataset, column_digests, read_files
from schemas import fields
from schemas.config import Engine, RunConfig
from tests.contract import cases
from tests.contract.recipes import Beside
from tests.hostile.batch_server import BatchServer
from tests.hostile.endpoint_server import Answer, Asked, EndpointServer
from tests.hostile.writer_server import used
from tests.steps import config, texts, write_urls

VOLATILE = frozenset({"detail", "retry_at"})
"""Free text beside a reason may hold what a server happened to say."""

SOAK = os.environ.get("PAIRMILL_SOAK") == "1"

LOCAL: dict[str, Any] = {"kind": "local"}
TWO: dict[str, Any] = {"kind": "local", "workers": 2}
RAY: dict[str, Any] = {"kind": "ray"}
BEAM: dict[str, Any] = {"kind": "beam"}

# -- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """All that a reader may see of a dataset, as hashes and counts."""

    tables: dict[str, dict[str, str]]
    """Of each column, by table."""
    counts: dict[str, Any]
    """Of the snapshot's record."""
    conversations: str
    export: dict[str, str]
    """Of the files of a WebDataset export, by name."""


def content(run: RunConfig, out: Path) -> Content:
    """Of the latest snapshot."""
    snapshot = Dataset(run.dataset).snapshot()
    record = snapshot.record
    counts = {name: getattr(record, name) for name in ("admitted", "kept", "dropped", "deferred", "reasons", "funnel")}
    written = "[]"
    if "instructions" in record.columns:
        asked = "SELECT * EXCLUDE (detail) FROM instructions ORDER BY uid, kind"
        written = json.dumps(query(snapshot, asked).to_pylist(), sort_keys=True, default=str)
    exported: dict[str, str] = {}
    if any(table.startswith("images-") for table in record.tables):
        report = export_webdataset(snapshot, str(out))
        assert report.samples == record.kept > 0
        exported = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.suffix == ".tar"
        }
        assert exported
    return Content(table_digests(run), counts, written, exported)


def table_digests(run: RunConfig) -> dict[str, dict[str, str]]:
    """Content hashes by table and column, of all tables of the latest snapshot."""
    snapshot = Dataset(run.dataset).snapshot()
    plan = compile_plan(load_recipe(run))
    found = {}
    for table in snapshot.record.tables:
        if table == "image_history":
            schema = HISTORY
        else:
            schema = fields.LEDGER if table == "ledger" else table_schema(plan, table)
        rows: pa.Table = read_files(snapshot.dataset, snapshot.files(table), schema, [*schema.names, "shard"])
        found[table] = {k: v for k, v in column_digests(rows).items() if k not in VOLATILE}
    return found


def check_equal(found: dict[str, Content]) -> None:
    """All of them are equal; a failure names the engine, the table and the column."""
    (first, expected), *others = found.items()
    for name, other in others:
        assert other.tables.keys() == expected.tables.keys()
        differ = [
            f"{table}.{column}"
            for table, columns in expected.tables.items()
            for column, digest in columns.items()
            if other.tables[table].get(column) != digest
        ]
        assert not differ, f"{name} differs from {first}"
        assert other == expected, f"{name} differs from {first}"


def label(engine: dict[str, Any], rows: int) -> str:
    return f"{engine['kind']}-{engine.get('workers', 'any')}-rows{rows}"


# -- what is shared ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray, which all runs join."""
    with open_engine(Engine(kind="ray", address="local")):
        yield


@pytest.fixture(scope="module")
def batches() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, batches: BatchServer) -> Iterator[cases.Material]:
    """The web, the files, the checkpoints and the servers that the configs name."""
    folder = tmp_path_factory.mktemp("material")

    def choose(asked: Asked) -> Answer:
        sees = not isinstance(asked.body["messages"][-1]["content"], str)
        return cases.captions(asked) if sees else cases.writer(asked)

    with ProceduralWeb(48, seed=5) as web, EndpointServer(choose) as endpoint:
        web.write(folder)
        models, sources = cases.write_models(folder), cases.local_sources(folder)
        yield cases.Material(folder, web, sources, models, endpoint.base_url, batches.base_url)


# -- the contract -----------------------------------------------------------------------------------------------------


def all_stages() -> set[type]:
    """The stages that the packages define."""
    for package in (captioners, filters, pairmill):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found: set[type] = set()
    kinds: list[type] = [Stage, GlobalStage]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if not inspect.isabstract(kind):
            found.add(kind)
    return {kind for kind in found if kind.__module__.partition(".")[0] in ("captioners", "filters", "pairmill")}


def test_every_stage_is_held_against_the_contract(material: cases.Material, tmp_path: Path) -> None:
    """A new stage belongs into a recipe of tests/contract/cases.py."""
    covered: set[type] = {Revisit}  # which no recipe has: `test_visits_give_equal_tables_everywhere` runs it
    for case in cases.CASES.values():
        for step in load_recipe(case(material, tmp_path, LOCAL, 256)).steps:
            covered.add(type(step.stage if isinstance(step, Beside) else step))
    missing = all_stages() - covered
    assert not missing, f"no contract case has {sorted(kind.__qualname__ for kind in missing)}"


@pytest.mark.timeout(900)
def test_every_stage_gives_equal_tables_everywhere(material: cases.Material, tmp_path: Path) -> None:
    """Sources, download, every model, cells, verdicts, paid conversations and exports."""
    variants = [(LOCAL, 256), (LOCAL, 5), (RAY, 256), (BEAM, 16), *([(LOCAL, 1), (TWO, 16), (RAY, 7)] if SOAK else [])]
    runs = {label(*variant): cases.everything(material, tmp_path / label(*variant), *variant) for variant in variants}
    found = {}
    for name, run in runs.items():
        record = refresh(run, Silent()).snapshot
        assert record is not None and 0 < record.kept < record.admitted == 72
        found[name] = content(run, tmp_path / f"{name}-out")
    check_equal(found)


@pytest.mark.timeout(900)
def test_visits_give_equal_tables_everywhere(material: cases.Material, tmp_path: Path) -> None:
    """Images that changed on the web meanwhile, their history, and what depends on them."""
    variants = [(LOCAL, 256), (RAY, 256), (BEAM, 256), *([(TWO, 256)] if SOAK else [])]
    runs = {label(*variant): cases.visited(material, tmp_path / label(*variant), *variant) for variant in variants}
    for run in runs.values():
        refresh(run, Silent())
    material.web.change([row.url for row in material.web.rows if row.scene is not None][:5])
    found = {}
    for name, run in runs.items():
        report = refresh(run, Silent(), revisit="true", admit=False)
        assert report.published and report.snapshot is not None and "image_history" in report.snapshot.tables
        assert report.computed["revisit"] > report.computed["regions"] > 0
        found[name] = content(run, tmp_path / f"{name}-visited")
    check_equal(found)


@pytest.mark.timeout(900)
def test_the_main_road_gives_equal_tables_everywhere(
    material: cases.Material, batches: BatchServer, tmp_path: Path
) -> None:
    """The recipe clip_filter, with conversations that come by batches."""
    variants = [(LOCAL, 256), (TWO, 3), (RAY, 7), (BEAM, 256)]
    runs = {label(*variant): cases.main_road(material, tmp_path / label(*variant), *variant) for variant in variants}
    for run in runs.values():
        refresh(run, Silent())
    batches.finish(lambda line: used(cases.said(Asked(0, "", {}, line["body"]))))
    found = {}
    for name, run in runs.items():
        report = refresh(run, Silent())
        assert set(report.computed) == {"instructions"}
        found[name] = content(run, tmp_path / f"{name}-out")
    check_equal(found)


def test_texts_give_equal_tables_everywhere(tmp_path: Path) -> None:
    table = write_urls(tmp_path / "urls.parquet", texts(330))
    found = {}
    for engine, rows in (
        (LOCAL, 256),
        (LOCAL, 7),
        (LOCAL, 1),
        (TWO, 256),
        (RAY, 256),
        ({**RAY, "workers": 1}, 7),
        (BEAM, 7),
    ):
        run = config(tmp_path / label(engine, rows), table, engine=engine, options={"rows": rows})
        refresh(run, Silent())
        found[label(engine, rows)] = content(run, tmp_path)
    assert {len(one.tables) for one in found.values()} == {5}
    check_equal(found)


def test_mixed_texts_give_equal_tables_everywhere(tmp_path: Path) -> None:
    table = write_urls(tmp_path / "urls.parquet", [t for t in texts(330) if t])
    for mix in ({"recipe": "blip2"}, {"recipe": "nguyen23"}):
        found = {}
        for engine in (LOCAL, RAY, BEAM):
            root = tmp_path / f"{engine['kind']}-{mix['recipe']}"
            options = {"folder": str(tmp_path)}
            run = config(root, table, engine=engine, recipe="tests.test_outcomes:recipe", mix=mix, options=options)
            refresh(run, Silent())
            found[engine["kind"]] = content(run, tmp_path)
        check_equal(found)
        tables = found["local"].tables
        assert "text_ranks" in tables["ledger"]
        assert any("boilerplate" in columns for columns in tables.values()), "the kept texts, joined"
