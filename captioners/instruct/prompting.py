"""What a model is told: the context of a picture as messages, in the structure of LLaVA's prompts.

A system message, a few examples (context as user, answer as assistant), then the context of the picture itself.
`conversation` is told the texts alone, the other kinds the boxes, too, one a line (LLaVA, section 3).

Texts and labels are data that strangers wrote, and some of them give orders. They stand in a fenced block: one line
each, as a JSON string, so that none can end its line; the fence bears a hash of what stands inside, so that none can
hold it; control and bidi characters, brackets and tokens of chat templates are gone, so that no tokenizer and no reader
of mentions takes a part of them for its own. The system message says what the block is. What gets through all the same
is caught in the answer (`captioners.instruct.leaks`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioners.completions import one_line
from captioners.instruct import parsing
from pairmill.boxes import Box
from pairmill.errors import ConfigError
from pairmill.instructions import ASSISTANT, KINDS, USER, Context, Task, Turn, plain
from schemas.config import InstructKind

FOLDER = Path(__file__).parent / "prompts"
"""The prompts that come with pairmill."""

RENDERING = 1
"""Raised when the same files and context give other messages."""

MAX_TEXT_CHARS = 1000
"""Of a text; what is longer is cut. The config's ``keep.max_chars`` has the same default."""
MAX_LABEL_CHARS = 60

BRIEF_WORDS = 40
"""A description of fewer words answers a question that asks for a short one."""

Message = dict[str, str]
"""``role`` and ``content``."""


# -- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """An example: a context, and the answer to it in the format that is asked for."""

    context: Context
    turns: tuple[Turn, ...]
    """Mentions count the boxes as `told` orders them. Of a description, the question is that of no list: empty."""

    def answer(self, kind: InstructKind) -> str:
        """As a model should write it."""
        return parsing.render(self.turns, kind)


@dataclass(frozen=True)
class PromptSet:
    """What one kind of conversation is asked for with."""

    kind: InstructKind
    system: str
    shots: tuple[Shot, ...]
    digest: str
    """sha256 (hex) over the kind's files and `RENDERING`."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of all kinds, and the questions that descriptions are paired with."""

    sets: tuple[PromptSet, ...]
    long_questions: tuple[str, ...]
    brief_questions: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Prompts:
        """Read ``<kind>_system.md`` and ``<kind>_shots.json`` of every kind and ``detail_questions.json``; from a
        folder of one's own, or pairmill's.

        A shot is an object with ``texts``, ``boxes`` (``label``, ``x1``, ``y1``, ``x2``, ``y2`` in pixels), ``width``,
        ``height``, perhaps ``crowded`` (labels), and ``answer``: of `detail` a text, of the others a list of objects
        with ``question`` and ``answer``. The messages are made from it as from a real context, so that they are alike.

        Raises:
            ConfigError: a file is missing or not as it should be.
        """
        place = FOLDER if folder is None else Path(folder)
        asked = _read(place / "detail_questions.json")
        sets = []
        for kind in KINDS:
            system, shots = _read(place / f"{kind}_system.md").strip(), _read(place / f"{kind}_shots.json")
            if not system:
                raise ConfigError(f"{place / f'{kind}_system.md'} is empty; write there what the model is told first")
            seen = [RENDERING, system, shots, *([asked] if kind == "detail" else [])]
            digest = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
            sets.append(PromptSet(kind, system, _shots(place / f"{kind}_shots.json", shots, kind), digest))
        questions = _json(place / "detail_questions.json", asked)
        lists = [questions.get(name) if isinstance(questions, dict) else None for name in ("long", "brief")]
        for name, entry in zip(("long", "brief"), lists, strict=True):
            if not isinstance(entry, list) or not entry or not all(isinstance(q, str) and q.strip() for q in entry):
                raise ConfigError(f"{place / 'detail_questions.json'}: {name!r} must be a list of questions")
        return cls(tuple(sets), *(tuple(entry) for entry in lists if entry))

    def of(self, kind: InstructKind) -> PromptSet:
        """The set of a kind."""
        return next(one for one in self.sets if one.kind == kind)

    def digest(self, kind: InstructKind) -> str:
        """sha256 (hex) over the files of a kind and the version of the rendering."""
        return self.of(kind).digest

    def question(self, uid: str, description: str) -> str:
        """The question that a description of this pair answers; which one follows from the uid. One of `BRIEF_WORDS`
        words or more answers a question that asks for details, a shorter one a question that asks for a few words."""
        fits = self.brief_questions if len(description.split()) < BRIEF_WORDS else self.long_questions
        return fits[int.from_bytes(hashlib.sha256(f"{uid}\ndetail".encode()).digest()[:8], "big") % len(fits)]

    def messages(self, task: Task, max_texts: int, max_boxes: int) -> list[Message]:
        """What a model is asked for a task: the system message, the examples, the context."""
        prompt = self.of(task.kind)
        sent = [{"role": "system", "content": prompt.system}]
        for shot in prompt.shots:
            sent.append({"role": USER, "content": material(shot.context, task.kind, max_texts, max_boxes)})
            sent.append({"role": ASSISTANT, "content": shot.answer(task.kind)})
        sent.append({"role": USER, "content": material(task.context, task.kind, max_texts, max_boxes)})
        return sent


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompt {path}: {error}; a folder of prompts needs it") from None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


