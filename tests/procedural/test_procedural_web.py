"""The procedural web: its list, its truth, and what its server does."""

import asyncio
import io
import json
import math
import subprocess
import sys
from collections import Counter

import aiohttp
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from pairmill.procedural.captions import is_true
from pairmill.procedural.scene import Scene, render
from pairmill.procedural.web import (
    FAULTY_BOXES,
    PROPORTIONS,
    WITHOUT_BOXES,
    BoxFault,
    Kind,
    ProceduralWeb,
    counts_by_kind,
    decode,
    make_rows,
    served_bytes,
)


@pytest.fixture(scope="module")
def rows():
    return make_rows(1000, 3, "127.0.0.1", 80)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A web of 300 pairs, its parquet files, and what an impatient client got for each row."""
    folder = tmp_path_factory.mktemp("web")
    shares = {**PROPORTIONS, Kind.TIMEOUT: 0.01, Kind.TRICKLE: 0.01, Kind.RESET: 0.02}

    async def fetch_all(rows):
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:

            async def fetch(row):
                try:
                    async with session.get(row.url) as response:
                        return response.status, response.content_type, await response.read()
                except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                    return type(error), None, b""

            return await asyncio.gather(*map(fetch, rows))

    with ProceduralWeb(300, seed=11, proportions=shares) as web:
        web.write(folder)
        fast = [row for row in web.rows if row.kind not in (Kind.TIMEOUT, Kind.TRICKLE)]
        slow = [row for row in web.rows if row.kind in (Kind.TIMEOUT, Kind.TRICKLE)]
        answers = dict(zip(fast, asyncio.run(fetch_all(fast)), strict=True))
        answers |= dict(zip(slow, asyncio.run(fetch_all(slow)), strict=True))
        yield web, folder, answers


def test_counts_add_up_and_follow_the_proportions():
    for pairs in (1, 7, 50, 2000):
        assert sum(counts_by_kind(pairs).values()) == pairs
    counts = counts_by_kind(2000)
    assert set(counts) == set(Kind)
    assert min(counts.values()) > 0
    assert counts[Kind.MISMATCHED] == 240
    assert counts[Kind.TRUE] > 1000
    with pytest.raises(ValueError, match="adding up"):
        counts_by_kind(10, {Kind.TRUE: 0.7, Kind.HTML: 0.7})


def test_rows_are_a_function_of_seed_and_address(rows):
    assert rows == make_rows(1000, 3, "127.0.0.1", 80)
    other = make_rows(1000, 4, "127.0.0.1", 80)
    assert {row.url for row in rows}.isdisjoint(row.url for row in other)
    moved = make_rows(1000, 3, "127.0.0.2", 81)
    assert [row.path for row in moved] == [row.path for row in rows]
    assert len({row.url for row in rows}) == len(rows)


def test_rows_do_not_depend_on_the_process():
    code = (
        "from pairmill.procedural.web import make_rows, served_bytes; import hashlib;"
        "rows = make_rows(60, 5, '127.0.0.1', 80);"
        "print(hashlib.sha256(repr(rows).encode() + served_bytes(rows[0])).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_truth_comes_from_the_oracle_over_the_served_scene(rows):
    for row in rows:
        if not row.kind.has_picture:
            assert row.text_is_true is None
            assert row.scene is None
        elif row.kind is Kind.BLANK:
            assert row.text_is_true is False
        else:
            assert row.text_is_true is bool(is_true(row.text, row.scene))
    by_kind = {kind: {row.text_is_true for row in rows if row.kind is kind} for kind in Kind}
    for kind in Kind:
        if kind is Kind.TRUE or kind.is_copy:
            assert by_kind[kind] == {True}
        if kind in (Kind.MISMATCHED, Kind.FOREIGN, Kind.BOILERPLATE):
            assert by_kind[kind] == {False}
    assert all(is_true(row.text, row.scene) is False for row in rows if row.kind is Kind.MISMATCHED)


def test_copies_show_the_original_and_originals_are_true(rows):
    by_url = {row.url: row for row in rows}
    for row in rows:
        assert row.kind.is_copy == (row.duplicate_of_url is not None)
        if not row.kind.is_copy:
            continue
        original = by_url[row.duplicate_of_url]
        assert original.kind is Kind.TRUE
        ours, theirs = served_bytes(row), served_bytes(original)
        if row.kind in (Kind.COPY_EXACT, Kind.COPY_RECAPTIONED):
            assert ours == theirs
            assert (row.text == original.text) == (row.kind is Kind.COPY_EXACT)
            continue
        assert ours != theirs
        picture, source = decode(ours), decode(theirs)
        if row.kind is Kind.COPY_CROPPED:
            source = source.crop(row.picture.crop)
            cut = 1 - min(source.width / original.scene.width, source.height / original.scene.height)
            assert 0.04 < cut <= 0.125
        elif row.kind is Kind.COPY_MIRRORED:
            source = ImageOps.mirror(source)
        elif row.kind is Kind.COPY_RESIZED:
            assert picture.size != source.size
            source = source.resize(picture.size, Image.Resampling.BICUBIC)
        assert picture.size == source.size == (row.scene.width, row.scene.height)
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(source, dtype=int)).mean()
        assert difference < 8


def test_served_scenes_are_what_truth_says(rows):
    for row in rows[:150]:
        if row.scene is not None and row.kind is not Kind.TINY:
            picture = decode(served_bytes(row))
            drawn = render(row.scene, *picture.size)
            assert np.abs(np.asarray(picture, dtype=int) - np.asarray(drawn, dtype=int)).mean() < 8
            assert min(picture.size) >= 224


def test_orientation_is_only_in_the_tag(rows):
    turned = [row for row in rows if row.picture is not None and row.picture.orientation != 1 and row.scene is not None]
    assert turned
    for row in turned[:4]:
        stored = Image.open(io.BytesIO(served_bytes(row)))
        assert stored.getexif()[0x0112] == row.picture.orientation
        upright = ImageOps.exif_transpose(stored)
        drawn = np.asarray(render(row.scene), dtype=int)
        if row.kind is Kind.TRUE:
            assert np.abs(np.asarray(upright.convert("RGB"), dtype=int) - drawn).mean() < 8


def test_formats_are_mixed(rows):
    formats = Counter(Image.open(io.BytesIO(served_bytes(row))).format for row in rows if row.kind is Kind.TRUE)
    assert set(formats) == {"JPEG", "PNG", "WEBP"}
    assert formats["JPEG"] > 0.75 * formats.total()


def test_the_server_answers_as_the_kinds_say(fetched):
    web, _, answers = fetched
    kinds = Counter()
    for row, (status, content_type, body) in answers.items():
        kinds[row.kind] += 1
        if row.kind is Kind.NOT_FOUND:
            assert status == 404
        elif row.kind is Kind.GONE:
            assert status == 410
        elif row.kind is Kind.SERVER_ERROR:
            assert status == 500
        elif row.kind is Kind.UNAVAILABLE:
            assert status == 503
        elif row.kind in (Kind.TIMEOUT, Kind.TRICKLE):
            assert issubclass(status, asyncio.TimeoutError)
        elif row.kind is Kind.RESET:
            assert issubclass(status, aiohttp.ClientConnectionError)
        elif row.kind is Kind.HTML:
            assert (status, content_type) == (200, "text/html")
        elif row.kind is Kind.EMPTY:
            assert (status, body) == (200, b"")
        elif row.kind in (Kind.TRUNCATED, Kind.BROKEN):
            assert status == 200
            with pytest.raises((OSError, UnidentifiedImageError)):
                Image.open(io.BytesIO(body)).load()
        elif row.kind is Kind.TINY:
            assert max(Image.open(io.BytesIO(body)).size) < 64
        elif row.kind is Kind.BLANK:
            colours = np.asarray(Image.open(io.BytesIO(body))).reshape(-1, 3)
            assert np.ptp(colours, axis=0).max() <= 2
        else:
            assert status == 200
            assert content_type == Image.MIME[Image.open(io.BytesIO(body)).format]
            assert body == served_bytes(row)
    assert sum(kinds.values()) == 300
    assert kinds[Kind.RESET] == 6
    # A client may try a reset connection once more by itself.
    assert {web.requests[row.url] for row in web.rows if row.kind is not Kind.RESET} == {1}
    assert set(web.requests) == {row.url for row in web.rows}


def test_parquet_files(fetched):
    web, folder, _ = fetched
    urls = pq.read_table(folder / "urls.parquet")
    truth = pq.read_table(folder / "truth.parquet")
    assert urls.column_names == ["url", "text", "page", "boxes"]
    assert truth.column_names == ["url", "text", "scene", "text_is_true", "kind", "duplicate_of_url", "box_faults"]
    assert urls["url"].to_pylist() == truth["url"].to_pylist() == [row.url for row in web.rows]
    for row, record in zip(web.rows, truth.to_pylist(), strict=True):
        assert record["kind"] == row.kind.value
        assert record["text_is_true"] is row.text_is_true
        if record["scene"] is not None:
            assert Scene.from_json(record["scene"]) == row.scene
            assert all("box" in entry for entry in json.loads(record["scene"])["objects"])
    for row, boxes, faults in zip(web.rows, urls["boxes"].to_pylist(), truth["box_faults"].to_pylist(), strict=True):
        if row.boxes is None:
            assert boxes is faults is None
            continue
        assert [(box["label"], *(repr(box[edge]) for edge in ("x1", "y1", "x2", "y2"))) for box in boxes] == [
            (box.label, *map(repr, (box.x1, box.y1, box.x2, box.y2))) for box in row.boxes
        ]
        assert faults == [box.fault and box.fault.value for box in row.boxes]


def test_boxes_are_those_of_the_served_picture(rows):
    """Each true box has its object's words, colour and place in the bytes that are served, copies and tiny ones too."""
    seen = Counter()
    for row in rows:
        if row.scene is None:
            assert row.boxes is None
            continue
        if row.boxes is None:
            seen["none"] += 1
            continue
        faulty = [box for box in row.boxes if box.fault]
        assert len(row.boxes) - len(row.scene.objects) in ((0, 1) if faulty else (0,))
        seen["faulty"] += len(faulty)
        picture = decode(served_bytes(row)) if sum(seen.values()) % 5 == 0 or row.kind is not Kind.TRUE else None
        for box in row.boxes:
            if box.fault or picture is None:
                continue
            scale = picture.width / row.scene.width
            middle = ((box.x1 + box.x2) / 2 / scale, (box.y1 + box.y2) / 2 / scale)
            thing = min(row.scene.objects, key=lambda thing: math.dist((thing.x, thing.y), middle))
            assert math.dist((thing.x, thing.y), middle) < 0.2 * thing.extent
            assert box.label == f"{thing.size} {thing.colour} {thing.shape}"[-len(box.label) :]
            assert 0 <= box.x1 < box.x2 <= picture.width + 0.01 and 0 <= box.y1 < box.y2 <= picture.height + 0.01
            if row.kind is not Kind.TINY:
                inside = np.asarray(picture.crop(tuple(map(round, (box.x1, box.y1, box.x2, box.y2)))), dtype=int)
                fill = np.abs(inside - np.asarray(thing.rgb)).max(axis=2) < 60
                assert fill.mean() > 0.15, row
                for edge in (fill[:8], fill[-8:], fill[:, :8], fill[:, -8:]):
                    assert edge.any(), "the box is tight"
        seen[row.kind] += 1
    scenes = sum(row.scene is not None for row in rows)
    assert seen["none"] / scenes == pytest.approx(WITHOUT_BOXES, abs=0.04)
    assert seen["faulty"] / scenes == pytest.approx(FAULTY_BOXES, abs=0.02)
    assert all(seen[kind] for kind in Kind if kind.is_copy)


