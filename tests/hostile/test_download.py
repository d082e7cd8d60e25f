"""The download stage against the hostile web: in every test a good URL in the same batch must still succeed."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pairmill.sources import addresses, fetch
from pairmill.sources.download import Download
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import config
from tests.hostile import pictures
from tests.hostile.server import HostileServer, endless, in_turn, silent, trickle, whole

GOOD = pictures.encoded(pictures.quadrants(), "JPEG", quality=95)
CAP = 200_000


@pytest.fixture(scope="module")
def web() -> Iterator[HostileServer]:
    with HostileServer() as server:
        server.add(
            "/good.jpg", whole(GOOD, {"Content-Type": "image/jpeg", "ETag": '"abc"', "Last-Modified": "yesterday"})
        )
        yield server


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_BACKOFF_S", 0.01)


def download(urls: list[str | None], **settings: object) -> list[dict]:
    """The stage's rows for some URLs."""
    stage = Download.from_config(
        config.Download(
            **{
                "allow_private_addresses": True,
                "timeout_s": 5,
                "retries": 0,
                "max_bytes": CAP,
                "max_pixels": 1_000_000,
                **settings,
            }
        )
    )
    return run(stage, urls)


def run(stage: Download, urls: list[str | None]) -> list[dict]:
    columns = {"uid": [str(i) for i in range(len(urls))], "url": urls, "locator": pa.nulls(len(urls), pa.string())}
    budget = ErrorBudget(0, 0)
    return apply(stage, stage.open(), Batch(pa.table(columns)), budget).to_pylist()


def with_control(web: HostileServer, url: str | None, **settings: object) -> dict:
    """The row of one hostile URL, fetched together with a good one, which must succeed."""
    before, row, after = download([web.url("/good.jpg?1"), url, web.url("/good.jpg?2")], **settings)
    assert before["reason"] is after["reason"] is None
    assert before["image"] == after["image"] == GOOD
    assert (row["reason"] is None) == (row["image"] is not None)
    return row


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(int)


def looks_right(row: dict) -> bool:
    """Whether the stored picture is `pictures.quadrants`, upright."""
    wanted = np.asarray(pictures.quadrants()).astype(int)
    got = pixels(row)
    return got.shape == wanted.shape and np.abs(got - wanted).mean() < 12


# -- accepted ---------------------------------------------------------------------------------------------------------


def test_a_good_image_keeps_its_bytes_and_headers(web: HostileServer) -> None:
    row = with_control(web, web.url("/good.jpg"))
    assert row["image"] == GOOD
    assert (row["width"], row["height"], row["original_bytes"]) == (40, 24, len(GOOD))
    assert (row["http_status"], row["etag"], row["last_modified"]) == (200, '"abc"', "yesterday")
    assert row["final_url"] is None


def test_redirects_are_followed_and_the_end_is_recorded(web: HostileServer) -> None:
    web.add("/hop2", whole(b"", {"Location": "good.jpg?hop=2"}, "301 Moved"))
    start = web.add("/hop1", whole(b"", {"Location": "/hop2"}, "302 Found"))
    row = with_control(web, start)
    assert row["final_url"] == web.url("/good.jpg?hop=2")
    assert row["image"] == GOOD


def test_spaces_and_unicode_in_a_url_are_quoted_once(web: HostileServer) -> None:
    web.add("/caf%C3%A9%20au%20lait.jpg", whole(GOOD))
    assert with_control(web, web.url("/café au lait.jpg?q=ä ö&sig=a%2Fb#part"))["image"] == GOOD
    assert "?q=%C3%A4%20%C3%B6&sig=a%2Fb " in web.requests["/caf%C3%A9%20au%20lait.jpg"]


def test_gzip_encoded_and_mislabelled_images_are_accepted(web: HostileServer) -> None:
    zipped = web.add("/zipped", whole(gzip.compress(GOOD), {"Content-Encoding": "gzip"}))
    claimed = web.add("/claimed", whole(GOOD, {"Content-Encoding": "gzip"}))
    html = web.add("/typed", whole(GOOD, {"Content-Type": "text/html"}))
    assert all(with_control(web, url)["image"] == GOOD for url in (zipped, claimed, html))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(web: HostileServer, orientation: int) -> None:
    row = with_control(web, web.add("/turned", whole(pictures.turned(orientation))))
    assert looks_right(row)
    assert (row["original_width"], row["original_height"]) == (40, 24)


