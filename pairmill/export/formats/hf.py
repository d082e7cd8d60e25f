"""A folder that Hugging Face's ``datasets`` loads: Parquet files with typed features, and a card.

::

    00000.parquet        uid, image (bytes and path), caption, texts, boxes, conversations, and what else is known
    README.md            the card: which files there are, what the columns are

``datasets.load_dataset("<the export's folder>")`` reads it, from a disk or from the Hub. The footer of each file names
the features (``huggingface`` in its schema's metadata), so that ``image`` is decoded; a reader that knows nothing of
that sees a struct of bytes and path.

``datasets`` keeps what it loaded from a folder with a card under the folder's name, and looks at the files no more. So
the card has a ``version`` that changes with what the files hold (`_version`): after an update or a takedown, and for
another export in a folder of the same name, the files are read again.

With kinds of conversations asked for, ``conversations`` has of each its id, kind, messages with role and content, and
the boxes that it mentions, in pixels; ``frame`` says what coordinates in its text are relative to, where that is not
the image (`pairmill.export.dialects`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pairmill.export.folder import Folder, Written
from pairmill.export.format import Format, Options, Parts, Whole
from pairmill.export.formats.rendered import with_conversations
from pairmill.export.selection import ENDINGS, Group, Selection
from pairmill.store import ROW_GROUP, parquet_options

CARD = "README.md"
FEATURES = b"huggingface"
"""Where ``datasets`` looks in a schema's metadata."""
CONTENT = b"pairmill"
"""Where a file says what went into it."""

IMAGE = pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]))

_FIRST = ("uid", "image", "caption", "texts", "conversations", "boxes", "width", "height", "url")
_OURS = ("key", "shard", "status", "error_message")
"""Metadata columns that say nothing beside a snapshot of the whole: where a sample stands, and that it was fetched."""

_TOLD = {
    "uid": "sha256 of the pair's URL and alt text",
    "image": "the stored image",
    "caption": "the first kept text",
    "texts": "all kept texts, the best first, with source and scores",
    "conversations": "instruction data: id, kind, messages, boxes in pixels",
    "boxes": "labelled boxes, in pixels of the image",
    "width": "of the image, pixels",
    "height": "of the image, pixels",
    "url": "where the image was fetched",
    "original_width": "of the fetched image, pixels",
    "original_height": "of the fetched image, pixels",
    "original_bytes": "size of the fetched file",
    "sha256": "of the fetched file",
    "pixel_sha256": "of the fetched image's width, height and RGB pixels",
    "format": "of the stored image: jpeg, png or webp",
    "animated": "whether the fetched file had several frames, of which this is the first",
    "contrast": "standard deviation of the grey levels, 0 to 255",
    "words": "in the alt text",
    "chars": "in the alt text",
    "repetition": "share of the alt text that repeats itself",
    "language": "of the alt text, ISO 639-1",
    "language_score": "probability of that language",
    "clip_score": "cosine of CLIP's embeddings of image and alt text",
    "itm_score": "probability that image and alt text match",
    "source": "which source of the config the pair came from",
    "refresh": "number of the refresh that admitted the pair",
    "extra": "columns of the source, as a JSON object",
}


def feature_of(kind: pa.DataType) -> Any:
    """An Arrow type as ``datasets`` names it, in the form that all its versions read; null where it has no name that
    they share (then ``datasets`` goes by the type itself)."""
    if pa.types.is_list(kind):
        inside = feature_of(kind.value_type)
        return None if inside is None else [inside]
    if pa.types.is_struct(kind):
        parts = {field.name: feature_of(field.type) for field in kind}
        return None if None in parts.values() else parts
    named = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_string(kind)
    floats = {pa.float32(): "float32", pa.float64(): "float64"}
    name = floats.get(kind) or (str(kind) if named else None)
    return None if name is None else {"dtype": name, "_type": "Value"}


def with_features(schema: pa.Schema) -> pa.Schema:
    """The schema with its features in its metadata."""
    known = {field.name: feature_of(field.type) for field in schema}
    known["image"] = {"_type": "Image"}
    features = {name: feature for name, feature in known.items() if feature is not None}
    return schema.with_metadata({FEATURES: json.dumps({"info": {"features": features}}).encode()})


def _schema(metadata: pa.Schema) -> pa.Schema:
    known = {field.name: field for field in metadata if field.name not in _OURS} | {"image": IMAGE}
    names = [name for name in _FIRST if name in known]
    return with_features(pa.schema([known[name] for name in [*names, *sorted(known.keys() - set(names))]]))


def _write(selection: Selection, group: Group, metadata: pa.Table, folder: Folder, options: Options) -> list[Written]:
    content = selection.content(metadata)
    metadata = with_conversations(metadata, options)
    held = {"content": content, "options": options.stated()}
    schema = _schema(metadata.schema)
    schema = schema.with_metadata({**schema.metadata, CONTENT: json.dumps(held).encode()})
    name = f"{group.number:05d}.parquet"
    with folder.create(name) as sink, pq.ParquetWriter(sink, schema, **parquet_options(schema)) as writer:
        for rows, images in selection.images(metadata):
            columns = {name: rows.column(name) for name in schema.names if name in rows.column_names}
            names = [f"{key}.{ENDINGS[kind]}" for key, kind in zip(*_lists(rows, "key", "format"), strict=True)]
            stored = [{"bytes": image.to_pybytes(), "path": path} for image, path in zip(images, names, strict=True)]
            columns["image"] = pa.array(stored, IMAGE.type)
            table = pa.table({name: columns[name] for name in schema.names})
            writer.write_table(table.cast(schema), row_group_size=ROW_GROUP)
    return [sink.written(name)]


def _lists(rows: pa.Table, *names: str) -> list[list[Any]]:
    return [rows.column(name).to_pylist() for name in names]


def _write_card(folder: Folder, parts: Parts) -> Written:
    footers = []
    for name in parts.names:
        with folder.open(name) as file:
            footers.append(pq.ParquetFile(file))
    with folder.create(CARD) as sink:
        sink.write(_card(footers[0].schema_arrow.names if footers else [], _version(footers)).encode())
    return sink.written(CARD)


def _version(files: Sequence[pq.ParquetFile]) -> str:
    """A version in the form that ``datasets`` takes, from what went into the files and how much of it is left."""
    held = [[(f.schema_arrow.metadata or {})[CONTENT].decode(), f.metadata.num_rows] for f in files]
    return f"1.0.{int(hashlib.sha256(json.dumps(held).encode()).hexdigest()[:12], 16)}"


def _card(columns: Sequence[str], version: str) -> str:
    files = '  data_files:\n  - split: train\n    path: "*.parquet"\n' if columns else ""
    rows = "".join(f"| `{name}` | {_TOLD.get(name, '')} |\n" for name in columns)
    return f"""---
configs:
- config_name: default
  version: {version}
{files}---

# Image-text pairs

Exported by pairmill. Load it with

```python
from datasets import load_dataset

pairs = load_dataset("<this folder>", split="train")
```

| column | |
|---|---|
{rows}"""


HF = Format(
    "hf",
    "Parquet files with typed features and a card, as Hugging Face's datasets loads them",
    ".parquet",
    _write,
    (Whole(CARD, _write_card),),
    Options(kinds=(), boxes="plain"),
)
