"""What is read from a model's answer, and how one is written.

Of `conversation`, `complex` and `grounding` a JSON array of ``{"question": ..., "answer": ...}`` is asked, one pair of
turns each; of `detail` plain prose. JSON, since its end can be seen: an answer that was cut off, or that goes on with
something else, is told from a whole one without trusting what the endpoint says of it; since no text in it can pass for
another turn; and since every server that can hold a model to a grammar can hold it to this one. What models make of it
that does no harm is understood: a code fence, one line before it, thoughts, curly quotation marks, line breaks within
strings, a comma too many, an object around the array, turns by role, and, from small models that fall back on it,
``Question:`` and ``Answer:`` lines. What may be only a part of an answer, or more than one, is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from captioners.completions import one_line
from captioners.endpoint import refusal_or_residue
from pairmill.boxes import Box
from pairmill.instructions import ASSISTANT, USER, Finding, Mention, Turn, parts
from pairmill.instructions import render as render_mentions
from schemas.config import InstructKind
from schemas.reasons import Reason

MAX_PAIRS = 30
"""Questions in an answer; a model that writes more has lost itself."""

_MAX_DETAIL = 120
_MAX_PREAMBLE = 200


@dataclass(frozen=True)
class Parsed:
    """An answer that could be read."""

    turns: tuple[Turn, ...]
    boxes: tuple[Box, ...] = ()
    """The boxes that the turns mention, in the order of their first mention."""


def render(turns: Sequence[Turn], kind: InstructKind) -> str:
    """Turns as a model should write them; `parse` reads them back."""
    if kind == "detail":
        return turns[-1].content
    pairs = (
        json.dumps({"question": question.content, "answer": answer.content}, ensure_ascii=False)
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
    )
    return "[\n" + ",\n".join(f"  {pair}" for pair in pairs) + "\n]"


def parse(answer: str, kind: InstructKind, told: Sequence[Box] = (), question: str = "") -> Parsed | Finding:
    """Read an answer, or say what is wrong with it.

    Args:
        answer: As the model gave it.
        kind: What it was asked for.
        told: The boxes that it was told, by number (`captioners.instruct.prompting.told`).
        question: What a description is paired with.

    Returns:
        Turns, and the boxes that they mention, numbered anew from 0 in the order of first mention; or what was found:
        ``writer.*`` where nothing can be read, ``check.turns`` where turns are missing, ``check.boxes`` where a mention
        means no box.
    """
    text = _THOUGHTS.sub("", answer).strip()
    if _OPEN_THOUGHT.search(text):
        return Finding(Reason.WRITER_CUT_OFF.value, "the answer ends amid its thoughts")
    text = _unfenced(text)
    if not one_line(text):
        return Finding(Reason.WRITER_EMPTY.value, "the answer is empty")
    try:
        turns = _description(text, question) if kind == "detail" else _pairs(text, kind)
        return _with_boxes(turns, kind, told)
    except _Wrong as wrong:
        return Finding(wrong.reason.value, wrong.detail)


class _Wrong(Exception):
    """What is wrong with an answer."""

    def __init__(self, reason: Reason, detail: str, words: str = "") -> None:
        super().__init__(detail)
        self.reason = reason
        shown = one_line(words)
        shown = shown if len(shown) <= _MAX_DETAIL else f"{shown[:_MAX_DETAIL]}..."
        self.detail = f"{detail}: {shown}" if shown else detail


_THOUGHTS = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHT = re.compile(r"\A\s*<think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"\A```[\w-]*[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_FENCED = re.compile(r"\A([^\[{`]*?:)\s*```[\w-]*[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)
"""A fence after a line that introduces it."""


def _unfenced(text: str) -> str:
    """Without a code fence around the whole."""
    if (found := _FENCE.match(text)) is not None:
        return found[1].strip()
    found = _FENCED.match(text)
    return found[2].strip() if found is not None and len(found[1]) <= _MAX_PREAMBLE else text


_STRAIGHT = str.maketrans({"\u201c": '"', "\u201d": '"', "\u201e": '"', "\u2018": "'", "\u2019": "'", "\u201a": "'"})


def line(text: str) -> str:
    """A turn's text as it is stored: one line, straight quotation marks, no control or bidi characters."""
    return one_line(text.translate(_STRAIGHT))


# -- questions and answers --------------------------------------------------------------------------------------------


def _pairs(text: str, kind: InstructKind) -> list[Turn]:
    turns = _labelled(text) if _LABEL.match(text) else _turns(_value(text))
    if len(turns) > 2 * MAX_PAIRS:
        raise _Wrong(Reason.CHECK_TURNS, f"{len(turns) // 2} questions, more than {MAX_PAIRS}")
    if kind == "complex" and len(turns) != 2:
        raise _Wrong(Reason.CHECK_TURNS, f"{len(turns) // 2} questions where one was asked for")
    for number, turn in enumerate(turns):
        if not turn.content:
            raise _Wrong(Reason.CHECK_TURNS, f"{'answer' if number % 2 else 'question'} {number // 2 + 1} is empty")
    return turns


