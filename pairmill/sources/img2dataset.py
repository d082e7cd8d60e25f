"""img2dataset as the downloader (``download: {with: img2dataset}``): a real run of it for each batch.

img2dataset fetches; the pixels go through `pairmill.imaging` as everywhere else, so the columns mean the same. Before
it runs, URLs are checked and names resolved as for `pairmill.sources.download.Download`; but it follows redirects and
resolves names again by itself, reads whole bodies into memory, and its timeout is for each read and not for the whole
request. Prefer pairmill's own downloader for URLs that nobody vouches for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pairmill.errors import ConfigError
from pairmill.sources import addresses
from pairmill.sources.addresses import AddressRefused
from pairmill.sources.download import ImageDownload, Outcome, decoders, load_local, rows_by_url, store, to_table
from pairmill.sources.fetch import Fetched, not_an_image
from pairmill.stage import Batch, Kernel
from schemas.reasons import Reason

_RUN = "import json, sys; from img2dataset import download; download(**json.load(sys.stdin))"
_OPT_OUTS = ["noai", "noimageai", "noindex", "noimageindex", "none"]
_START_UP_S = 120.0
_PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy")


@dataclass(frozen=True)
class Img2DatasetDownload(ImageDownload):
    """Fetches the images of a batch with img2dataset; rows with a locator are read from local files.

    Starting img2dataset costs about 10 CPU seconds a batch: it imports torch and Ray.
    """

    def open(self) -> Kernel:
        """Raises `ConfigError` when img2dataset is not installed."""
        if importlib.util.find_spec("img2dataset") is None:
            raise ConfigError("download.with is img2dataset, but it is not installed: pip install img2dataset")

        def kernel(batch: Batch) -> pa.Table:
            urls, places = batch.pylist("url"), batch.pylist("locator")
            outcomes = [Outcome(Fetched(reason=Reason.EMPTY_URL, detail="the URL is empty")) for _ in urls]
            with ThreadPoolExecutor(decoders(), thread_name_prefix="pairmill-decode") as pool:
                for index, outcome in load_local(places, self.max_bytes, lambda _, found: self._store(found), pool):
                    outcomes[index] = outcome
                rows = rows_by_url(urls, places)
                fetched = self._fetch(list(rows), pool)
                for indices, outcome in zip(rows.values(), pool.map(self._store, fetched), strict=True):
                    for index in indices:
                        outcomes[index] = outcome
            return to_table(outcomes)

        return kernel

    def _store(self, fetched: Fetched) -> Outcome:
        return store(fetched, self.resize, self.max_pixels)

    def _fetch(self, urls: Sequence[str], pool: ThreadPoolExecutor) -> list[Fetched]:
        checked = list(pool.map(self._checked, urls))
        allowed = list(dict.fromkeys(url for url in checked if isinstance(url, str)))
        fetched = dict(zip(allowed, self._run(allowed), strict=True)) if allowed else {}
        return [fetched[url] if isinstance(url, str) else url for url in checked]

    def _checked(self, url: str) -> str | Fetched:
        """The URL as img2dataset may fetch it, or why it must not."""
        try:
            address = addresses.parse(url, self.allow_private_addresses)
            if not self.allow_private_addresses:
                _check_name(address.host)
        except AddressRefused as refused:
            return Fetched(reason=refused.reason, detail=refused.detail)
        except OSError as error:
            return Fetched(reason=Reason.HTTP_DNS, detail=f"{address.host}: {error}"[:200])
        return address.url

    def _run(self, urls: list[str]) -> list[Fetched]:
        """Run img2dataset over the URLs, in a process of its own."""
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory(prefix="pairmill-img2dataset-") as folder:
            pq.write_table(pa.table({"url": urls, "position": list(range(len(urls)))}), f"{folder}/urls.parquet")
            failure = self._process(self._arguments(folder, len(urls)), len(urls))
            rows: dict[int, dict[str, Any]] = {}
            for file in sorted(Path(folder, "out").glob("*.parquet")):
                try:
                    rows |= {row["position"]: row for row in pq.read_table(file).to_pylist()}
                except pa.ArrowException:  # it was killed while writing: those rows have no answer
                    continue
        missing = failure or Fetched(reason=Reason.ERROR_CRASH, detail="img2dataset lost the row")
        return [self._answer(rows[i]) if i in rows else missing for i in range(len(urls))]

    def _arguments(self, folder: str, count: int) -> dict[str, Any]:
        return {
            "url_list": f"{folder}/urls.parquet",
            "input_format": "parquet",
            "output_folder": f"{folder}/out",
            "output_format": "parquet",
            "save_additional_columns": ["position"],
            "processes_count": 1,
            "thread_count": min(self.concurrency, count),
            "number_sample_per_shard": max(10, count),
            "timeout": math.ceil(self.timeout_s),
            "retries": self.retries,
            "disable_all_reencoding": True,  # its decoder ignores orientation and clips 16 bits; ours does not
            "extract_exif": False,
            "compute_hash": None,
            "user_agent_token": self.user_agent.split("/", maxsplit=1)[0],
            "disallowed_header_directives": _OPT_OUTS if self.robots else [],
        }

    def _process(self, arguments: dict[str, Any], count: int) -> Fetched | None:
        """Run it; None, or what to say of the rows it left without an answer."""
        environment = {k: v for k, v in os.environ.items() if k.lower() not in _PROXIES}
        environment["NO_ALBUMENTATIONS_UPDATE"] = "1"
        turns = math.ceil(count / self.concurrency)
        limit = _START_UP_S + 6 * self.timeout_s * (self.retries + 1) * turns
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            _, said = process.communicate(json.dumps(arguments).encode(), timeout=limit)
        except subprocess.TimeoutExpired:
            _kill(process)
            return Fetched(reason=Reason.HTTP_TIMEOUT, detail=f"img2dataset did not finish within {limit:g} s")
        except BaseException:
            _kill(process)
            raise
        if process.returncode != 0:
            last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
            return Fetched(
                reason=Reason.ERROR_CRASH, detail=f"img2dataset ended with {process.returncode}: {last}"[:300]
            )
        return None

    def _answer(self, row: dict[str, Any]) -> Fetched:
        if row["status"] != "success":
            return failure_of(row["error_message"] or "")
        data = row["jpg"]
        if len(data) > self.max_bytes:
            return Fetched(
                reason=Reason.HTTP_TOO_LARGE, detail=f"{len(data)} bytes; at most {self.max_bytes} are allowed"
            )
        if not data:
            return Fetched(reason=Reason.HTTP_EMPTY, detail="no bytes")
        return not_an_image(data[:1024], "") or Fetched(data)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and the workers it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _check_name(host: str) -> None:
    for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
        ip = str(entry[4][0])
        if not addresses.is_public(ipaddress.ip_address(ip)):
            detail = f"{host} resolves to {ip}, which is not on the public internet"
            raise AddressRefused(Reason.URL_PRIVATE_ADDRESS, detail)


_MESSAGES = (
    (r"X-Robots-Tag", Reason.HTTP_OPT_OUT),
    (r"redirect.*infinite loop|HTTP Error 30\d", Reason.HTTP_REDIRECT_LOOP),
    (r"HTTP Error (404|410)", Reason.HTTP_NOT_FOUND),
    (r"HTTP Error 429", Reason.HTTP_TOO_MANY_REQUESTS),
    (r"HTTP Error 4\d\d", Reason.HTTP_CLIENT_ERROR),
    (r"HTTP Error 5\d\d", Reason.HTTP_SERVER_ERROR),
    (r"timed out|timeout", Reason.HTTP_TIMEOUT),
    (r"Name or service not known|name resolution|nodename nor servname|No address associated", Reason.HTTP_DNS),
    (r"CERTIFICATE|SSL|TLS", Reason.HTTP_TLS),
    (r"IncompleteRead|BadStatusLine|LineTooLong|got more than \d+ headers|content-length|chunk", Reason.HTTP_PROTOCOL),
    (r"Errno|Connection|Remote end closed|unreachable|reset", Reason.HTTP_CONNECTION),
)


def failure_of(message: str) -> Fetched:
    """An error message of img2dataset as a reason."""
    detail = addresses.without_controls(message)[:200]
    status = re.search(r"HTTP Error (\d{3})", message)
    for pattern, reason in _MESSAGES:
        if re.search(pattern, message, re.IGNORECASE):
            return Fetched(reason=reason, detail=detail, status=int(status[1]) if status else None)
    return Fetched(reason=Reason.HTTP_PROTOCOL, detail=detail)
