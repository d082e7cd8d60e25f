"""How each trainer writes boxes in text: rendering stored mentions, and reading them back.

========== ===================================================== ============================ ======================
dialect    a phrase and its boxes                                coordinates                  relative to
========== ===================================================== ============================ ======================
llava      the dog [0.10, 0.20, 0.30, 0.40]                      fractions, 2 decimals        the image padded square
shikra     the dog[0.100,0.200,0.300,0.400;0.500,...]            fractions, 3 decimals        the image padded square
qwen_vl    <ref>the dog</ref><box>(100,200),(300,400)</box>      integers, 0 to 1000          the image
qwen2_vl   <|object_ref_start|>the dog<|object_ref_end|>         integers, 0 to 1000          the image
           <|box_start|>(100,200),(300,400)<|box_end|>
minigpt_v2 <p>the dog</p> {<10><20><30><40>}                     integers, 0 to 100           the image
kosmos2    <phrase>the dog</phrase><object><patch_index_0195>    32 x 32 patches, row by row: the image
           <patch_index_0393></object>                           the first and the last
plain      the dog                                               none
========== ===================================================== ============================ ======================

Sources: LLaVA's ``expand2square`` and its region data (LLaVA-1.5, appendix A); Shikra's ``PlainBoxFormatter`` and
``Expand2square``; the fine-tuning section of Qwen-VL's README, which says [0, 1000) where its tools round ``1000 *
coordinate / size``, so that the far border is 1000; the grounding format that ms-swift documents for Qwen2-VL;
MiniGPT-4's ``flickr.py`` and ``demo_v2.py``; transformers' ``processing_kosmos2``.

**Rounding.** A coordinate goes to the nearest unit (1/100, 1/1000 ... of the frame's side). Where both ends of a box
would be one unit, one of them is moved by one, so that a box never becomes a line: an end is then off by less than a
unit, and by half a unit at most elsewhere. Kosmos-2 names the patches that hold the corners, and its readers take the
patches' centres for the corners (half a patch off at most), but their outer edges where a box lies within one row or
column of patches (less than a patch off).

**What a text may not say.** Whatever of a text or phrase would be read as a token (``<image>``, ``<box>``,
``<|im_end|>``; ``[0.1,0.2,0.3,0.4]`` where boxes are written so) gets other brackets, so it stays readable and means
nothing to a tokenizer.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pairmill.boxes import Box
from pairmill.instructions import Mention, parts

Corners = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the image."""

_TAG = re.compile(r"<([^<>\s]*)>")
_NUMBERS = re.compile(r"\[(\s*[\d.]+(?:\s*[,;]\s*[\d.]+)+\s*)\]")
_OPEN, _CLOSE = "\u2039", "\u203a"


class Located(NamedTuple):
    """A mention, read back."""

    phrase: str
    """Empty where there is none, or where the dialect does not mark phrases. In Qwen's dialects, boxes that follow on
    another mention's with nothing between them are read as its own."""
    boxes: tuple[Corners, ...]


@dataclass(frozen=True)
class Frame:
    """What coordinates are relative to, where that is not the image: a canvas that the image lies on."""

    width: int
    """Of the canvas, pixels of the image."""
    height: int
    left: int
    """Where the image's left border is on it, pixels."""
    top: int


