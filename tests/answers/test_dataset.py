"""The answers of a dataset through its whole life: takedown, verify and repair, rollback, vacuum."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from captioners.chat import ChatRequest
from pairmill.admission import pair_uid
from pairmill.answers import ANSWERS, ANSWERS_TABLE, JOURNAL, spent
from pairmill.errors import StoreError
from pairmill.integrity import examine
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.store import Dataset, read_files
from pairmill.takedown import Selectors, check_absence, forget
from pairmill.versions import rollback, vacuum
from tests.answers.asking import chat_of, folded
from tests.hostile.endpoint_server import EndpointServer, Meter
from tests.needles import find_needles
from tests.steps import config, texts, write_urls

COUNT = 60
TEXTS = texts(COUNT)
URLS = [f"http://host{i % 7}.example/{i}.jpg" for i in range(COUNT)]
UIDS = [pair_uid(url, text) for url, text in zip(URLS, TEXTS, strict=True)]


def ask_about(url: str, base_url: str, numbers: range) -> None:
    """A question about each pair, which the endpoint says again."""

    async def work() -> None:
        async with chat_of(url, base_url, tokens=10**6) as chat:
            for number in numbers:
                asked = ChatRequest(({"role": "user", "content": f"secret word{number}z"},), 50, 0.7, 0.95, number)
                await chat.ask(UIDS[number], number % 2, "detail", asked)

    asyncio.run(work())


def rows(url: str) -> int:
    opened = Dataset(url)
    return read_files(opened, opened.table(ANSWERS_TABLE, ANSWERS).files(), ANSWERS, ["uid"]).num_rows


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Two snapshots; answers in the table, and some that are in the journal still."""
    table = write_urls(tmp_path / "urls.parquet", TEXTS)
    run = config(tmp_path, table)
    refresh(run, Silent())
    refresh(run.model_copy(update={"options": {"words": 5}}), Silent())
    with EndpointServer(Meter()) as server:
        ask_about(run.dataset, server.base_url, range(40))
        folded(run.dataset)
        ask_about(run.dataset, server.base_url, range(40, 60))
    return run.dataset


def test_nothing_of_a_forgotten_pair_is_left_in_the_table_or_in_the_journal(dataset: str):
    before = spent(Dataset(dataset))
    gone = [UIDS[5], UIDS[45]]
    words = [f"secret word{number}z" for number in (5, 45)]
    assert len({found.partition(" in ")[0] for found in find_needles([Path(dataset)], [*gone, *words])}) == 4
    report = forget(Dataset(dataset), Selectors.of(uids=gone), Silent())
    assert report.done and report.pairs == 2 and report.tables[ANSWERS_TABLE].rows >= 1
    places = [p for p in Path(dataset).iterdir() if p.name not in ("tombstones", "takedowns")]
    assert find_needles(places, [*gone, *words]) == []
    assert check_absence(Dataset(dataset), Selectors.of(uids=gone), Silent()).absent
    assert rows(dataset) == COUNT - 2 and spent(Dataset(dataset)) == pytest.approx(before)
    assert not examine(Dataset(dataset), Silent()).damage


def test_damage_to_the_table_is_found(dataset: str):
    assert not examine(Dataset(dataset), Silent()).damage
    opened = Dataset(dataset)
    path = Path(opened.table(ANSWERS_TABLE, ANSWERS).files()[0].path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damage = examine(Dataset(dataset), Silent()).damage
    assert [(finding.kind.value, finding.table) for finding in damage] == [("flipped", ANSWERS_TABLE)]
    path.unlink()
    with EndpointServer(Meter()) as server, pytest.raises(StoreError, match="verify"):
        ask_about(dataset, server.base_url, range(2))
    assert server.requests == [], "nothing is paid for again as long as it may be there"


def test_a_rollback_leaves_what_was_paid_for(dataset: str):
    folded(dataset)
    before = spent(Dataset(dataset))
    rollback(Dataset(dataset), 1)
    assert rows(dataset) == COUNT and spent(Dataset(dataset)) == before
    meter = Meter()
    with EndpointServer(meter) as server:
        ask_about(dataset, server.base_url, range(COUNT))
    assert not meter.billed


def test_vacuum_removes_what_dead_processes_left_and_no_line(dataset: str):
    journal = Path(dataset) / JOURNAL
    left = [journal / "open" / "0123456789abcdef", journal / "spending.json.77.88.tmp"]
    for path in left:
        path.write_bytes(b"")
        os.utime(path, (time.time() - 10**6,) * 2)
    lines = sorted((journal / "answers").iterdir())
    for path in lines:
        os.utime(path, (time.time() - 10**6,) * 2)
    report = vacuum(Dataset(dataset))
    assert [removal.files for removal in report.removed if removal.table == JOURNAL] == [2]
    assert not any(path.exists() for path in left) and sorted((journal / "answers").iterdir()) == lines
    folded(dataset)
    assert rows(dataset) == COUNT
    vacuum(Dataset(dataset), grace_hours=0)
    assert rows(dataset) == COUNT and not examine(Dataset(dataset), Silent()).damage
