"""80 real photographs with their captions, from a URL table over HTTP to shards that trainers read.

They lie beside the project (../shared); the test is skipped where they do not.
"""

from __future__ import annotations

import functools
import gc
import http.server
import io
import json
import tarfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest
from PIL import Image, ImageOps

from pairmill.export import export_webdataset
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import parse_config, refresh
from pairmill.store import Dataset
from tests.readers import open_clip_loader

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason="the COCO photographs are not beside the project")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name is the base class's)
        """Say nothing."""


@pytest.fixture(scope="module")
def photographs() -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a server of the photographs, and a caption for each file name."""
    data = json.loads((COCO / "captions.json").read_text())
    names = {image["id"]: image["file_name"] for image in data["images"]}
    captions: dict[str, str] = {}
    for row in data["annotations"]:
        captions.setdefault(names[row["image_id"]], row["caption"].strip())
    handler = functools.partial(Quiet, directory=str(COCO / "images"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", captions
        server.shutdown()


@pytest.fixture(scope="module")
def exported(photographs: tuple[str, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main recipe over a CSV of the photographs, exported."""
    address, captions = photographs
    root = tmp_path_factory.mktemp("coco")
    table = pa.table({"image_url": [f"{address}/{name}" for name in captions], "caption": list(captions.values())})
    pacsv.write_csv(table, root / "urls.csv")
    config = parse_config(
        {
            "dataset": str(root / "dataset"),
            "recipe": "clip_filter",
            "source": {"kind": "url_table", "path": str(root / "urls.csv"), "url": "image_url", "text": "caption"},
            "engine": {"kind": "local"},
            "shard_size": 30,
            "download": {"allow_private_addresses": True, "resize": {"mode": "keep_ratio", "size": 256}},
            # the shipped model knows shapes, not photographs: its scores are stored, and nothing is judged by them
            "keep": {"clip_score": ">= -1"},
            "dedup": {"semantic": None},
        }
    )
    record = refresh(config, Silent()).snapshot
    assert record is not None and record.admitted == 80 == record.kept, record.reasons
    export_webdataset(Dataset(config.dataset).snapshot(), str(root / "export"), pairs_per_shard=60)
    return root


def expected(name: str) -> np.ndarray:
    """The photograph, shorter side 256, by plain Pillow."""
    with Image.open(COCO / "images" / name) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    scale = 256 / min(image.size)
    return np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.HAMMING))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def test_webdataset_reads_pixels_and_captions(photographs: tuple[str, dict[str, str]], exported: Path) -> None:
    import webdataset as wds

    _, captions = photographs
    shards = [str(p) for p in sorted((exported / "export").glob("*.tar"))]
    assert len(shards) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        samples = list(wds.WebDataset(shards, shardshuffle=False).decode("pilrgb").to_tuple("jpg;png", "txt", "json"))
        gc.collect()
    assert len(samples) == 80
    quality = []
    for image, text, row in samples:
        name = row["url"].rsplit("/", 1)[-1]
        assert text == captions[name]
        pixels = np.asarray(image)
        assert min(pixels.shape[:2]) == 256 and pixels.shape == expected(name).shape
        quality.append(psnr(pixels, expected(name)))
    # what JPEG's halved colour resolution leaves of photographs with fine colours; another picture gives 10 dB
    assert min(quality) > 28 and np.median(quality) > 35


@pytest.mark.filterwarnings("default")
def test_open_clips_own_loader_reads_the_same(
    photographs: tuple[str, dict[str, str]], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, captions = photographs
    texts = list(captions.values())
    shards = f"{exported}/export/{{00000..00001}}.tar"
    loader = open_clip_loader(monkeypatch, shards, 80, texts.index)
    stored = {}
    for path in sorted((exported / "export").glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            if name.endswith(".txt"):
                stored[data.decode()] = members[name[:-4] + ".jpg"]
    seen = set()
    for images, codes in loader:
        text = texts[int(codes[0, 0])]
        assert np.array_equal(images[0].numpy(), np.asarray(Image.open(io.BytesIO(stored[text])).convert("RGB")))
        seen.add(text)
    assert seen == set(texts)


def test_the_boxes_of_the_instances_file_stay_on_their_objects(tmp_path: Path) -> None:
    """From an image folder: five captions a photograph, boxes in pixels of the stored image."""
    source = {
        "kind": "image_folder",
        "path": str(COCO / "images"),
        "captions": str(COCO / "captions.json"),
        "instances": str(COCO / "instances.json"),
    }
    config = parse_config(
        {
            "dataset": str(tmp_path / "dataset"),
            "source": source,
            "engine": {"kind": "local"},
            "download": {"resize": {"mode": "center_crop", "size": 224}},
            "keep": {"clip_score": ">= -1"},
            "dedup": {"semantic": None},
        }
    )
    refresh(config, Silent())
    snapshot = Dataset(config.dataset).snapshot()
    counts = query(snapshot, "SELECT count(*) AS n, count(DISTINCT uid) AS pairs FROM texts WHERE source = 'human'")
    captions = json.loads((COCO / "captions.json").read_text())["annotations"]
    assert counts.to_pylist() == [{"n": len(captions), "pairs": 80}]
    outside = query(
        snapshot,
        "SELECT count(*) AS n FROM boxes JOIN images USING (uid) WHERE x1 < 0 OR y1 < 0 OR x2 > width OR y2 > height",
    )
    assert outside["n"][0].as_py() == 0
    total = query(snapshot, "SELECT count(*) AS n FROM boxes")["n"][0].as_py()
    assert 300 < total <= len(json.loads((COCO / "instances.json").read_text())["annotations"])