def padded_square(width: int, height: int) -> Frame:
    """The square that LLaVA and Shikra pad an image to: the image in the middle, an odd pixel goes right or below."""
    side = max(width, height)
    return Frame(side, side, (side - width) // 2, (side - height) // 2)


class Dialect(ABC):
    """One way to write boxes."""

    name: ClassVar[str]
    shows_boxes: ClassVar[bool] = True
    """Whether there are boxes in it at all: text that asks for a region makes no sense without."""
    marks_phrases: ClassVar[bool] = True
    """Whether a reader can tell a phrase from the text before it."""

    def frame(self, width: int, height: int) -> Frame | None:  # noqa: ARG002 (of dialects with one)
        """The canvas that coordinates are relative to; null where that is the image itself."""
        return None

    @abstractmethod
    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:
        """A phrase and its boxes.

        Args:
            mention: the phrase, and which boxes it means.
            boxes: of the conversation, in pixels of the image.
            width: of the image, pixels.
            height: of the image, pixels.

        Raises:
            ValueError: there is no such box, or nothing of it lies in the image.
        """

    def text(self, text: str) -> str:
        """A text without anything that a reader of this dialect takes for a token."""
        return _without_tags(text)

    def render(self, content: str, boxes: Sequence[Box], width: int, height: int) -> str:
        """A stored turn (`pairmill.instructions`) in this dialect; arguments and errors as for `mention`."""
        return "".join(
            self.text(part) if isinstance(part, str) else self.mention(part, boxes, width, height)
            for part in parts(content)
        )

    def parse(self, text: str, width: int, height: int) -> list[str | Located]:
        """What was rendered, as pieces of text and mentions, in order; no piece is empty.

        Boxes are in pixels of the image and within it. What is no well-formed mention is text.
        """
        found: list[str | Located] = []
        end = 0
        for match in self._pattern.finditer(text):
            located = self._located(match, width, height)
            if located is None:
                continue
            if match.start() > end:
                found.append(text[end : match.start()])
            found.append(located)
            end = match.end()
        if end < len(text):
            found.append(text[end:])
        return found

    _pattern: ClassVar[re.Pattern[str]]

    @abstractmethod
    def _located(self, match: re.Match[str], width: int, height: int) -> Located | None:
        """A match of the pattern; null where its boxes are none."""


class _Grid(Dialect):
    """Dialects that write corners as multiples of a unit."""

    units: ClassVar[int]
    """In the side of the frame."""

    def _ticks(self, box: Box, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right, bottom, in units of the frame; right > left, bottom > top."""
        frame = self.frame(width, height) or Frame(width, height, 0, 0)
        x1, y1, x2, y2 = _inside(box, width, height)
        left, right = _apart((x1 + frame.left) / frame.width, (x2 + frame.left) / frame.width, self.units)
        top, bottom = _apart((y1 + frame.top) / frame.height, (y2 + frame.top) / frame.height, self.units)
        return left, top, right, bottom

    def _corners(self, ticks: Sequence[float], width: int, height: int) -> Corners | None:
        """The inverse; null for corners out of order or outside the image."""
        x1, y1, x2, y2 = (value / self.units for value in ticks)
        frame = self.frame(width, height) or Frame(width, height, 0, 0)
        return _ordered(
            _clip(x1 * frame.width - frame.left, width),
            _clip(y1 * frame.height - frame.top, height),
            _clip(x2 * frame.width - frame.left, width),
            _clip(y2 * frame.height - frame.top, height),
        )

    def _all_corners(self, ticks: Sequence[Sequence[float]], width: int, height: int) -> tuple[Corners, ...] | None:
        found = [self._corners(four, width, height) for four in ticks]
        known = tuple(corners for corners in found if corners is not None)
        return known if len(known) == len(found) else None


class _Brackets(_Grid):
    """Fractions of the padded square, in brackets behind the phrase, which is not marked."""

    marks_phrases = False
    decimals: ClassVar[int]
    _comma: ClassVar[str]

    def frame(self, width: int, height: int) -> Frame | None:
        """The padded square; null where the image is one."""
        return None if width == height else padded_square(width, height)

    def text(self, text: str) -> str:
        """Without tags, and without lists of numbers in brackets."""
        return _NUMBERS.sub(r"(\1)", super().text(text))

    def render(self, content: str, boxes: Sequence[Box], width: int, height: int) -> str:
        """As for every dialect; a tag whose parts stand in phrase and text is none either."""
        return _without_tags(super().render(content, boxes, width, height))

    def _fractions(self, box: Box, width: int, height: int) -> str:
        ticks = self._ticks(box, width, height)
        return self._comma.join(f"{tick / self.units:.{self.decimals}f}" for tick in ticks)

    def _located(self, match: re.Match[str], width: int, height: int) -> Located | None:
        fours = [[float(v) * self.units for v in four.split(",")] for four in match[1].split(";")]
        boxes = self._all_corners(fours, width, height)
        return None if boxes is None else Located("", boxes)


class Llava(_Brackets):
    """LLaVA-1.5. Several boxes of one phrase are several brackets, which are read back as a mention each."""

    name = "llava"
    units, decimals, _comma = 100, 2, ", "
    _pattern = re.compile(r"\[([01]\.\d\d(?:, [01]\.\d\d){3})\]")

    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:
        """``the dog [0.10, 0.20, 0.30, 0.40], [0.50, ...]``."""
        places = ", ".join(f"[{self._fractions(box, width, height)}]" for box in _meant(mention, boxes))
        return f"{self.text(mention.phrase)} {places}" if mention.phrase.strip() else places


class Shikra(_Brackets):
    """Shikra: three decimals, all boxes of a phrase in one pair of brackets."""

    name = "shikra"
    units, decimals, _comma = 1000, 3, ","
    _pattern = re.compile(r"\[([01]\.\d{3}(?:,[01]\.\d{3}){3}(?:;[01]\.\d{3}(?:,[01]\.\d{3}){3})*)\]")

    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:
        """``the dog[0.100,0.200,0.300,0.400;0.500,...]``."""
        places = ";".join(self._fractions(box, width, height) for box in _meant(mention, boxes))
        return f"{self.text(mention.phrase)}[{places}]"


class _Qwen(_Grid):
    units = 1000
    _phrase: ClassVar[tuple[str, str]]
    _box: ClassVar[tuple[str, str]]
    _four = re.compile(r"\((\d{1,4}),(\d{1,4})\),\((\d{1,4}),(\d{1,4})\)")

    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:
        """The phrase between its tokens, where there is one, and each box between its own."""
        start, end = self._box
        places = ""
        for box in _meant(mention, boxes):
            x1, y1, x2, y2 = self._ticks(box, width, height)
            places += f"{start}({x1},{y1}),({x2},{y2}){end}"
        start, end = self._phrase
        return f"{start}{self.text(mention.phrase)}{end}{places}" if mention.phrase.strip() else places

    def _located(self, match: re.Match[str], width: int, height: int) -> Located | None:
        fours = [[float(tick) for tick in four] for four in self._four.findall(match[2])]
        if any(tick > self.units for four in fours for tick in four):
            return None
        boxes = self._all_corners(fours, width, height)
        return None if boxes is None else Located(match[1] or "", boxes)


_CORNERS = r"\(\d{1,4},\d{1,4}\),\(\d{1,4},\d{1,4}\)"


class QwenVl(_Qwen):
    """Qwen-VL."""

    name = "qwen_vl"
    _phrase, _box = ("<ref>", "</ref>"), ("<box>", "</box>")
    _pattern = re.compile(rf"(?:<ref>((?:(?!</?ref>).)+)</ref>)?((?:<box>{_CORNERS}</box>)+)", re.DOTALL)


class Qwen2Vl(_Qwen):
    """Qwen2-VL."""

    name = "qwen2_vl"
    _phrase, _box = ("<|object_ref_start|>", "<|object_ref_end|>"), ("<|box_start|>", "<|box_end|>")
    _pattern = re.compile(
        r"(?:<\|object_ref_start\|>((?:(?!<\|object_ref_).)+)<\|object_ref_end\|>)?"
        rf"((?:<\|box_start\|>{_CORNERS}<\|box_end\|>)+)",
        re.DOTALL,
    )


class MinigptV2(_Grid):
    """MiniGPT-v2. Its own data loaders cut fractions of a unit off; here they are rounded."""

    name = "minigpt_v2"
    units = 100
    _four = re.compile(r"<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>")
    _pattern = re.compile(
        r"(?:<p>((?:(?!</?p>).)+)</p> )?"
        r"(\{(?:<\d{1,3}>){4}\}(?:<delim>\{(?:<\d{1,3}>){4}\})*)",
        re.DOTALL,
    )

    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:
        """``<p>two dogs</p> {<10><20><30><40>}<delim>{<50>...}``."""
        fours = (self._ticks(box, width, height) for box in _meant(mention, boxes))
        places = "<delim>".join("{" + "".join(f"<{tick}>" for tick in four) + "}" for four in fours)
        return f"<p>{self.text(mention.phrase)}</p> {places}" if mention.phrase.strip() else places

    def _located(self, match: re.Match[str], width: int, height: int) -> Located | None:
        fours = [[float(tick) for tick in four] for four in self._four.findall(match[2])]
        if any(tick > self.units for four in fours for tick in four):
            return None
        boxes = self._all_corners(fours, width, height)
        return None if boxes is None else Located(match[1] or "", boxes)


class Kosmos2(Dialect):
    """Kosmos-2.

    The space before a phrase stands inside its tags, as in the model's own data. Its readers drop everything between a
    ``<`` and the next ``>``, so no text keeps either. ``<grounding>``, which asks for boxes, belongs to the prompt and
    is not written here.
    """

    name = "kosmos2"
    patches: ClassVar[int] = 32
    """A side."""
    _pattern = re.compile(
        r"(?:<phrase>([^<]+)</phrase>)?<object>"
        r"((?:<patch_index_\d{4}><patch_index_\d{4}></delimiter_of_multi_objects/>)*"
        r"<patch_index_\d{4}><patch_index_\d{4}>)</object>"
    )
    _pair = re.compile(r"<patch_index_(\d{4})><patch_index_(\d{4})>")

    def text(self, text: str) -> str:
        """Without angle brackets."""
        return text.replace("<", _OPEN).replace(">", _CLOSE)

    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:
        """``<phrase>the dog</phrase><object><patch_index_0195><patch_index_0393></object>``."""
        pairs = (self._pair_of(box, width, height) for box in _meant(mention, boxes))
        places = "</delimiter_of_multi_objects/>".join(
            f"<patch_index_{first:04d}><patch_index_{last:04d}>" for first, last in pairs
        )
        phrase = f"<phrase>{self.text(mention.phrase)}</phrase>" if mention.phrase.strip() else ""
        return f"{phrase}<object>{places}</object>"

    def render(self, content: str, boxes: Sequence[Box], width: int, height: int) -> str:
        """As for every dialect, with the space before a phrase in its tags."""
        rendered = super().render(content, boxes, width, height)
        return rendered.replace(" <phrase>", "<phrase> ")

    def parse(self, text: str, width: int, height: int) -> list[str | Located]:
        """As for every dialect; a space at the start of a phrase is moved before it."""
        return super().parse(text.replace("<phrase> ", " <phrase>"), width, height)

    def _pair_of(self, box: Box, width: int, height: int) -> tuple[int, int]:
        x1, y1, x2, y2 = _inside(box, width, height)
        n = self.patches
        # A far corner on the border between two patches belongs to the one before it; it is never before the near one.
        left, top = min(math.floor(x1 / width * n), n - 1), min(math.floor(y1 / height * n), n - 1)
        right, bottom = max(math.ceil(x2 / width * n) - 1, left), max(math.ceil(y2 / height * n) - 1, top)
        return top * n + left, bottom * n + right

    def _located(self, match: re.Match[str], width: int, height: int) -> Located | None:
        found = [self._corners(int(first), int(last), width, height) for first, last in self._pair.findall(match[2])]
        boxes = tuple(corners for corners in found if corners is not None)
        return Located(match[1] or "", boxes) if len(boxes) == len(found) else None

    def _corners(self, first: int, last: int, width: int, height: int) -> Corners | None:
        n = self.patches
        if max(first, last) >= n * n:
            return None
        (top, left), (bottom, right) = divmod(first, n), divmod(last, n)
        if bottom < top or right < left:
            return None
        near, far = (0.0, 1.0) if left == right or top == bottom else (0.5, 0.5)
        return _ordered(
            (left + near) / n * width, (top + near) / n * height, (right + far) / n * width, (bottom + far) / n * height
        )


class Plain(Dialect):
    """No boxes: phrases alone."""

    name = "plain"
    shows_boxes = False
    marks_phrases = False
    _pattern = re.compile(r"(?!)")

    def mention(self, mention: Mention, boxes: Sequence[Box], width: int, height: int) -> str:  # noqa: ARG002
        """The phrase."""
        return self.text(mention.phrase)

    def render(self, content: str, boxes: Sequence[Box], width: int, height: int) -> str:
        """As for every dialect; a tag whose parts stand in phrase and text is none either."""
        return _without_tags(super().render(content, boxes, width, height))

    def _located(self, match: re.Match[str], width: int, height: int) -> Located | None:  # noqa: ARG002
        return None


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect for dialect in (Llava(), Shikra(), QwenVl(), Qwen2Vl(), MinigptV2(), Kosmos2(), Plain())
}
"""By name."""


def _without_tags(text: str) -> str:
    """The text with angle quotes for the brackets of tags, of nested ones, too."""
    while (changed := _TAG.sub(rf"{_OPEN}\1{_CLOSE}", text)) != text:
        text = changed
    return text


def _meant(mention: Mention, boxes: Sequence[Box]) -> list[Box]:
    for number in mention.boxes:
        if number >= len(boxes):
            raise ValueError(f"{mention} means box {number}, but the conversation has {len(boxes)}")
    return [boxes[number] for number in mention.boxes]


def _inside(box: Box, width: int, height: int) -> Corners:
    """The part of a box in the image.

    Raises:
        ValueError: there is none.
    """
    corners = (_clip(box.x1, width), _clip(box.y1, height), _clip(box.x2, width), _clip(box.y2, height))
    if not all(map(math.isfinite, box.xyxy)) or _ordered(*corners) is None:
        raise ValueError(f"nothing of the box {box.xyxy} lies in the image of {width} x {height} pixels")
    return corners


def _ordered(x1: float, y1: float, x2: float, y2: float) -> Corners | None:
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _clip(value: float, most: float) -> float:
    return min(max(value, 0.0), float(most))


def _apart(start: float, end: float, units: int) -> tuple[int, int]:
    """The ends of a stretch of [0, 1] in units, rounded; never the same."""
    first, last = round(start * units), round(end * units)
    if first < last:
        return first, last
    # The unit that holds more of the stretch, so what is read back overlaps what was written.
    before = first == units or (first > 0 and (start + end) / 2 * units < first)
    return (first - 1, first) if before else (first, first + 1)