def test_duplicate_urls_cost_one_fetch(web: HostileServer) -> None:
    url = web.add("/once.jpg", whole(GOOD))
    rows = download([url] * 5 + [web.url("/good.jpg")])
    assert [row["image"] for row in rows] == [GOOD] * 6
    assert web.hits["/once.jpg"] == 1


def test_a_passing_error_is_tried_again(web: HostileServer) -> None:
    url = web.add("/later", in_turn(whole(b"", status="503 Busy"), whole(b"", status="500 Oops"), whole(GOOD)))
    assert with_control(web, url, retries=2)["image"] == GOOD
    assert web.hits["/later"] == 3


# -- refused before a socket is opened --------------------------------------------------------------------------------

REFUSED = {
    "url.scheme": [
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "ftp://example.com/a.jpg",
        "gopher://example.com/a",
        "javascript:alert(1)",
    ],
    "url.private_address": [
        "http://127.0.0.1:{port}/good.jpg",
        "http://2130706433:{port}/good.jpg",
        "http://0x7f000001:{port}/good.jpg",
        "http://0x7f.0.0.1:{port}/good.jpg",
        "http://0177.0.0.1:{port}/good.jpg",
        "http://017700000001:{port}/good.jpg",
        "http://127.1:{port}/good.jpg",
        "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:{port}/good.jpg",  # full-width digits
        "http://127.0.0.1.:{port}/good.jpg",
        "http://localhost:{port}/good.jpg",
        "http://0:{port}/good.jpg",
        "http://0.0.0.0:{port}/good.jpg",
        "http://[::1]:{port}/good.jpg",
        "http://[::]:{port}/good.jpg",
        "http://[::ffff:127.0.0.1]:{port}/good.jpg",
        "http://[::ffff:7f00:1]:{port}/good.jpg",
        "http://[::127.0.0.1]:{port}/good.jpg",
        "http://[64:ff9b::7f00:1]/a",
        "http://[2002:7f00:1::]/a",
        "http://[fe80::1]/a",
        "http://[fd00::1]/a",
        "http://[fec0::1]/a",
        "http://[ff02::1]/a",
        "http://10.0.0.1/a",
        "http://172.16.0.1/a",
        "http://192.168.0.1/a",
        "http://100.64.0.1/a",
        "http://169.254.169.254/latest/meta-data",
        "http://224.0.0.1/a",
        "http://255.255.255.255/a",
    ],
    "url.userinfo": ["http://user:secret@example.com/a.jpg", "http://127.0.0.1:{port}@example.com/a.jpg"],
    "url.invalid": [
        "http://exa mple.com/a.jpg",
        "http://example.com/a\r\nHost: evil",
        "http://example.com/a\nb",
        "//example.com/a.jpg",
        "not a url",
        "http://",
        "http://example.com:99999/a",
        "http://[::1/a",
        "http://evil.com\\.example.com/a",
    ],
}


@pytest.mark.parametrize(("reason", "url"), [(reason, url) for reason, urls in REFUSED.items() for url in urls])
def test_refused_addresses_open_no_socket(web: HostileServer, reason: str, url: str) -> None:
    hits = sum(web.hits.values())
    (row,) = download([url.format(port=web.port)], allow_private_addresses=False)
    assert row["reason"] == reason
    assert row["image"] is None
    assert sum(web.hits.values()) == hits
    assert "secret" not in row["detail"]


def test_refused_schemes_stay_refused_where_private_addresses_are_allowed(web: HostileServer) -> None:
    for url in REFUSED["url.scheme"]:
        assert with_control(web, url)["reason"] == "url.scheme"


def test_empty_urls(web: HostileServer) -> None:
    assert with_control(web, None)["reason"] == "source.empty_url"
    assert with_control(web, "")["reason"] == "source.empty_url"


