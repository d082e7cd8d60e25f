"""What the journal, the budget and the reading of answers cost: requests a second of `captioners.chat.PaidChat` against
those of a bare aiohttp loop, at the same number of requests in flight, over one endpoint.

The endpoint is on the loopback, in a process of its own; an answer takes 100 to 500 ms, drawn from the request, as long
as it does for a model; prompts and answers are as long as LLaVA's (5 kB, 900 characters). Each client runs in a process
of its own, too, and they take turns. The journal is switched on, and a budget that is large enough. ``batched`` is the
same in the sessions of a stage: `BATCH` requests, three kinds of a shard of 1,000 pairs, then the next ones; each waits
for its slowest answers.
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
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REQUESTS = 6000
IN_FLIGHT = 200
ROUNDS = 3
BATCH = 3000
CONTEXT = "A brown dog lies on a red sofa beside a window, and a cup stands on the table. " * 64
ANSWER = "Question:\n===\nWhat lies on the sofa?\n===\nAnswer:\n===\nA brown dog lies on it.\n" * 12


def serve(pipe: Connection) -> None:
    """The endpoint: tells its port, and serves until it is told to stop."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        drawn = hashlib.sha256(body).digest()
        await asyncio.sleep(0.1 + 0.4 * int.from_bytes(drawn[:4], "big") / 2**32)
        choice = {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": len(ANSWER) // 4}
        return web.json_response({"id": drawn.hex()[:8], "choices": [choice], "usage": usage})

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        pipe.send(runner.addresses[0][1])
        await asyncio.to_thread(pipe.recv)
        await runner.cleanup()

    asyncio.run(run())


def messages(turn: int, number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": CONTEXT}, {"role": "user", "content": f"Picture {turn}-{number}."}]


def bare(port: int, turn: int, requests: int, in_flight: int, _: str) -> int:
    """A loop that sends, reads and parses, and no more. Returns how many answers there were."""
    import aiohttp

    async def run() -> int:
        slots, url = asyncio.Semaphore(in_flight), f"http://127.0.0.1:{port}/v1/chat/completions"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(number: int) -> bool:
                body = {
                    "model": "some/model",
                    "messages": messages(turn, number),
                    "temperature": 0.7,
                    "top_p": 0.95,
                    "seed": number,
                    "max_tokens": 1000,
                }
                async with slots, session.post(url, json=body) as response:
                    return bool((await response.json())["choices"][0]["message"]["content"])

            return sum(await asyncio.gather(*(one(number) for number in range(requests))))

    return asyncio.run(run())


def batched(port: int, turn: int, requests: int, in_flight: int, dataset: str) -> int:
    """`paid`, one session after the other."""
    return paid(port, turn, requests, in_flight, f"{dataset}-batched", BATCH)


def paid(port: int, turn: int, requests: int, in_flight: int, dataset: str, batch: int | None = None) -> int:
    """`PaidChat`, with its journal and a budget. Returns how many answers there were."""
    from captioners.chat import ChatRequest, PaidChat
    from schemas.config import Budget, InstructWriter, Price

    url = f"http://127.0.0.1:{port}/v1"
    writer = InstructWriter(kind="endpoint", name="some/model", base_url=url, concurrency=in_flight)
    chat = PaidChat.of(dataset, writer, Price(prompt=1, completion=4), Budget(tokens=10**9, money=10**4))

    async def session(numbers: range) -> int:
        async with chat:

            async def one(number: int) -> bool:
                asked = ChatRequest(tuple(messages(turn, number)), 1000, 0.7, 0.95, number)
                answer = await chat.ask(f"{turn:032x}{number:032x}", number // BATCH, "detail", asked)
                return bool(answer.text) and not answer.cached

            return sum(await asyncio.gather(*map(one, numbers)))

    size = batch or requests
    return sum(asyncio.run(session(range(start, min(start + size, requests)))) for start in range(0, requests, size))


def client(pipe: Connection, work: Callable[..., int], *arguments: Any) -> None:
    """Run a client; tell seconds, seconds of CPU and how many answers there were."""
    import aiohttp  # noqa: F401 (loading it is no part of the figures)

    import captioners.chat  # noqa: F401

    before, begin = os.times(), time.perf_counter()
    answers = work(*arguments)
    seconds, after = time.perf_counter() - begin, os.times()
    pipe.send((seconds, after.user + after.system - before.user - before.system, answers))


def timed(work: Callable[..., int], *arguments: Any) -> tuple[float, float]:
    """Requests a second, and milliseconds of CPU a request, of a client in a process of its own."""
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=client, args=(theirs, work, *arguments))
    process.start()
    seconds, cpu, answers = mine.recv()
    process.join()
    if answers != arguments[2]:
        raise SystemExit(f"{work.__name__}: {answers} answers of {arguments[2]}")
    return answers / seconds, 1000 * cpu / answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="where the figures go; results/endpoint-DATE.json without it")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,))
    server.start()
    port = pipe.recv()
    clients = (bare, paid, batched)
    found: dict[str, list[tuple[float, float]]] = {work.__name__: [] for work in clients}
    with tempfile.TemporaryDirectory(prefix="pairmill-endpoint-") as folder:
        for turn in range(arguments.rounds):
            for work in clients if turn % 2 else clients[::-1]:
                name = work.__name__
                figures = timed(work, port, turn, arguments.requests, arguments.in_flight, f"{folder}/{turn}")
                found[name].append(figures)
                print(f"{name}: {figures[0]:.0f} requests a second, {figures[1]:.2f} ms of CPU a request", flush=True)
    pipe.send(None)
    server.join()
    middle = {
        name: {
            "requests_per_second": round(statistics.median(rate for rate, _ in runs), 1),
            "cpu_ms_per_request": round(statistics.median(cpu for _, cpu in runs), 3),
            "runs": [round(rate, 1) for rate, _ in runs],
        }
        for name, runs in found.items()
    }
    ratios = {
        name: round(float(middle[name]["requests_per_second"]) / float(middle["bare"]["requests_per_second"]), 3)
        for name in ("paid", "batched")
    }
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "python": sys.version.split()[0],
            "load_at_the_end": [round(load, 2) for load in os.getloadavg()],
        },
        "requests": arguments.requests,
        "in_flight": arguments.in_flight,
        "rounds": arguments.rounds,
        "latency_s": [0.1, 0.5],
        "most_at_that_latency": round(arguments.in_flight / 0.3, 1),
        **middle,
        "batch": BATCH,
        "ratio": ratios,
        "peak_rss_mib_of_a_client": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    out = arguments.out or Path(__file__).parent / "results" / f"endpoint-{results['date']}.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    for name, ratio in ratios.items():
        print(f"{name}: {100 * ratio:.1f}% of what a bare loop gets")


if __name__ == "__main__":
    main()