def _shots(path: Path, text: str, kind: InstructKind) -> tuple[Shot, ...]:
    entries = _json(path, text)
    if not isinstance(entries, list):
        raise ConfigError(f"{path} must be a list of examples")
    shots = []
    for number, entry in enumerate(entries, 1):
        try:
            shots.append(_shot(entry, kind))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"{path}: example {number} is not as it should be ({problem}); it needs texts, boxes, width, height "
                "and answer, as in the prompts that come with pairmill"
            ) from None
    return tuple(shots)


def _shot(entry: Mapping[str, Any], kind: InstructKind) -> Shot:
    boxes = tuple(
        Box(str(box["label"]), float(box["x1"]), float(box["y1"]), float(box["x2"]), float(box["y2"]))
        for box in entry["boxes"]
    )
    width, height = int(entry["width"]), int(entry["height"])
    for box in boxes:
        if (refusal := box.refusal(width, height)) is not None or box.clipped(width, height) != box:
            raise ValueError(f"the box {box.label!r} does not lie in the picture ({refusal or 'it sticks out'})")
    crowded = frozenset(map(str, entry.get("crowded", ())))
    context = Context("example", tuple(map(str, entry["texts"])), boxes, width, height, crowded)
    answer = entry["answer"]
    if kind == "detail":
        if not isinstance(answer, str):
            raise TypeError("the answer must be a text")
        return Shot(context, (Turn("user", ""), Turn("assistant", answer)))
    pairs = [(Turn("user", str(pair["question"])), Turn("assistant", str(pair["answer"]))) for pair in answer]
    turns = [turn for pair in pairs for turn in pair]
    if not turns:
        raise ValueError("the answer is empty")
    return Shot(context, tuple(turns))


# -- the context ------------------------------------------------------------------------------------------------------


def told(context: Context, max_boxes: int) -> tuple[Box, ...]:
    """The boxes that a model is told, largest first (equal ones in the order in which they are stored); mentions count
    these. One whose label is nothing but signs is left out."""
    named = [box for box in context.boxes if label(box.label)] if min(context.width, context.height) > 0 else []
    return tuple(sorted(named, key=lambda box: -box.area)[:max_boxes])


def texts(context: Context, max_texts: int) -> tuple[str, ...]:
    """The texts that a model is told, as it is told them."""
    clean = (neutral(text, MAX_TEXT_CHARS) for text in context.texts)
    return tuple(text for text in clean if text)[:max_texts]


def something_to_say(task: Task, max_texts: int, max_boxes: int) -> bool:
    """Whether there is anything that a model could be told for a task."""
    if task.kind == "grounding":
        return bool(told(task.context, max_boxes))
    return bool(texts(task.context, max_texts)) or (task.kind != "conversation" and bool(told(task.context, max_boxes)))


