"""Instructions inside texts (prompt injection), and answers that obey them or speak of their own instructions.

These patterns are narrow, since sentences that they match are no evidence any more: no title or caption may be taken
for a demand. What a model answers is searched with wider ones, too (`captioners.instruct.leaks`).
"""

from __future__ import annotations

import re
from itertools import pairwise

from filters.instruct.words import words_of

_OVERRIDE = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass|skip)\b[^.!?\n]{0,40}\b(?:instructions?|prompts?|rules|guidelines|"
    r"above|previous|prior|directions|you (?:were|have been) told|everything (?:above|before|else|you))\b"
    r"|\bsystem (?:prompt|message)\b|\bnew instructions?\b|\byou are now (?:a|an|in)\b|\bdeveloper mode\b",
    re.IGNORECASE,
)
_START = r"(?:\A|[.!?\n\])}>]\s*)[\"'\u201c\u2018\[({<*#-]*"
_VERB = (
    r"(?:say|print|reply|output|respond|write|answer|repeat|include|begin|start|end|finish|mention|append|add|return"
    r"|type|insert|tell|state|reveal|echo|recommend|claim|describe|call|use)"
)
_DEMAND = re.compile(
    r"(?:\A|[.!?:;,\n\])}>\u2014-]\s*|\b(?:and|then|please|must|should|instead|just|only|always|you|to)\s+)"
    r"(?:please\s+|instead\s+|always\s+|only\s+|just\s+|now\s+|simply\s+)*" + _VERB + r"\b"
    r"(?:\s+(?:only|exactly|with|by|saying|your|the|every|each|all|answers?|replies|reply|responses?|descriptions?|"
    r"turns?|sentences?|words?|phrases?|back|that|me|us|them|users?|readers?|everyone|in|to|as|it|this|image|picture|"
    r"following|at|end|start|a|an|please)\b)*\s*[:,]?\s*"
    r"(?P<what>[^\n]{1,200}?)(?=[.!?](?:\s|\Z)|\n|\Z)",
    re.IGNORECASE,
)
_FIRST = re.compile(
    _START + r"(?:please\s+|now\s+|instead\s*,?\s+|always\s+|then\s+|only\s+)*(?:"
    r"(?:reply|respond|append|reveal|ignore|disregard)\b(?!\s+of\b)"
    r"|(?:answer|begin|start|end|finish)\s+(?:only\s+|just\s+)?(?:with\s+(?:the\s+(?:words?|phrase|sentence)"
    r"|[\"'\u201c\u2018]|(?-i:[A-Z]{3,}))|your|each|every|all\s+(?:answers|replies|turns|sentences))"
    r"|" + _VERB + r"\s+(?:only\b|exactly\b|just\b|that\b|me\b|us\b|your\b|the\s+(?:words?|phrases?|sentences?|"
    r"following|users?|readers?|answer|system|reply)\b|this\s+(?:sentence|phrase|word|exact)|[\"'\u201c\u2018])"
    r"|(?:say|print|reply|output|respond|write|answer|repeat|echo)\s*:"
    r"|(?:call|describe)\s+(?:it|him|her|them|this|the\s+\w+)\s+(?:as\b|an?\b)"
    r"|(?-i:(?:[Ss]ay|[Pp]rint|[Oo]utput|[Ww]rite|[Ii]nclude|[Ii]nsert|[Ee]cho|[Rr]epeat|[Mm]ention"
    r"|[Aa]dd)\s+[A-Z]{3,})"
    r")",
    re.IGNORECASE,
)
_ADDRESS = re.compile(
    _START
    + r"(?:hey\s+|dear\s+|attention\s+)?(?:assistant|ai|ai model|chatbot|llm|gpt|language model|captioner|system|"
    r"instructions?|admin|developer|note to (?:the )?(?:ai|assistant|model|writer))s?\s*[:,]\s*(?:\w+\s+){0,3}?"
    + _VERB
    + r"\b"
    r"|\byour (?:reply|answer|answers|response|responses|output)\b"
    r"|\byou (?:must|should|have to|need to|will) (?:now |always |only |also )?" + _VERB + r"\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?;\n])\s+|\n+|\s+[-\u2013\u2014|]+\s+")
