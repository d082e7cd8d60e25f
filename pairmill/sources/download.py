"""The download stage: from a URL, or a local source's locator, to a stored image."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

import pyarrow as pa

from pairmill import imaging
from pairmill.errors import ConfigError
from pairmill.imaging import ImagingError, StoredImage
from pairmill.sources import locator as locators
from pairmill.sources.fetch import Fetched, Fetcher, Policy, Validators
from pairmill.sources.locator import Loader, LocatorError
from pairmill.stage import Batch, Kernel, Resources, Stage
from schemas import config, fields
from schemas.reasons import Reason, Visit

Result = TypeVar("Result")


FREE = {"identity": False}
"""Of a parameter that changes how images are fetched, not what comes of them."""


REVISIT_READS = tuple(
    column.name
    for column in (fields.URL, fields.LOCATOR, fields.ETAG, fields.LAST_MODIFIED, fields.SHA256, fields.FINAL_URL)
)
"""What `ImageDownload.open_revisit` reads: the pair, and what is stored of its image."""

Self = TypeVar("Self", bound="ImageDownload")


@dataclass(frozen=True)
class ImageDownload(Stage):
    """What all downloaders share: they write the same table, and take their knobs from the config's `download`."""

    name = "images"
    version = 1

    resize: config.Resize = field(default_factory=config.Resize)
    max_pixels: int = 80_000_000
    max_bytes: int = 32_000_000
    concurrency: int = field(default=256, metadata=FREE)
    timeout_s: float = field(default=10.0, metadata=FREE)
    retries: int = field(default=2, metadata=FREE)
    robots: bool = field(default=True, metadata=FREE)
    allow_private_addresses: bool = field(default=False, metadata=FREE)
    user_agent: str = field(default="pairmill/0.1", metadata=FREE)
    resources: Resources = field(default=Resources(cpus=1.0, rows=1000), metadata=FREE)

    @classmethod
    def from_config(cls: type[Self], download: config.Download) -> Self:
        """The stage that a config asks for: each field that the config has too."""
        known = type(download).model_fields
        return cls(**{f.name: getattr(download, f.name) for f in dataclass_fields(cls) if f.name in known})

    @property
    def reads(self) -> tuple[str, ...]:
        """The URL, or where a local source has the bytes."""
        return fields.URL.name, fields.LOCATOR.name

    @property
    def writes(self) -> tuple[pa.Field, ...]:
        """`schemas.fields.IMAGES`."""
        return fields.IMAGES

    def open_revisit(self) -> Kernel:
        """The kernel that looks again at images which are already stored, and decodes only what changed.

        It reads `REVISIT_READS` and returns, for each row, `schemas.fields.IMAGES`, ``reason``, ``detail`` and
        ``visit`` (string, a `schemas.reasons.Visit`):

        - unchanged: ``http_status``, ``final_url``, ``etag`` and ``last_modified`` as they are now; all else is null;
        - changed: all columns of the new image, as at a first fetch;
        - failed: reason, detail and, as at a first fetch, what is known of the answer.

        Raises:
            ConfigError: this downloader cannot do it.
        """
        raise ConfigError(
            "revisiting needs download.with: pairmill; img2dataset cannot ask a server whether an image changed"
        )


