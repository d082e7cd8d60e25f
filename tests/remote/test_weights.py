"""Models in an object store: fetched once a machine, identified by their content."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from filters.heads import EmbeddingHead
from pairmill import storage
from pairmill.errors import ConfigError, StoreError
from pairmill.models import ModelRef, load_clip
from pairmill.weights import tiny_clip_dir
from pairmill.weights_cache import CACHE_ENV, local_path
from schemas.config import HeadChoice, Models
from tests.remote.conftest import ROOT, S3

WEIGHTS = next(tiny_clip_dir().glob("*.safetensors")).name


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def upload(source: Path, url: str) -> str:
    fs, root = storage.open_fs(url)
    for file in source.iterdir():
        fs.put_file(str(file), f"{root}/{file.name}")
    return url


def gets(s3: S3, name: str) -> int:
    return sum(line.startswith("GET ") and f"/{name} " in line for line in s3.requests())


def test_a_model_is_fetched_once_a_machine(s3: S3, bucket: str, tmp_path: Path, home: Path):
    url = upload(tiny_clip_dir(), f"s3://{bucket}/models/clip")
    before = gets(s3, WEIGHTS)
    code = f"from pairmill.models import ModelRef; print(ModelRef(path={url!r}).identity()['sha256'])"
    asking = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)
    ]
    told = {process.communicate(timeout=60)[0].strip() for process in asking}
    assert told == {ModelRef(path=str(tiny_clip_dir())).identity()["sha256"]}
    assert gets(s3, WEIGHTS) - before == 1
    assert load_clip(ModelRef(path=url), device="cpu").embed_texts(["a red circle"]).shape == (1, 128)
    assert gets(s3, WEIGHTS) - before == 1
    assert [p.name for p in home.iterdir() if p.is_dir()] == list(told)


def test_a_model_that_was_changed_is_fetched_anew(s3: S3, bucket: str, tmp_path: Path):
    copy = shutil.copytree(tiny_clip_dir(), tmp_path / "copy")
    url = upload(copy, f"s3://{bucket}/clip")
    first = ModelRef(path=url).identity()
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    upload(copy, url)
    assert ModelRef(path=url).identity() == ModelRef(path=str(copy)).identity() != first


def test_what_is_no_model_is_told(s3: S3, bucket: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"there is no model at s3://{bucket}/nothing; correct the path"):
        local_path(f"s3://{bucket}/nothing")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "config.json").write_text("{}")
    url = upload(tmp_path / "docs", f"s3://{bucket}/docs")
    with pytest.raises(ConfigError, match=f"{url} holds no .safetensors file"):
        local_path(url)
    s3.fault("down")
    with pytest.raises(StoreError, match=f"of {url}/: .*run again when the store answers"):
        local_path(url)


def test_a_head_is_a_file_of_a_store(s3: S3, bucket: str):
    fs, root = storage.open_fs(f"s3://{bucket}/head.safetensors")
    fs.put_file("examples/heads/objects.safetensors", root)
    by_url, local = (
        EmbeddingHead.all_of(Models(heads={"objects": HeadChoice(path=path)}))[0]
        for path in (f"s3://{bucket}/head.safetensors", "examples/heads/objects.safetensors")
    )
    assert by_url.fingerprint([]) == local.fingerprint([])
    by_url.open()
