"""Faults 1, 8 and 9 where answers cost money: a whole run over a paid endpoint that misbehaves, killed again and again,
under a budget."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from aiohttp import web
from PIL import Image

from filters.instruct import check
from pairmill.instructions import Context, Instruction
from pairmill.query import query
from pairmill.store import Dataset
from tests.hostile.endpoint_server import Answer, Asked, EndpointServer, error, reset, says
from tests.hostile.writer_server import kind_of, texts_of, used

IMAGES = 16
KINDS = {"conversation": 1.0, "detail": 1.0, "complex": 1.0}


def photographs(folder: Path) -> dict[str, Any]:
    """A source of pictures with three texts each."""
    (folder / "images").mkdir()
    images, annotations = [], []
    animals, places, colours = ("dog", "cat", "horse", "cow"), ("park", "street", "field", "garden"), ("red", "blue")
    for n in range(IMAGES):
        pixels = np.random.default_rng(n).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{n:03d}.jpg")
        images.append({"id": n, "file_name": f"{n:03d}.jpg", "width": 320, "height": 240})
        animal, place, colour = animals[n % 4], places[n // 4 % 4], colours[n % 2]
        for text in (
            f"A {animal} stands in a {place} beside a {colour} car.",
            f"A {colour} car is parked in the {place} near a {animal}.",
            f"The {place} has many trees, and a {animal} looks at a {colour} car.",
        ):
            annotations.append({"id": len(annotations), "image_id": n, "caption": text})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {"kind": "image_folder", "path": str(folder / "images"), "captions": str(folder / "captions.json")}


def written(asked: Asked) -> str:
    """A writer that needs no model: it says what the texts say."""
    texts, kind = texts_of(asked), kind_of(asked)
    if kind == "detail":
        return " ".join(texts)
    if kind == "complex":
        return json.dumps([{"question": "Why might the animal be near the car?", "answer": " ".join(texts[:2])}])
    questions = ("What does the picture show?", "What else can be seen?")
    return json.dumps([{"question": q, "answer": t} for q, t in zip(questions, texts, strict=False)])


@dataclass
class Paid:
    """Charges what it delivers to the end; of each request of its first sight, it may break in one way."""

    rate: float = 0.4
    after_s: float = 0.02
    delivered: Counter[str] = field(default_factory=Counter)
    """Answers that were sent whole, by what was asked."""
    tokens: int = 0
    asked: Counter[str] = field(default_factory=Counter)

    def __call__(self, asked: Asked) -> Answer:
        key = hashlib.sha256(json.dumps(asked.body, sort_keys=True).encode()).hexdigest()
        self.asked[key] += 1
        chance = int(key[:8], 16) / 2**32
        text = written(asked)
        if self.asked[key] == 1 and chance < self.rate:
            way = int(key[8:16], 16) % 4
            if way < 3:
                return (error(429, Retry_After="0"), error(500), reset(b'{"choices": [{"mess'))[way]
        if chance > 0.85:  # malformed, and always so for this seed
            text = text[: len(text) // 2] if kind_of(asked) != "detail" else "As an AI, I cannot see the image."

        async def answer(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(self.after_s * (0.5 + chance))
            response = await says(used(text, prompt=300, answered=60))(request)
            await response.prepare(request)
            await response.write_eof()
            self.delivered[key] += 1
            self.tokens += 360
            return response

        return answer


def settings(folder: Path, name: str, source: dict[str, Any], base_url: str, **instruct: Any) -> Path:
    data = {
        "dataset": str(folder / name),
        "recipe": "instruct",
        "shard_size": 8,
        "source": source,
        "engine": {"kind": "local"},
        "instruct": {
            "kinds": KINDS,
            "writer": {
                "kind": "endpoint",
                "name": "paid",
                "base_url": base_url,
                "concurrency": 6,
                "retries": 6,
                "max_retry_wait_s": 1,
                "max_tokens": 200,
                "answers": 3,
            },
            "price": {"prompt": 1.0, "completion": 2.0},
            **instruct,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pairmill", "run", str(config)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finish(config: Path) -> None:
    process = start(config)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said.decode()


def conversations(folder: Path, name: str) -> list[dict[str, Any]]:
    sql = "SELECT uid, kind, messages, prompt_digest, answers, reason FROM instructions ORDER BY uid, kind"
    return query(Dataset(str(folder / name)).snapshot(), sql).to_pylist()


def usage(folder: Path, name: str) -> list[dict[str, Any]]:
    return query(Dataset(str(folder / name)).snapshot(), "FROM usage").to_pylist()


def test_killed_and_refused_a_run_pays_once_and_loses_nothing(tmp_path: Path):
    source = photographs(tmp_path)
    calm = Paid()
    with EndpointServer(calm) as server:
        finish(settings(tmp_path, "calm", source, server.base_url))
    wanted = conversations(tmp_path, "calm")
    assert len(wanted) == IMAGES * len(KINDS)
    good = [row for row in wanted if row["reason"] is None]
    assert len(good) >= 0.9 * len(wanted), Counter(row["reason"] for row in wanted)
    assert sum(row["answers"] for row in wanted) == sum(calm.delivered.values()) > len(wanted), "some asked anew"
    assert set(calm.delivered.values()) == {1}
    charged = [row for row in usage(tmp_path, "calm") if row["outcome"] != "lost"]
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in charged) == calm.tokens

    stormy, kills, in_flight = Paid(), 0, 6
    rng = random.Random(3)
    with EndpointServer(stormy) as server:
        config = settings(tmp_path, "stormy", source, server.base_url)
        while kills < 3:
            before = sum(stormy.delivered.values())
            process = start(config)
            give_up = time.monotonic() + 60
            target = before + rng.randint(5, 20)
            while sum(stormy.delivered.values()) < target and process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.005)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            process.communicate(timeout=60)
            if process.returncode == 0:
                break
        finish(config)
    assert kills == 3
    assert conversations(tmp_path, "stormy") == wanted, "as if nothing had happened"
    # What was delivered to a process that died before it could write it down is charged twice, and no more than that.
    assert set(stormy.delivered) == set(calm.delivered)
    assert sum(stormy.delivered.values()) - len(stormy.delivered) <= kills * in_flight
    rows = usage(tmp_path, "stormy")
    told = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
    assert told >= stormy.tokens, "nothing that may have been charged is missing from the ledger"
    broken = sum(row["outcome"] == "lost" for row in usage(tmp_path, "calm"))
    assert sum(row["outcome"] == "lost" for row in rows) <= broken + kills * in_flight


def test_a_budget_ends_a_run_cleanly_and_a_larger_one_goes_on(tmp_path: Path):
    source = photographs(tmp_path)
    paid = Paid(rate=0.0, after_s=0.005)
    with EndpointServer(paid) as server:
        tokens = 14_000
        first = settings(tmp_path, "budget", source, server.base_url, budget={"tokens": tokens})
        finish(first)
        assert 0 < paid.tokens <= tokens
        rows = conversations(tmp_path, "budget")
        reasons = Counter(row["reason"] for row in rows)
        assert reasons[None] > 0 and reasons["writer.budget"] > 0
        snapshot = Dataset(str(tmp_path / "budget")).snapshot().record
        assert (snapshot.kept, snapshot.deferred) == (IMAGES, 0), "pairs are not concerned"
        spent = paid.tokens
        finish(settings(tmp_path, "budget", source, server.base_url, budget={"tokens": 1_000_000}))
        rows = conversations(tmp_path, "budget")
        assert "writer.budget" not in {row["reason"] for row in rows}
        assert set(paid.delivered.values()) == {1}, "what was paid for under the small budget was not asked for again"
        assert paid.tokens > spent
        calm = Paid(rate=0.0, after_s=0.005)
    with EndpointServer(calm) as server:
        finish(settings(tmp_path, "whole", source, server.base_url))
    assert rows == conversations(tmp_path, "whole")
    for row in rows:
        if row["reason"] is None:
            made = Instruction.from_row({**dict.fromkeys(Instruction("detail").to_row()), **row})
            assert check(made.turns, (), made.kind, context(tmp_path, row["uid"])) == []


def context(folder: Path, uid: str) -> Context:
    texts = query(Dataset(str(folder / "budget")).snapshot(), f"SELECT text FROM texts WHERE uid = '{uid}'")
    return Context(uid, tuple(texts["text"].to_pylist()), (), 320, 240)
