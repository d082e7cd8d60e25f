"""The demo's instruction data: how much of it is true by the oracle, and some of it with its pictures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pairmill.boxes import Box
from pairmill.demo_examples import font_of
from pairmill.instructions import KINDS, USER, Mention, Turn, parts
from pairmill.procedural.answers import Judgement, judge
from pairmill.procedural.scene import Scene

INSTRUCTIONS_SQL = """
    SELECT instructions.id, instructions.uid, instructions.kind, messages, boxes, instructions.reason,
        pairs.url, pairs.text AS alt_text, pairs.width, pairs.height
    FROM instructions JOIN pairs ON pairs.uid = instructions.uid ORDER BY instructions.id
"""


@dataclass(frozen=True)
class InstructionScore:
    """How much of the instruction data is true of the pictures; an answer is the one to one question."""

    conversations: dict[str, int]
    """By kind."""
    answers: int
    true: float
    """Share of true answers; those that the oracle does not understand count as not true."""
    true_by_kind: dict[str, float]
    false: int
    not_understood: int
    left_out: dict[str, int]
    """Conversations that were asked for and not written, by reason."""


def conversation_of(row: Mapping[str, Any]) -> tuple[list[Turn], list[Box]]:
    """Turns and boxes of a row of `INSTRUCTIONS_SQL`."""
    turns = [Turn(message["role"], message["content"]) for message in row["messages"] or ()]
    return turns, [Box.from_row(box) for box in row["boxes"] or ()]


def judged(
    rows: Iterable[Mapping[str, Any]], truth: Mapping[tuple[str, str], Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], int, Judgement]]:
    """What the oracle says of each answer: the row, the answer's number in it, the judgement.

    Args:
        rows: of `INSTRUCTIONS_SQL`.
        truth: rows of truth.parquet by URL and alt text.
    """
    for row in rows:
        turns, boxes = conversation_of(row)
        scene = truth[row["url"], row["alt_text"]]["scene"]
        if not turns:
            continue
        if scene is None:
            yield from ((row, n, Judgement(False, "the picture shows no scene")) for n in range(len(turns) // 2))
            continue
        found = judge(turns, boxes, Scene.from_json(scene), row["width"], row["height"])
        yield from ((row, n, judgement) for n, judgement in enumerate(found))


def measure_instructions(
    rows: Sequence[Mapping[str, Any]], truth: Mapping[tuple[str, str], Mapping[str, Any]]
) -> InstructionScore:
    """Compare the conversations of a snapshot with the ground truth; arguments as of `judged`."""
    found = Counter((row["kind"], judgement.truth) for row, _, judgement in judged(rows, truth))
    written = Counter(row["kind"] for row in rows if row["messages"])
    true = {kind: found[kind, True] for kind in KINDS}
    answers = {kind: sum(found[kind, said] for said in (True, False, None)) for kind in KINDS}
    return InstructionScore(
        conversations={kind: written[kind] for kind in KINDS},
        answers=sum(answers.values()),
        true=_share(sum(true.values()), sum(answers.values())),
        true_by_kind={kind: _share(true[kind], answers[kind]) for kind in KINDS},
        false=sum(found[kind, False] for kind in KINDS),
        not_understood=sum(found[kind, None] for kind in KINDS),
        left_out=dict(sorted(Counter(row["reason"] for row in rows if row["reason"]).items())),
    )


def _share(part: int, whole: int) -> float:
    return round(part / max(1, whole), 4)


# -- examples ---------------------------------------------------------------------------------------------------------

_COLUMNS, _SIDE, _TEXT, _GAP, _LINE = 2, 250, 400, 14, 19
_ORDER = ("grounding", "conversation", "complex", "detail")
_PALETTE = ((200, 30, 30), (20, 90, 210), (10, 130, 60), (160, 60, 180), (190, 100, 0))
_QUESTION, _ANSWER, _KIND = (110, 110, 110), (15, 15, 15), (120, 120, 160)


@dataclass(frozen=True)
class Talk:
    """A conversation about an image that is shown."""

    uid: str
    kind: str
    turns: tuple[Turn, ...]
    boxes: tuple[Box, ...]
    width: int
    height: int

    def lines(self) -> list[str]:
        """As lines to print."""
        return [
            f"  {self.kind if place == 0 else '':13} {'Q' if turn.role == USER else 'A'}  {_spoken(turn.content)}"
            for place, turn in enumerate(self.turns)
        ]


def choose_talks(rows: Sequence[Mapping[str, Any]], count: int) -> list[Talk]:
    """Conversations of all kinds in turn, each about another image; the rich ones first.

    Args:
        rows: of `INSTRUCTIONS_SQL`.
        count: conversations at most.
    """
    by_kind: dict[str, list[Talk]] = {kind: [] for kind in _ORDER}
    for row in rows:
        turns, boxes = conversation_of(row)
        if turns:
            talk = Talk(row["uid"], row["kind"], tuple(turns), tuple(boxes), row["width"], row["height"])
            by_kind[row["kind"]].append(talk)
    for talks in by_kind.values():
        talks.sort(key=_richness, reverse=True)
    chosen: list[Talk] = []
    for place in range(count):
        talks = by_kind[_ORDER[place % len(_ORDER)]]
        seen = {talk.uid for talk in chosen}
        new = next((talk for talk in talks if talk.uid not in seen), None)
        if new is not None:
            chosen.append(new)
    return chosen


def _richness(talk: Talk) -> float:
    """How much there is to see: boxes, questions and words, no more than the sheet has room for."""
    words = sum(len(turn.content.split()) for turn in talk.turns)
    return min(len(talk.boxes), 3) + min(len(talk.turns), 6) / 2 + min(words, 60) / 10


def talk_lines(talks: Sequence[Talk]) -> list[str]:
    """One block of lines a conversation."""
    return [line for talk in talks for line in (*talk.lines(), "")]


def _spoken(content: str) -> str:
    """A turn with the numbers of its boxes, as on the sheet: ``the star [1]``."""
    return "".join(
        part if isinstance(part, str) else f"{part.phrase} {_numbers(part)}".strip() for part in parts(content)
    )


def _numbers(mention: Mention) -> str:
    return "".join(f"[{box + 1}]" for box in mention.boxes)


def draw_talks(talks: Sequence[Talk], images: Mapping[str, bytes], path: Path) -> None:
    """Write a sheet: each image beside its conversation; boxes that a turn mentions are drawn and numbered, and their
    phrases have their colours.

    Args:
        talks: what to show.
        images: image files by uid.
        path: the PNG to write.
    """
    font = font_of(14)
    laid = [_Laid.of(talk, font) for talk in talks]
    rows = [laid[place : place + _COLUMNS] for place in range(0, len(laid), _COLUMNS)]
    heights = [max(max(cell.height, _drawn_size(cell.talk)[1]) for cell in row) + 2 * _GAP for row in rows]
    cell_width = _SIDE + _TEXT + 3 * _GAP
    sheet = Image.new("RGB", (_COLUMNS * cell_width, max(1, sum(heights))), "white")
    pencil = ImageDraw.Draw(sheet)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = column * cell_width + _GAP
            sheet.paste(_with_boxes(cell.talk, images[cell.talk.uid], font), (left, top + _GAP))
            for x, y, word, colour in cell.words:
                pencil.text((left + _SIDE + _GAP + x, top + _GAP + y), word, fill=colour, font=font)
        top += height
        pencil.line((0, top - 1, sheet.width, top - 1), fill=(225, 225, 225))
    sheet.save(path)


def _drawn_size(talk: Talk) -> tuple[int, int]:
    scale = _SIDE / max(talk.width, talk.height)
    return round(talk.width * scale), round(talk.height * scale)


def _with_boxes(talk: Talk, data: bytes, font: ImageFont.FreeTypeFont) -> Image.Image:
    size = _drawn_size(talk)
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB").resize(size)
    pencil = ImageDraw.Draw(picture)
    for number, box in enumerate(talk.boxes):
        x1, y1, x2, y2 = box.moved((size[0] / talk.width, size[1] / talk.height, 0.0, 0.0)).xyxy
        for gap, colour in ((4, "white"), (3, _PALETTE[number % len(_PALETTE)]), (2, _PALETTE[number % len(_PALETTE)])):
            pencil.rectangle((x1 - gap, y1 - gap, x2 + gap, y2 + gap), outline=colour)  # outside, so as to hide nothing
    for number, box in enumerate(talk.boxes):
        x1, y1, *_ = box.moved((size[0] / talk.width, size[1] / talk.height, 0.0, 0.0)).xyxy
        left, top = min(x1, size[0] - 16), max(0.0, y1 - 16)
        pencil.rectangle((left, top, left + 15, top + 17), fill=_PALETTE[number % len(_PALETTE)])
        pencil.text((left + 4, top), str(number + 1), fill="white", font=font)
    return picture


@dataclass(frozen=True)
class _Laid:
    """A conversation as words with their places, pixels from its upper left corner."""

    talk: Talk
    words: tuple[tuple[float, float, str, tuple[int, int, int]], ...]
    height: int

    @classmethod
    def of(cls, talk: Talk, font: ImageFont.FreeTypeFont) -> _Laid:
        words: list[tuple[float, float, str, tuple[int, int, int]]] = [(0, 0, talk.kind, _KIND)]
        y = float(_LINE + 4)
        for turn in talk.turns:
            plain_colour = _QUESTION if turn.role == USER else _ANSWER
            x = 0.0
            for word, colour in _coloured(turn.content, plain_colour):
                width = font.getlength(word + " ")
                if x and x + font.getlength(word) > _TEXT:
                    x, y = 0.0, y + _LINE
                words.append((x, y, word, colour))
                x += width
            y += _LINE + (2 if turn.role == USER else 9)
        return cls(talk, tuple(words), round(y))


def _coloured(content: str, colour: tuple[int, int, int]) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """The words of a turn, those of a mention in the colour of its first box and with its numbers behind; punctuation
    stays with the word before."""
    words: list[tuple[str, tuple[int, int, int]]] = []
    for part in parts(content):
        own = colour if isinstance(part, str) else _PALETTE[part.boxes[0] % len(_PALETTE)]
        said = part if isinstance(part, str) else f"{part.phrase} {_numbers(part)}"
        for place, word in enumerate(said.split()):
            glued = isinstance(part, str) and place == 0 and words and not part[0].isspace()
            if glued and not word[0].isalnum():
                last, before = words.pop()
                words.append((last + word, before))
            else:
                words.append((word, own))
    return iter(words)
