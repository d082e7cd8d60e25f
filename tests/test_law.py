"""The law of refreshes: whatever happened on the way, a dataset holds what one run over the final inputs would make.

**The law.** Let a dataset have gone through any sequence of: rows added to the list, the list put in another order,
rows taken off it, a threshold moved, a stage's parameters or model changed, pairs taken down, refreshes killed at any
step, and refreshes; and let it end with a refresh. Compare it with a dataset made in one run, with the last config, of
all rows that were ever admitted and are not taken down. Then, for every pair:

1. it is in the one if and only if it is in the other;
2. what a map stage measured is equal wherever both hold it, and the first holds all that the second does;
3. the reason is equal, but for reasons of duplicates;
4. of each group of duplicates (pairs that reach that step with equal content) exactly one stays in both. In the dataset
   made in one run it is the most senior by quality and uid; in the other it is one that the earliest refresh admitted,
   and of those the most senior by quality and uid. That is the only difference there may be, and what follows from it:
   what global stages behind that step measure is of another pair of the group.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pairmill.admission import pair_uid
from pairmill.execute import table_schema
from pairmill.plan import compile_plan
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_config, load_recipe, refresh
from pairmill.store import PAIRS_TABLE, Dataset, read_files
from pairmill.takedown import Selectors, forget
from schemas import fields
from tests.faults.datasets import write_config
from tests.faults.zygote import Zygote
from tests.steps import texts

Row = tuple[str, str]
URLS = [f"http://host{i % 5}.example/{i}.jpg" for i in range(40)]
ROWS: list[Row] = list(zip(URLS, texts(40), strict=True))


@dataclass
class World:
    """The inputs as they are now."""

    folder: Path
    zygote: Zygote
    rows: list[Row] = field(default_factory=list)
    words: int = 3
    scale: int = 1
    admitted: set[Row] = field(default_factory=set)
    """Rows that a refresh has seen, which is what a dataset keeps."""
    gone_urls: set[str] = field(default_factory=set)
    gone_domains: set[str] = field(default_factory=set)

    @property
    def config(self) -> Path:
        pq.write_table(
            pa.table({"url": [u for u, _ in self.rows], "text": [t for _, t in self.rows]}),
            self.folder / "urls.parquet",
        )
        return write_config(self.folder, shard_size=7, options={"words": self.words, "scale": self.scale})

    def barred(self, row: Row) -> bool:
        host = row[0].split("/")[2]
        return row[0] in self.gone_urls or any(host == d or host.endswith(f".{d}") for d in self.gone_domains)

    def refresh(self, step: int | None = None) -> None:
        """A refresh; killed before a step that others can see, where one is given."""
        config = self.config
        if step is None:
            refresh(load_config(str(config)), Silent())
        else:
            (outcome,) = self.zygote.run({"config": str(config), "before": step})
            assert outcome.code in (0, -9), outcome.error
        dataset = Dataset(str(self.folder / "dataset"))
        files = dataset.table(PAIRS_TABLE, fields.PAIRS).files()
        known = set(read_files(dataset, files, fields.PAIRS, ["uid"]).column("uid").to_pylist())
        self.admitted |= {row for row in self.rows if pair_uid(*row) in known}

    def take_down(self, what: str, value: str) -> None:
        dataset = Dataset(str(self.folder / "dataset"))
        if dataset.exists():
            forget(dataset, Selectors(**{what: (value,)}), Silent())
            (self.gone_urls if what == "urls" else self.gone_domains).add(value)
            self.admitted = {row for row in self.admitted if not self.barred(row)}


numbers = st.integers(0, len(ROWS) - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(numbers, min_size=1, max_size=15)),
        st.tuples(st.just("reorder"), st.randoms(use_true_random=False)),
        st.tuples(st.just("drop"), st.lists(numbers, max_size=5)),
        st.tuples(st.just("threshold"), st.integers(0, 6)),
        st.tuples(st.just("model"), st.integers(1, 2)),
        st.tuples(st.just("forget url"), numbers),
        st.tuples(st.just("forget domain"), st.integers(0, 4)),
        st.tuples(st.just("kill"), st.integers(0, 30)),
        st.tuples(st.just("refresh"), st.none()),
    ),
    min_size=2,
    max_size=8,
)


def apply(world: World, operation: str, value: object) -> None:
    """One thing that happens."""
    if operation == "add":
        assert isinstance(value, list)
        world.rows += [ROWS[i] for i in value]
    elif operation == "reorder":
        value.shuffle(world.rows)  # type: ignore[attr-defined]
    elif operation == "drop":
        assert isinstance(value, list)
        world.rows = [row for i, row in enumerate(world.rows) if i not in value]
    elif operation == "threshold":
        assert isinstance(value, int)
        world.words = value
    elif operation == "model":
        assert isinstance(value, int)
        world.scale = value
    elif operation == "forget url":
        assert isinstance(value, int)
        world.take_down("urls", URLS[value])
    elif operation == "forget domain":
        world.take_down("domains", f"host{value}.example")
    elif operation == "kill":
        assert isinstance(value, int)
        world.refresh(value)
    else:
        world.refresh()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


def pairs(config: Path) -> dict[str, dict[str, object]]:
    run = load_config(str(config))
    rows = query(Dataset(run.dataset).snapshot(), "SELECT * FROM pairs").to_pylist()
    return {row["uid"]: row for row in rows}


def measures(config: Path, stage: str) -> dict[str, dict[str, object]]:
    run = load_config(str(config))
    plan = compile_plan(load_recipe(run))
    snapshot = Dataset(run.dataset).snapshot()
    table = next(t for t in plan.tables if t.startswith(f"{stage}-"))
    schema = table_schema(plan, table)
    rows = read_files(snapshot.dataset, snapshot.files(table), schema, schema.names).to_pylist()
    return {row["uid"]: row for row in rows}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations)
def test_the_final_dataset_is_what_one_run_over_the_final_inputs_makes(zygote: Zygote, operations):
    folder = Path(tempfile.mkdtemp(prefix="pairmill-law-"))
    try:
        world = World(folder / "lived", zygote)
        world.folder.mkdir()
        world.rows += ROWS[:10]
        for operation, value in operations:
            apply(world, operation, value)
        world.refresh()
        check(world, folder)
    finally:
        shutil.rmtree(folder)


def check(world: World, folder: Path) -> None:
    """The law, number by number."""
    once = World(folder / "once", world.zygote, sorted(world.admitted), world.words, world.scale)
    once.folder.mkdir()
    once.refresh()
    lived, made = pairs(world.config), pairs(once.config)
    assert lived.keys() == made.keys()  # 1
    if not lived:
        return
    for stage in ("words", "chars"):  # 2
        old, new = measures(world.config, stage), measures(once.config, stage)
        shared = old.keys() & new.keys()
        assert {u: old[u] for u in shared} == {u: new[u] for u in shared}
        assert new.keys() <= old.keys()
    is_duplicate = {u: str(row["reason"] or "").startswith("duplicate.") for u, row in lived.items()}
    was_duplicate = {u: str(row["reason"] or "").startswith("duplicate.") for u, row in made.items()}
    reach = {u for u in lived if is_duplicate[u] or lived[u]["reason"] is None}
    assert reach == {u for u in made if was_duplicate[u] or made[u]["reason"] is None}  # 3
    assert all(lived[u]["reason"] == made[u]["reason"] for u in lived.keys() - reach)
    groups: dict[object, set[str]] = {}
    for uid in reach:
        groups.setdefault(lived[uid]["text"], set()).add(uid)
    for group in groups.values():  # 4
        (stays,) = (u for u in group if not is_duplicate[u])
        assert stays == min(group, key=lambda u: (lived[u]["refresh"], u))
        (stayed,) = (u for u in group if not was_duplicate[u])
        assert stayed == min(group)
        assert all(lived[u]["duplicate_of"] == stays for u in group - {stays})