def _value(text: str) -> Any:
    """The JSON value that is the answer."""
    start = min((at for at in (text.find("["), text.find("{")) if at >= 0), default=-1)
    before = text[:start].strip() if start >= 0 else text
    if start < 0 or (before and not (before.endswith(":") and len(before) <= _MAX_PREAMBLE)):
        refused = refusal_or_residue(one_line(text)) == Reason.CAPTION_REFUSED
        if refused:
            raise _Wrong(Reason.WRITER_REFUSED, "the model declines", text)
        raise _Wrong(Reason.WRITER_MALFORMED, "not the JSON array that was asked for", text)
    body = text[start:]
    for repaired in (body, _COMMA.sub(lambda found: found[1] or "", body), body.translate(_STRAIGHT)):
        try:
            value, end = json.JSONDecoder(strict=False, object_pairs_hook=_once).raw_decode(repaired)
        except (ValueError, RecursionError):
            continue
        if rest := repaired[end:].strip():
            raise _Wrong(Reason.WRITER_MALFORMED, "the answer goes on after its JSON", rest)
        return value
    if _unclosed(body):
        raise _Wrong(Reason.WRITER_CUT_OFF, "the JSON is cut off", body[-_MAX_DETAIL:])
    raise _Wrong(Reason.WRITER_MALFORMED, "the answer is not JSON", body)


_STRING = r'"(?:[^"\\]|\\.)*"'
_COMMA = re.compile(rf"({_STRING})|,(?=\s*[\]}}])", re.DOTALL)
"""A comma before a closing bracket; strings, which are passed over, are its first group."""
_BRACKET = re.compile(rf"{_STRING}|([\[\]{{}}])|(\")", re.DOTALL)


def _unclosed(body: str) -> bool:
    """Whether a string or a bracket is still open at the end."""
    depth = 0
    for found in _BRACKET.finditer(body):
        if found[2]:
            return True
        if found[1]:
            depth += 1 if found[1] in "[{" else -1
    return depth > 0


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, its keys in lower case; one that says a thing twice is none."""
    found = {key.strip().lower(): value for key, value in pairs}
    if len(found) != len(pairs):
        raise _Wrong(Reason.WRITER_MALFORMED, "an object has a key twice", ", ".join(key for key, _ in pairs))
    return found


def _turns(value: Any) -> list[Turn]:
    """Turns of a JSON value: pairs, or messages by role."""
    if isinstance(value, dict):
        wrapped = list(value.values())
        value = wrapped[0] if len(wrapped) == 1 and isinstance(wrapped[0], list) else [value]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise _Wrong(Reason.WRITER_MALFORMED, "the JSON is no list of objects", json.dumps(value, ensure_ascii=False))
    if not value:
        raise _Wrong(Reason.CHECK_TURNS, "there are no turns")
    if any("role" in entry or "from" in entry for entry in value):
        return _by_role(value)
    turns = []
    for number, entry in enumerate(value, 1):
        for role, key in ((USER, "question"), (ASSISTANT, "answer")):
            if key not in entry:
                raise _Wrong(Reason.CHECK_TURNS, f"pair {number} has no {key}", json.dumps(entry, ensure_ascii=False))
            turns.append(Turn(role, _said(entry[key])))  # type: ignore[arg-type]
    return turns


def _by_role(entries: Sequence[dict[str, Any]]) -> list[Turn]:
    turns = []
    for number, entry in enumerate(entries):
        role = entry.get("role", entry.get("from"))
        expected = ASSISTANT if number % 2 else USER
        if not isinstance(role, str) or _ROLES.get(role.lower()) != expected:
            raise _Wrong(Reason.CHECK_TURNS, f"turn {number + 1} is not the {expected}'s", str(role))
        turns.append(Turn(expected, _said(entry.get("content", entry.get("value")))))  # type: ignore[arg-type]
    if len(turns) % 2:
        raise _Wrong(Reason.CHECK_TURNS, "the last question has no answer", turns[-1].content)
    return turns


_ROLES = {"user": USER, "human": USER, "person": USER, "assistant": ASSISTANT, "gpt": ASSISTANT}


def _said(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong(Reason.WRITER_MALFORMED, "a turn is no text", json.dumps(value, ensure_ascii=False))
    return line(value)


_LABEL = re.compile(r"\A[\s>#*_=-]*(?:question|q)\s*[0-9]{0,2}\s*[*_]*\s*:", re.IGNORECASE)
_LABELS = re.compile(r"^[ \t>#*_=-]*(question|q|answer|a)\s*[0-9]{0,2}\s*[*_]*\s*:[*_]*", re.IGNORECASE | re.MULTILINE)
_RULE = re.compile(r"^\s*[=*_-]{3,}\s*$", re.MULTILINE)


def _labelled(text: str) -> list[Turn]:
    """Turns of lines that begin with ``Question:`` and ``Answer:``, a paragraph each. More than a paragraph may be
    somebody else's words, so it is refused."""
    found = list(_LABELS.finditer(text))
    turns = []
    for number, match in enumerate(found):
        role = USER if match[1].lower().startswith("q") else ASSISTANT
        expected = ASSISTANT if number % 2 else USER
        end = found[number + 1].start() if number + 1 < len(found) else len(text)
        said = _RULE.sub("", text[match.end() : end]).strip()
        if role != expected:
            raise _Wrong(Reason.CHECK_TURNS, f"turn {number + 1} is not the {expected}'s", said)
        if re.search(r"\n\s*\n", said):
            raise _Wrong(Reason.WRITER_MALFORMED, f"turn {number + 1} has more than a paragraph", said[-_MAX_DETAIL:])
        turns.append(Turn(role, line(said)))  # type: ignore[arg-type]
    if len(turns) % 2:
        raise _Wrong(Reason.CHECK_TURNS, "the last question has no answer", turns[-1].content)
    return turns


