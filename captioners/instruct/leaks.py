"""Answers that give the prompt away, or do what a text told the model to do.

Captions come from strangers, and what is sent (`captioners.instruct.prompting`) only makes it unlikely that a model
takes one of them for an order. So its answer is looked at as well: none of it may be of the system message or of the
fence, and whatever only an order supplies must not be in it.

What counts as an order is wider here than in `filters.instruct.leaks`, whose checks every answer passes as well: there
a sentence that is taken for one is no evidence any more, here it costs no more than the words that nothing else has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from captioners.instruct import prompting
from captioners.instruct.prompting import PromptSet
from pairmill.boxes import Box
from pairmill.instructions import Finding, Turn, plain
from schemas.reasons import Reason

SHINGLE = 8
"""Words in a row that an answer shares with the system message from which on it repeats it."""

SHOT_SHINGLE = 12
"""Words in a row shared with the answer of an example, which, unlike the system message, is made of plain words about
pictures, from which on the answer is the example's."""

_WORD = re.compile(r"[^\W_]+")


def leaks(turns: Sequence[Turn], boxes: Sequence[Box], prompt: PromptSet, texts: Sequence[str]) -> list[Finding]:
    """What an answer has that comes from the prompt, or from an order in a text (``check.leak``); and another language
    than English, in which no other check could read it, or capitals throughout (``check.wording``).

    Args:
        turns: What the model wrote; a question that was drawn from a list is not looked at.
        boxes: Those that it mentions.
        prompt: What it was told at first.
        texts: The texts as it was told them (`captioners.instruct.prompting.texts`).
    """
    written = [turn.content for turn in turns if prompt.kind != "detail" or turn.role == "assistant"]
    words = [_words(plain(content)) for content in written]
    found = []
    for content in written:
        if (mark := prompting.MARK.search(content)) is not None:
            found.append(f"the fence of the material: {mark[0]}")
    own = _shingles((_words(text) for text in texts), SHINGLE)
    told = _shingles([_words(plain(prompt.system))], SHINGLE) - own
    shown = _shingles((_words(plain(t.content)) for shot in prompt.shots for t in shot.turns), SHOT_SHINGLE)
    shown -= _shingles((_words(text) for text in texts), SHOT_SHINGLE)
    for said in words:
        if repeated := _first(said, told, SHINGLE):
            found.append(f"words of the prompt: {repeated}")
        elif repeated := _first(said, shown, SHOT_SHINGLE):
            found.append(f"words of an example of the prompt: {repeated}")
    found += _obeyed(words, boxes, texts)
    findings = [Finding(Reason.CHECK_LEAK.value, detail) for detail in found]
    if _foreign([word for said in words for word in said]):
        findings.append(Finding(Reason.CHECK_WORDING.value, "not in English"))
    if (
        loud := next((content for content in written if content.isupper() and len(content.split()) > 3), None)
    ) is not None:
        findings.append(Finding(Reason.CHECK_WORDING.value, f"in capitals: {loud[:80]}"))
    return findings


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _shingles(texts: Iterable[Sequence[str]], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + size]) for words in texts for at in range(len(words) - size + 1)}


def _first(words: Sequence[str], shingles: set[tuple[str, ...]], size: int) -> str:
    """The first run of words that is among these; empty where none is."""
    runs = (tuple(words[at : at + size]) for at in range(len(words) - size + 1))
    return " ".join(next((run for run in runs if run in shingles), ()))


_ENGLISH = frozenset(
    _WORD.findall(
        "a an the and with there are is to it that this they which what his her has have from by at for be seen where "
        "in on of no yes two can while next some"
    )
)
"""Words that make up a third of English prose. Other languages have some of them, too (``a``, ``in``, ``is``)."""


def _foreign(words: Sequence[str]) -> bool:
    """Whether so many words cannot be English. Of five COCO captions in a row, which are terser than answers, 19% and
    more are words of `_ENGLISH`; of eight other languages up to 15%, of Portuguese 18%."""
    least = 0.17 if len(words) >= 20 else 0.08 if len(words) >= 12 else 0.0
    return sum(word in _ENGLISH for word in words) < least * len(words)


# -- orders in texts --------------------------------------------------------------------------------------------------

