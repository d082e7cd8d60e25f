"""How the everyday verbs grow with the number of pairs: 100,000, 300,000 and 1,000,000 rows of metadata, no images.

The recipe is `text_only`. Each verb runs in a process of its own by the command that a user types, so start-up counts
too; its wall time and its peak memory are taken. Verbs are run in turn, `ROUNDS` times over, and the median is told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROUNDS = 3
SIZES = (100_000, 300_000, 1_000_000)
WORDS = [f"word{i}" for i in range(5000)]


def write_urls(path: Path, rows: int, start: int = 0) -> None:
    """Alt texts of 0 to 12 words, five hosts a thousand rows."""
    chance = np.random.default_rng(start)
    counts = chance.integers(0, 13, rows)
    picks = chance.integers(0, len(WORDS), int(counts.sum()))
    ends = np.cumsum(np.r_[0, counts])
    texts = [" ".join(WORDS[w] for w in picks[a:b]) for a, b in itertools.pairwise(ends)]
    urls = [f"http://host{i % 200}.example/{i}.jpg" for i in range(start, start + rows)]
    pq.write_table(pa.table({"url": urls, "text": texts}), path)


def apart(path: Path, rows: int, start: int = 0) -> None:
    """`write_urls` in a process of its own: a child's peak memory is never told as less than that of this one."""
    child = multiprocessing.get_context("spawn").Process(target=write_urls, args=(path, rows, start))
    child.start()
    child.join()
    assert child.exitcode == 0


def timed(*arguments: str) -> dict[str, float]:
    """Seconds and peak memory (MiB) of a command; it must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pairmill", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {errors}")
    return {"seconds": seconds, "mib": usage.ru_maxrss / 1024}


def measure(rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """All verbs on a dataset of so many rows."""
    dataset = str(folder / "dataset")
    apart(folder / "urls.parquet", rows)
    config = folder / "config.yaml"
    source = {"kind": "url_table", "path": str(folder / "*.parquet")}
    data = {"dataset": dataset, "recipe": "text_only", "engine": {"kind": "local"}, "source": source}
    config.write_text(yaml.safe_dump({**data, "keep": {"language": None}}))
    found = {"first run": timed("run", str(config))}
    apart(folder / "more.parquet", rows // 100, rows)
    found["plan, 1% new"] = timed("plan", str(config))
    found["refresh, 1% new"] = timed("run", str(config))
    rounds: dict[str, list[dict[str, float]]] = {}
    for turn in range(ROUNDS):
        least = 3 + turn % 2
        verbs: dict[str, tuple[str, ...]] = {
            "plan": ("plan", str(config)),
            "run, nothing new": ("run", str(config)),
            "run, other threshold": ("run", str(config), "--set", f"keep.min_words={least + 1}"),
            "run, back": ("run", str(config)),
            "status": ("status", dataset),
            "snapshots": ("snapshots", dataset),
            "sql, counts by reason": ("sql", dataset, "SELECT reason, count(*) FROM pairs GROUP BY 1"),
            "sql, one pair": ("sql", dataset, "SELECT * FROM pairs WHERE url = 'http://host7.example/7.jpg'"),
            "diff": ("diff", dataset, "1", "2"),
            "verify": ("verify", dataset),
            "vacuum, dry run": ("vacuum", dataset, "--dry-run"),
            "forget one url": ("forget", dataset, "--url", f"http://host{turn + 9}.example/{turn + 9}.jpg", "--yes"),
            "forget a domain (0.5%)": ("forget", dataset, "--domain", f"host{turn + 50}.example", "--yes"),
            "forget --check": ("forget", dataset, "--check"),
        }
        for name, arguments in verbs.items():
            rounds.setdefault(name, []).append(timed(*arguments))
    for name, runs in rounds.items():
        found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, help="where the figures go; results/metadata-DATE.json without it")
    arguments = parser.parse_args()
    results = {}
    for rows in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            results[rows] = measure(rows, Path(folder))
        for verb, cost in results[rows].items():
            print(f"{rows:>9,}  {verb:24} {cost['seconds']:8.2f} s  {cost['mib']:7.0f} MiB", flush=True)
    out = arguments.out or Path(__file__).parent / "results" / f"metadata-{time.strftime('%Y-%m-%d')}.json"
    out.write_text(json.dumps({"cpus": os.cpu_count(), "rounds": ROUNDS, "sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
