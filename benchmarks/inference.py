"""Model stages of real size against the plain loops that a user would write with their libraries, in one run.

    python -m benchmarks.inference [--device auto|cpu|cuda] [--parts clip,blip] [--repeats N] [--scale X] [--out FILE]

Models have the published sizes and random weights: what they say is noise, what they cost is real. Each part compares
ways to do the same work; the ways of a case take turns, `repeats` times after a warm-up of each, and medians are told,
with the rate as a ratio to that of the first way, the plain loop. `pairmill` ways are the stages themselves, image
bytes in and columns out. Answers are compared, too.

The ceiling is what a large product of matrices reaches on the device in a precision; a case that knows how many
floating point operations it takes tells its share of it.

Prints a table; writes benchmarks/results/inference-<date>.json, one entry for each device, after each case.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Case:
    """Some work and the ways to do it."""

    name: str
    unit: str
    """What is counted, in the plural."""
    items: int
    ways: dict[str, Callable[[], Any]]
    """The first is the plain loop; each does the whole work once."""
    compare: Callable[[dict[str, Any]], dict[str, float]] | None = None
    """How far answers are apart, by what the ways returned."""
    flops: dict[str, tuple[float, str]] = field(default_factory=dict)
    """Of a way: floating point operations of an item (of those that matter), and the precision of the ceiling."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is worth telling of it."""


def ceiling(device: str, precision: str) -> float:
    """Floating point operations a second of a large product of matrices on all of a device; the best of five.

    On a CPU each core makes a product of its own by oneDNN, whose weights are laid out before."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if device == "cpu":
        from concurrent.futures import ThreadPoolExecutor

        from pairmill.onednn import PackedLinear, usable

        side, threads = 2048, torch.get_num_threads()
        weight = torch.randn(side, side).to(dtype)
        product = PackedLinear(weight, None) if usable() else torch.nn.Linear(side, side, bias=False).to(dtype)
        inputs = [torch.randn(side, side).to(dtype) for _ in range(threads)]

        def one(x: torch.Tensor) -> None:
            torch.set_num_threads(1)
            with torch.inference_mode():
                product(x)

        with ThreadPoolExecutor(threads) as pool:
            seconds = _fastest(lambda: list(pool.map(one, inputs)), device)
        torch.set_num_threads(threads)
        return threads * 2 * side**3 / seconds
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: left @ right, device)


def _fastest(work: Callable[[], Any], device: str) -> float:
    taken = []
    for _ in range(6):
        begin = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def measure(case: Case, repeats: int, device: str) -> dict[str, Any]:
    """Wall and CPU seconds of each way, run in turn, and ratios to the first."""
    answers: dict[str, Any] = {}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in case.ways}
    for number in range(repeats + 1):
        for name, way in case.ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            answers[name] = way()
            if device != "cpu":
                torch.cuda.synchronize()
            if number:  # the first run warms up
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    found: dict[str, Any] = {}
    for name, runs in taken.items():
        wall, cpu = (statistics.median(values) for values in zip(*runs, strict=True))
        found[name] = {"wall_s": wall, "cpu_s": cpu, "per_s": case.items / wall, "walls_s": [run[0] for run in runs]}
    plain = found[next(iter(case.ways))]
    for name, row in found.items():
        row["ratio"] = plain["wall_s"] / row["wall_s"]
        if name in case.flops:
            flops, precision = case.flops[name]
            row["share_of_ceiling"] = row["per_s"] * flops / ceiling(device, precision)
    apart = case.compare(answers) if case.compare else {}
    return {"unit": case.unit, "items": case.items, **case.details, "ways": found, "apart": apart}


def show(name: str, found: dict[str, Any]) -> None:
    """A table of one case."""
    print(f"\n{name}: {found['items']} {found['unit']}")
    print(f"  {'way':<34}{'wall s':>8}{'CPU s':>8}{'per s':>9}{'x plain':>9}{'of ceiling':>12}")
    for way, row in found["ways"].items():
        share = f"{row['share_of_ceiling']:12.0%}" if "share_of_ceiling" in row else " " * 12
        rates = f"{row['wall_s']:8.2f}{row['cpu_s']:8.2f}{row['per_s']:9.2f}{row['ratio']:9.2f}"
        print(f"  {way:<34}{rates}{share}")
    for what, value in found["apart"].items():
        print(f"  {what}: {value:.2e}", flush=True)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The cases of the parts that were asked for; each is prepared when its turn comes."""
    for part in options.parts.split(","):
        if part == "clip":
            from benchmarks.inference_clip import cases as of_part
        elif part == "blip":
            from benchmarks.inference_blip import cases as of_part
        else:
            raise SystemExit(f"there is no part {part!r}; there are clip and blip")
        yield from of_part(options)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--parts", default="clip,blip")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="times the items of each case")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    out = options.out or RESULTS / f"inference-{today}.json"
    entry: dict[str, Any] = {
        "hardware": _hardware(options.device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "transformers")},
        "repeats": options.repeats,
        "ceiling_tflops": {p: ceiling(options.device, p) / 1e12 for p in ("fp32", "bf16")},
        "cases": {},
    }
    print(f"{entry['hardware']}, {entry['threads']} threads, ceiling in TFLOP/s: {entry['ceiling_tflops']}")
    known = json.loads(out.read_text()) if out.is_file() else {"date": today}
    for case in cases(options):
        found = measure(case, options.repeats, options.device)
        show(case.name, found)
        entry["cases"][case.name] = _rounded(found)
        out.write_text(json.dumps(known | {options.device: _rounded(entry)}, indent=1) + "\n")
    print(f"\nwrote {out.name}: {options.device}")


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