_MANNER = re.compile(
    r"[\"'\u201c\u201d\u2018\u2019<]|\s+(?:in|at|to|as|and|on|before|after|instead|with)\b", re.IGNORECASE
)
"""Behind what is demanded: how or where it is to be said."""
_SHOUTED = re.compile(r"\b[A-Z]{4,}\b")
_OWN = re.compile(
    r"\b(?:system prompt|system message|(?:my|these|the|your) (?:previous |prior |own )?instructions? (?:say|said|tell"
    r"|told|are|were|is)|ignor(?:e|ing) (?:all |any |the |my )?(?:previous|prior|above|earlier) (?:instructions?"
    r"|prompts?|directions?)|i (?:was|am|have been|'?m) (?:instructed|told|asked|programmed|prompted|supposed) to|"
    r"as (?:instructed|requested|you (?:asked|requested|instructed))|prompt injection|jailbreak|few[- ]shot|"
    r"per (?:your|the) instructions|according to (?:my|your|the) (?:instructions?|prompt|guidelines)|"
    r"(?:my|your) (?:training data|guidelines|prompt)|instructions? (?:above|below|i was given))\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+")
_SMALL = words_of(
    "a an the and or of in on at to with it is are that this as by for from be you your i my me we all any not "
    "only please something anything now then word words phrase sentence following answer reply exactly nothing else "
    "every"
)


def is_demand(text: str) -> bool:
    """Whether a text, or any sentence of it, tells its reader what to do or to write."""
    return bool(_OVERRIDE.search(text) or _ADDRESS.search(text) or _FIRST.search(text))


def without_demands(text: str) -> str:
    """The text without the sentences that tell its reader what to write; the text itself where there is none."""
    if not is_demand(text):
        return text
    kept, armed = [], False
    for sentence in _SENTENCE.split(text):
        if is_demand(sentence):
            armed = True
            before = _before_demand(sentence)
            if before:
                kept.append(before)
        elif not (armed and _DEMAND.match(sentence)):
            kept.append(sentence)
    return " ".join(kept)


def _before_demand(sentence: str) -> str:
    found = [match.start() for match in (_OVERRIDE.search(sentence), _ADDRESS.search(sentence)) if match]
    before = sentence[: min(found)] if found and not _FIRST.search(sentence) else ""
    return "" if _DEMAND.search(before) else before


def demands(text: str) -> list[str]:
    """What a text asks its reader to write, word for word, and the first and loudest parts of it."""
    if not is_demand(text):
        return []
    found = []
    for match in _DEMAND.finditer(text):
        what = match["what"].strip(" \"'\u201c\u201d\u2018\u2019.")
        found += [what, _MANNER.split(what)[0], *_SHOUTED.findall(what)]
    return list(dict.fromkeys(found))


def own_instructions(answer: str) -> str | None:
    """Words with which an answer speaks of its own instructions."""
    found = _OWN.search(answer)
    return found[0] if found else None


def obeyed(answer: str, texts: tuple[str, ...]) -> str | None:
    """What a text demanded and the answer says; words that the other texts or sentences hold are no sign of it."""
    asked = [what for text in texts for what in demands(text)]
    if not asked:
        return None
    innocent = {word.lower() for text in texts for word in _WORD.findall(without_demands(text))}
    said = [word.lower() for word in _WORD.findall(answer)]
    joined = f" {' '.join(said)} "
    for what in asked:
        words = [word.lower() for word in _WORD.findall(what)]
        telling = [word for word in words if word not in _SMALL and word not in innocent]
        if not telling:
            continue
        if f" {' '.join(words)} " in joined:
            return what
        for size in (4, 3):
            for at in range(len(words) - size + 1):
                run = words[at : at + size]
                if any(word in telling for word in run) and f" {' '.join(run)} " in joined:
                    return " ".join(run)
        for pair in pairwise(words):
            if all(word in telling for word in pair) and f" {' '.join(pair)} " in joined:
                return " ".join(pair)
        if len(telling) <= 4 and all(word in said for word in telling):
            return " ".join(telling)
    return None
