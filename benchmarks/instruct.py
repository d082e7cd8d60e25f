"""Whole runs of the recipe `instruct` over an endpoint: answers a second while it is busy, against what it can
give (requests in flight over the mean latency), on the local engine with one and two processes and on Ray.

The endpoint is on the loopback, in a process of its own; an answer takes 0.4 to 2 s, drawn from the request, and says
what the texts in its prompt say, so it passes the checks. Images, boxes and the like are made before the clock starts:
only the conversations are lacking. Journal, budget, reading, checks and commits are all in.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

PAIRS = 2000
IN_FLIGHT = 200
LATENCY = (0.4, 2.0)
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"kind": "local"},
    "local, 2 processes": {"kind": "local", "workers": 2},
    "ray": {"kind": "ray", "address": "local"},
}


def serve(pipe: Connection) -> None:
    """The endpoint: tells its port; at each message the moments of its answers since the last one, until None comes."""
    from aiohttp import web

    moments: list[float] = []

    async def answer(request: web.Request) -> web.Response:
        data = await request.read()
        drawn = int.from_bytes(hashlib.sha256(data).digest()[:4], "big") / 2**32
        body = json.loads(data)
        lines = body["messages"][-1]["content"].split("\n")
        texts = [json.loads(line) for line in lines if line.startswith('"') and line.endswith('"')]
        questions = ("What does the picture show?", "What else can be seen?")
        text = json.dumps([{"question": q, "answer": t} for q, t in zip(questions, texts, strict=False)])
        if "plain prose" in lines[-1]:
            text = " ".join(texts)
        elif "the question" in lines[-1]:
            text = json.dumps([{"question": "Why might the animal be near the car?", "answer": " ".join(texts[:2])}])
        await asyncio.sleep(LATENCY[0] + (LATENCY[1] - LATENCY[0]) * drawn)
        moments.append(time.monotonic())
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(data) // 4, "completion_tokens": len(text) // 4}
        return web.json_response({"id": "x", "choices": [choice], "usage": usage})

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        pipe.send(runner.addresses[0][1])
        while await asyncio.to_thread(pipe.recv) is not None:
            pipe.send(list(moments))
            moments.clear()
        await runner.cleanup()

    asyncio.run(run())


def photographs(folder: Path, count: int) -> dict[str, Any]:
    """A source of small pictures with three texts each."""
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    animals, places, colours = ("dog", "cat", "horse", "cow"), ("park", "street", "field", "garden"), ("red", "blue")
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{n:06d}.jpg")
        images.append({"id": n, "file_name": f"{n:06d}.jpg", "width": 320, "height": 240})
        animal, place, colour = animals[n % 4], places[n // 4 % 4], colours[n % 2]
        for text in (
            f"A {animal} stands in a {place} beside a {colour} car.",
            f"A {colour} car is parked in the {place} near a {animal}.",
            f"The {place} has many trees, and a {animal} looks at a {colour} car.",
        ):
            annotations.append({"id": len(annotations), "image_id": n, "caption": text})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"kind": "image_folder", "path": str(folder / "images"), "captions": str(folder / "captions.json")}


def run(folder: Path, data: dict[str, Any]) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    subprocess.run(
        [sys.executable, "-m", "pairmill", "run", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    most = IN_FLIGHT / statistics.mean(LATENCY)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    found: dict[str, list[float]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        base: dict[str, Any] = {
            "dataset": str(folder / "dataset"),
            "recipe": "instruct",
            "source": photographs(folder, options.pairs),
            "dedup": {"exact": False},
            "engine": {"kind": "local"},
        }
        run(folder, base)  # offline: all but the endpoint's conversations is there
        writer = {"kind": "endpoint", "name": "m", "base_url": f"http://127.0.0.1:{port}/v1", "concurrency": IN_FLIGHT}
        asked = {
            "kinds": {"conversation": 1, "detail": 1, "complex": 1},
            "writer": writer,
            "price": {"prompt": 1, "completion": 2},
            "budget": {"money": 10_000},
        }
        for turn in range(options.rounds):
            for name, engine in ENGINES.items():
                dataset = folder / f"dataset-{turn}-{len(found[name])}-{engine['kind']}-{engine.get('workers', 1)}"
                shutil.copytree(folder / "dataset", dataset)
                run(folder, {**base, "dataset": str(dataset), "engine": engine, "instruct": asked})
                ours.send("moments")
                moments = ours.recv()
                found[name].append(len(moments) / (moments[-1] - moments[0] + statistics.mean(LATENCY)))
                print(f"{name}: {len(moments)} answers, {found[name][-1]:.1f} a second of {most:.1f}", flush=True)
                shutil.rmtree(dataset)
    ours.send(None)
    server.join(10)
    result = {
        "date": datetime.date.today().isoformat(),  # noqa: DTZ011 (a day is meant)
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "load_at_the_end": os.getloadavg()},
        "pairs": options.pairs,
        "in_flight": IN_FLIGHT,
        "latency_s": LATENCY,
        "most_at_that_latency": round(most, 1),
        "answers_per_second": {name: [round(value, 1) for value in values] for name, values in found.items()},
        "share_of_the_most": {name: round(statistics.median(values) / most, 3) for name, values in found.items()},
    }
    print(json.dumps(result["share_of_the_most"], indent=1))
    out = Path(__file__).parent / "results" / f"instruct-{result['date']}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
