"""Instruction data as it is stored: conversations about one image, which mention boxes by number.

Stored text is plain English in no trainer's dialect. There is no ``<image>`` in it, and a box is mentioned by its
position among the conversation's own boxes, in the manner of a link: ``[the brown dog](box:0)``, ``[two
cups](box:1,2)``, or, where the region itself is meant and nothing is said of it, ``[](box:0)``. Exports render mentions
as each trainer reads them; boxes stay float pixels until then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pairmill.boxes import Box
from schemas.config import InstructKind

USER, ASSISTANT = "user", "assistant"
"""The roles of turns; a conversation begins with a user's turn and ends with an assistant's."""

KINDS: tuple[InstructKind, ...] = get_args(InstructKind)
"""``conversation`` (several turns), ``detail`` (one long description), ``complex`` (one question that needs reasoning
and its answer), as in LLaVA, and ``grounding`` (turns that refer to regions or locate phrases)."""

_MENTION = re.compile(r"\[([^\[\]]*)\]\(box:([0-9]{1,4}(?:,[0-9]{1,4})*)\)")


@dataclass(frozen=True, slots=True)
class Mention:
    """A phrase of a turn and the boxes that it means."""

    phrase: str
    """Empty where the region itself is meant."""
    boxes: tuple[int, ...]
    """Positions in the conversation's boxes; at least one."""

    def __str__(self) -> str:
        return f"[{self.phrase}](box:{','.join(map(str, self.boxes))})"


def parts(content: str) -> list[str | Mention]:
    """A turn's text as pieces of text and mentions, in order; no piece is empty. ``"".join(map(str, parts(c))) == c``
    but for leading zeros of box numbers."""
    found: list[str | Mention] = []
    end = 0
    for match in _MENTION.finditer(content):
        if match.start() > end:
            found.append(content[end : match.start()])
        found.append(Mention(match[1], tuple(map(int, match[2].split(",")))))
        end = match.end()
    if end < len(content):
        found.append(content[end:])
    return found


def render(content: str, mention: Callable[[Mention], str]) -> str:
    """A turn's text with each mention put in a dialect."""
    return "".join(part if isinstance(part, str) else mention(part) for part in parts(content))


def plain(content: str) -> str:
    """A turn's text with mentions as their phrases alone."""
    return render(content, lambda mention: mention.phrase)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check holds against an answer."""

    reason: str
    """A value of `schemas.reasons.Reason`."""
    detail: str
    """What is wrong, with the words at fault."""


@dataclass(frozen=True)
class Context:
    """What a writer is told of an image: the kept texts and the boxes. It never sees the image."""

    uid: str
    texts: tuple[str, ...]
    """The kept texts, by rank."""
    boxes: tuple[Box, ...]
    """In pixels of the stored image, inside of it; in the order in which they are stored."""
    width: int
    """Of the stored image, pixels."""
    height: int
    crowded: frozenset[str] = frozenset()
    """Labels with unboxed or lumped-together instances: their boxes must not be counted."""
    labels: tuple[str, ...] = ()
    """Labels that were looked for in every image (``boxes.labels``): one that has no box is not in the picture. Empty:
    nothing is known of what has no box."""


@dataclass(frozen=True)
class Instruction:
    """One conversation about an image, or why there is none."""

    kind: InstructKind
    turns: tuple[Turn, ...] = ()
    """Empty where there is a reason."""
    boxes: tuple[Box, ...] = ()
    """The boxes that the turns mention, by position."""
    writer: str = ""
    """``offline``, or the model's name."""
    prompt_digest: str | None = None
    """sha256 (hex) of all that the model was sent; null for the offline writer."""
    prompt_tokens: int | None = None
    """Of all answers asked for, the unusable ones, too."""
    completion_tokens: int | None = None
    cost: float | None = None
    """In the currency of ``instruct.price``."""
    answers: int = 0
    """Answers that a model gave for it, usable or not."""
    findings: tuple[Finding, ...] = field(default=())
    """What the checks held against answers that were not taken, in order."""
    reason: str | None = None
    """Why there is no conversation: a value of `schemas.reasons.Reason`."""
    detail: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Instruction:
        """From a value of `schemas.fields.INSTRUCTION`."""
        return cls(
            row["kind"],
            tuple(Turn(turn["role"], turn["content"]) for turn in row["messages"] or ()),
            tuple(Box.from_row(box) for box in row["boxes"] or ()),
            row["writer"],
            row["prompt_digest"],
            row["prompt_tokens"],
            row["completion_tokens"],
            row["cost"],
            row["answers"],
            tuple(Finding(check["reason"], check["detail"]) for check in row["checks"] or ()),
            row["reason"],
            row["detail"],
        )

    def to_row(self) -> dict[str, Any]:
        """As a value of `schemas.fields.INSTRUCTION`."""
        return {
            "kind": self.kind,
            "messages": [{"role": turn.role, "content": turn.content} for turn in self.turns],
            "boxes": [box.to_row() for box in self.boxes],
            "writer": self.writer,
            "prompt_digest": self.prompt_digest,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": self.cost,
            "answers": self.answers,
            "checks": [{"reason": finding.reason, "detail": finding.detail} for finding in self.findings],
            "reason": self.reason,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class Task:
    """One conversation to be written."""

    context: Context
    kind: InstructKind
    shard: int = 0
    """The shard of the pair."""


Check = Callable[[Sequence[Turn], Sequence[Box], InstructKind, Context], list[Finding]]
"""Judges an answer: turns, the boxes that they mention, what was asked for, and what the writer was told."""


def instruction_id(uid: str, kind: str) -> str:
    """The id of a conversation: the same in every run and export."""
    return f"{uid}-{kind}"