def material(context: Context, kind: InstructKind, max_texts: int, max_boxes: int) -> str:
    """A context as a user's message: a fenced block of data, then what is wanted.

    A text is a JSON string. A box is ``"dog": [0.120, 0.330, 0.480, 0.990]`` (left, top, right, bottom, fractions of
    the image), for grounding with its number before it. Labels of which there are more than these lines follow last.
    """
    lines = [_quoted(text) for text in texts(context, max_texts)]
    if kind != "conversation":
        boxes = told(context, max_boxes)
        for number, box in enumerate(boxes):
            sides = (box.x1 / context.width, box.y1 / context.height, box.x2 / context.width, box.y2 / context.height)
            fractions = ", ".join(f"{side:.3f}" for side in sides)
            lines.append(f"{f'{number} ' if kind == 'grounding' else ''}{_quoted(label(box.label))}: [{fractions}]")
        named = {box.label for box in context.boxes}
        fewer = {name for name in named if _count(context.boxes, name) > _count(boxes, name)}
        more = {label(name) for name in context.crowded | fewer} - {""}
        if more:
            lines.append(f"more than listed: {', '.join(_quoted(name) for name in sorted(more)[:max_boxes])}")
    body = "\n".join(lines)
    mark = hashlib.sha256(body.encode()).hexdigest()[:MARK_CHARS]
    return f"----- material {mark} begins -----\n{body}\n----- material {mark} ends -----\n\n{_WANTED[kind]}"


MARK_CHARS = 16
"""Hex digits of the fence's hash, 64 bits: a text that held its own would be a fixed point of sha256."""

MARK = re.compile(rf"\bmaterial [0-9a-f]{{{MARK_CHARS}}}\b")
"""A fence, as it must not be in an answer."""

_WANTED: dict[InstructKind, str] = {
    "conversation": "Write the conversation about this picture as the JSON array described at the beginning.",
    "detail": "Write the description of this picture, as plain prose.",
    "complex": "Write the question about this picture and its answer as the JSON array described at the beginning.",
    "grounding": "Write the conversation about this picture, with its objects pointed at, as the JSON array described "
    "at the beginning.",
}


def _count(boxes: Sequence[Box], name: str) -> int:
    return sum(box.label == name for box in boxes)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def label(text: str) -> str:
    """A label as a model is told it."""
    return neutral(text, MAX_LABEL_CHARS)


def neutral(text: str, most: int) -> str:
    """A text of unknown origin as data: at most `most` characters on one line, without control, format and bidi
    characters, mentions as their phrases, and nothing that a chat template or a reader of mentions takes for its own:
    its tokens and role names are gone, brackets are others."""
    line = one_line(text[: 4 * most])  # cut first: a text of 50 MB must cost no more than another
    line = plain(line.translate(_WIDE))
    while (without := _TOKEN.sub(" ", line)) != line:  # what is taken out of a token may leave another one
        line = without
    line = line.translate(_BRACKETS)
    line = _ROLE.sub("\\1 \u2013", _RULE.sub(" ", line))
    line = " ".join(line.split())
    if len(line) > most:
        cut = line[: most + 1].rpartition(" ")[0]
        line = cut if len(cut) >= most // 2 else line[:most]
    return line.strip()


_WIDE = str.maketrans(
    {
        **dict.fromkeys("\uff1c\ufe64\u2329\u27e8\u3008", "<"),
        **dict.fromkeys("\uff1e\ufe65\u232a\u27e9\u3009", ">"),
        **dict.fromkeys("\uff3b\ufe47", "["),
        **dict.fromkeys("\uff3d\ufe48", "]"),
        "\uff5c": "|",
    }
)
"""Wide brackets and bars as plain ones: some tokenizers fold them, and DeepSeek's tokens are made of them."""
_TOKEN = re.compile(r"<{1,2}\s*[|/!A-Za-z][^<>]{0,40}>{1,2}|<{1,2}\s*>{1,2}|\[/?[A-Z_]{2,24}\]")
"""Tokens of chat templates (``<|im_end|>``, ``</s>``, ``<<SYS>>``, ``[INST]``), ``<image>``, and tags of HTML."""
_BRACKETS = str.maketrans({"<": "\u2039", ">": "\u203a", "[": "(", "]": ")", "|": " ", "`": " ", "\u2581": " "})
_RULE = re.compile(r"#{2,}|={3,}|-{3,}|_{3,}|\*{3,}")
_ROLE = re.compile(
    r"\b(system|assistant|user|human|gpt|bot|model|instructions?|prompt|response|question|answer)\s*[:\uff1a]",
    re.IGNORECASE,
)
