"""kill -9 at five points of the main recipe, then the same snapshot, and nothing committed is downloaded again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import yaml

from pairmill.procedural.web import ProceduralWeb
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_config, refresh
from pairmill.store import Dataset, column_digests, open_delta, read_files
from schemas import fields

KILL_AT = ("admitted", "first shard", "third shard", "neighbours", "publish")

SCRIPT = """
import os, signal, sys
from pairmill import run
from pairmill.report.progress import Silent
from pairmill.store import Dataset

point = sys.argv[2]
run.COMMIT_EVERY_S = 0.0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer(Silent):
    shards = 0
    def note(self, message):
        if point == "admitted" and "rows read" in message:
            die()
    def start(self, title, rows):
        if point == title == "neighbours":
            die()
    def advance(self, rows, dropped):
        self.shards += 1
        if (point, self.shards) in (("first shard", 1), ("third shard", 3)):
            die()

if point == "publish":
    Dataset.publish = lambda *_: die()
run.refresh(run.load_config(sys.argv[1]), Killer())
"""


def ledger_digests(folder: Path) -> dict[str, str]:
    snapshot = Dataset(str(folder)).snapshot()
    rows = read_files(snapshot.dataset, snapshot.files("ledger"), fields.LEDGER, [*fields.LEDGER.names, "shard"])
    return {k: v for k, v in column_digests(rows).items() if k not in ("detail", "retry_at")}


def downloaded(folder: Path) -> set[str]:
    """uids whose image rows are committed."""
    dataset = Dataset(str(folder))
    table = next((p.name for p in folder.glob("images-*")), None)
    if table is None or open_delta(dataset, table) is None:
        return set()
    files = dataset.table(table, fields.PAIRS).files()
    return set(read_files(dataset, files, fields.PAIRS, ["uid"]).column("uid").to_pylist())


def main_config(folder: Path, **changes: object) -> Path:
    """A config file of the main recipe over the web written to `folder`."""
    data = {
        "dataset": str(folder / "killed"),
        "recipe": "clip_filter",
        "source": {"kind": "url_table", "path": str(folder / "urls.parquet")},
        "engine": {"kind": "local"},
        "shard_size": 30,
        "download": {"allow_private_addresses": True, "timeout_s": 2, "retries": 0, "per_host": 32},
        "keep": {"clip_score": "top 70%"},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_deferred_rows_are_tried_again_when_asked_and_only_they(tmp_path: Path):
    with ProceduralWeb(150, seed=11, hang_s=3) as web:
        web.write(tmp_path)
        run = load_config(str(main_config(tmp_path)))
        first = refresh(run, Silent()).snapshot
        assert first is not None and first.deferred > 0
        web.requests.clear()
        assert not refresh(run, Silent()).published, "nobody asked"
        assert not web.requests
        again = refresh(run, Silent(), retry_deferred=True)
        asked = query(
            Dataset(run.dataset).snapshot(1), "SELECT DISTINCT url FROM pairs WHERE status = 'deferred'"
        ).column("url")
        assert set(web.requests) - {f"http://{web.host}:{web.port}/robots.txt"} == set(asked.to_pylist())
        assert again.computed["images"] == first.deferred
        assert again.snapshot is not None and again.snapshot.admitted == first.admitted
        assert again.snapshot.kept + sum(again.snapshot.reasons.values()) == 150


def test_sigkill_at_five_points_gives_the_same_snapshot_and_downloads_nothing_twice(tmp_path: Path):
    with ProceduralWeb(150, seed=11, hang_s=3) as web:
        web.write(tmp_path)
        path = main_config(tmp_path)
        calm = load_config(str(path), [f"dataset={tmp_path / 'calm'}"])
        assert refresh(calm, Silent()).published
        web.requests.clear()
        committed: list[tuple[set[str], dict[str, int]]] = []
        for point in KILL_AT:
            run = subprocess.run([sys.executable, "-c", SCRIPT, str(path), point], check=False, cwd=Path.cwd())
            assert run.returncode == -signal.SIGKILL, point
            committed.append((downloaded(tmp_path / "killed"), dict(web.requests)))
        report = refresh(load_config(str(path)), Silent())
        assert report.published and "images" not in report.computed, "all was downloaded before the last kill"
    assert [len(uids) for uids, _ in committed][:2] == [0, 0] and len(committed[2][0]) > 0
    assert ledger_digests(tmp_path / "killed") == ledger_digests(tmp_path / "calm")
    dataset = Dataset(str(tmp_path / "killed"))
    pairs = read_files(dataset, dataset.snapshot().files("pairs"), fields.PAIRS, ["uid", "url"]).to_pylist()
    for uids, requests in committed:
        for pair in pairs:
            if pair["uid"] in uids:
                assert web.requests[pair["url"]] == requests.get(pair["url"], 0), "downloaded again after its commit"
