"""The conversations of pairs as a typed column, in the dialect of a trainer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pairmill.export.format import Options
from pairmill.export.formats.conversations import conversations_of
from pairmill.export.selection import as_json
from schemas import fields

CONVERSATIONS = pa.field(
    "conversations",
    pa.list_(
        pa.struct(
            [
                pa.field("id", pa.string()),
                pa.field("kind", pa.string()),
                fields.INSTRUCTION.field("messages"),
                fields.INSTRUCTION.field("boxes"),
                pa.field("frame", pa.struct([pa.field(n, pa.int32()) for n in ("width", "height", "left", "top")])),
            ]
        )
    ),
)
"""Of each conversation its id, its kind, its messages (role and content), the boxes that it mentions, in pixels of the
image, and what coordinates in its text are relative to, where that is not the image (`pairmill.export.dialects`)."""


def with_conversations(metadata: pa.Table, options: Options) -> pa.Table:
    """The metadata with its conversations rendered as the options say; as it is where none were asked for.

    Raises:
        StoreError: a conversation mentions a box that it does not have.
    """
    if CONVERSATIONS.name not in metadata.column_names:
        return metadata
    needed = metadata.select(["uid", "width", "height", CONVERSATIONS.name])
    values = pa.array([_values(row, options) for row in as_json(needed)], CONVERSATIONS.type)
    return metadata.set_column(metadata.column_names.index(CONVERSATIONS.name), CONVERSATIONS, values)


def _values(row: dict[str, Any], options: Options) -> list[dict[str, Any]]:
    return [
        {
            "id": conversation.id,
            "kind": conversation.kind,
            "messages": [asdict(turn) for turn in conversation.turns],
            "boxes": stored["boxes"],
            "frame": asdict(conversation.frame) if conversation.frame else None,
        }
        for conversation, stored in zip(conversations_of(row, options), row["conversations"], strict=True)
    ]