def test_faulty_boxes_are_none_of_the_picture():
    faults = Counter()
    for row in make_rows(1500, 8, "127.0.0.1", 80):
        for box in row.boxes or ():
            faults[box.fault] += 1
            if box.fault is BoxFault.OUTSIDE:
                assert box.x1 >= row.scene.width or row.kind is Kind.TINY
            elif box.fault is BoxFault.SWAPPED:
                assert box.x1 > box.x2 and box.y1 > box.y2
            elif box.fault is BoxFault.NOT_FINITE:
                assert math.isnan(box.x2)
            elif box.fault is BoxFault.UNLABELLED:
                assert not box.label.strip()
    assert set(faults) == {None, *BoxFault} - {BoxFault.STALE}


def get(url, **conditions):
    """Status, ETag, Last-Modified and body of one answer."""

    async def ask():
        headers = {name.replace("_", "-"): value for name, value in conditions.items()}
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
            return (
                response.status,
                response.headers.get("ETag"),
                response.headers.get("Last-Modified"),
                await response.read(),
            )

    return asyncio.run(ask())


def test_images_carry_validators_and_are_not_sent_twice():
    shares = dict.fromkeys((Kind.BLANK, Kind.BROKEN, Kind.TRUNCATED, Kind.NOT_FOUND, Kind.HTML, Kind.EMPTY), 0.1)
    with ProceduralWeb(20, seed=2, proportions=shares) as web:
        tags = set()
        for row in web.rows:
            status, etag, modified, body = get(row.url)
            if row.kind in (Kind.NOT_FOUND, Kind.HTML, Kind.EMPTY):
                assert etag is modified is None
                continue
            assert (status, body) == (200, served_bytes(row))
            tags.add(etag)
            assert get(row.url, If_None_Match=etag) == (304, etag, modified, b"")
            assert get(row.url, If_None_Match=f'"x", W/{etag}')[0] == 304
            assert get(row.url, If_Modified_Since=modified) == (304, etag, modified, b"")
            assert get(row.url, If_None_Match='"x"', If_Modified_Since=modified)[0] == 200
            assert get(row.url, If_Modified_Since="Sat, 01 Jan 2000 00:00:00 GMT")[0] == 200
            assert (web.not_modified[row.url], web.requests[row.url]) == (3, 6)
        assert len(tags) == 14