# -- descriptions -----------------------------------------------------------------------------------------------------

_HEAD = re.compile(r"\A[\s#*_]*(?:detailed |picture )?description\s*[*_]*\s*:[*_]*\s*", re.IGNORECASE)
_INTRODUCED = re.compile(r"\A(?:sure|certainly|of course|here)\b[^\n:]{0,150}:\s*\n", re.IGNORECASE)
_LISTED = re.compile(r"^\s*(?:[-*\u2022+]\s+|#{1,6}\s+|[0-9]{1,2}[.)]\s+|\|)", re.MULTILINE)
_JSON = re.compile(r"\{|\[\s*[\[{\"]")
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_CHATTER = re.compile(
    r"\b(?:let me know if|i hope (?:this|that)|feel free to"
    r"|if you (?:need|have|would like|want) (?:any|more|me|further)|would you like me to"
    r"|please note that|note that (?:this|i))\b",
    re.IGNORECASE,
)


def _description(text: str, question: str) -> list[Turn]:
    """A description as an answer to a question; its paragraphs stay."""
    text = _HEAD.sub("", _INTRODUCED.sub("", text))
    if _JSON.match(text):
        raise _Wrong(Reason.WRITER_MALFORMED, "JSON where prose was asked for", text)
    if _LABEL.match(text):
        raise _Wrong(Reason.WRITER_MALFORMED, "questions where a description was asked for", text)
    if (found := _LISTED.search(text)) is not None:
        raise _Wrong(Reason.WRITER_MALFORMED, "a list or a heading where prose was asked for", text[found.start() :])
    if (found := _CHATTER.search(text)) is not None:
        raise _Wrong(Reason.WRITER_MALFORMED, "speaks to whoever asked", text[found.start() :])
    paragraphs = [line(_EMPHASIS.sub(r"\2", part)) for part in re.split(r"\n\s*\n", text)]
    said = "\n\n".join(part for part in paragraphs if part)
    if not said:
        raise _Wrong(Reason.WRITER_EMPTY, "the answer is empty")
    return [Turn("user", question), Turn("assistant", said)]


# -- boxes ------------------------------------------------------------------------------------------------------------

_ALMOST = re.compile(
    r"\[([^\[\]]*)\]\s?\(\s*box(?:es)?\s*[:=]?\s*"
    r"([0-9]{1,4}(?:(?:\s*(?:,|&|\band\b)\s*|\s+)(?:box(?:es)?\s*:?\s*)?[0-9]{1,4})*)\s*\)",
    re.IGNORECASE,
)
"""A mention but for its spaces, ``boxes`` or ``and``."""
_STRAY = re.compile(r"\(\s*box\b|\bbox(?:es)?\s*[:#]\s*[0-9]|\bbox(?:es)?\s+[0-9]{1,3}\b|\]\s*\(|[\[\]]", re.IGNORECASE)


def _with_boxes(turns: Sequence[Turn], kind: InstructKind, told: Sequence[Box]) -> Parsed:
    """Mentions counted anew, over the boxes that are mentioned."""
    new: dict[int, int] = {}
    found = []

    def renumbered(mention: Mention) -> str:
        for number in mention.boxes:
            if number >= len(told) or kind != "grounding":
                raise _Wrong(Reason.CHECK_BOXES, f"no box {number} was told", str(mention))
        known = dict.fromkeys(mention.boxes)
        return str(Mention(line(mention.phrase), tuple(new.setdefault(number, len(new)) for number in known)))

    for turn in turns:
        content = _ALMOST.sub(lambda m: f"[{m[1]}](box:{','.join(re.findall(r'[0-9]+', m[2]))})", turn.content)
        if kind == "grounding":
            for part in parts(content):
                if isinstance(part, str) and (stray := _STRAY.search(part)) is not None:
                    raise _Wrong(Reason.CHECK_BOXES, "a box that is not mentioned as asked", part[stray.start() :])
        found.append(Turn(turn.role, render_mentions(content, renumbered)))
    if kind == "grounding" and not new:
        raise _Wrong(Reason.CHECK_BOXES, "no box is mentioned")
    return Parsed(tuple(found), tuple(told[number] for number in new))
