"""The cache of weights: one process brings a model while others wait, and what is there is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pairmill.errors import StoreError
from pairmill.weights import tiny_clip_dir, tiny_itm_dir
from pairmill.weights_cache import CACHE_ENV, Content, cache_folder, folder_sha256, holds, kept

ROOT = Path(__file__).resolve().parent.parent

ASK = """
import os, shutil, sys, time
from pathlib import Path
from pairmill.weights_cache import Content, kept

source, meeting, name, fate, others = sys.argv[1:]
meeting = Path(meeting)

def fill(folder):
    with open(meeting / "fills", "a") as log:
        log.write(name + "\\n")
    while len(list(meeting.glob("asks-*"))) < int(others):
        time.sleep(0.01)
    if fate == "dies":
        (folder / "open_clip_config.json").write_text("half of it")
        os._exit(9)
    shutil.copytree(source, folder, dirs_exist_ok=True)

(meeting / f"asks-{name}").touch()
print(kept(Content.of(source), fill))
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def ask(source: Path, meeting: Path, name: str, *, dies: bool = False, others: int = 1) -> subprocess.Popen[str]:
    """A process that asks for a model and copies it from `source` where it has to, once `others` have asked, too."""
    args = [str(source), str(meeting), name, "dies" if dies else "lives", str(others)]
    return subprocess.Popen([sys.executable, "-c", ASK, *args], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_of_many_processes_one_brings_the_model(tmp_path: Path, home: Path):
    asking = [ask(tiny_clip_dir(), tmp_path, str(n), others=4) for n in range(4)]
    told = {process.communicate(timeout=60)[0].strip() for process in asking}
    sha256 = folder_sha256(str(tiny_clip_dir()))
    assert told == {str(home / sha256)}
    assert folder_sha256(told.pop()) == sha256
    assert len((tmp_path / "fills").read_text().split()) == 1


def test_a_process_that_dies_half_way_leaves_nothing_that_counts(tmp_path: Path, home: Path):
    dying = ask(tiny_clip_dir(), tmp_path, "first", dies=True)
    dying.communicate(timeout=60)
    assert dying.returncode == 9
    sha256 = folder_sha256(str(tiny_clip_dir()))
    assert not (home / sha256).exists() and (home / f"{sha256}.part").exists()
    place, _ = ask(tiny_clip_dir(), tmp_path, "second").communicate(timeout=60)
    assert folder_sha256(place.strip()) == sha256
    assert not (home / f"{sha256}.part").exists()


def test_other_content_is_refused(home: Path):
    wanted = Content.of(str(tiny_clip_dir()))
    with pytest.raises(StoreError, match=f"not {wanted.sha256}; its files were changed"):
        kept(wanted, lambda folder: shutil.copytree(tiny_itm_dir(), folder, dirs_exist_ok=True))
    assert [p.name for p in home.iterdir()] == [f"{wanted.sha256}.lock"]


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "file"))
    content = Content.of(str(tiny_clip_dir()))
    with pytest.raises(StoreError, match=f"cannot keep models in .*set {CACHE_ENV} to a folder that can be written"):
        kept(content, lambda folder: None)
    assert holds(str(tiny_clip_dir()), content), "what lies here already needs no cache"


def test_the_cache_is_in_the_home_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(CACHE_ENV)
    monkeypatch.setenv("HOME", "/nobody")
    assert cache_folder() == Path("/nobody/.cache/pairmill/models")


def test_the_same_content_is_known_wherever_it_lies(tmp_path: Path):
    content = Content.of(str(tiny_clip_dir()))
    copy = shutil.copytree(tiny_clip_dir(), tmp_path / "copy")
    assert holds(str(copy), content)
    (copy / "README.md").write_text("no part of the model")
    assert holds(str(copy), content)
    assert not holds(str(tmp_path / "nowhere"), content)


def test_weights_changed_in_place_are_other_content(tmp_path: Path):
    copy = shutil.copytree(tiny_clip_dir(), tmp_path / "copy")
    content = Content.of(str(copy))
    assert holds(str(copy), content)
    weights = next(copy.glob("*.safetensors"))
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # a time that was set back deceives nobody
    _forget_digests()
    assert not holds(str(copy), content)


def test_one_file_is_a_model_too(tmp_path: Path, home: Path):
    head = tmp_path / "head.safetensors"
    head.write_bytes(b"not read here")
    content = Content.of(str(head))
    place = kept(content, lambda folder: shutil.copy(head, folder))
    assert place == home / content.sha256 / "head.safetensors" and place.read_bytes() == b"not read here"
    assert holds(str(head), content) and not holds(str(tmp_path), content)


def _forget_digests() -> None:
    """As in another process."""
    from pairmill import weights_cache

    weights_cache._file_sha256.cache_clear()
