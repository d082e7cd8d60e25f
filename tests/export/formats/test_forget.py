"""`pairmill forget` reaches exports of conversations, and the check of absence reads them."""

from __future__ import annotations

import hashlib

import pytest

from pairmill.export import Options, export, verify_export
from pairmill.takedown import Selectors, check_absence, forget
from tests.export.dataset import Pair, build, instructed
from tests.needles import find_needles

PAIRS = [instructed(Pair(n, n // 3, f"picture {n:04d}.")) for n in range(6)]


class Silent:
    def start(self, title, total, unit="rows"): ...
    def advance(self, count, dropped): ...
    def finish(self): ...
    def note(self, message): ...


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_by_the_hash_of_an_image(tmp_path):
    built, pair = build(str(tmp_path / "data"), PAIRS), PAIRS[4]
    outs = {"files": tmp_path / "llava", "shards": tmp_path / "qwen"}
    for (images, out), name in zip(outs.items(), ("llava", "qwen-vl"), strict=True):
        export(built.snapshot, str(out), name, pairs_per_shard=3, options=Options(images=images))
    assert pair.image
    wanted = [pair.url, pair.uid, pair.image, pair.mark]
    assert find_needles([outs["files"]], wanted) and find_needles([outs["shards"]], wanted)
    path = next(p for p in (outs["files"] / "images").rglob("*.jpg") if p.read_bytes() == pair.image)
    asked = Selectors.of(sha256=[hashlib.sha256(pair.image).hexdigest()])
    found = {(trace.file, trace.where) for trace in check_absence(built.dataset, asked, Silent()).traces}
    assert (str(path), "the image") in found
    report = forget(built.dataset, asked, Silent())
    assert [(e.held, e.removed, e.has_left) for e in report.exports] == [(1, 1, False)] * 2
    assert find_needles([outs["files"], outs["shards"]], wanted) == []
    assert check_absence(built.dataset, asked, Silent()).absent
    assert all(verify_export(str(out)).ok for out in outs.values())
    path.write_bytes(pair.image)  # brought back by hand
    assert not check_absence(built.dataset, asked, Silent()).absent
    told = [(problem.file, problem.wrong.value) for problem in verify_export(str(outs["files"])).problems]
    assert told == [(path.relative_to(outs["files"]).as_posix(), "surplus")]