@dataclass(frozen=True)
class Download(ImageDownload):
    """Fetches, decodes, resizes and encodes the images of a batch; rows with a locator are read from local files.

    One call takes a whole shard, so that a slow host delays its own URLs only. A URL that occurs several times in a
    batch is fetched once. ``robots`` covers opt-out headers (``X-Robots-Tag``, ``tdm-reservation``).

    A revisit sends the ETag and Last-Modified of the last answer to the address that gave it, so an unchanged image
    costs no body. Where rows with the same URL remember different answers, the image is fetched once, whole, and each
    row compares its own sha256. A file of a local source is read and compared.
    """

    per_host: int = field(default=8, metadata=FREE)
    max_redirects: int = field(default=5, metadata=FREE)
    resources: Resources = field(default=Resources(cpus=0.5, rows=1000), metadata=FREE)

    def open(self) -> Kernel:
        """One TLS context a worker (making one costs more than fetching an image); sessions live as long as a call."""
        tls = ssl.create_default_context()

        def kernel(batch: Batch) -> pa.Table:
            urls, places = batch.pylist("url"), batch.pylist("locator")
            rows = rows_by_url(urls, places)
            nothing = dict.fromkeys(rows, Validators())
            return to_table(self._look(tls, rows, places, nothing, lambda _, fetched: self._store(fetched)))

        return kernel

    def open_revisit(self) -> Kernel:
        """As `ImageDownload.open_revisit`; it raises nothing. One TLS context a worker, as in `open`."""
        tls = ssl.create_default_context()

        def kernel(batch: Batch) -> pa.Table:
            urls, places, hashes = (batch.pylist(name) for name in ("url", "locator", "sha256"))
            rows = rows_by_url(urls, places)
            known = {url: {hashes[index] for index in indices} for url, indices in rows.items()}

            def compare(where: str | int, fetched: Fetched) -> Outcome:
                return self._compare(fetched, known[where] if isinstance(where, str) else {hashes[where]})

            return _to_visits(self._look(tls, rows, places, _validators(batch, rows), compare), hashes)

        return kernel

    def _look(
        self,
        tls: ssl.SSLContext,
        rows: Mapping[str, Sequence[int]],
        places: Sequence[str | None],
        validators: Mapping[str, Validators],
        use: Callable[[str | int, Fetched], Outcome],
    ) -> list[Outcome]:
        """Get the bytes of a batch, from the web (`rows` of each URL) and from files (`places`), and hand them to `use`
        with their URL or, if they come from a file, the row's position."""
        policy = Policy(
            concurrency=self.concurrency,
            per_host=self.per_host,
            timeout_s=self.timeout_s,
            retries=self.retries,
            max_bytes=self.max_bytes,
            max_redirects=self.max_redirects,
            robots=self.robots,
            allow_private_addresses=self.allow_private_addresses,
            user_agent=self.user_agent,
        )
        outcomes = [Outcome(Fetched(reason=Reason.EMPTY_URL, detail="the URL is empty")) for _ in places]
        with ThreadPoolExecutor(decoders(), thread_name_prefix="pairmill-decode") as pool:
            for index, outcome in load_local(places, self.max_bytes, use, pool):
                outcomes[index] = outcome
            fetched = in_own_loop(lambda: _fetch_all(validators, policy, tls, use, pool)) if rows else {}
        for url, indices in rows.items():
            for index in indices:
                outcomes[index] = fetched[url]
        return outcomes

    def _store(self, fetched: Fetched) -> Outcome:
        return store(fetched, self.resize, self.max_pixels)

    def _compare(self, fetched: Fetched, known: set[str | None]) -> Outcome:
        """The outcome of a revisit; bytes are decoded unless every row that asks for them has these already."""
        if fetched.data is None:
            return Outcome(fetched)
        digest = hashlib.sha256(fetched.data).hexdigest()
        if known == {digest}:
            return Outcome(_without_data(fetched), sha256=digest)
        return replace(self._store(fetched), sha256=digest)


@dataclass(frozen=True)
class Outcome:
    """What became of a row: how it was fetched and, when all went well, its image."""

    fetched: Fetched
    stored: StoredImage | None = None
    sha256: str | None = None
    """Of the bytes as fetched, where they are compared with those of an earlier visit."""


def store(fetched: Fetched, resize: config.Resize, max_pixels: int) -> Outcome:
    """The outcome of a fetched file; what is wrong with it becomes the row's reason."""
    if fetched.data is None:
        return Outcome(fetched)
    try:
        return Outcome(_without_data(fetched), imaging.store(fetched.data, resize, max_pixels))
    except ImagingError as error:
        return Outcome(_without_data(fetched, error.reason, error.detail))
    except MemoryError:
        return Outcome(_without_data(fetched, Reason.ERROR_MEMORY, "out of memory while decoding"))


def _without_data(fetched: Fetched, reason: Reason | None = None, detail: str | None = None) -> Fetched:
    return replace(fetched, data=None, reason=reason, detail=detail)


def _validators(batch: Batch, rows: Mapping[str, Sequence[int]]) -> dict[str, Validators]:
    """For each URL what its rows remember of the last answer: nothing, where they do not agree on it or hold no image
    that could be unchanged."""
    remembered = list(
        zip(*(batch.pylist(name) for name in ("etag", "last_modified", "final_url", "sha256")), strict=True)
    )
    found = {}
    for url, indices in rows.items():
        etag, last_modified, final_url, sha256 = remembered[indices[0]]
        agreed = sha256 is not None and all(remembered[i] == remembered[indices[0]] for i in indices)
        found[url] = Validators(etag, last_modified, final_url) if agreed else Validators()
    return found


def _to_visits(outcomes: Sequence[Outcome], hashes: Sequence[str | None]) -> pa.Table:
    """Outcomes of a revisit as columns, given the sha256 that each row had."""
    visits, shown = [], []
    for outcome, before in zip(outcomes, hashes, strict=True):
        same = outcome.sha256 is not None and outcome.sha256 == before
        if same or outcome.fetched.not_modified:
            visits.append(Visit.UNCHANGED)
            outcome = Outcome(_without_data(outcome.fetched))
        else:
            visits.append(Visit.FAILED if outcome.stored is None else Visit.CHANGED)
        shown.append(outcome)
    return to_table(shown).append_column("visit", pa.array([visit.value for visit in visits], pa.string()))


