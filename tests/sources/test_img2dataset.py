"""img2dataset as the downloader: one real run of it against the hostile server."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pairmill.sources import download_stage
from pairmill.sources.download import Download
from pairmill.sources.img2dataset import Img2DatasetDownload, failure_of
from pairmill.stage import Batch, ErrorBudget, apply
from schemas import config
from tests.hostile import pictures
from tests.hostile.server import HostileServer, silent, whole

GOOD = pictures.encoded(pictures.quadrants(), "JPEG", quality=95)


def run(stage: Img2DatasetDownload, urls: list[str | None]) -> list[dict]:
    columns = {"uid": [str(i) for i in range(len(urls))], "url": urls, "locator": pa.nulls(len(urls), pa.string())}
    return apply(stage, stage.open(), Batch(pa.table(columns)), ErrorBudget(0, 0)).to_pylist()


def test_the_config_chooses() -> None:
    assert isinstance(download_stage(config.Download()), Download)
    assert isinstance(download_stage(config.Download.model_validate({"with": "img2dataset"})), Img2DatasetDownload)


def test_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HostileServer() as web:
        cases = {
            web.add("/good.jpg", whole(GOOD)): None,
            web.add("/turned.jpg", whole(pictures.turned(6))): None,
            web.add("/gone", whole(b"", status="404 Not Found")): "http.not_found",
            web.add("/busy", whole(b"", status="429 Too Many Requests")): "http.too_many_requests",
            web.add("/broken", whole(b"", status="500 Oops")): "http.server_error",
            web.add("/out", whole(GOOD, {"X-Robots-Tag": "noai"})): "http.opt_out",
            web.add("/page", whole(b"<html></html>")): "http.not_an_image",
            web.add("/empty", whole(b"")): "http.empty",
            web.add("/large", whole(GOOD + bytes(100_000))): "http.too_large",
            web.add("/bomb", whole(pictures.gif_bomb())): "image.too_many_pixels",
            web.add("/loop", whole(b"", {"Location": "/loop"}, "302 Found")): "http.redirect_loop",
            web.add("/hang", silent(30)): "http.timeout",
            "http://127.0.0.1:9/nobody": "http.connection",
            "http://no-such-host.invalid/a": "http.dns",
            "file:///etc/passwd": "url.scheme",
        }
        settings = {
            "with": "img2dataset",
            "allow_private_addresses": True,
            "timeout_s": 1,
            "retries": 0,
            "max_bytes": 50_000,
        }
        stage = download_stage(config.Download.model_validate(settings))
        out = run(stage, [*cases, web.url("/good.jpg"), None])
    assert {row_url: row["reason"] for row_url, row in zip(cases, out, strict=False)} == cases
    assert out[0]["image"] == out[-2]["image"] == GOOD
    assert (out[1]["width"], out[1]["height"], out[1]["format"]) == (40, 24, "jpeg")
    assert out[0]["pixel_sha256"]
    assert out[2]["http_status"] == 404
    assert out[-1]["reason"] == "source.empty_url"
    assert web.hits["/good.jpg"] == 1


def test_private_addresses_are_refused_before_it_starts() -> None:
    with HostileServer() as web:
        urls = [web.url("/a"), f"http://localhost:{web.port}/a", f"http://2130706433:{web.port}/a"]
        out = run(Img2DatasetDownload(), urls)
        assert [row["reason"] for row in out] == ["url.private_address"] * 3
        assert not web.hits


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 403: Forbidden", "http.client_error"),
        ("HTTP Error 503: Service Unavailable", "http.server_error"),
        ("<urlopen error timed out>", "http.timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "http.tls"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "http.dns"),
        ("IncompleteRead(5 bytes read, 10 more expected)", "http.protocol"),
        ("Remote end closed connection without response", "http.connection"),
        ("something new", "http.protocol"),
    ],
)
def test_its_messages_as_reasons(message: str, reason: str) -> None:
    assert failure_of(message).reason == reason
