"""What a refresh costs against the first run: 20,000 small pairs of a procedural web, then 1% new ones, nothing new,
and another threshold.

Every run is the command in a process of its own (local engine, the shipped models). Told are wall seconds, start-up and
loading of models included, the bytes that the process read (``rchar`` of /proc; what a run with nothing to do reads is
its libraries and the narrow columns), rows that each stage computed, and requests that the web saw.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pairmill.procedural.web import ProceduralWeb

ROUNDS = 3


def run(config: Path, *overrides: str) -> dict[str, Any]:
    """Run the command; its report, wall seconds and bytes read."""
    arguments = [x for o in overrides for x in ("--set", o)]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "pairmill", "run", str(config), "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a dead process still says what it read
    seconds = time.perf_counter() - begin
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
    read = next(int(line.split()[1]) for line in lines if line.startswith("rchar"))
    process.wait()
    return {"seconds": seconds, "read_mib": read / 2**20, "computed": report["computed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--recipe", default="capfilt", help="capfilt: with captioner and filter; or clip_filter")
    parser.add_argument("--out", type=Path, help="where the figures go; results/refresh-RECIPE-DATE.json without it")
    arguments = parser.parse_args()
    pairs, new = arguments.pairs, arguments.pairs // 100
    results: dict[str, Any] = {"pairs": pairs, "recipe": arguments.recipe, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary, ProceduralWeb(pairs + ROUNDS * new, seed=3, hang_s=3) as web:
        folder = Path(temporary)
        table = pa.table({"url": [r.url for r in web.rows], "text": [r.text for r in web.rows]})
        config = folder / "config.yaml"
        data = {
            "dataset": str(folder / "dataset"),
            "recipe": arguments.recipe,
            "source": {"kind": "url_table", "path": str(folder / "urls.parquet")},
            "engine": {"kind": "local"},
            "download": {"allow_private_addresses": True, "timeout_s": 2, "retries": 0, "per_host": 64},
            "keep": {"clip_score": ">= 0.2", "itm": ">= 0.5", "min_side": 32},
        }
        config.write_text(yaml.safe_dump(data))
        pq.write_table(table.slice(0, pairs), folder / "urls.parquet")
        results["first run"] = run(config)
        rounds: dict[str, list[dict[str, Any]]] = {"1% new": [], "nothing new": [], "another threshold": []}
        for turn in range(ROUNDS):
            pq.write_table(table.slice(0, pairs + (turn + 1) * new), folder / "urls.parquet")
            rounds["1% new"].append(run(config))
            rounds["nothing new"].append(run(config))
            before = dict(web.requests)
            key = "keep.itm" if arguments.recipe == "capfilt" else "keep.clip_score"
            rounds["another threshold"].append(run(config, f"{key}='>= 0.{turn + 2}1'"))
            assert dict(web.requests) == before, "a threshold asks for no image"
            run(config)
        images = [p.stat().st_size for p in (folder / "dataset").glob("images-*/shard=*/*.parquet")]
        results["images_mib"] = sum(images) / 2**20
    for name, runs in rounds.items():
        results[name] = {
            "seconds": statistics.median(r["seconds"] for r in runs),
            "read_mib": statistics.median(r["read_mib"] for r in runs),
            "computed": runs[-1]["computed"],
        }
    first = results["first run"]["seconds"]
    print(f"{arguments.recipe}: {pairs:,} pairs, {results['images_mib']:.0f} MiB of images; median of {ROUNDS}")
    for name in ("first run", *rounds):
        cost = results[name]
        share = cost["seconds"] / first
        print(
            f"  {name:18} {cost['seconds']:8.2f} s  {share:7.1%}  read {cost['read_mib']:7.0f} MiB  {cost['computed']}"
        )
    name = f"refresh-{arguments.recipe}-{time.strftime('%Y-%m-%d')}.json"
    out = arguments.out or Path(__file__).parent / "results" / name
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
