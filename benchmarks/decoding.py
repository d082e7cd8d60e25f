"""Where should images be decoded: beside the model, or by other workers that send it pixels?

CPU milliseconds an image of each way, interleaved, in this process and through Ray's object store (a Ray of its own on
loopback). Beside the model: decode the stored JPEG and resize it to the model's side, as `Passes` does in its threads,
for several sides of stored images (``download.resize``). By others: what the model's worker still pays to take over a
batch of resized pixels from the object store, and what the sender pays to put it there.

    python -m benchmarks.decoding
"""

from __future__ import annotations

import datetime
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, BATCH, ROUNDS = 224, 256, 7
STORED = (1024, 512, 384, 256)
"""Longer sides of stored images, pixels; 4:3."""
RESULTS = Path(__file__).resolve().parent / "results"


def picture(side: int, seed: int) -> bytes:
    """A JPEG with edges, gradients and some grain: as many bytes a pixel as photographs have (about 0.2)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.normal(0, 6, image.shape[:2]).astype(np.int16)[..., None]
    buffer = io.BytesIO()
    Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepared(data: bytes) -> np.ndarray:
    """What a model of `SIDE` pixels sees of a stored image, as bytes."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    scale = SIDE / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left = (image.width - SIDE) // 2
    return np.asarray(image.crop((left, 0, left + SIDE, SIDE)))


def cpu_ms(work: Callable[[], object], images: int) -> float:
    """CPU milliseconds an image."""
    begin = time.process_time()
    work()
    return (time.process_time() - begin) / images * 1e3


def main() -> None:
    import ray

    ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.2", log_to_driver=False)
    stored = {side: [picture(side, seed) for seed in range(16)] for side in STORED}
    pixels = np.random.default_rng(0).integers(0, 255, (BATCH, SIDE, SIDE, 3), dtype=np.uint8)

    @ray.remote(num_cpus=1)
    def send(batch: np.ndarray) -> np.ndarray:
        return batch.copy()

    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for side, images in stored.items():
            spent = cpu_ms(lambda images=images: [prepared(data) for data in images], len(images))
            found.setdefault(f"decode and resize, stored at {side}", []).append(spent)
        found.setdefault("put pixels into the object store", []).append(cpu_ms(lambda: ray.put(pixels), BATCH))
        ready = send.remote(pixels)
        ray.wait([ready])
        taken = cpu_ms(lambda ready=ready: np.array(ray.get(ready)), BATCH)
        found.setdefault("take pixels from the object store", []).append(taken)
    ray.shutdown()
    figures = {name: round(statistics.median(values), 3) for name, values in found.items()}
    sizes = {side: round(statistics.mean(map(len, images))) for side, images in stored.items()}
    for name, value in figures.items():
        print(f"{name:<42}{value:>8.3f} CPU ms an image")
    out = RESULTS / f"decoding-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}.json"
    record = {"side": SIDE, "batch": BATCH, "rounds": ROUNDS, "stored_bytes": sizes, "cpu_ms_an_image": figures}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"bytes an image: pixels {SIDE * SIDE * 3:,}, stored {sizes}")


if __name__ == "__main__":
    main()