def load_local(
    places: Sequence[str | None], max_bytes: int, use: Callable[[int, Fetched], Outcome], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Outcome]]:
    """The outcomes of the rows that have a locator, with their positions: each file is read once, forwards."""
    here = [i for i, place in enumerate(places) if place is not None]
    order = [here[i] for i in locators.order([places[i] or "" for i in here])]
    pending: deque[tuple[int, Future[Outcome]]] = deque()
    with Loader(max_bytes) as loader:
        for index in order:
            try:
                fetched = Fetched(loader.load(places[index] or ""))
            except LocatorError as error:
                fetched = Fetched(reason=error.reason, detail=error.detail)
            pending.append((index, pool.submit(use, index, fetched)))
            if len(pending) > 4 * decoders():  # so that few files are in memory at a time
                done, future = pending.popleft()
                yield done, future.result()
    for done, future in pending:
        yield done, future.result()


def decoders() -> int:
    """Decoding threads a call; Pillow lets go of the interpreter while it works."""
    return min(4, os.cpu_count() or 1)


def rows_by_url(urls: Sequence[str | None], places: Sequence[str | None]) -> dict[str, list[int]]:
    """The positions of each URL that must be fetched."""
    rows: dict[str, list[int]] = defaultdict(list)
    for index, (url, place) in enumerate(zip(urls, places, strict=True)):
        if place is None and url:
            rows[url].append(index)
    return rows


async def _fetch_all(
    validators: Mapping[str, Validators],
    policy: Policy,
    tls: ssl.SSLContext,
    use: Callable[[str, Fetched], Outcome],
    pool: ThreadPoolExecutor,
) -> dict[str, Outcome]:
    loop = asyncio.get_running_loop()

    async def one(fetcher: Fetcher, url: str) -> Outcome:
        async def decode(fetched: Fetched) -> Outcome:
            if fetched.data is None:
                return Outcome(fetched)
            return await loop.run_in_executor(pool, use, url, fetched)

        try:
            return await fetcher.fetch(url, decode, validators[url])
        except Exception as error:  # noqa: BLE001 one strange answer must not cost the other rows their images
            return Outcome(Fetched(reason=Reason.ERROR_KERNEL, detail=f"{type(error).__name__}: {error}"[:300]))

    async with Fetcher(policy, tls) as fetcher:
        outcomes = await asyncio.gather(*(one(fetcher, url) for url in validators))
    return dict(zip(validators, outcomes, strict=True))


def in_own_loop(work: Callable[[], Awaitable[Result]]) -> Result:
    """Run a coroutine in an event loop of its own thread, for the caller's may be running one (notebooks, Ray's async
    actors). Ctrl-C in the caller cancels it."""
    outcome: Future[Result] = Future()
    started = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def run() -> Result:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        started.set()
        return await work()

    def target() -> None:
        try:
            outcome.set_result(asyncio.run(run()))
        except BaseException as error:  # noqa: BLE001 handed to the caller, whatever it is
            outcome.set_exception(error)

    thread = threading.Thread(target=target, name="pairmill-fetch", daemon=True)
    thread.start()
    try:
        return outcome.result()
    except BaseException:
        if not outcome.done():
            started.wait()
            loop, task = running[0]
            loop.call_soon_threadsafe(task.cancel)
        raise
    finally:
        thread.join()


def to_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """Outcomes as columns: `schemas.fields.IMAGES`, reason and detail."""

    def of_image(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([getattr(o.stored, name) if o.stored else None for o in outcomes], kind)

    columns: dict[str, Any] = {}
    for column in fields.IMAGES[: fields.IMAGES.index(fields.HTTP_STATUS)]:
        columns[column.name] = of_image(column.name, column.type)
    fetched = [o.fetched for o in outcomes]
    columns["http_status"] = pa.array([f.status for f in fetched], fields.HTTP_STATUS.type)
    columns["final_url"] = pa.array([f.final_url for f in fetched], fields.FINAL_URL.type)
    columns["etag"] = pa.array([f.etag for f in fetched], fields.ETAG.type)
    columns["last_modified"] = pa.array([f.last_modified for f in fetched], fields.LAST_MODIFIED.type)
    columns["reason"] = pa.array([f.reason.value if f.reason else None for f in fetched], fields.REASON.type)
    columns["detail"] = pa.array([f.detail for f in fetched], fields.DETAIL.type)
    return pa.table(columns)