def test_changed_urls_show_another_scene(tmp_path):
    shares = {Kind.MISMATCHED: 0.2, Kind.NOT_FOUND: 0.1, Kind.COPY_EXACT: 0.1, Kind.TINY: 0.1, Kind.BLANK: 0.1}
    with ProceduralWeb(20, seed=4, proportions=shares) as web, ProceduralWeb(20, seed=4, proportions=shares) as twin:
        first = {row.kind: row for row in reversed(web.rows)}
        before = {row.url: get(row.url) for row in web.rows}
        rows = web.rows
        for wrong in (first[Kind.NOT_FOUND].url, first[Kind.BLANK].url, "http://elsewhere/a.jpg"):
            with pytest.raises(ValueError, match="shows no scene"):
                web.change([first[Kind.TRUE].url, wrong])
        assert web.rows == rows
        picked = [first[kind] for kind in (Kind.TRUE, Kind.COPY_EXACT, Kind.TINY)]
        changed = web.change(row.url for row in picked)
        assert [row.kind for row in changed] == [Kind.MISMATCHED, Kind.MISMATCHED, Kind.TINY]
        for old, new in zip(picked, changed, strict=True):
            assert (new.url, new.text, new.page) == (old.url, old.text, old.page)
            assert new.scene != old.scene
            assert new.boxes is None or {box.fault for box in new.boxes} <= set(BoxFault)
            assert [(b.label, b.x2) for b in new.boxes or ()] == [(b.label, b.x2) for b in old.boxes or ()]
            assert new.text_is_true is bool(is_true(new.text, new.scene)) is False
            assert new.duplicate_of_url is None
            status, etag, modified, body = get(new.url, If_None_Match=before[new.url][1])
            assert (status, body) == (200, served_bytes(new))
            assert get(new.url, If_Modified_Since=before[new.url][2])[0] == 200
            assert get(new.url, If_None_Match=etag)[0] == get(new.url, If_Modified_Since=modified)[0] == 304
        assert [row for row in web.rows if row not in changed] == [row for row in rows if row not in picked]
        assert all(get(row.url) == before[row.url] for row in web.rows if row not in changed)
        web.write(tmp_path)
        truth = {row["url"]: row for row in pq.read_table(tmp_path / "truth.parquet").to_pylist()}
        assert all(Scene.from_json(truth[row.url]["scene"]) == row.scene for row in changed)

        # the same changes of the same web come out the same; a second change is another one; a scene can be given
        again = twin.change(row.url.replace(str(web.port), str(twin.port)) for row in picked)
        assert [row.scene for row in again] == [row.scene for row in changed]
        (second,) = web.change([picked[0].url])
        assert second.scene not in (picked[0].scene, changed[0].scene)
        (back,) = web.change({picked[0].url: picked[0].scene})
        assert (back.kind, back.text_is_true) == (Kind.TRUE, True)
        assert get(back.url, If_Modified_Since=before[back.url][2])[0] == 200  # it changed in between


def test_other_paths_robots_and_closing():
    with ProceduralWeb(5, seed=1, host="127.0.0.2") as web:

        async def get(path):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.2:{web.port}{path}") as response,
            ):
                return response.status, await response.text()

        assert asyncio.run(get("/images/none.jpg"))[0] == 404
        assert asyncio.run(get("/robots.txt")) == (200, "User-agent: *\nAllow: /\n")
        assert web.requests[f"http://127.0.0.2:{web.port}/robots.txt"] == 1
    with pytest.raises(aiohttp.ClientConnectionError):
        asyncio.run(get("/robots.txt"))
    with ProceduralWeb(5, seed=1, host="127.0.0.2", port=web.port) as again:
        assert [row.url for row in again.rows] == [row.url for row in web.rows]
    with pytest.raises(ValueError, match="loopback"):
        ProceduralWeb(5, host="192.0.2.1")


def test_importing_needs_no_model_library():
    code = (
        "import sys, pairmill.procedural.web, pairmill.procedural.truth, pairmill.weights, pairmill._torchvision;"
        "print(sorted({'torch', 'ray', 'transformers', 'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"
