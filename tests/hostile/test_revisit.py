"""Looking again at images that are stored, against the hostile web and over local files."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pairmill import imaging
from pairmill.errors import ConfigError
from pairmill.procedural.web import Kind, ProceduralWeb, served_bytes
from pairmill.sources import fetch
from pairmill.sources.download import REVISIT_READS, Download
from pairmill.sources.fetch import Validators
from pairmill.sources.img2dataset import Img2DatasetDownload
from pairmill.sources.locator import file_locator, tar_locator
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import config, fields
from schemas.reasons import Visit, retry_after_s, with_retry_after
from tests.hostile import pictures
from tests.hostile.server import Answer, HostileServer, in_turn, silent, whole

OLD = pictures.encoded(pictures.quadrants(), "JPEG", quality=95)
NEW = pictures.encoded(pictures.quadrants().rotate(180), "PNG")
ETAG, DATE = '"v1"', "Wed, 21 Oct 2015 07:28:00 GMT"
IMAGE_COLUMNS = [column.name for column in fields.IMAGES[: fields.IMAGES.index(fields.HTTP_STATUS)]]


@pytest.fixture(scope="module")
def web() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_BACKOFF_S", 0.01)


def downloader(**settings: object) -> Download:
    fast = {"allow_private_addresses": True, "timeout_s": 5, "retries": 0, "max_bytes": 200_000}
    return Download.from_config(config.Download(**{**fast, **settings}))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(url: str | None, data: bytes | None = OLD, **columns: str | None) -> dict[str, str | None]:
    """A row of the store: what an earlier run knows of an image."""
    row = dict.fromkeys(REVISIT_READS) | {"url": url, "sha256": None if data is None else sha256(data)}
    return row | columns


def visit_all(rows: list[dict[str, str | None]], **settings: object) -> list[dict]:
    table = pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in REVISIT_READS]))
    table = table.append_column("uid", pa.array([str(i) for i in range(len(rows))]))
    found = downloader(**settings).open_revisit()(Batch(table))
    assert found.schema == pa.schema([*fields.IMAGES, fields.REASON, fields.DETAIL, ("visit", pa.string())])
    out = found.to_pylist()
    for row in out:
        holds_image = row["visit"] == Visit.CHANGED
        assert {row[name] is not None for name in IMAGE_COLUMNS} == {holds_image}
        assert (row["reason"] is not None) == (row["detail"] is not None) == (row["visit"] == Visit.FAILED)
    return out


def revisit(web: HostileServer, row: dict[str, str | None], **settings: object) -> dict:
    """The visit of one row, beside a control that must come out unchanged."""
    web.add("/control", whole(OLD))
    found, control = visit_all([row, stored(web.url("/control"))], **settings)
    assert control["visit"] == Visit.UNCHANGED
    return found


def sent(web: HostileServer, path: str) -> dict[str, str]:
    """The conditions of the last request for a path."""
    lines = [line.split(": ", 1) for line in web.requests[path].split("\r\n")[1:] if line]
    return {name: value for name, value in lines if name.startswith("If-")}


def careful(web: HostileServer, path: str, body: bytes, etag: str | None = None, date: str | None = None) -> Answer:
    """An answer of a server that knows conditions: 304 to its own validators, else the body."""
    headers = {name: value for name, value in (("ETag", etag), ("Last-Modified", date)) if value}

    async def answer(writer: asyncio.StreamWriter) -> None:
        asked = sent(web, path)
        matches = (
            asked["If-None-Match"].removeprefix("W/") == (etag or "").removeprefix("W/")
            if "If-None-Match" in asked
            else date is not None and asked.get("If-Modified-Since") == date
        )
        not_modified = b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n"
        not_modified += b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items()) + b"\r\n"
        writer.write(not_modified if matches else whole(body, headers))
        await writer.drain()

    return answer


NOT_MODIFIED = whole(b"", status="304 Not Modified")


# -- unchanged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("etag", "date"), [(ETAG, None), (None, DATE), (ETAG, DATE), ('W/"weak"', None), ("unquoted", None)]
)
def test_the_server_says_that_nothing_changed(web: HostileServer, etag: str | None, date: str | None) -> None:
    url = web.add("/careful", careful(web, "/careful", NEW, etag, date))
    row = revisit(web, stored(url, etag=etag, last_modified=date))
    assert (row["visit"], row["http_status"], row["etag"], row["last_modified"]) == ("unchanged", 304, etag, date)
    assert row["final_url"] is None
    headers = {"If-None-Match": etag, "If-Modified-Since": date}
    assert sent(web, "/careful") == {name: value for name, value in headers.items() if value}


def test_a_304_that_repeats_no_validators_leaves_them(web: HostileServer) -> None:
    row = revisit(web, stored(web.add("/terse", NOT_MODIFIED), etag=ETAG, last_modified=DATE))
    assert (row["visit"], row["etag"], row["last_modified"]) == ("unchanged", ETAG, DATE)


def test_a_304_cannot_swap_the_validator_that_stands_for_our_bytes(web: HostileServer) -> None:
    url = web.add("/swap", whole(b"", {"ETag": '"v2"', "Last-Modified": DATE}, "304 Not Modified"))
    row = revisit(web, stored(url, etag=ETAG))
    assert (row["etag"], row["last_modified"]) == (ETAG, DATE)


def test_a_304_may_carry_a_length_and_no_body(web: HostileServer) -> None:
    announced = web.add("/announced", whole(b"", status="304 Not Modified", length=str(len(OLD))))
    bodied = web.add("/bodied", whole(NEW, status="304 Not Modified"))
    assert revisit(web, stored(announced, etag=ETAG))["visit"] == "unchanged"
    assert revisit(web, stored(bodied, etag=ETAG))["reason"] in (None, "http.protocol")  # whichever is seen first


def test_a_server_that_ignores_conditions_is_compared_by_hash(
    web: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("bytes that did not change were decoded")

    monkeypatch.setattr(imaging, "store", refuse)
    url = web.add("/ignores", whole(OLD, {"ETag": '"other"'}))
    row = revisit(web, stored(url, etag=ETAG, last_modified=DATE))
    assert (row["visit"], row["http_status"]) == ("unchanged", 200)
    assert (row["etag"], row["last_modified"]) == ('"other"', None)  # as the server says now


# -- changed ----------------------------------------------------------------------------------------------------------


def test_other_bytes_are_a_new_image(web: HostileServer) -> None:
    url = web.add("/changed", careful(web, "/changed", NEW, '"v2"', DATE))
    row = revisit(web, stored(url, etag=ETAG))
    assert (row["visit"], row["http_status"], row["etag"], row["last_modified"]) == ("changed", 200, '"v2"', DATE)
    assert (row["image"], row["sha256"], row["format"]) == (NEW, sha256(NEW), "png")
    columns = {"uid": ["0"], "url": [url], "locator": pa.nulls(1, pa.string())}
    first = apply(stage := downloader(), stage.open(), Batch(pa.table(columns)), ErrorBudget(0, 0)).to_pylist()[0]
    assert {name: row[name] for name in first if name != "uid"} == {k: v for k, v in first.items() if k != "uid"}


def test_a_row_without_an_image_is_fetched_whole(web: HostileServer) -> None:
    url = web.add("/first", careful(web, "/first", OLD, ETAG))
    row = revisit(web, stored(url, None, etag=ETAG))
    assert (row["visit"], row["image"]) == ("changed", OLD)
    assert sent(web, "/first") == {}


# -- failed -----------------------------------------------------------------------------------------------------------

FAILURES = {
    "not_found": (whole(b"", status="404 Not Found"), "http.not_found"),
    "gone": (whole(b"", status="410 Gone"), "http.not_found"),
    "page": (whole(b"<!doctype html><p>gone</p>", {"Content-Type": "text/html"}), "http.not_an_image"),
    "cut": (whole(NEW[: len(NEW) // 2]), "image.truncated"),
    "large": (whole(NEW + bytes(200_000)), "http.too_large"),
    "opt_out": (whole(NEW, {"X-Robots-Tag": "noai"}), "http.opt_out"),
    "same_but_opt_out": (whole(OLD, {"tdm-reservation": "1"}), "http.opt_out"),
    "opt_out_on_304": (whole(b"", {"X-Robots-Tag": "noai"}, "304 Not Modified"), "http.opt_out"),
    "loop": (whole(b"", {"Location": "/loop"}, "302 Found"), "http.redirect_loop"),
    "inwards": (whole(b"", {"Location": "file:///etc/passwd"}, "302 Found"), "url.redirect_refused"),
    "silent": (silent(30), "http.timeout"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(web: HostileServer, name: str) -> None:
    answer, reason = FAILURES[name]
    row = revisit(web, stored(web.add(f"/{name}", answer), etag=ETAG), timeout_s=1)
    assert (row["visit"], row["reason"]) == ("failed", reason)


@pytest.mark.parametrize("known", [{}, {"etag": "*"}, {"etag": "é"}, {"last_modified": "\u2028"}])
def test_a_304_that_nobody_asked_for(web: HostileServer, known: dict[str, str]) -> None:
    row = revisit(web, stored(web.add("/unasked", NOT_MODIFIED), **known))
    assert (row["visit"], row["reason"], row["http_status"]) == ("failed", "http.protocol", 304)


@pytest.mark.parametrize("url", [None, "", "ftp://example.com/a", "http://user:pw@example.com/a"])
def test_urls_that_are_not_fetched(web: HostileServer, url: str | None) -> None:
    row = revisit(web, stored(url, etag=ETAG))
    assert (row["visit"], row["reason"].split(".")[0]) == ("failed", "url" if url else "source")


def test_private_addresses_stay_refused(web: HostileServer) -> None:
    url = web.add("/private", whole(OLD))
    (row,) = visit_all([stored(url, etag=ETAG)], allow_private_addresses=False)
    assert row["reason"] == "url.private_address"
    assert not web.hits["/private"]


def test_a_revisit_is_tried_again_and_defers_as_a_first_visit(web: HostileServer) -> None:
    again = web.add("/again", in_turn(whole(b"", status="503 Busy"), NOT_MODIFIED))
    assert revisit(web, stored(again, etag=ETAG), retries=1)["visit"] == "unchanged"
    busy = web.add("/patience", whole(b"", {"Retry-After": "1234567"}, "429 Too Many Requests"))
    row = revisit(web, stored(busy, etag=ETAG), retries=3)
    assert (row["visit"], row["reason"]) == ("failed", "http.too_many_requests")
    assert retry_after_s(row["detail"]) == 1234567
    assert web.hits["/patience"] == 1


# -- hostile validators -----------------------------------------------------------------------------------------------

HOSTILE = [
    '"a"\r\nX-Evil: 1',
    '"a"\nX-Evil: 1',
    "a\r\n\r\nGET /evil HTTP/1.1",
    '"a\0b"',
    '"caf\u00e9"',
    '"\u2603"',
    '"\x7f"',
    '"\x85"',
    f'"{"a" * 10_000}"',
    f'"{"a" * 498}"',  # it may be cut: longer ones are when they are stored
    f'"{"a" * 498}',
    "",
    "*",
    "a, *",
    '"a", "b"',
    '"a", *',
    '"',
]


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_hostile_validators_are_not_sent(web: HostileServer, value: str) -> None:
    web.hits["/evil"] = 0
    row = revisit(web, stored(web.add("/victim", whole(OLD)), etag=value, last_modified=value))
    assert row["visit"] == "unchanged"
    assert sent(web, "/victim") == {}
    assert "Evil" not in web.requests["/victim"]
    assert not web.hits["/evil"]


def test_what_is_an_entity_tag() -> None:
    assert Validators("two words").headers() == {}
    assert Validators(longest := f'"{"a" * 497}"').headers() == {"If-None-Match": longest}


@given(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()))
@example(ETAG + "\n", DATE + "\n")
def test_what_is_sent_is_short_visible_ascii(etag: str | None, date: str | None) -> None:
    for value in Validators(etag, date).headers().values():
        assert value.isascii()
        assert value.isprintable()
        assert 0 < len(value) < 500


# -- redirects --------------------------------------------------------------------------------------------------------


def test_validators_go_to_the_address_that_gave_them(web: HostileServer) -> None:
    end = web.add("/end", careful(web, "/end", NEW, ETAG))
    start = web.add("/start", whole(b"", {"Location": "/end"}, "302 Found"))
    row = revisit(web, stored(start, etag=ETAG, final_url=end))
    assert (row["visit"], row["http_status"], row["final_url"]) == ("unchanged", 304, end)
    assert sent(web, "/start") == {}
    assert sent(web, "/end") == {"If-None-Match": ETAG}


def test_validators_of_another_address_are_not_believed(web: HostileServer) -> None:
    elsewhere = web.add("/elsewhere", careful(web, "/elsewhere", NEW, ETAG))
    moved = web.add("/moved", whole(b"", {"Location": "/elsewhere"}, "302 Found"))
    row = revisit(web, stored(moved, etag=ETAG))  # it answered by itself then
    assert (row["visit"], row["final_url"], row["image"]) == ("changed", elsewhere, NEW)
    assert (sent(web, "/moved"), sent(web, "/elsewhere")) == ({"If-None-Match": ETAG}, {})
    direct = web.add("/direct", careful(web, "/direct", OLD, ETAG))  # it led elsewhere then
    assert revisit(web, stored(direct, etag=ETAG, final_url=elsewhere))["http_status"] == 200
    assert sent(web, "/direct") == {}
    hop = web.add("/hop", NOT_MODIFIED)
    assert revisit(web, stored(hop, etag=ETAG, final_url=elsewhere))["reason"] == "http.protocol"


def test_an_opt_out_on_a_redirect_counts(web: HostileServer) -> None:
    end = web.add("/end2", NOT_MODIFIED)
    start = web.add("/start2", whole(b"", {"Location": "/end2", "X-Robots-Tag": "noai"}, "302 Found"))
    assert revisit(web, stored(start, etag=ETAG, final_url=end))["reason"] == "http.opt_out"


# -- several rows -----------------------------------------------------------------------------------------------------


def test_rows_of_one_url_that_agree_cost_one_conditional_request(web: HostileServer) -> None:
    url = web.add("/agree", careful(web, "/agree", NEW, ETAG))
    rows = visit_all([stored(url, etag=ETAG)] * 3)
    assert [row["visit"] for row in rows] == ["unchanged"] * 3
    assert web.hits["/agree"] == 1
    assert sent(web, "/agree")


def test_rows_of_one_url_that_differ_compare_their_own_hashes(web: HostileServer) -> None:
    url = web.add("/differ", careful(web, "/differ", NEW, '"v2"'))
    known = [
        stored(url, OLD, etag=ETAG),
        stored(url, NEW, etag='"v2"'),
        stored(url, NEW),
        stored(url, None, etag='"v2"'),
    ]
    rows = visit_all(known)
    assert [row["visit"] for row in rows] == ["changed", "unchanged", "unchanged", "changed"]
    assert {row["http_status"] for row in rows} == {200}
    assert rows[0]["image"] == rows[3]["image"] == NEW
    assert (web.hits["/differ"], sent(web, "/differ")) == (1, {})


def test_broken_bytes_that_one_row_holds_already_fail_for_the_others_only(web: HostileServer) -> None:
    broken = NEW[: len(NEW) // 2]
    url = web.add("/half", whole(broken))
    held, other = visit_all([stored(url, broken), stored(url, OLD)])
    assert (held["visit"], other["visit"], other["reason"]) == ("unchanged", "failed", "image.truncated")


def test_visits_do_not_depend_on_order_or_batch(web: HostileServer) -> None:
    answers: dict[str, bytes | Answer] = {
        "/a": NOT_MODIFIED,
        "/b": whole(OLD),
        "/c": whole(NEW),
        "/d": whole(b"", status="410 Gone"),
        "/e": whole(b"", {"X-Robots-Tag": "none"}, "304 Not Modified"),
    }
    rows = [stored(web.add(path, answer), etag=ETAG) for path, answer in answers.items()]
    together = visit_all(rows)
    assert together == visit_all(rows[::-1])[::-1] == [visit_all([row])[0] for row in rows]
    assert [row["visit"] for row in together] == ["unchanged", "unchanged", "changed", "failed", "failed"]


# -- local files ------------------------------------------------------------------------------------------------------


def test_local_files(tmp_path: Path, web: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    real = imaging.store
    monkeypatch.setattr(imaging, "store", lambda data, *rest: (decoded.append(data), real(data, *rest))[1])
    for name, data in (("same", OLD), ("changed", NEW), ("broken", NEW[:60])):
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(OLD)
        tar.addfile(member, io.BytesIO(OLD))
    places = [file_locator(str(tmp_path / name)) for name in ("same", "changed", "broken", "missing")]
    places.append(tar_locator(str(tmp_path / "shard.tar"), 512, len(OLD)))
    url = web.add("/never_asked", whole(NEW))
    rows = visit_all([stored(url, locator=place, etag=ETAG) for place in places])
    assert [row["visit"] for row in rows] == ["unchanged", "changed", "failed", "failed", "unchanged"]
    assert [row["reason"] for row in rows[2:4]] == ["image.truncated", "image.missing"]
    assert (rows[1]["image"], rows[1]["sha256"]) == (NEW, sha256(NEW))
    assert {row["http_status"] for row in rows} == {row["etag"] for row in rows} == {None}
    assert sorted(decoded) == sorted([NEW, NEW[:60]])
    assert not web.hits["/never_asked"]


# -- a whole web ------------------------------------------------------------------------------------------------------


def test_a_web_of_which_some_pictures_changed() -> None:
    shares = {Kind.NOT_FOUND: 0.1, Kind.COPY_EXACT: 0.1}
    with ProceduralWeb(30, seed=5, proportions=shares) as web:
        stage = downloader()
        columns = {"uid": [row.path for row in web.rows], "url": [row.url for row in web.rows]}
        table = pa.table({**columns, "locator": pa.nulls(30, pa.string())})
        first = apply(stage, stage.open(), Batch(table), ErrorBudget(0, 0)).drop_columns(["uid", "reason", "detail"])
        pictures_of_web = [row for row in web.rows if row.scene is not None]
        changed = {row.url for row in web.change(row.url for row in pictures_of_web[::5])}
        again = stage.open_revisit()(Batch(pa.table({**columns, "locator": table["locator"]} | _columns(first))))
        found = again.to_pylist()
        for row, visit in zip(web.rows, found, strict=True):
            if row.kind is Kind.NOT_FOUND:
                assert (visit["visit"], visit["reason"]) == ("failed", "http.not_found")
            elif row.url in changed:
                assert (visit["visit"], visit["sha256"]) == ("changed", sha256(served_bytes(row)))
            else:
                assert (visit["visit"], visit["http_status"]) == ("unchanged", 304)
        assert sum(web.not_modified.values()) == len(pictures_of_web) - len(changed) == 21


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))


# -- what the driver relies on ----------------------------------------------------------------------------------------


def test_img2dataset_says_that_it_cannot() -> None:
    with pytest.raises(ConfigError, match=r"download\.with: pairmill"):
        Img2DatasetDownload().open_revisit()


@pytest.mark.parametrize("after", ["30", "0", "1234567", "99999999999999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_wait_is_read_back_as_it_was_written(web: HostileServer, after: str) -> None:
    url = web.add("/wait", whole(b"", {"Retry-After": after}, "503 Busy"))
    detail = visit_all([stored(url)])[0]["detail"]
    wanted = min(int(after), 10**8) if after.isdigit() else 10**8
    assert retry_after_s(detail) == wanted


@given(st.text(), st.floats(0, 1e8))
def test_a_wait_in_a_detail(detail: str, seconds: float) -> None:
    read = retry_after_s(with_retry_after(detail, seconds))
    assert read is not None
    assert seconds <= read <= seconds + 1  # never too early


@pytest.mark.parametrize("detail", [None, "", "HTTP 429", "Retry-After: soon", "x, Retry-After: 5 s later", "5 s"])
def test_a_detail_without_a_wait(detail: str | None) -> None:
    assert retry_after_s(detail) is None
