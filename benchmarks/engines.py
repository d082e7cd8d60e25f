"""Local, Ray and Beam side by side: what each engine costs over the stages that it runs, and how that grows.

    python -m benchmarks.engines [--rows 2000,20000] [--engines local,local-2,ray,beam,beam-2] [--rounds 1] [--out FILE]

The recipe clip_filter with the shipped tiny models over a procedural web's pictures in WebDataset tars: decoded and
stored again as after a download, but by no web server, which would be what is measured. They are rendered once and kept
in --data. Each run is the command in a process of its own, on a new dataset; in each round all engines, one after the
other. Told of each run:

- wall seconds of the command, interpreter and imports included; what the run says of its own wall time
  (`pairmill.spent`), and the engine share: all that is not in stages;
- seconds in stages, summed over workers, and the CPU seconds of all processes;
- peak memory of the driver (RSS) and of all its processes together (PSS, which counts shared pages once), sampled;
- how much more a row costs than at the smallest number of rows (growth).

Start-up is a run over `START` rows. All engines must agree on what is kept. Prints as it goes; the JSON is written
after each run, so Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import yaml

from pairmill.procedural.web import PROPORTIONS, Kind, make_rows, served_bytes
from pairmill.spent import STAGES, engine_share
from pairmill.store import Dataset

ENGINES: dict[str, dict[str, Any]] = {
    "local": {"kind": "local"},
    "local-2": {"kind": "local", "workers": 2},
    "ray": {"kind": "ray", "address": "local"},
    "beam": {"kind": "beam"},
    "beam-2": {
        "kind": "beam",
        "pipeline_options": ["--direct_num_workers=2", "--direct_running_mode=multi_processing"],
    },
}
"""Beam on its DirectRunner: a thread of the driver, and two processes, as the local engine."""
START = 20
"""Rows of the run that tells what starting costs."""
SAMPLES_A_TAR = 1000
EVERY_S = 0.25
"""Between two looks at the memory."""
SOFTWARE = ("pairmill", "ray", "apache-beam", "torch", "pyarrow", "deltalake", "numpy", "pillow")
SERVED = {
    kind: share for kind, share in PROPORTIONS.items() if kind.has_picture or kind in (Kind.TRUNCATED, Kind.BROKEN)
}
"""What the tars hold: all but what a web server alone can do wrong."""


# -- the pictures -----------------------------------------------------------------------------------------------------


def tars(folder: Path, rows: int) -> Path:
    """A folder of tars with so many samples; made where it is not there yet."""
    ready = folder / f"{rows}"
    if ready.exists():
        return ready
    print(f"rendering {rows:,} pictures", flush=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{rows}-", dir=folder))
    starts = range(0, rows, SAMPLES_A_TAR)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_tar, itertools.repeat(unfinished), itertools.repeat(rows), starts))
    unfinished.rename(ready)
    return ready


@functools.lru_cache(maxsize=1)
def _rows(rows: int) -> Any:
    return make_rows(rows, 0, "web.invalid", 80, SERVED)


def _write_tar(folder: Path, rows: int, start: int) -> None:
    with tarfile.open(folder / f"{start // SAMPLES_A_TAR:05d}.tar", "w") as tar:
        for number, row in enumerate(_rows(rows)[start : start + SAMPLES_A_TAR], start):
            key = f"{number:07d}"
            ending = row.path.rpartition(".")[2]
            for name, data in (
                (f"{key}.{ending}", served_bytes(row)),
                (f"{key}.txt", row.text.encode()),
                (f"{key}.json", json.dumps({"url": row.url, "key": key}).encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


# -- a run ------------------------------------------------------------------------------------------------------------


class Watch:
    """Looks at a process and all that it started, until it is gone."""

    def __init__(self, pid: int) -> None:
        self._driver = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._cpu: dict[int, float] = {}
        self.driver = self.all = self.processes = 0
        """Peaks: bytes of the driver, of all, and how many there were."""

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """User and system time, as last seen of each process."""
        return sum(self._cpu.values())

    def _look(self) -> None:
        while not self._stop.wait(EVERY_S):
            whole = count = 0
            for process in self._family():
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_full_info()
                    whole += memory.pss
                    count += 1
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
                    if process.pid == self._driver.pid:
                        self.driver = max(self.driver, memory.rss)
            self.all, self.processes = max(self.all, whole), max(self.processes, count)

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self._driver, *self._driver.children(recursive=True)]
        return []


def config(dataset: Path, source: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """What is run; two shards at least, so that two workers have something to do."""
    return {
        "dataset": str(dataset),
        "recipe": "clip_filter",
        "source": {"kind": "webdataset", "path": str(source)},
        "engine": engine,
        "models": {"device": "cpu"},
        "keep": {"clip_score": ">= 0.2", "min_side": 32},
    }


def run(folder: Path, source: Path, engine: dict[str, Any], rows: int) -> dict[str, Any]:
    """Run the command over a new dataset; what it cost, and how many pairs it kept."""
    dataset = folder / "dataset"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config(dataset, source, engine)))
    command = [sys.executable, "-m", "pairmill", "run", str(path), "--json"]
    with (folder / "stderr").open("wb") as said:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            with Watch(process.pid) as watch:
                status = process.wait()
            wall = time.perf_counter() - begin
        except BaseException:
            process.terminate()
            process.wait(30)
            raise
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: {(folder / 'stderr').read_text()[-2000:]}")
    record = Dataset(str(dataset)).snapshot().record
    shutil.rmtree(dataset)
    return {
        "rows": rows,
        "kept": record.kept,
        "wall_s": round(wall, 2),
        "run_s": record.seconds,
        "rows_per_s": round(rows / wall, 1),
        "stages_summed_s": round(sum(record.stage_seconds.values()), 2),
        "stages_s": record.stage_seconds,
        "spent_s": record.spent,
        "engine_share": round(engine_share(record.spent), 4),
        "outside_stages_s": round(wall - record.spent[STAGES], 2),
        "cpu_s": round(watch.cpu_s, 1),
        "driver_peak_mib": round(watch.driver / 2**20),
        "all_peak_mib": round(watch.all / 2**20),
        "processes": watch.processes,
    }


# -- all of them ------------------------------------------------------------------------------------------------------


def turns(rows: list[int], engines: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Rows and engine of each run, the engines in turn; first those that tell what starting costs."""
    for count in (START, *rows):
        for _ in range(rounds):
            for engine in engines:
                yield count, engine


