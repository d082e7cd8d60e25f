"""WebDataset shards: tar files whose consecutive members with one key are a sample; img2dataset's output among them.

Only headers, texts and JSON members are read: an image stays where it is, and the row says at which offset. Nothing is
extracted, so a member named ``../x`` is only a name.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa

from pairmill.sources import files
from pairmill.sources.boxes import are_boxes, take_boxes
from pairmill.sources.files import SourceFile
from pairmill.sources.locator import tar_locator
from pairmill.sources.rows import Row, extra_json, malformed, tables, web_row
from schemas import config

ENDINGS = (".tar", ".tar.gz", ".tgz")
_MAX_SIDE_MEMBER = 64 * 2**20  # a text or JSON member beyond this is no caption


@dataclass
class _Sample:
    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)


def read_webdataset(source: config.WebDataset) -> Iterator[pa.Table]:
    """The rows of a `schemas.config.WebDataset`.

    ``url`` is the JSON member's url, else ``wds:<tar name>/<key>``. What img2dataset could not fetch is not in its tars
    but in the parquet file beside them: read that as a ``url_table`` to try those URLs again. Boxes are taken from the
    JSON's key ``boxes`` where they have the form of `pairmill.sources.boxes`, as in pairmill's own exports.
    """
    found = files.find(source.path, ENDINGS, "webdataset")
    return tables(row for file in found for row in _tar_rows(file, source))


def _tar_rows(file: SourceFile, source: config.WebDataset) -> Iterator[Row]:
    name = file.name.replace("\\", "/").rsplit("/", 1)[-1]
    with files.open_bytes(file) as handle:
        samples = _Samples(handle, name)
        for sample in samples:
            yield _row(sample, samples, file, name, source)
        if samples.damage is not None:
            yield malformed(
                f"{name}: {samples.damage}".encode(), f"{name}: {samples.damage}; samples after it are lost"
            )


class _Samples:
    """The samples of a tar file, in its order. `damage` says afterwards where it broke off, if it did."""

    def __init__(self, handle: IO[bytes], name: str) -> None:
        self._handle = handle
        self._name = name
        self.damage: str | None = None

    def __iter__(self) -> Iterator[_Sample]:
        sample: _Sample | None = None
        for member in self._members():
            folder, slash, base = member.name.rpartition("/")
            stem, _, ending = base.partition(".")
            key = f"{folder}{slash}{stem}"
            if sample is not None and key != sample.key:
                yield sample
                sample = None
            if sample is None:
                sample = _Sample(key)
            sample.members.setdefault(ending.lower(), member)
        if sample is not None:
            yield sample

    def _members(self) -> Iterator[tarfile.TarInfo]:
        try:
            tar = tarfile.open(fileobj=self._handle, mode="r:")  # noqa: SIM115 closed below
        except (tarfile.TarError, EOFError, zlib.error) as error:
            if self._handle.seek(0) == 0 and not self._handle.read(1):
                return
            self.damage = f"not a tar file ({error})"
            return
        with tar:
            while True:
                try:
                    member = tar.next()
                except (tarfile.TarError, EOFError, zlib.error) as error:
                    self.damage = f"damaged at byte {tar.offset} ({error})"
                    return
                if member is None:
                    break
                if member.isfile():
                    yield member
            # tarfile ends quietly at a header it cannot read: a sound end is a block of zeros, or the end of the file
            self._handle.seek(tar.offset)
            if self._handle.read(512).strip(b"\0"):
                self.damage = f"damaged at byte {tar.offset} (no tar header there)"

    def read(self, member: tarfile.TarInfo) -> bytes | None:
        """A text or JSON member's bytes; None when the file ends before."""
        self._handle.seek(member.offset_data)
        data = self._handle.read(min(member.size, _MAX_SIDE_MEMBER))
        return data if len(data) == min(member.size, _MAX_SIDE_MEMBER) else None

    def is_whole(self, member: tarfile.TarInfo) -> bool:
        """Whether the file goes as far as the member's end."""
        if member.size == 0:
            return True
        self._handle.seek(member.offset_data + member.size - 1)
        return len(self._handle.read(1)) == 1


def _row(sample: _Sample, samples: _Samples, file: SourceFile, tar: str, source: config.WebDataset) -> Row:
    image = next((sample.members[e] for e in _endings(source.image) if e in sample.members), None)
    address = f"wds:{tar}/{sample.key}"
    try:
        meta = _json_member(sample, samples)
        text = _text(sample, samples, source, meta)
    except ValueError as error:
        return malformed(address.encode("utf-8", "surrogateescape"), f"{address}: {error}"[:500])
    url = meta.pop("url", None)
    if image is None and not url:
        there = ", ".join(sorted(sample.members))
        return malformed(
            address.encode("utf-8", "surrogateescape"), f"{address} has no image member (it has: {there})"[:500]
        )
    if image is not None and not samples.is_whole(image):
        return malformed(
            address.encode("utf-8", "surrogateescape"), f"{address}: the tar file ends inside its image"[:500]
        )
    if meta.get("caption") == text:
        meta.pop("caption", None)
    boxes = take_boxes(meta, "boxes") if are_boxes(meta.get("boxes")) else None
    locator = tar_locator(file.name, image.offset_data, image.size) if image is not None else None
    return web_row(url or address, text, extra_json(meta), locator, boxes)


def _endings(spec: str) -> list[str]:
    return [ending.strip().lstrip(".").lower() for ending in spec.split(";") if ending.strip()]


def _json_member(sample: _Sample, samples: _Samples) -> dict[str, Any]:
    member = sample.members.get("json")
    if member is None:
        return {}
    data = samples.read(member)
    try:
        content = json.loads(data.decode("utf-8")) if data is not None else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json member is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("its json member is not an object, or cut off")
    return content


def _text(sample: _Sample, samples: _Samples, source: config.WebDataset, meta: dict[str, Any]) -> Any:
    """The pair's text: the JSON's `text_key`, else the text member, else the JSON's caption."""
    if source.text_key is not None:
        return meta.pop(source.text_key, None)
    for ending in _endings(source.text):
        if ending in sample.members:
            data = samples.read(sample.members[ending])
            if data is None:
                raise ValueError(f"its {ending} member is cut off")
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"its {ending} member is not UTF-8") from error
    return meta.get("caption")
