"""The checks on what a writer of instruction data writes, as a table and as one function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from filters.instruct import form
from filters.instruct.attributes import attribute_faults
from filters.instruct.counts import Count, asked_count, count_fault, count_faults
from filters.instruct.evidence import MAX_TEXT_CHARS, Evidence, evidence_of
from filters.instruct.leaks import obeyed, own_instructions
from filters.instruct.mentions import mention_faults
from filters.instruct.positions import position_fault, position_faults, relations
from filters.instruct.presence import asked_presence, is_hedged, premise_faults, presence_faults
from filters.instruct.words import number, sentences, tamed
from pairmill.boxes import Box
from pairmill.instructions import USER, Context, Finding, Turn, plain
from schemas.config import InstructKind
from schemas.reasons import Reason

CHECKS_VERSION = 1
"""Raise it when an answer may be judged otherwise than before: answers are checked anew."""


@dataclass(frozen=True)
class _Answer:
    turns: Sequence[Turn]
    boxes: Sequence[Box]
    kind: InstructKind
    context: Context
    evidence: Evidence
    sentences: Sequence[list[list[str]]]
    """Of each turn, mentions put as their phrases."""

    def exchanges(self) -> Iterator[tuple[list[list[str]], list[list[str]]]]:
        """The sentences of each question and of its answer."""
        question: list[list[str]] = []
        for turn, said in zip(self.turns, self.sentences, strict=True):
            if turn.role == USER:
                question = said
            else:
                yield question, said


@dataclass(frozen=True)
class Rule:
    """One check: what it is called in findings, what it asks, and how it looks for faults."""

    name: str
    reason: Reason
    asks: str
    faults: Callable[[_Answer], Iterator[str]]
    """What is wrong, in words, with the words at fault."""


def _counts(answer: _Answer) -> Iterator[str]:
    for question, said in answer.exchanges():
        yield from count_faults(said, answer.evidence)
        noun = asked_count(question, answer.evidence)
        first = said[0] if said else []
        if noun and len(first) <= 6:
            stated = [(at, value) for at, word in enumerate(first) if (value := number(word)) is not None]
            named = answer.evidence.nouns(first)
            if stated and not named and first[: stated[0][0]] in ([], ["there", "are"], ["there", "is"], ["i", "see"]):
                claim = Count(
                    stated[0][1], noun.name.concepts, "all", f"{first[stated[0][0]]} {noun.words}", frozenset()
                )
                fault = count_fault(claim, answer.evidence, [claim], frozenset(first))
                if fault:
                    yield fault


def _positions(answer: _Answer) -> Iterator[str]:
    width, height = answer.context.width, answer.context.height
    for question, said in answer.exchanges():
        asked = [noun for words in question for noun in answer.evidence.nouns(words)]
        yield from position_faults(said, answer.evidence, width, height, asked[:1])
        first = said[0][0] if said and said[0] else ""
        for words in question:
            nouns = answer.evidence.nouns(words)
            if asked_presence(words, nouns) or words[:1] not in (["is"], ["are"], ["does"], ["do"]):
                continue
            stated = list(relations(words, nouns))
            if len(stated) != 1 or first not in ("yes", "no"):
                continue
            relation = stated[0]
            if first == "yes":
                fault = position_fault(relation, answer.evidence, words, width, height)
                if fault:
                    yield fault


def _nouns(answer: _Answer) -> Iterator[str]:
    hedged = answer.kind == "complex"
    for question, said in answer.exchanges():
        yield from presence_faults(said, answer.evidence, hedged)
        yield from premise_faults(question, said, answer.evidence, hedged)
        yield from attribute_faults([words for words in said if not (hedged and is_hedged(words))], answer.evidence)


def _leaks(answer: _Answer) -> Iterator[str]:
    texts = tuple(tamed(text, MAX_TEXT_CHARS) for text in answer.context.texts)
    for turn in answer.turns:
        text = plain(turn.content)
        found = own_instructions(text) or (obeyed(text, texts) if turn.role != USER else None)
        if found:
            yield f"{found!r}"


CHECKS: tuple[Rule, ...] = (
    Rule(
        "turns",
        Reason.CHECK_TURNS,
        "user and assistant take turns, the user first; none is empty; as many turns as the kind has",
        lambda a: form.turn_faults(a.turns, a.kind),
    ),
    Rule(
        "repeated",
        Reason.CHECK_REPEATED,
        "no turn twice, no two answers nearly the same, no loop inside an answer",
        lambda a: form.repetition_faults(a.turns),
    ),
    Rule(
        "length",
        Reason.CHECK_LENGTH,
        "neither too short nor too long for the kind, not cut off, quotes and brackets closed",
        lambda a: form.length_faults(a.turns, a.kind),
    ),
    Rule(
        "tokens",
        Reason.CHECK_TOKENS,
        "no <image>, role names, chat-template tokens, markup, control characters, addresses",
        lambda a: form.token_faults(a.turns),
    ),
    Rule(
        "wording",
        Reason.CHECK_WORDING,
        "nothing that tells that the writer read texts instead of seeing the picture",
        lambda a: form.wording_faults(a.turns, "\n".join(a.context.texts).lower()),
    ),
    Rule(
        "refusal", Reason.CHECK_REFUSAL, 'no refusal, no apology, no "as an AI"', lambda a: form.refusal_faults(a.turns)
    ),
    Rule(
        "numbers",
        Reason.CHECK_NUMBERS,
        "no coordinates: boxes are mentioned by number, in grounding alone",
        lambda a: form.number_faults(a.turns),
    ),
    Rule(
        "boxes",
        Reason.CHECK_BOXES,
        "mentions exist, fit the labels of their boxes, and leave no box out",
        lambda a: mention_faults(a.turns, a.boxes, a.kind, a.evidence),
    ),
    Rule("count", Reason.CHECK_COUNT, "stated numbers agree with the boxes of that label or with a text", _counts),
    Rule(
        "position",
        Reason.CHECK_POSITION,
        "left, right, above and below agree with the centres of boxes or with a text",
        _positions,
    ),
    Rule(
        "noun",
        Reason.CHECK_NOUN,
        "things said to be there are named by a text or a label; things denied are not there",
        _nouns,
    ),
    Rule(
        "leak", Reason.CHECK_LEAK, "no instruction found in a text is obeyed, none of the writer's own is told", _leaks
    ),
)
"""In the order in which their findings are listed."""


def check(turns: Sequence[Turn], boxes: Sequence[Box], kind: InstructKind, context: Context) -> list[Finding]:
    """What is wrong with an answer (`pairmill.instructions.Check`).

    Args:
        turns: as they would be stored, in canonical text.
        boxes: those that the turns mention, by position.
        kind: what was asked for.
        context: what the writer was told.

    Returns:
        All findings, in the order of `CHECKS`; empty for an answer that may be stored.
    """
    turns = [replace(turn, content=tamed(turn.content, form.MAX_CHARS)) for turn in turns]
    answer = _Answer(
        turns, boxes, kind, context, evidence_of(context), [sentences(plain(turn.content)) for turn in turns]
    )
    return [Finding(rule.reason.value, detail) for rule in CHECKS for detail in dict.fromkeys(rule.faults(answer))]
