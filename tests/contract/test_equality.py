"""Results do not depend on the engine, the batch size or the number of workers: equal content hashes of every
column."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pairmill.execute import table_schema
from pairmill.plan import compile_plan
from pairmill.procedural.web import ProceduralWeb
from pairmill.report.progress import Silent
from pairmill.run import load_recipe, parse_config, refresh
from pairmill.store import Dataset, column_digests, read_files
from schemas import fields
from schemas.config import RunConfig
from tests.steps import config, texts, write_urls

VOLATILE = frozenset({"detail", "retry_at"})
"""Free text beside a reason may hold what a server happened to say."""


def table_digests(run: RunConfig) -> dict[str, dict[str, str]]:
    """Content hashes by table and column, of all tables of the latest snapshot."""
    snapshot = Dataset(run.dataset).snapshot()
    plan = compile_plan(load_recipe(run))
    found = {}
    for table in snapshot.record.tables:
        schema = fields.LEDGER if table == "ledger" else table_schema(plan, table)
        rows: pa.Table = read_files(snapshot.dataset, snapshot.files(table), schema, [*schema.names, "shard"])
        found[table] = {k: v for k, v in column_digests(rows).items() if k not in VOLATILE}
    return found


VARIANTS = [
    ({"kind": "local"}, 256),
    ({"kind": "local"}, 7),
    ({"kind": "local"}, 1),
    ({"kind": "local", "workers": 2}, 256),
    ({"kind": "ray", "address": "local"}, 256),
    ({"kind": "ray", "address": "local", "workers": 1}, 7),
]


def name(variant: tuple[dict[str, object], int]) -> str:
    engine, rows = variant
    return f"{engine['kind']}-{engine.get('workers', 'any')}-rows{rows}"


def test_texts_give_equal_tables_everywhere(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", texts(330))
    found = {}
    for variant in VARIANTS:
        engine, rows = variant
        run = config(tmp_path / name(variant), table, engine=engine, options={"rows": rows})
        refresh(run, Silent())
        found[name(variant)] = table_digests(run)
    first = found.pop(name(VARIANTS[0]))
    assert set(first) >= {"pairs", "ledger"} and len(first) == 5
    for variant_name, digests in found.items():
        assert digests == first, variant_name


def test_mixed_texts_give_equal_tables_everywhere(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [t for t in texts(330) if t])
    found = {}
    for variant in (VARIANTS[0], VARIANTS[3], VARIANTS[4]):
        for mix in ({"recipe": "blip2"}, {"recipe": "nguyen23"}):
            root = tmp_path / f"{name(variant)}-{mix['recipe']}"
            options = {"folder": str(tmp_path)}
            run = config(root, table, engine=variant[0], recipe="tests.test_outcomes:recipe", mix=mix, options=options)
            refresh(run, Silent())
            found.setdefault(mix["recipe"], []).append(table_digests(run))
    for first, *others in found.values():
        assert "text_ranks" in first["ledger"]
        assert any("boilerplate" in columns for columns in first.values()), "the kept texts, joined"
        assert all(digests == first for digests in others)


@pytest.mark.timeout(600)
def test_the_main_recipe_gives_equal_tables_everywhere(tmp_path: Path):
    """Downloads, decoding, CLIP scores, neighbours, verdicts, boxes and conversations of the recipe clip_filter."""
    with ProceduralWeb(120, seed=5, hang_s=5) as web:
        web.write(tmp_path)
        found = {}
        for variant in VARIANTS:
            engine, rows = variant
            run = parse_config(
                {
                    "dataset": str(tmp_path / name(variant)),
                    "recipe": "tests.contract.recipes:clip_filter",
                    "source": {"kind": "url_table", "path": str(tmp_path / "urls.parquet"), "boxes": "boxes"},
                    "engine": engine,
                    "shard_size": 40,
                    "download": {"allow_private_addresses": True, "timeout_s": 2, "retries": 0, "per_host": 32},
                    "keep": {"clip_score": "top 80%"},
                    "instruct": {"kinds": {"conversation": 1, "detail": 0.5, "complex": 1, "grounding": 0.7}},
                    "options": {"rows": rows},
                }
            )
            record = refresh(run, Silent()).snapshot
            assert record is not None and 0 < record.kept < record.admitted == 120
            found[name(variant)] = table_digests(run)
    first = found.pop(name(VARIANTS[0]))
    for variant_name, digests in found.items():
        assert digests == first, variant_name