def summary(runs: list[dict[str, Any]], rows: list[int], engines: list[str]) -> list[dict[str, Any]]:
    """Medians by engine and rows, against the local engine in one process, and against the smallest number of rows."""
    told = ("wall_s", "rows_per_s", "stages_summed_s", "engine_share", "outside_stages_s", "cpu_s")
    told += ("driver_peak_mib", "all_peak_mib")
    table: list[dict[str, Any]] = []
    for engine, count in itertools.product(engines, (START, *rows)):
        mine = [r for r in runs if (r["engine"], r["rows"]) == (engine, count)]
        if mine:
            table.append({"engine": engine, "rows": count} | {k: statistics.median(r[k] for r in mine) for k in told})
    by_key = {(line["engine"], line["rows"]): line for line in table}
    for line in table:
        local, start = by_key.get(("local", line["rows"])), by_key.get((line["engine"], START))
        if local:
            line["wall_to_local"] = round(line["wall_s"] / local["wall_s"], 3)
            line["cpu_to_local"] = round(line["cpu_s"] / local["cpu_s"], 3)
        small = by_key.get((line["engine"], rows[0]))
        if start and small and line["rows"] > rows[0]:
            line["growth"] = round(_a_row(line, start) / _a_row(small, start), 3)
    return table


def _a_row(line: dict[str, Any], start: dict[str, Any]) -> float:
    """Wall seconds of a row, starting aside."""
    return float((line["wall_s"] - start["wall_s"]) / (line["rows"] - START))


def show(table: list[dict[str, Any]]) -> None:
    """The summary as a table."""
    heads = ("engine", "rows", "wall_s", "wall_to_local", "rows_per_s", "stages_summed_s", "outside_stages_s")
    heads += ("engine_share", "cpu_s", "driver_peak_mib", "all_peak_mib", "growth")
    print(" ".join(f"{head:>16}" for head in heads))
    for line in table:
        print(" ".join(f"{line.get(head, '')!s:>16}" for head in heads))


def machine() -> dict[str, Any]:
    """What it ran on."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for name in SOFTWARE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpus": os.cpu_count(),
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "software": versions,
        "load_at_start": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="2000,20000", help="how many, smallest first")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "pairmill-bench-engines")
    parser.add_argument("--out", type=Path, help="where the figures go; results/engines-DATE.json without it")
    options = parser.parse_args()
    rows, engines = [int(count) for count in options.rows.split(",")], options.engines.split(",")
    today = datetime.date.today().isoformat()  # noqa: DTZ011 (a day is meant)
    out = options.out or Path(__file__).parent / "results" / f"engines-{today}.json"
    options.data.mkdir(parents=True, exist_ok=True)
    sources = {count: tars(options.data, count) for count in (START, *rows)}
    result: dict[str, Any] = {"date": today, "recipe": "clip_filter", "machine": machine(), "runs": [], "table": []}
    kept: dict[int, int] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="pairmill-bench-") as folder:
            for count, engine in turns(rows, engines, options.rounds):
                found = run(Path(folder), sources[count], ENGINES[engine], count)
                told = ("wall_s", "rows_per_s", "engine_share", "cpu_s", "driver_peak_mib", "all_peak_mib")
                print(f"{count:>7,} {engine:8}", *(f"{k} {found[k]}" for k in told), flush=True)
                if kept.setdefault(count, found["kept"]) != found["kept"]:
                    raise RuntimeError(f"{engine} kept {found['kept']} of {count} pairs, others {kept[count]}")
                result["runs"].append({"engine": engine, **found})
                result["table"] = summary(result["runs"], rows, engines)
                out.write_text(json.dumps(result, indent=1) + "\n")
    except KeyboardInterrupt:
        print("interrupted: what was measured until now is kept", flush=True)
    show(result["table"])


if __name__ == "__main__":
    main()
