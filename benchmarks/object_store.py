"""Memory stays bounded: a run on Ray over a hundred times as many bytes of images as Ray's object store can hold.

    python -m benchmarks.object_store [--images 2000] [--mib 4]

A loopback server sends large pictures (noise, so that nothing compresses), each under many addresses; the recipe
clip_filter fetches, stores, decodes and scores them with the shipped model, on a Ray of our own whose object store is
the smallest that Ray allows (75 MiB). Images are kept as they came, so the dataset holds as many bytes as were fetched;
it lies in a temporary folder, which has to have room for them.

Told are what went through the object store, the most that it held, what it spilled (has to be nothing), and the most
memory that driver and workers had. Prints a table; writes benchmarks/results/object_store-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from aiohttp import web
from PIL import Image

HERE = Path(__file__).resolve().parent
STORE_BYTES = 75 * 2**20
"""The least that Ray takes (ray_constants.OBJECT_STORE_MINIMUM_MEMORY_BYTES)."""
PICTURES = 4
SHARD = 25
IN_BYTES = ("image_bytes", "stored_image_bytes", "driver_rss_before", "spilled")
ROOM = 1.5
"""Free space that the temporary folder has to have, in sizes of the dataset."""


def pictures(mib: float) -> list[bytes]:
    """PNG files of noise, so large each."""
    side = round((mib * 2**20 / 3) ** 0.5)
    found = []
    for n in range(PICTURES):
        noise = np.random.default_rng(n).integers(0, 256, (side, side, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG", compress_level=0)
        found.append(file.getvalue())
    return found


class Server:
    """Serves the pictures, in a thread; a context manager."""

    def __init__(self, files: list[bytes]) -> None:
        self._files = files
        self.sent = 0
        self.port = 0
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _serve(self) -> None:
        application = web.Application()
        application.router.add_get("/{n}.png", self._answer)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await asyncio.to_thread(self._stop.wait)
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        body = self._files[int(request.match_info["n"]) % len(self._files)]
        self.sent += len(body)
        return web.Response(body=body, content_type="image/png")


class Watch(threading.Thread):
    """Looks at the object store and at the memory of all processes, several times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.looks = 0
        self.peaks: dict[str, int] = {}
        """Bytes: the most that was seen of each."""

    def run(self) -> None:
        while not self.over.wait(0.2):
            self.look()

    def look(self) -> None:
        """Once."""
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        store = get_memory_info_reply(state).store_stats
        found = {
            "object_store_used": store.object_store_bytes_used,
            "object_store_size": store.object_store_bytes_avail,
            "object_store_through": store.cumulative_created_bytes,
            "object_store_beside": store.object_store_bytes_fallback,
            "spilled": store.spilled_bytes_total,
            "restored": store.restored_bytes_total,
            **_memory(),
        }
        self.looks += 1
        self.peaks = {name: max(value, self.peaks.get(name, 0)) for name, value in found.items()}


def _memory() -> dict[str, int]:
    me = psutil.Process()
    workers = []
    for process in me.children(recursive=True):
        try:
            if "ray::" in " ".join(process.cmdline()):
                workers.append(process.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return {"driver_rss": me.memory_info().rss, "worker_rss": max(workers, default=0), "workers_rss": sum(workers)}


def drive(config: str) -> None:
    """The run, on a Ray with a small store; prints what was seen."""
    import ray

    from pairmill.report.progress import Silent
    from pairmill.run import load_config, refresh

    ray.init(
        address="local",
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        _node_ip_address="127.0.0.2",
        log_to_driver=False,
    )
    watch = Watch()
    watch.look()
    before = dict(watch.peaks)
    watch.start()
    begin = time.monotonic()
    record = refresh(load_config(config), Silent()).snapshot
    seconds = time.monotonic() - begin
    watch.over.set()
    watch.join()
    watch.look()
    ray.shutdown()
    assert record is not None
    found = {
        "seconds": seconds,
        "looks": watch.looks,
        "admitted": record.admitted,
        "computed": record.computed,
        "reasons": record.reasons,
        "bytes": record.bytes,
        "driver_rss_before": before["driver_rss"],
        **watch.peaks,
    }
    print(json.dumps(found))


def measure(images: int, mib: float) -> dict[str, Any]:
    """One run over so many images of this size."""
    files = pictures(mib)
    with tempfile.TemporaryDirectory() as temporary, Server(files) as server:
        folder = Path(temporary)
        free = shutil.disk_usage(folder).free
        if free < ROOM * images * len(files[0]):
            raise SystemExit(f"{folder} has {free / 2**30:.0f} GiB of room, which is too little; fewer --images?")
        urls = [f"http://127.0.0.1:{server.port}/{n % PICTURES}.png?as={n}" for n in range(images)]
        texts = [f"a picture of coloured noise, number {n} of many" for n in range(images)]
        pq.write_table(pa.table({"url": urls, "text": texts}), folder / "urls.parquet")
        data = {
            "dataset": str(folder / "dataset"),
            "recipe": "clip_filter",
            "source": {"kind": "url_table", "path": str(folder / "urls.parquet")},
            "download": {
                "allow_private_addresses": True,
                "concurrency": 8,
                "timeout_s": 120,
                "robots": False,
                "resize": {"mode": "no"},
            },
            "keep": {"clip_score": ">= -1", "min_contrast": 0},
            "engine": {"kind": "ray"},
            "shard_size": SHARD,
        }
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(data))
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_worker_niceness": "0"}
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), **quiet}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.object_store", "--drive", str(config)],
            stdout=subprocess.PIPE,
            cwd=HERE.parent,
            env=environment,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return {"image_bytes": server.sent, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--mib", type=float, default=4.0, help="of each image")
    parser.add_argument("--drive", metavar="CONFIG", help=argparse.SUPPRESS)
    name = f"object_store-{time.strftime('%Y-%m-%d')}.json"
    parser.add_argument("--out", type=Path, default=HERE / "results" / name)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(arguments.drive)
        return
    found = measure(arguments.images, arguments.mib)
    stored = sum(size for table, size in found["bytes"].items() if table.startswith("images"))
    times = found["image_bytes"] / found["object_store_size"]
    results = {"cpus": os.cpu_count(), "shard": SHARD, "times_the_store": times, "stored_image_bytes": stored, **found}
    mib = {k: v / 2**20 for k, v in results.items() if k.endswith("rss") or "store_" in k or k in IN_BYTES}
    print(f"{arguments.images} images, {times:.0f} times the object store, in {found['seconds']:.0f} s")
    for key, value in mib.items():
        print(f"  {key:24}{value:12,.1f} MiB")
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if found["spilled"] or times < 100 <= arguments.images * arguments.mib / 75:
        raise SystemExit("the object store spilled, or too little was fetched")


if __name__ == "__main__":
    main()
