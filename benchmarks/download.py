"""How fast images come in: pairmill's downloader, and img2dataset, from a web server on this machine.

    python -m benchmarks.download [--images 1000] [--size 256] [--with-img2dataset]

Prints a table and writes benchmarks/results/download-DATE.json. Photograph-like JPEGs of about 100 KB, the shorter side
resized to `size`. CPU seconds are those of the downloading processes only. img2dataset runs with its own decoder; its
start-up is taken out: its figure is the difference between a run of all images and a run of a tenth of them.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import io
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from pairmill.sources.download import Download
from pairmill.stage import Batch, ErrorBudget, Stage, apply
from schemas import config

DISTINCT = 50


def photographs() -> list[bytes]:
    """JPEGs of 900 x 600 pixels that weigh what photographs do."""
    files = []
    for seed in range(DISTINCT):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize(
            (900, 600), Image.Resampling.BICUBIC
        )
        grain = Image.fromarray(rng.integers(0, 256, (600, 900, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
        buffer = io.BytesIO()
        Image.blend(coarse, grain, 0.25).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
    return files


def serve(ports: Any) -> None:
    """A web server that does as little as it can."""
    answers = [
        f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(d)}\r\n\r\n".encode() + d
        for d in photographs()
    ]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await reader.readuntil(b"\r\n\r\n"):
                writer.write(answers[int(request.split(b" ", 2)[1][1:].split(b".")[0]) % DISTINCT])
                await writer.drain()
                if b"close" in request:
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
        ports.put((server.sockets[0].getsockname()[1], sum(map(len, answers)) / DISTINCT))
        await server.serve_forever()

    asyncio.run(main())


def measure(stage: Stage, urls: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one kernel call over the URLs."""
    kernel = stage.open()
    columns = {"uid": urls, "url": urls, "locator": pa.nulls(len(urls), pa.string())}
    began, cpu = time.perf_counter(), cpu_seconds()
    table = apply(stage, kernel, Batch(pa.table(columns)), ErrorBudget(0, 0))
    wall, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    if table["reason"].null_count != len(urls):
        sys.exit(f"not all images came: {set(table['reason'].to_pylist())}")
    return wall, cpu


def img2dataset(urls: list[str], size: int) -> float:
    """CPU seconds of a run of img2dataset with its own decoder, start-up included."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "urls.txt").write_text("\n".join(urls))
        arguments = {
            "url_list": f"{folder}/urls.txt",
            "output_folder": f"{folder}/out",
            "output_format": "parquet",
            "image_size": size,
            "resize_mode": "keep_ratio",
            "resize_only_if_bigger": True,
            "thread_count": 64,
            "number_sample_per_shard": len(urls),
        }
        code = "import json, sys; from img2dataset import download; download(**json.load(sys.stdin))"
        before = cpu_seconds()
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(arguments).encode(),
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"},
            capture_output=True,
            check=True,
        )
        (stats,) = Path(folder, "out").glob("*_stats.json")
        if json.loads(stats.read_text())["successes"] != len(urls):
            sys.exit("img2dataset did not get all images")
        return cpu_seconds() - before


def cpu_seconds() -> float:
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(p.ru_utime + p.ru_stime for p in parts)


def median_of_three(stage: Stage, urls: list[str]) -> tuple[float, float]:
    return sorted(measure(stage, urls) for _ in range(3))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--with-img2dataset", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ports = context.SimpleQueue()
    server = context.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    port, weight = ports.get()
    urls = [f"http://127.0.0.1:{port}/{i}.jpg" for i in range(args.images)]
    stage = Download(
        resize=config.Resize(size=args.size), allow_private_addresses=True, concurrency=64, per_host=64, retries=0
    )
    results: dict[str, tuple[float | None, float]] = {"pairmill": median_of_three(stage, urls)}
    results["pairmill, no resize"] = median_of_three(replace(stage, resize=config.Resize(mode="no")), urls)
    if args.with_img2dataset:
        few, everything = img2dataset(urls[: len(urls) // 10], args.size), img2dataset(urls, args.size)
        results["img2dataset"] = (None, (everything - few) * 10 / 9)
    server.kill()
    report(results, args.images, weight)


def report(results: dict[str, tuple[float | None, float]], images: int, weight: float) -> None:
    print(f"{images} images of {weight / 1000:.0f} KB, {os.cpu_count()} cores")
    print(f"{'':24s} {'images/s':>9s} {'CPU s / 1000':>13s}")
    rows = {
        name: {"images_per_s": images / wall if wall else None, "cpu_s_per_1000": cpu / images * 1000}
        for name, (wall, cpu) in results.items()
    }
    for name, row in rows.items():
        rate = "" if row["images_per_s"] is None else f"{row['images_per_s']:.0f}"
        print(f"{name:24s} {rate:>9s} {row['cpu_s_per_1000']:13.2f}")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = {
        "date": today,
        "images": images,
        "bytes": weight,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "results": rows,
    }
    (folder / f"download-{today}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