_SENTENCE = re.compile(r"(?<=[.!?;:\n])\s+|(?<=[.!?])(?=[A-Z\"'])")
_ORDER = re.compile(
    r"""
    \b(?:ignore|disregard|forget|override|overrule|bypass|skip|do\ not\ follow|stop\ following)\b
        (?:\W+\w+){0,5}?\W+(?:instructions?|rules?|prompts?|orders?|above|previous|prior|earlier|before|told|said
        |messages?|directions?|guidelines?|system|everything|anything|context)\b
  | \b(?:system|hidden|original|initial|secret|developer)\W+(?:prompt|message|instructions?|rules?)\b
  | \b(?:new|updated|revised|real|actual|following|additional|important)\W+(?:instructions?|orders?|task|rules?)\b
  | \b(?:your|the)\W+(?:instructions?|prompt|new\W+task|(?:real|actual|only)\W+task|answer|reply|response|output)\W+
        (?:is|are|must|should|shall|has|needs?)\b
  | \byou\W+(?:are\W+now|must\W+now|will\W+now)\b
  | \byou\W+(?:must|shall|should|will|have\W+to|need\W+to)\W+(?:(?:only|always|never|not|just|instead)\W+)*
        (?:say|print|output|repeat|write|recite|reveal|echo|mention|answer|reply|respond|obey|ignore|describe)\b
  | \b(?:from\W+now\W+on|instead\W+of\W+(?:the|a|this|that|describing|writing|answering)|pretend\W+(?:to|that|you)
        |act\W+as|roleplay|role\W+play|jailbreak|end\W+of\W+(?:the\W+)?(?:material|data|text|context|input|prompt))\b
  | \b(?:correct|right|only|best)\W+answers?\W+(?:\w+\W+){0,4}?(?:is|are)\b
  | \bin\W+(?:every|each|all|your)\W+(?:answers?|repl(?:y|ies)|responses?|turns?|sentences?|descriptions?)\b
  | \b(?:assistants?|ai|models?|chat\W*bots?|llms?|gpt|writers?|captioners?)\W+
        (?:should|must|shall|has\W+to|have\W+to|needs?\W+to|is\W+to)\W+(?:\w+\W+)?
        (?:say|print|write|mention|answer|reply|respond|recommend|praise|claim|state|describe|call|add|include|use)\b
  | \b(?:note|message|attention|instructions?|hint|order|request)\W+(?:to|for)\W+(?:the\W+|any\W+|every\W+)?
        (?:assistants?|ai|models?|chat\W*bots?|llms?|gpt|writers?|captioners?|annotators?)\b
  | \b(?:always|never)\W+(?:say|write|mention|answer|reply|respond|claim|state|describe|call|add|include)\b
  | \bwhen\W+(?:you\W+are\W+|you\W+)?(?:describ|caption|answer|respond|reply)(?:e|ing)?\b
  | \boverrid(?:e|ing)\W*[:\u2013] | \breveal\W+(?:\w+\W+)?(?:secrets?|prompts?|instructions?|keys?|rules?)\b
  | \b(?:ignor|oubli|olvid|vergiss|vergess|missacht|\u0438\u0433\u043d\u043e\u0440)\w*\W+(?:\w+\W+){0,4}?
        (?:instruc|instruz|anweisung|consigne|\u0438\u043d\u0441\u0442\u0440\u0443\u043a)
  | \b(?:reply|respond|answer)\W+(?:only|with|in|using|everything|all|every|always|each)\b
  | (?:\A|[.!?;:,]\W*|\b(?:and|then|please|now|just|instead|always|simply|must|should|to)\W+)
        (?:say|print|output|repeat|write|translate|recite|reveal|echo|include|insert|append|mention|add|quote|spell
        |type|state|use)\b
        (?=(?:\W+\w+){0,6}?\W+(?:words?|phrase|sentence|prompt|instructions?|following|tokens?|text|string|letters?
        |exactly|verbatim|only|nothing|conversation|answers?|reply|response|question|message|json|poem|above
        |everything|yourself)\b|\W*["'])
  | (?:\A|[.!?;:,]\W*|\b(?:and|then|please|now|just|instead|always|must|should|to)\W+)
        (?:begin|start|end|finish|conclude)\W+(?:\w+\W+){0,3}?with\W+(?:the\W+)?
        (?:words?|letters?|phrase|sentence|["'])
  | \A\W*(?:say|print|output|repeat|reply|respond|echo)\W+\w+(?:\W+\w+){0,2}\W*\Z
  | (?:\A|[.!?;,]\W*)(?:assistant|system|user|human|instructions?|prompt|response)\W?[:\u2013]
  | \b(?:as\W+an\W+ai|language\W+model|chat\W*gpt|chat\W*bot)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Words that speak to a model rather than of a picture."""

_COMMON = frozenset(
    _WORD.findall(
        "the and for with that this from have has had are was were not but its they them their there here she his "
        "her him you your who what which where when why how any all both each some more most other than then too "
        "very can could will would may might must should into onto over under about out off down near between "
        "behind above below left right side front back top bottom middle center picture image photo photograph "
        "scene one two three four five six seven eight nine ten yes does did doing being been see seen look looks "
        "looking show shows shown visible appear appears seem seems probably likely also only just like made make "
        "makes thing things something someone people person man woman color colour colors large small many much "
        "several first second next last word words write say answer question describe"
    )
)
"""Words that an answer may have whatever the texts are."""


def orders(text: str) -> tuple[str, str]:
    """A text in two: what it says of the picture, and what it says to a model (from the first sentence with an order
    on, since what follows belongs to it)."""
    sentences = _SENTENCE.split(text)
    for number, sentence in enumerate(sentences):
        if _ORDER.search(sentence):
            return " ".join(sentences[:number]), " ".join(sentences[number:])
    return text, ""


def _obeyed(said: Sequence[Sequence[str]], boxes: Sequence[Box], texts: Sequence[str]) -> list[str]:
    """Words of an answer for which there is no source but an order."""
    parted = [orders(text) for text in texts]
    ordered = {word for _, order in parted for word in _words(order)}
    if not ordered:
        return []
    sound = {word for text, _ in parted for word in _words(text)}
    sound |= {word for box in boxes for word in _words(box.label)}
    only = {word for word in ordered - sound - _COMMON if (len(word) > 2 or word.isdigit()) and not _known(word, sound)}
    followed = [word for words in said for word in words if word in only]
    return [f"words that only an order in a text has: {', '.join(dict.fromkeys(followed))}"] if followed else []


def _known(word: str, sound: set[str]) -> bool:
    """Whether it is a form of a known word: dog, dogs; grazing, grazes."""
    return len(word) > 3 and any(word[:4] == other[:4] and abs(len(word) - len(other)) <= 3 for other in sound)
