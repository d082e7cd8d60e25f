"""Where pairs come from: tables of URLs, folders, WebDataset and img2dataset shards; and how images are fetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

    from pairmill.stage import Stage
    from schemas import config


def read(source: config.Source) -> Iterator[pa.Table]:
    """The rows of a source as tables of `pairmill.sources.rows.SCHEMA`, about 10,000 rows each, in a fixed order.

    Rows that cannot be used are there too, with a reason: nothing vanishes.

    Raises:
        SourceError: the source cannot be read at all: no such file, no such column, a damaged file.
    """
    if source.kind == "url_table":
        from pairmill.sources.url_table import read_url_table

        return read_url_table(source)
    if source.kind == "image_folder":
        from pairmill.sources.image_folder import read_image_folder

        return read_image_folder(source)
    if source.kind == "webdataset":
        from pairmill.sources.webdataset import read_webdataset

        return read_webdataset(source)
    from pairmill.sources.img2dataset_parquet import read_img2dataset_parquet

    return read_img2dataset_parquet(source)


def source_files(source: config.Source) -> list[tuple[config.Source, str | None]]:
    """The files of a source, each as a source of its own, in the order in which `read` takes them; and what tells
    whether a file is as it was: a hash of its name, size, times and, on object stores, ETag. None where nothing can
    tell (web addresses, folders of images with files beside them).

    Raises:
        SourceError: there is no such file.
    """
    if source.kind == "image_folder":
        return [(source, None)]
    from pairmill.sources import url_table, webdataset
    from pairmill.sources.files import identities

    endings = {"url_table": url_table.ENDINGS, "webdataset": webdataset.ENDINGS}.get(source.kind, (".parquet",))
    found = identities(source.path, endings, source.kind)
    return [(source.model_copy(update={"path": name}), identity) for name, identity in found]


def download_stage(download: config.Download) -> Stage:
    """The stage that fetches images: pairmill's own, or img2dataset (``download: {with: img2dataset}``)."""
    if download.with_ == "img2dataset":
        from pairmill.sources.img2dataset import Img2DatasetDownload

        return Img2DatasetDownload.from_config(download)
    from pairmill.sources.download import Download

    return Download.from_config(download)