@pytest.fixture
def second_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.2 stands for the public internet."""
    monkeypatch.setattr(addresses, "is_public", lambda ip: str(ip) == "127.0.0.2")


@pytest.mark.usefixtures("second_is_public")
@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "file:///etc/passwd",
        "ftp://127.0.0.2/secret",
        "http://a:b@127.0.0.2/secret",
        "//127.1:{port}/secret",
    ],
)
def test_a_redirect_to_a_refused_address(web: HostileServer, target: str) -> None:
    web.add("/inwards", whole(b"", {"Location": target.format(port=web.port)}, "302 Found"))
    web.add("/secret", whole(GOOD))
    web.hits["/secret"] = 0
    urls = [web.url(path, "127.0.0.2") for path in ("/inwards", "/good.jpg")]
    row, control = download(urls, allow_private_addresses=False)
    assert row["reason"] == "url.redirect_refused"
    assert control["image"] == GOOD
    assert web.hits["/secret"] == 0


def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[list[str]]]) -> dict[str, int]:
    """Names that resolve to other addresses at each lookup; counts the lookups."""
    real = socket.getaddrinfo
    asked: dict[str, int] = dict.fromkeys(names, 0)

    def getaddrinfo(host: str, port: object, *args: object, **kwargs: object) -> list:
        if host not in names:
            return real(host, port, *args, **kwargs)
        answers = names[host]
        found = answers[min(asked[host], len(answers) - 1)]
        asked[host] += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port or 0)) for ip in found]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.usefixtures("second_is_public")
def test_names_are_checked_with_all_their_addresses(web: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, {"mixed.test": [["127.0.0.2", "127.0.0.1"]], "inner.test": [["127.0.0.1"]]})
    urls = [f"http://{host}:{web.port}/good.jpg" for host in ("mixed.test", "inner.test", "127.0.0.2")]
    mixed, inner, control = download(urls, allow_private_addresses=False)
    assert mixed["reason"] == inner["reason"] == "url.private_address"
    assert control["image"] == GOOD


@pytest.mark.usefixtures("second_is_public")
def test_dns_rebinding_meets_the_address_that_was_checked(web: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolving(monkeypatch, {"rebind.test": [["127.0.0.2"], ["127.0.0.1"]]})
    rows = download([f"http://rebind.test:{web.port}/good.jpg?{i}" for i in range(3)], allow_private_addresses=False)
    assert [row["image"] for row in rows] == [GOOD] * 3
    assert asked["rebind.test"] == 1
    assert f"Host: rebind.test:{web.port}" in web.requests["/good.jpg"]


# -- rejected ---------------------------------------------------------------------------------------------------------

JPEG = pictures.encoded(pictures.noise(200, 100), "JPEG")
PNG = pictures.encoded(pictures.noise(60, 40), "PNG")


def _bad_crc() -> bytes:
    data = bytearray(PNG)
    data[data.index(b"IDAT") + 200] ^= 0xFF
    return bytes(data)


REJECTED = {
    "not_found": (whole(b"gone", status="404 Not Found"), "http.not_found"),
    "gone": (whole(b"", status="410 Gone"), "http.not_found"),
    "forbidden": (whole(GOOD, status="403 Forbidden"), "http.client_error"),
    "html": (whole(b"<!doctype html><p>no picture</p>" * 100, {"Content-Type": "text/html"}), "http.not_an_image"),
    "html_as_jpeg": (whole(b"<html></html>", {"Content-Type": "image/jpeg"}), "http.not_an_image"),
    "json": (whole(b'{"error": 1}', {"Content-Type": "application/json"}), "http.not_an_image"),
    "svg": (whole(b'<?xml version="1.0"?><svg xmlns="x"/>', {"Content-Type": "image/svg+xml"}), "image.format"),
    "icon": (whole(b"\0\0\1\0\1\0" + bytes(100), {"Content-Type": "image/x-icon"}), "image.format"),
    "zero_bytes": (whole(b""), "http.empty"),
    "no_content": (whole(b"", status="204 No Content"), "http.empty"),
    "over_cap": (whole(GOOD + bytes(CAP)), "http.too_large"),
    "over_cap_unannounced": (b"HTTP/1.1 200 OK\r\n\r\n" + GOOD + bytes(CAP), "http.too_large"),
    "endless": (endless(b"HTTP/1.1 200 OK\r\n\r\n" + GOOD, bytes(65536)), "http.too_large"),
    "length_huge": (whole(GOOD, length="99999999999"), "http.too_large"),
    "length_more": (whole(GOOD, length=str(len(GOOD) + 10)), "http.protocol"),
    "length_negative": (whole(GOOD, length="-1"), "http.protocol"),
    "length_nonsense": (whole(GOOD, length="many"), "http.protocol"),
    "length_short": (whole(GOOD, length=str(len(GOOD) // 2)), ("image.truncated", "http.protocol")),
    "bad_chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD, "http.protocol"),
    "cut_chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", "http.protocol"),
    "no_http": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "http.protocol"),
    "header_line_flood": (whole(GOOD, {"X-Long": "a" * 200_000}), "http.protocol"),
    "gzip_bomb": (whole(gzip.compress(bytes(50_000_000)), {"Content-Encoding": "gzip"}), "http.too_large"),
    "not_gzip": (whole(b"no gzip at all", {"Content-Encoding": "gzip"}), "http.protocol"),
    "brotli": (whole(b"\x0b\x02\x80abc\x03", {"Content-Encoding": "br"}), "http.protocol"),
    "no_location": (whole(b"", status="302 Found"), "http.protocol"),
    "one_bit_bomb": (whole(pictures.png_bomb(60_000, 60_000, 1, 0)), "image.too_many_pixels"),
    "rgba_bomb": (whole(pictures.png_bomb(8_000, 8_000, 8, 6)), "image.too_many_pixels"),
    "gif_canvas": (whole(pictures.gif_bomb()), "image.too_many_pixels"),
    "webp_canvas": (whole(pictures.webp_canvas_bomb()), "image.too_many_pixels"),
    "forged_dimensions": (whole(pictures.png_bomb(900, 900, 8, 2)), ("image.undecodable", "image.truncated")),
    "truncated_jpeg": (whole(JPEG[: len(JPEG) // 2]), "image.truncated"),
    "truncated_png": (whole(PNG[: len(PNG) // 2]), "image.truncated"),
    "bad_crc": (whole(_bad_crc()), "image.undecodable"),
    "garbage_after_magic": (whole(b"\xff\xd8\xff\xe0" + bytes(500)), ("image.undecodable", "image.truncated")),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(web: HostileServer, name: str) -> None:
    answer, reasons = REJECTED[name]
    row = with_control(web, web.add(f"/{name}", answer))
    assert row["reason"] in (reasons if isinstance(reasons, tuple) else (reasons,))
    assert row["detail"]


def test_a_flood_of_headers(web: HostileServer) -> None:
    async def flood(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-Flood: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 100)
            await writer.drain()

    row = with_control(web, web.add("/flood", flood), timeout_s=1)
    assert row["reason"] in ("http.protocol", "http.timeout")


def test_redirect_loops(web: HostileServer) -> None:
    loop = web.add("/loop", whole(b"", {"Location": "/loop"}, "302 Found"))
    for i in range(10):
        web.add(f"/chain{i}", whole(b"", {"Location": f"/chain{i + 1}"}, "302 Found"))
    assert with_control(web, loop)["reason"] == "http.redirect_loop"
    assert with_control(web, web.url("/chain0"), max_redirects=5)["reason"] == "http.redirect_loop"
    assert [web.hits[f"/chain{i}"] for i in range(7)] == [1, 1, 1, 1, 1, 1, 0]


def test_what_a_server_says_reaches_the_detail_without_secrets(web: HostileServer) -> None:
    url = web.add("/signed", whole(b"", {"Location": "/signed?signature=hush"}, "302 Found"))
    assert "hush" not in with_control(web, url, max_redirects=0)["detail"]
    assert (
        with_control(web, web.add("/tea", whole(b"", status="418 I'm a teapot")))["detail"] == "HTTP 418 I'm a teapot"
    )


def test_tls_to_a_server_without_it(web: HostileServer) -> None:
    assert with_control(web, web.url("/good.jpg").replace("http:", "https:"))["reason"] == "http.tls"


# -- deferred ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("silent", silent(30)),
        ("slow_header", trickle(whole(GOOD), 0.05)),
        ("slow_body", trickle(whole(GOOD), 0.05, first=200)),
    ],
)
def test_the_deadline_covers_headers_and_body(web: HostileServer, name: str, answer: object) -> None:
    began = time.monotonic()
    row = with_control(web, web.add(f"/{name}", answer), timeout_s=1.5)
    assert row["reason"] == "http.timeout"
    assert time.monotonic() - began < 5


def test_a_server_that_asks_for_patience_gets_one_request(web: HostileServer) -> None:
    busy = web.add("/busy", whole(b"", {"Retry-After": "30"}, "429 Too Many Requests"))
    row = with_control(web, busy, retries=3)
    assert row["reason"] == "http.too_many_requests"
    assert "30 s" in row["detail"]
    assert web.hits["/busy"] == 1
    url = web.add("/soon", in_turn(whole(b"", {"Retry-After": "0"}, "503 Wait"), whole(GOOD)))
    assert with_control(web, url, retries=1)["image"] == GOOD


def test_what_will_not_pass_is_not_tried_again(web: HostileServer) -> None:
    url = web.add("/never", whole(b"", status="404 Not Found"))
    assert with_control(web, url, retries=3)["reason"] == "http.not_found"
    assert web.hits["/never"] == 1


def test_connection_and_name_failures(web: HostileServer) -> None:
    async def reset(writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/a.jpg"
        assert with_control(web, nobody)["reason"] == "http.connection"
    assert with_control(web, web.add("/reset", reset))["reason"] == "http.connection"
    assert with_control(web, "http://no-such-host.invalid/a.jpg")["reason"] == "http.dns"


# -- opted out --------------------------------------------------------------------------------------------------------

OPT_OUTS = [
    {"X-Robots-Tag": "noai"},
    {"X-Robots-Tag": "NoImageAI"},
    {"X-Robots-Tag": "noindex"},
    {"X-Robots-Tag": "none"},
    {"X-Robots-Tag": "nofollow, noai"},
    {"X-Robots-Tag": "nofollow; noimageai"},
    {"X-Robots-Tag": "pairmill: noai"},
    {"X-Robots-Tag": "otherbot: nofollow, pairmill: nosnippet, noindex"},
    {"X-Robots-Tag": "unavailable_after: 25 Jun 2010 15:00:00 PST, noai"},
    {"tdm-reservation": "1"},
]


@pytest.mark.parametrize("headers", OPT_OUTS, ids=lambda headers: " ".join(headers.values()))
def test_opt_outs(web: HostileServer, headers: dict[str, str]) -> None:
    url = web.add("/out", whole(GOOD, headers))
    web.hits["/out"] = 0
    row = with_control(web, url, retries=2)
    assert row["reason"] == "http.opt_out"
    assert web.hits["/out"] == 1
    assert with_control(web, url, robots=False)["image"] == GOOD


@pytest.mark.parametrize("value", ["nofollow", "all", "otherbot: noai", "max-image-preview:none"])
def test_what_is_no_opt_out(web: HostileServer, value: str) -> None:
    assert (
        with_control(web, web.add("/in", whole(GOOD, {"X-Robots-Tag": value, "tdm-reservation": "0"})))["image"] == GOOD
    )


def test_an_opt_out_on_a_redirect_counts(web: HostileServer) -> None:
    url = web.add("/hop_out", whole(b"", {"Location": "/good.jpg?out", "X-Robots-Tag": "noai"}, "302 Found"))
    assert with_control(web, url)["reason"] == "http.opt_out"


# -- manners, and where the kernel runs -------------------------------------------------------------------------------


def test_the_user_agent_and_no_more(web: HostileServer) -> None:
    with_control(web, web.add("/agent", whole(GOOD)), user_agent="pairmill/9 (+mailto:me@example.com)")
    request = web.requests["/agent"]
    assert "User-Agent: pairmill/9 (+mailto:me@example.com)\r\n" in request
    assert "Cookie" not in request


def test_proxies_of_the_environment_are_not_used(web: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert with_control(web, web.url("/good.jpg"))["image"] == GOOD


def test_other_hosts_go_on_while_one_is_slow(web: HostileServer) -> None:
    web.add("/slow", silent(30))
    slow = [web.url(f"/slow?{i}", "127.0.0.3") for i in range(8)]
    fast = [web.url(f"/good.jpg?{i}") for i in range(20)]
    web.seen.clear()
    rows = download([*slow, *fast], concurrency=4, per_host=2, timeout_s=0.8)
    assert [row["reason"] for row in rows] == ["http.timeout"] * 8 + [None] * 20
    last = {path: max(at for at, seen in web.seen if seen == path) for path in ("/slow", "/good.jpg")}
    assert last["/good.jpg"] < last["/slow"] - 0.8  # the slow ones go by twos; the others wait for none of them


def test_a_dead_host_is_given_up_for_the_batch(web: HostileServer) -> None:
    web.add("/dead", silent(30))
    urls = [web.url(f"/dead?{i}", "127.0.0.3") for i in range(200)]
    web.hits["/dead"] = 0
    began = time.monotonic()
    rows = download([*urls, web.url("/good.jpg")], per_host=4, timeout_s=0.6, retries=2)
    assert [row["reason"] for row in rows] == ["http.timeout"] * 200 + [None]
    assert 16 <= web.hits["/dead"] <= 20
    assert time.monotonic() - began < 8


def test_no_more_than_per_host_at_once(web: HostileServer) -> None:
    now = most = 0

    async def count(writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        writer.write(whole(GOOD))
        await writer.drain()

    url = web.add("/counted", count)
    rows = download([f"{url}?{i}" for i in range(12)], per_host=3)
    assert all(row["image"] == GOOD for row in rows)
    assert most == 3


def test_results_do_not_depend_on_order_or_batch(web: HostileServer) -> None:
    names = ["not_found", "html", "bad_crc", "gif_canvas", "length_short", "zero_bytes"]
    urls = [web.add(f"/{name}", REJECTED[name][0]) for name in names] + [web.url("/good.jpg")]
    together = download(urls)
    backwards = download(urls[::-1])[::-1]
    alone = [download([url])[0] for url in urls]
    for a, b, c in zip(together, backwards, alone, strict=True):
        assert {k: v for k, v in a.items() if k != "uid"} == {k: v for k, v in b.items() if k != "uid"}
        assert {k: v for k, v in a.items() if k != "uid"} == {k: v for k, v in c.items() if k != "uid"}


def test_inside_a_running_event_loop(web: HostileServer) -> None:
    async def caller() -> dict:
        return with_control(web, web.url("/good.jpg"))

    assert asyncio.run(caller())["image"] == GOOD


def test_inside_a_process_pool(web: HostileServer) -> None:
    stage = Download(allow_private_addresses=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        (row,) = pool.submit(run, stage, [web.url("/good.jpg")]).result(60)
    assert row["image"] == GOOD


def test_ctrl_c_ends_a_batch_at_once(web: HostileServer) -> None:
    code = (
        "import sys; from tests.hostile.test_download import download; print('go', flush=True); "
        "download([sys.argv[1]], timeout_s=60)"
    )
    command = [sys.executable, "-c", code, web.add("/hang", silent(60))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    while web.hits["/hang"] == 0 and process.poll() is None:
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 15, "it hangs for 60 s"
    assert b"KeyboardInterrupt" in said
    assert process.returncode != 0


def test_only_what_shapes_the_result_is_in_the_identity() -> None:
    assert Download(per_host=1, retries=9).fingerprint() == Download().fingerprint()
    assert Download(resize=config.Resize(size=256)).fingerprint() != Download().fingerprint()
    assert Download(max_pixels=5).fingerprint() != Download().fingerprint()
