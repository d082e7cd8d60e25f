"""Stages that read what verdicts made of texts: told by the driver, done anew when that changes, tried once a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pairmill.errors import PlanError
from pairmill.execute import Frame, Job, Worker, table_files, table_schema, units_to_do
from pairmill.plan import Recipe, compile_plan
from pairmill.planning import ANEW
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_recipe, plan, refresh
from pairmill.stage import Batch, Kernel, Resources, Stage
from pairmill.store import Dataset, read_files
from schemas import fields
from schemas.config import RunConfig
from tests import mixing_steps
from tests.steps import CountWords, config, texts, write_urls


@dataclass(frozen=True)
class JoinKept(Stage):
    """Writes the kept texts, joined, into `boilerplate`. Pairs that the file `due` names by their alt text are due."""

    log: str
    due: str = field(metadata={"identity": False})
    resources: Resources = field(default=Resources(rows=16), metadata={"identity": False})
    name = "joined"
    reads = ("texts", "captions", "text_ranks")
    writes = (fields.BOILERPLATE, fields.INSTRUCTED_RANKS, fields.INSTRUCTION_OUTCOMES)

    def open(self) -> Kernel:
        def join(batch: Batch) -> pa.Table:
            with open(self.log, "a", encoding="utf-8") as log:
                log.writelines(f"{uid}\n" for uid in batch.pylist("uid"))
            due = set(Path(self.due).read_text().splitlines()) if Path(self.due).exists() else set()
            columns = [batch.pylist(name) for name in self.reads]
            joined, outstanding = [], []
            for given, written, ranks in zip(*columns, strict=True):
                pairs = [(r, t["text"]) for r, t in zip(ranks, [*given, *written], strict=True) if r is not None]
                joined.append(" | ".join(text for _, text in sorted(pairs)))
                outstanding.append(
                    [{"kind": "detail", "reason": "writer.timeout"}] if given[0]["text"] in due else None
                )
            return pa.table(
                {
                    "boilerplate": pa.array(joined, pa.string()),
                    "instructed_ranks": batch.column("text_ranks"),
                    "instruction_outcomes": pa.array(outstanding, fields.INSTRUCTION_OUTCOMES.type),
                }
            )

        return join

    @property
    def revises(self) -> tuple[str, ...]:
        return ("instructed_ranks", "text_ranks", "instruction_outcomes")

    def outdated(self, rows: pa.Table, *, retry: bool) -> pa.Array:
        before, now, due = (rows.column(name).to_pylist() for name in self.revises)
        return pa.array([a != b or (retry and bool(d)) for a, b, d in zip(before, now, due, strict=True)], pa.bool_())


def recipe(config: RunConfig) -> Recipe:
    """Captions, scores, mix, and the kept texts joined; with `apart` a global step lies between the two."""
    steps = mixing_steps.recipe(config).steps
    steps = steps if config.options.get("apart", True) else steps[:-1]
    folder = config.options["folder"]
    return Recipe("joining", (*steps, JoinKept(f"{folder}/log", f"{folder}/due")))


def settings(folder: Path, itm: str = ">= 0.5", name: str = "dataset", **changes: object) -> RunConfig:
    table = folder / "urls.parquet"
    if not table.exists():
        write_urls(table, texts(60))
    mix, options = changes.pop("mix", {}), changes.pop("options", {})
    run = config(
        folder,
        table,
        recipe="tests.test_outcomes:recipe",
        shard_size=25,
        keep={"itm": itm, "language": None, "max_repetition": None},
        mix=mix,
        options={"folder": str(folder), **options},  # type: ignore[dict-item]
        **changes,
    )
    return run.model_copy(update={"dataset": str(folder / name)})


def done(folder: Path) -> list[str]:
    """The uids that the stage saw since the last call."""
    log = folder / "log"
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


SQL = "SELECT uid, status, reason, boilerplate FROM pairs ORDER BY uid"


def kept_as_text(run: RunConfig) -> dict[str, str]:
    """What the view says of the kept texts of each kept pair."""
    sql = """SELECT uid, string_agg(text, ' | ' ORDER BY rank) AS joined FROM texts WHERE kept GROUP BY 1"""
    return {row["uid"]: row["joined"] for row in query(Dataset(run.dataset).snapshot(), sql).to_pylist()}


def ledger(run: RunConfig) -> dict[str, str]:
    rows = query(Dataset(run.dataset).snapshot(), SQL).to_pylist()
    return {row["uid"]: row["boilerplate"] for row in rows if row["status"] == "kept"}


@pytest.mark.parametrize("apart", [True, False], ids=["behind a global step", "in the verdict's own segment"])
@pytest.mark.parametrize("mix", [{}, {"clip": "top 40%"}], ids=["by row", "over all rows"])
def test_a_moved_threshold_redoes_the_rows_whose_kept_texts_changed_and_no_others(tmp_path, apart, mix):
    options = {"apart": apart}
    first = settings(tmp_path, options=options, mix=mix)
    refresh(first, Silent())
    before = ledger(first)
    assert before == kept_as_text(first)
    assert len(set(before.values())) > 10
    done(tmp_path)
    moved = settings(tmp_path, ">= 0.3", options=options, mix=mix)
    planned = next(step for step in plan(moved, Silent()).steps if step["step"] == "joined")
    refresh(moved, Silent())
    after = ledger(moved)
    seen = done(tmp_path)
    assert sorted(seen) == sorted(uid for uid in after if before.get(uid) != after[uid]), "each once"
    assert 0 < len(seen) < len(after)
    assert planned["why"][ANEW] == sum(uid in before for uid in seen)
    assert planned["rows_todo"] == len(seen)
    assert after == kept_as_text(moved)
    alone = settings(tmp_path, ">= 0.3", "alone", options=options, mix=mix)
    refresh(alone, Silent())
    assert query(Dataset(alone.dataset).snapshot(), SQL).equals(query(Dataset(moved.dataset).snapshot(), SQL))
    done(tmp_path)
    assert not refresh(moved, Silent()).published
    assert done(tmp_path) == []


def test_an_uncommitted_file_of_other_texts_is_not_taken_for_this_work(tmp_path):
    """Killed between writing and committing, then a threshold moved."""
    first, moved = settings(tmp_path), settings(tmp_path, ">= 0.3")
    refresh(first.model_copy(update={"recipe": "tests.mixing_steps:recipe"}), Silent())
    compiled = compile_plan(load_recipe(first))
    dataset = Dataset(first.dataset)
    last = len(compiled.segments) - 1
    frame = Frame(dataset, compiled, table_files(dataset, compiled))
    for unit in units_to_do(compiled, last, frame):
        written = Worker(Job(dataset.url, compiled, last, 0.1, 5), 0).run(unit)
        assert written.outputs
    done(tmp_path)
    refresh(moved, Silent())
    assert ledger(moved) == kept_as_text(moved)
    assert sorted(done(tmp_path)) == sorted(ledger(moved)), "nothing was adopted"
    # where the threshold did not move the files are adopted
    again = settings(tmp_path, name="again")
    refresh(again.model_copy(update={"recipe": "tests.mixing_steps:recipe"}), Silent())
    dataset = Dataset(again.dataset)
    frame = Frame(dataset, compiled, table_files(dataset, compiled))
    for unit in units_to_do(compiled, last, frame):
        Worker(Job(dataset.url, compiled, last, 0.1, 5), 0).run(unit)
    done(tmp_path)
    refresh(again, Silent())
    assert done(tmp_path) == []
    assert ledger(again) == kept_as_text(again)


def test_what_is_due_is_tried_once_a_run_until_it_is_there(tmp_path):
    run = settings(tmp_path)
    chosen = texts(60)[14]
    (tmp_path / "due").write_text(chosen + "\n")
    refresh(run, Silent())
    (uid,) = query(Dataset(run.dataset).snapshot(), f"SELECT uid FROM pairs WHERE text = '{chosen}'")["uid"].to_pylist()
    done(tmp_path)
    assert next(s for s in plan(run, Silent()).steps if s["step"] == "joined")["why"] == {ANEW: 1}
    refresh(run, Silent())
    assert done(tmp_path) == [uid]
    (tmp_path / "due").unlink()
    refresh(run, Silent())
    assert done(tmp_path) == [uid]
    refresh(run, Silent())
    assert done(tmp_path) == []
    dataset = Dataset(run.dataset)
    compiled = compile_plan(load_recipe(run))
    table = compiled.columns["instruction_outcomes"]
    schema = table_schema(compiled, table)
    rows = read_files(dataset, dataset.table(table, schema).files(), schema, ["uid", "instruction_outcomes"])
    assert pc.all(pc.is_null(rows["instruction_outcomes"])).as_py()
    assert len(set(rows["uid"].to_pylist())) == len(rows)


def test_outcomes_cannot_be_read_where_no_verdict_chose(tmp_path):
    stage = JoinKept(str(tmp_path / "log"), str(tmp_path / "due"))
    with pytest.raises(PlanError, match="text_ranks"):
        compile_plan(Recipe("x", (CountWords(), mixing_steps.Describe(), stage)))
