"""The offline writer: questions and answers that follow from an image's texts and boxes, composed without a model.

Facts come first (`captioners.instruct.offline.facts`, whose docstring says which evidence licenses which claim), words
second (`captioners.instruct.offline.phrases`). An answer says nothing that is no fact, so it is as true as the texts
and boxes are. What cannot be said for sure is left out; where too little is left for a conversation of a kind, there is
none, with the reason ``writer.nothing_to_say``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from captioners.instruct.offline import facts, nouns
from captioners.instruct.offline.complex import Complex
from captioners.instruct.offline.composer import Composer
from captioners.instruct.offline.conversation import Conversation
from captioners.instruct.offline.detail import Detail
from captioners.instruct.offline.grounding import Grounding
from captioners.instruct.offline.naming import Picture
from captioners.instruct.offline.phrases import Choices
from pairmill.boxes import Box
from pairmill.instructions import Instruction, Task, Turn, render
from pairmill.stage import Resources
from schemas.config import InstructKind, RunConfig
from schemas.reasons import Reason

OFFLINE = "offline"
"""The name under which its conversations are stored."""


@dataclass(frozen=True)
class OfflineWriter:
    """Writes without a model.

    Args:
        seed: another one gives other wordings and other choices among the facts.
    """

    seed: int = 0
    version: ClassVar[int] = 1
    """Raised when it writes otherwise for the same tasks."""
    judges: ClassVar[bool] = False

    @classmethod
    def of(cls, config: RunConfig) -> OfflineWriter:
        """As the config has it."""
        return cls(config.seed)

    def identity(self) -> dict[str, Any]:
        """What determines its answers."""
        return {"writer": OFFLINE, "version": self.version, "seed": self.seed}

    @property
    def resources(self) -> Resources:
        """One core, no weights."""
        return Resources()

    def open(self) -> Callable[[Sequence[Task]], list[Instruction]]:
        """The function that writes: one conversation a task, in order."""
        nouns.lexicon()
        seed = self.seed

        def write(tasks: Sequence[Task]) -> list[Instruction]:
            picture: Picture | None = None
            written = []
            for task in tasks:
                if picture is None or picture.context is not task.context:
                    picture = Picture(facts.read(task.context))
                written.append(compose(picture, task.kind, seed))
            return written

        return write


_COMPOSERS: Mapping[InstructKind, type[Composer]] = {
    "conversation": Conversation,
    "detail": Detail,
    "complex": Complex,
    "grounding": Grounding,
}


def compose(picture: Picture, kind: InstructKind, seed: int) -> Instruction:
    """One conversation of a kind, or why there is none."""
    pairs = _COMPOSERS[kind](picture, Choices(seed, picture.context.uid, kind)).compose()
    if isinstance(pairs, str):
        return Instruction(kind, writer=OFFLINE, reason=Reason.WRITER_NOTHING_TO_SAY.value, detail=pairs)
    turns = [turn for asked, answered in pairs for turn in (Turn("user", asked), Turn("assistant", answered))]
    turns, boxes = _renumbered(turns, picture.context.boxes)
    return Instruction(kind, tuple(turns), boxes, OFFLINE)


def _renumbered(turns: Sequence[Turn], boxes: Sequence[Box]) -> tuple[list[Turn], tuple[Box, ...]]:
    """Mentions of the context's boxes as mentions of the conversation's own, numbered as they come."""
    places: dict[int, int] = {}
    renamed = []
    for turn in turns:
        content = render(
            turn.content,
            lambda mention: str(
                replace(mention, boxes=tuple(places.setdefault(place, len(places)) for place in mention.boxes))
            ),
        )
        renamed.append(replace(turn, content=content))
    return renamed, tuple(boxes[place] for place in places)
