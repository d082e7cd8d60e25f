"""A full disk: the run fails and says so, nothing half-written is visible, and it goes on when there is room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pairmill.store import Dataset
from tests.faults.datasets import content, counts, write_config, write_urls

AFTER = ["--set", "options.words=2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs rights that this user does not have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pairmill", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_a_full_disk_fails_clean_at_every_amount_of_room_and_goes_on_when_there_is_more(
    small_disk: Path, tmp_path: Path
):
    write_urls(tmp_path, 60)
    config = write_config(tmp_path, dataset=str(small_disk / "dataset"))
    assert command("run", str(config)).returncode == 0
    before = counts(Dataset(str(small_disk / "dataset")))
    write_urls(tmp_path, 400)
    ballast = small_disk / "ballast"
    full = 0
    for room in (4, 24, 64, 128, 192, 256, 320, 384, 512):  # KiB
        free = shutil.disk_usage(small_disk).free + (ballast.stat().st_size if ballast.exists() else 0)
        ballast.write_bytes(b"")
        ballast.write_bytes(b"\0" * max(0, free - room * 1024))
        done = command("run", str(config), *AFTER)
        if done.returncode == 0:
            break
        full += 1
        assert done.returncode == 1, done.stderr
        assert "make room" in done.stderr and "Traceback" not in done.stderr, done.stderr
        ballast.write_bytes(b"")
        dataset = Dataset(str(small_disk / "dataset"))
        assert counts(dataset) == before and len(dataset.snapshots()) == 1, "the last snapshot is intact"
        assert not list(small_disk.rglob("*.tmp")), "nothing half-written is left"
    assert full >= 3
    ballast.unlink(missing_ok=True)
    done = command("run", str(config), *AFTER)
    assert done.returncode == 0, done.stderr
    calm = write_config(tmp_path, dataset=str(tmp_path / "calm"))
    write_urls(tmp_path, 60)
    assert command("run", str(calm)).returncode == 0
    write_urls(tmp_path, 400)
    assert command("run", str(calm), *AFTER).returncode == 0
    expected = content(calm, ("options.words=2",))
    assert content(write_config(tmp_path, dataset=str(small_disk / "dataset")), ("options.words=2",)) == expected
