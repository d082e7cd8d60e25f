"""Box mentions: they exist in grounding alone, each names boxes that fit its phrase."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from filters.instruct.evidence import Evidence, Labelled
from filters.instruct.vocabulary import Noun, vocabulary
from filters.instruct.words import FUNCTION, number, tokens, words_of
from pairmill.boxes import Box
from pairmill.instructions import Mention, Turn, parts
from schemas.config import InstructKind

_BROKEN = re.compile(r"\]\s*\(\s*box|\(box:|\bbox:\s*\d|\[[^\[\]]*\]\([^()]*\)|<box>|<ref>|</?p>", re.IGNORECASE)
_FREE = words_of(
    "left right top bottom middle center centre corner side background foreground region area part section place spot "
    "here there it this that one ones they them these those thing things "
    "object objects item items"
)
_BEHIND = words_of("on in with at near next behind that who holding wearing riding to by")
_PLURAL = words_of(
    "both all two three four five six seven eight nine ten several many these those they them ones things "
    "objects items regions areas places people and pair group row couple"
)


def mention_faults(
    turns: Sequence[Turn], boxes: Sequence[Box], kind: InstructKind, evidence: Evidence
) -> Iterator[str]:
    """What is wrong with the mentions of a conversation, in words."""
    found: list[Mention] = []
    for turn in turns:
        pieces = parts(turn.content)
        found.extend(piece for piece in pieces if isinstance(piece, Mention))
        for piece in pieces:
            if isinstance(piece, str) and (broken := _BROKEN.search(piece)):
                yield f"{broken[0]}: not written as a mention"
    if kind != "grounding":
        if found:
            yield f"{found[0]}: a mention in a {kind}"
        if boxes:
            yield f"{len(boxes)} boxes stored with a {kind}"
        return
    if not found:
        yield "no box is mentioned"
        return
    known = {(thing.box.label, thing.box.xyxy): thing for thing in evidence.labelled}
    things = [known.get((box.label, box.xyxy)) for box in boxes]
    for box, thing in zip(boxes, things, strict=True):
        if thing is None:
            yield f"{box.label}: a box that the image does not have"
    mentioned: set[int] = set()
    for mention in found:
        mentioned.update(mention.boxes)
        beyond = [position for position in mention.boxes if position >= len(boxes)]
        if beyond:
            yield f"{mention}: there is no box {beyond[0]}"
            continue
        if len(set(mention.boxes)) < len(mention.boxes):
            yield f"{mention}: names a box twice"
            continue
        meant = [thing for position in mention.boxes if (thing := things[position]) is not None]
        fault = _misfit(mention, meant, evidence) if meant and mention.phrase.strip() else None
        if fault:
            yield f"{mention}: {fault}"
    for position, box in enumerate(boxes):
        if position not in mentioned:
            yield f"{box.label}: box {position} is not mentioned"


def _misfit(mention: Mention, meant: Sequence[Labelled], evidence: Evidence) -> str | None:
    words = tokens(mention.phrase)
    nouns = vocabulary().find(words, evidence.names)
    labels = ", ".join(sorted({thing.box.label for thing in meant}))
    if nouns and not nouns[0].name.free:
        joint = "and" in words
        heads = [noun for at, noun in enumerate(nouns) if at + 1 == len(nouns) or nouns[at + 1].start != noun.end]
        head = heads if joint else _head(heads, words)
        for thing in meant:
            if not any(thing.is_a(noun.name.concepts) or thing.may_be(noun.name.concepts) for noun in head):
                return f"the box is {labels}"
        adjectives = evidence.adjectives & frozenset(words)
        for thing in meant:
            if thing.adjectives and not joint and not adjectives <= thing.adjectives:
                return f"the box is {labels}"
        single = not joint and not head[0].name.plural and not head[0].name.both
        if len(meant) > 1 and single and not _PLURAL & set(words):
            return f"one thing, {len(meant)} boxes"
        if len(meant) == 1 and head[0].name.plural and not joint and not _lumped(meant[0], head[0].words):
            return "several things, one box"
    elif not nouns and not _FREE & set(words) and meant and _is_foreign(words, meant, evidence):
        return f"the box is {labels}"
    values = [value for word in words if (value := number(word)) is not None and value > 1]
    if (
        values
        and "of" not in words
        and values[0] != len(meant)
        and nouns
        and (nouns[0].name.plural or nouns[0].name.both)
    ):
        return f"{values[0]} things, {len(meant)} boxes"
    if "both" in words and len(meant) != 2:
        return f"two things, {len(meant)} boxes"
    return None


def _head(nouns: Sequence[Noun], words: Sequence[str]) -> Sequence[Noun]:
    """The noun that a phrase is about: ``dog`` in ``the dog on the couch``."""
    at = next((at for at, word in enumerate(words) if word in _BEHIND), len(words))
    before = [noun for noun in nouns if noun.end <= at]
    return before[-1:] or nouns[-1:]


def _lumped(thing: Labelled, words: str) -> bool:
    label = thing.box.label.lower()
    return label.endswith("s") or words in ("scissors", "skis", "glasses", "pants", "jeans", "shorts", "flowers")


def _is_foreign(words: Sequence[str], meant: Sequence[Labelled], evidence: Evidence) -> bool:
    """Whether a phrase without a known noun ends in a word that neither the texts nor the labels have."""
    telling = [word for word in words if word.isalpha() and word not in FUNCTION and number(word) is None]
    labels = {part for thing in meant for part in thing.box.label.lower().split()}
    return bool(telling) and not {telling[-1], telling[-1].rstrip("s")} & (evidence.words | labels)
