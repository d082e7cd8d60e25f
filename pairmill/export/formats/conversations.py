"""The conversations of a pair in the dialect of a trainer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pairmill.boxes import Box
from pairmill.errors import StoreError
from pairmill.export.dialects import DIALECTS, Frame
from pairmill.export.format import Options
from pairmill.instructions import Mention, Turn, instruction_id, parts

IMAGE = "<image>"
"""What stands for the image in LLaVA's texts and in those of many others."""


@dataclass(frozen=True)
class Conversation:
    """A conversation, rendered."""

    id: str
    kind: str
    turns: tuple[Turn, ...]
    has_boxes: bool
    """Whether boxes are written in it."""
    frame: Frame | None
    """What its boxes are relative to; null: the image."""


def conversations_of(row: dict[str, Any], options: Options) -> Iterator[Conversation]:
    """The conversations of a metadata row (JSON values), with boxes in the dialect that the options name.

    Raises:
        StoreError: one mentions a box that it does not have.
    """
    width, height = row["width"], row["height"]
    dialect = DIALECTS[options.boxes or "plain"]
    for stored in row["conversations"]:
        boxes = [Box.from_row(box) for box in stored["boxes"]]
        said = [message["content"] for message in stored["messages"]]
        try:
            rendered = [dialect.render(content, boxes, width, height) for content in said]
        except ValueError as error:
            raise StoreError(
                f"the {stored['kind']} of the pair {row['uid']} cannot be written: {error}; "
                "run the refresh again, then export the new snapshot"
            ) from error
        mentions = any(isinstance(part, Mention) for content in said for part in parts(content))
        shown = mentions and dialect.shows_boxes
        yield Conversation(
            instruction_id(row["uid"], stored["kind"]),
            stored["kind"],
            tuple(Turn(m["role"], text) for m, text in zip(stored["messages"], rendered, strict=True)),
            shown,
            dialect.frame(width, height) if shown else None,
        )


def spoken(conversation: Conversation, image: str, user: str, assistant: str) -> list[dict[str, str]]:
    """The turns as ``from`` and ``value``, what stands for the image before the first."""
    speakers = {"user": user, "assistant": assistant}
    turns = [{"from": speakers[turn.role], "value": turn.content} for turn in conversation.turns]
    return [{**turns[0], "value": f"{image}{turns[0]['value']}"}, *turns[1:]]


def with_frame(record: dict[str, Any], conversation: Conversation) -> dict[str, Any]:
    """The record; where its boxes are relative to something else than the image, it says to what in ``frame``."""
    return {**record, "frame": asdict(conversation.frame)} if conversation.frame else record
