"""WebDataset tars, img2dataset's parquet output, and the locators that both hand out."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pairmill.errors import SourceError
from pairmill.sources import locator
from pairmill.sources.download import Download
from pairmill.sources.locator import Loader, LocatorError
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import config
from tests.hostile.pictures import encoded, quadrants
from tests.sources.tables import rows

IMAGES = [encoded(quadrants(40 + i, 24), "JPEG") for i in range(4)]


def tar_of(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(name: str, image: bytes, text: str, **meta: object) -> list[tuple[str, bytes]]:
    return [(f"{name}.jpg", image), (f"{name}.txt", text.encode()), (f"{name}.json", json.dumps(meta).encode())]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_and_their_bytes(tmp_path: Path, form: int) -> None:
    members = sample("000", IMAGES[0], "one", url="http://x/0", caption="one", key="000", status="success")
    members += [("001.png", IMAGES[1]), ("001.caption", b"two"), ("ü" * 60 + "/002.jpg", IMAGES[2])]
    tar = tar_of(tmp_path / "00000.tar", members, form)
    one, two, three = rows(config.WebDataset(path=str(tar)))
    assert (one["url"], one["text"]) == ("http://x/0", "one")
    assert json.loads(one["extra"]) == {"key": "000", "status": "success"}
    assert (two["url"], two["text"]) == ("wds:00000.tar/001", "two")
    assert three["url"] == "wds:00000.tar/" + "ü" * 60 + "/002"
    assert [locator.load(row["locator"]) for row in (one, two, three)] == IMAGES[:3]


def test_names_are_only_names(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", sample("../../evil", IMAGES[0], "t") + sample("/etc/passwd", IMAGES[1], "u"))
    found = rows(config.WebDataset(path=str(tar)))
    assert [row["url"] for row in found] == ["wds:x.tar/../../evil", "wds:x.tar//etc/passwd"]
    assert [locator.load(row["locator"]) for row in found] == IMAGES[:2]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["x.tar"]


def test_endings_and_text_keys(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", sample("a.b", IMAGES[0], "from txt", alt="from json"))
    assert rows(config.WebDataset(path=str(tar), image="b.jpg", text="b.txt"))[0]["text"] == "from txt"
    members = [("k.jpg", IMAGES[0]), ("k.seg.png", IMAGES[1]), ("k.json", b'{"alt": "from json", "caption": "c"}')]
    tar = tar_of(tmp_path / "y.tar", members)
    (row,) = rows(config.WebDataset(path=str(tar), text_key="alt"))
    assert row["text"] == "from json"
    (row,) = rows(config.WebDataset(path=str(tar), image="seg.png"))
    assert row["text"] == "c"
    assert locator.load(row["locator"]) == IMAGES[1]


def test_damaged_samples_cost_themselves_only(tmp_path: Path) -> None:
    members = [
        *sample("0", IMAGES[0], "good"),
        ("1.jpg", IMAGES[1]),
        ("1.json", b"{torn"),
        ("2.jpg", IMAGES[1]),
        ("2.txt", b"caf\xe9"),
        ("3.txt", b"no image"),
        ("4.txt", b"no image, but a URL"),
        ("4.json", b'{"url": "http://x/4"}'),
        *sample("5", IMAGES[2], "good"),
    ]
    found = rows(config.WebDataset(path=str(tar_of(tmp_path / "x.tar", members))))
    bad = "source.malformed_row"
    assert [row["reason"] for row in found] == [None, bad, bad, bad, None, None]
    assert (found[4]["url"], found[4]["locator"]) == ("http://x/4", None)
    assert "it has: txt" in found[3]["detail"]


@pytest.mark.parametrize("damage", ["cut_in_image", "cut_in_header", "garbage", "no_tar"])
def test_damaged_tars_say_so(tmp_path: Path, damage: str) -> None:
    tar = tar_of(tmp_path / "x.tar", sample("0", IMAGES[0], "zero") + sample("1", IMAGES[1], "one"))
    data = bytearray(tar.read_bytes())
    second = data.index(b"1.jpg")
    if damage == "cut_in_image":
        del data[second + 600 :]
    elif damage == "cut_in_header":
        del data[second + 100 :]
    elif damage == "garbage":
        data[second : second + 512] = b"\xaa" * 512
    else:
        data = bytearray(b"this is no tar file" * 100)
    tar.write_bytes(data)
    other = tar_of(tmp_path / "y.tar", sample("2", IMAGES[2], "two"))
    found = rows(config.WebDataset(path=str(tmp_path / "*.tar")))
    assert [row["text"] for row in found if row["reason"] is None] == (
        ["two"] if damage == "no_tar" else ["zero", "two"]
    )
    assert [row["reason"] for row in found].count("source.malformed_row") >= 1
    other.write_bytes(b"")
    assert rows(config.WebDataset(path=str(other))) == []


def test_compressed_tars(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", sample("0", IMAGES[0], "t") + sample("1", IMAGES[1], "u"))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    found = rows(config.WebDataset(path=str(tmp_path / "x.tar.gz")))
    assert [locator.load(row["locator"]) for row in found] == IMAGES[:2]


def parquet(path: Path, status: bool = True) -> Path:
    table = pa.table(
        {
            "url": [f"http://x/{i}" for i in range(4)],
            "caption": ["a", "b", None, "d"],
            "key": [f"00{i}" for i in range(4)],
            "status": ["success", "failed_to_download", "success", "success"],
            "error_message": [None, "HTTP Error 404", None, None],
            "jpg": [IMAGES[0], None, IMAGES[2], IMAGES[3]],
        }
    )
    pq.write_table(table if status else table.drop_columns(["status"]), path, row_group_size=2)
    return path


@pytest.mark.parametrize("status", [True, False])
def test_img2dataset_parquet(tmp_path: Path, status: bool) -> None:
    found = rows(config.Img2DatasetParquet(path=str(parquet(tmp_path / "0.parquet", status))))
    assert [row["text"] for row in found] == ["a", "b", None, "d"]
    assert found[1]["locator"] is None
    assert json.loads(found[1]["extra"])["error_message"] == "HTTP Error 404"
    assert [locator.load(row["locator"]) for row in found if row["locator"]] == [IMAGES[0], IMAGES[2], IMAGES[3]]
    pq.write_table(pa.table({"url": ["http://x"], "key": ["1"]}), tmp_path / "meta.parquet")
    with pytest.raises(SourceError, match="kind: url_table"):
        rows(config.Img2DatasetParquet(path=str(tmp_path / "meta.parquet")))


def test_missing_bytes(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", sample("0", IMAGES[0], "t"))
    for place in (
        locator.file_locator(str(tmp_path / "gone.jpg")),
        locator.tar_locator(str(tmp_path / "gone.tar"), 0, 5),
        locator.tar_locator(str(tar), 10**9, 5),
        locator.parquet_locator(str(parquet(tmp_path / "0.parquet")), 99, "jpg"),
        locator.parquet_locator(str(tmp_path / "0.parquet"), 1, "jpg"),
        locator.parquet_locator(str(tmp_path / "0.parquet"), 0, "png"),
        locator.parquet_locator(str(tar), 0, "jpg"),
        "no json",
        "{}",
    ):
        with pytest.raises(LocatorError) as error:
            locator.load(place)
        assert error.value.reason == "image.missing"


def test_a_loader_in_any_order(tmp_path: Path) -> None:
    tars = [tar_of(tmp_path / f"{n}.tar", sample("0", IMAGES[n], "") + sample("1", IMAGES[n + 1], "")) for n in (0, 2)]
    places = [row["locator"] for tar in tars for row in rows(config.WebDataset(path=str(tar)))]
    with Loader() as loader:
        assert [loader.load(places[i]) for i in (3, 0, 2, 1)] == [IMAGES[i] for i in (3, 0, 2, 1)]
    assert locator.order([places[i] for i in (3, 0, 2, 1)]) == [1, 3, 2, 0]


def test_the_download_stage_loads_local_rows(tmp_path: Path) -> None:
    found = rows(
        config.WebDataset(path=str(tar_of(tmp_path / "x.tar", sample("0", IMAGES[0], "t") + sample("1", b"junk", "u"))))
    )
    (tmp_path / "big.jpg").write_bytes(IMAGES[3] + bytes(100_000))
    places = [row["locator"] for row in found] + [
        locator.file_locator(str(tmp_path / n)) for n in ("big.jpg", "gone.jpg")
    ]
    columns = {"uid": list("abcd"), "url": ["wds:x", "wds:y", "file:///z", "file:///w"], "locator": places}
    stage = Download(max_bytes=50_000)
    out = apply(stage, stage.open(), Batch(pa.table(columns)), ErrorBudget(0, 0)).to_pylist()
    assert [row["reason"] for row in out] == [None, "image.format", "http.too_large", "image.missing"]
    assert out[0]["image"] == IMAGES[0]
    assert out[0]["http_status"] is None
