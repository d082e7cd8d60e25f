"""What img2dataset wrote with output_format=parquet: images in a column beside url, caption, key and status."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pairmill.errors import SourceError
from pairmill.sources import files
from pairmill.sources.boxes import are_boxes, take_boxes
from pairmill.sources.files import SourceFile
from pairmill.sources.locator import parquet_locator
from pairmill.sources.rows import ROWS, Row, extra_json, tables, web_row
from schemas import config

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "bytes")


def read_img2dataset_parquet(source: config.Img2DatasetParquet) -> Iterator[pa.Table]:
    """The rows of a `schemas.config.Img2DatasetParquet`.

    Rows that img2dataset failed to fetch or resize have no locator: their URL is tried again. Their status and error
    message stay in ``extra``. A column ``boxes`` counts as such in the form of `pairmill.sources.boxes`.
    """
    found = files.find(source.path, (".parquet",), "img2dataset_parquet")
    return tables(row for file in found for row in _parquet_rows(file))


def _parquet_rows(file: SourceFile) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with files.open_bytes(file) as handle:
        try:
            parquet = pq.ParquetFile(handle)
            schema = parquet.schema_arrow
            if "url" not in schema.names:
                raise files.column_missing(file, "url", schema.names, "path")
            image = _image_column(file, schema)
            # the status tells which rows have an image; only without it the images themselves must be read
            columns = [n for n in schema.names if n != image or "status" not in schema.names]
            at = 0
            for batch in parquet.iter_batches(batch_size=ROWS if image not in columns else 256, columns=columns):
                yield from _rows(batch, file, image, at)
                at += batch.num_rows
        except pa.ArrowException as error:
            raise SourceError(f"{file.name!r} is not a readable parquet file: {error}") from error


def _image_column(file: SourceFile, schema: pa.Schema) -> str:
    for name in IMAGE_COLUMNS:
        if name in schema.names and (
            pa.types.is_binary(schema.field(name).type) or pa.types.is_large_binary(schema.field(name).type)
        ):
            return name
    raise SourceError(
        f"{file.name!r} has no image column (one of {', '.join(IMAGE_COLUMNS)}). If it lists URLs only, such as the "
        "parquet file that img2dataset writes beside its tars, read it with kind: url_table."
    )


def _rows(batch: pa.RecordBatch, file: SourceFile, image: str, at: int) -> Iterator[Row]:
    has_image = batch.column(image).is_valid().to_pylist() if image in batch.schema.names else None
    for offset, values in enumerate(batch.drop_columns([image] if has_image else []).to_pylist()):
        there = has_image[offset] if has_image else values.get("status") == "success"
        yield _row(values, parquet_locator(file.name, at + offset, image) if there else None)


def _row(values: dict[str, Any], locator: str | None) -> Row:
    url = values.pop("url")
    caption = values.pop("caption", None)
    txt = values.pop("txt", None)
    boxes = take_boxes(values, "boxes") if are_boxes(values.get("boxes")) else None
    return web_row(url, caption if caption is not None else txt, extra_json(values), locator, boxes)
