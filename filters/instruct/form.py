"""What can be held against an answer without knowing its context: turns, lengths, repetition, tokens, wording."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

from pairmill.instructions import ASSISTANT, USER, Turn, plain
from schemas.config import InstructKind

TURNS: dict[str, tuple[int, int]] = {"conversation": (2, 20), "detail": (2, 2), "complex": (2, 2), "grounding": (2, 20)}
"""Fewest and most turns by kind."""
ANSWER_WORDS: dict[str, tuple[int, int]] = {
    "conversation": (1, 200),
    "detail": (12, 400),
    "complex": (8, 400),
    "grounding": (1, 200),
}
"""Fewest and most words of an answer by kind."""
QUESTION_WORDS = (2, 80)
"""Fewest and most words of a question."""
MAX_CHARS = 8000
"""Characters of a turn, far more than the most words have; what is longer is not read any further."""
NEAR_DUPLICATE = 0.6
"""Jaccard similarity of word triples from which two longer answers of a conversation say the same."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_END = re.compile(r"[.!?\u2026][\"'\u201d\u2019)\]]*\Z")
_CUT = re.compile(
    r"\b(?:a|an|the|and|or|but|of|in|on|at|to|with|by|for|from|is|are|was|were|its|their|his|her|this|that|which|while|"
    r"as|into|near|behind|between|under|over)\W*\Z",
    re.IGNORECASE,
)
_SAME = re.compile(r"(.)\1{9,}")
_OPEN = re.compile(r"\b(?:a|an|the|and|or|its|their)[.!?]+\Z", re.IGNORECASE)
_TOKENS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^<>]{1,40}\uff5c>|</?s>|<</?SYS>>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|</?think(?:ing)?>"
    r"|<(?:image|img|im_start|im_end|pad|unk|bos|eos|sep|cls|mask|video|answer|ImageHere)>|\[(?:PAD|UNK|CLS|SEP|MASK"
    r"|BOS|EOS)\]|<im_\w+>"
    r"|</?(?:image|img|answer|question|human|user|assistant|system)>|<0x[0-9A-F]{2}>|\u2581|###",
    re.IGNORECASE,
)
_ROLE = re.compile(
    r"(?:^|(?<=[.!?\n\"]))[ \t]*[*_#>-]*[ \t]*(?:human|assistant|user|system|gpt|chatgpt|bot|ai|model|question|answer"
    r"|q\d*|a\d*|"
    r"response|instruction|input|output|context|turn \d+)[*_]*[ \t]*:",
    re.IGNORECASE | re.MULTILINE,
)
_MARKUP = re.compile(
    r"^[ \t]*#{1,6}[ \t]+\S|```|~~~|\*\*[^*\n]+\*\*|__[^_\n]+__|^[ \t]*[-*+\u2022][ \t]+\S|^[ \t]*\d{1,2}[.)][ \t]+\S"
    r"|^[ \t]*>[ \t]+\S"
    r"|^[ \t]*\|.*\|[ \t]*$|^-{3,}[ \t]*$|`[^`\n]+`|!\[[^\]]*\]\(",
    re.MULTILINE,
)
_HTML = re.compile(
    r"</?[a-z][a-z0-9]{0,15}(?:\s+[a-z-]+\s*=[^<>]*)?\s*/?>|<!--|&(?:nbsp|amp|lt|gt|quot|#\d+);", re.IGNORECASE
)
_URL = re.compile(
    r"\b(?:https?|ftp)://|\bwww\.[a-z0-9-]+\.|\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b"
    r"|\b[a-z0-9-]{2,}\.(?:com|org|net|io|info|biz|edu|gov)\b",
    re.IGNORECASE,
)
_KEPT_FORMATS = frozenset("\u200c\u200d")
_JSON = re.compile(r"[{}]|\"(?:from|value|role|content)\"\s*:|\\[nt\"]")

_WORDING = re.compile(
    r"\b(?:captions?|captioned|captioning|bounding[- ]box(?:es)?|co-?ordinates?|annotations?|annotated|metadata"
    r"|alt[- ]text)\b"
    r"|\b(?:the|this|that|given|your|provided|these|those|each|every|image|first|second|third|other|both|all|several"
    r"|multiple|of the) "
    r"(?:\w+ )?descriptions?\b"
    r"|\b(?:as|is|are|was|were|been|being) (?:also )?(?:described|stated|mentioned|noted|reported|specified"
    r"|listed)\b(?! as (?:the )?(?:best|most))"
    r"|\bdescrib(?:ed|es) (?:as|in|by)\b|\bdescriptions? (?:say|says|mention|mentions|state|states|indicate|indicates"
    r"|of the (?:image|picture|photo|scene))\b"
    r"|\b(?:(?:based on|according to|judging by) (?:the |this |these |all |any |what )?|(?:from|given|per|in) (?:the"
    r"|this|these|all|any) )"
    r"(?:\w+ )?"
    r"(?:information|details?|data|text|texts|sentences?|context|input|description|descriptions|statements?|prompt"
    r"|list)\b"
    r"(?! (?:on|of) (?:the|a|his|her|its|their|this|that) (?!(?:image|picture|photo|scene)\b))"
    r"|\b(?:provided|given|supplied|available|input) (?:information|details?|data|text|texts|sentences?|context"
    r"|descriptions?|boxes)\b"
    r"|\bthe (?:texts?|sentences?|context|information|data|details?|input|boxes|box data|labels?|detections?"
    r"|object list)(?: provided| given)? "
    r"(?:say|says|said|mention|mentions|mentioned|state|states|stated|indicate|indicates|describe|describes|suggest"
    r"|suggests|tell|tells|"
    r"note|notes|show|shows|provided|given|specify|specifies|list|lists|do|does|confirm|confirms|reports?)\b"
    r"|\b(?:the|this) context (?:of the image )?(?:does|do|is not|provided|given)\b"
    r"|\b(?:is|are|was|were|not|n't|n\u2019t) (?:\w+ )?(?:mentioned|specified|stated|described|provided|listed"
    r"|given)(?: in| by|[.,;]|\Z)"
    r"|\b(?:detected|labell?ed|detection|detector|object detection|detections|confidence scores?|pixels?|x-?axis"
    r"|y-?axis|normali[sz]ed)\b(?= (?:objects?|boxes|box|as|in|by|results?|of|value|values|from)|[.,;]|\Z)",
    re.IGNORECASE,
)
_WORDING_ASKED = re.compile(
    r"\b(?:captions?|bounding[- ]box(?:es)?|co-?ordinates?|(?:the|given|provided) (?:descriptions?|texts?|sentences?"
    r"|information|context))\b",
    re.IGNORECASE,
)
"""What a question must not say either; "Describe it in detail." is what one asks."""
_REFUSAL = re.compile(
    r"\bas an? (?:ai|a\.i\.|artificial intelligence|(?:large |vision |text[- ]based )?(?:language )?(?:ai )?model"
    r"|assistant|chatbot)\b"
    r"|\bi(?:['\u2019]?m| am) (?:just |only )?(?:an? )?(?:ai|language model|text[- ](?:based|only)|virtual assistant"
    r"|chatbot)\b"
    r"|\b(?:i['\u2019]?m|i am|we are|we['\u2019]re) (?:\w+ ){0,2}(?:sorry|unable|not able|not capable|afraid"
    r"|not allowed|not comfortable)\b"
    r"|\b(?:i|we) apologi[sz]e|\bmy apologies\b|\bapologies\b|\A(?:so )?sorry\b|\bsorry,? (?:but|i|for)\b"
    r"|\b(?:i|we) (?:can ?not|can['\u2019]?t|could not|couldn['\u2019]?t|won['\u2019]?t|will not|do not|don['\u2019]?t"
    r"|am unable to) (?:\w+ ){0,2}"
    r"(?:provide|assist|help|describe|identify|see|view|comply|fulfill?|process|analy[sz]e|access|determine|have|tell"
    r"|know|answer|"
    r"confirm|verify|discuss|generate|create|perceive|say|make out)\b"
    r"|\bno image (?:was|is|has been)? ?(?:provided|attached|uploaded|given|available)?\b(?= (?:provided|attached"
    r"|uploaded|given|was|is|has)|[.,]|\Z)"
    r"|\bplease (?:upload|provide|attach|share|send)\b|\bwithout (?:seeing|access to|being able to see) the (?:image"
    r"|picture|photo)\b"
    r"|\b(?:unable|impossible|not possible) to (?:see|view|determine|tell|say|know|answer)\b(?: from| without| what"
    r"| the image|[.,]|\Z)"
    r"|\b(?:impossible|not possible|unable|hard|difficult) to (?:see|determine|tell|say|know|answer"
    r"|identify)\b[^.!?]{0,40}"
    r"\bfrom (?:the|this|an?) (?:image|picture|photo)"
    r"|\b(?:against|violates?) (?:my|our|the) (?:guidelines|polic(?:y|ies))\b|\bcontent policy\b|\bknowledge cut-?off\b"
    r"|\bhow (?:can|may) i (?:help|assist)\b"
    r"|\bif you (?:could|can|would) (?:provide|share|upload|describe)\b",
    re.IGNORECASE,
)
_NUMBER = r"[-+]?(?:(?<!\d)\d{1,9}(?:\.\d{1,9})?|(?<!\d)\.\d{1,9})\s?(?:%|px|pixels?)?"
_SEPARATOR = r"\s*[,;:|]\s*|\s+(?:and|to|by|x)\s+"
_TUPLES = re.compile(
    rf"(?:{_NUMBER})(?:(?:{_SEPARATOR}|\s+)(?:{_NUMBER})){{3,}}"
    rf"|[(\[{{<]\s*{_NUMBER}(?:{_SEPARATOR}){_NUMBER}\s*[)\]}}>]"
    r"|\b(?:x|y|w|h|x_?min|y_?min|x_?max|y_?max|x[0-9]|y[0-9]|left|top|right|bottom|width|height|cx"
    r"|cy)\s*[=:]\s*[-+]?\.?\d"
    r"|<(?:box|loc|quad|ref|p|patch_index|bin|point)_?\d*>|\bpatch_index_|<loc\d+>"
    rf"|\b0?\.\d{{2,}}\b(?:{_SEPARATOR}|\s+)0?\.\d{{2,}}\b|\b0\.\d{{3,}}\b",
    re.IGNORECASE,
)
_ENUMERATION = re.compile(r"\d+(?:\s*,\s*\d+)*\s*,?\s*(?:and|or)\s+\d+")


def turn_faults(turns: Sequence[Turn], kind: InstructKind) -> Iterator[str]:
    """`Reason.CHECK_TURNS`."""
    fewest, most = TURNS[kind]
    if not turns:
        yield "no turns"
        return
    for at, turn in enumerate(turns):
        wanted = ASSISTANT if at % 2 else USER
        if turn.role != wanted:
            yield f"turn {at + 1} is the {turn.role}'s, not the {wanted}'s"
            break
    if len(turns) % 2:
        yield f"{len(turns)} turns: an odd number"
    if not fewest <= len(turns) <= most:
        yield f"{len(turns)} turns: a {kind} has {fewest if fewest == most else f'{fewest} to {most}'}"
    for at, turn in enumerate(turns):
        if not turn.content.strip():
            yield f"turn {at + 1} is empty"


def repetition_faults(turns: Sequence[Turn]) -> Iterator[str]:
    """`Reason.CHECK_REPEATED`."""
    seen: dict[tuple[str, str], int] = {}
    answers: list[tuple[int, list[str]]] = []
    question = ""
    for at, turn in enumerate(turns):
        text = turn.content
        words = [word.lower() for word in _WORD.findall(text)]
        key = " ".join(words)
        if turn.role == USER:
            question = key
            if key and (turn.role, key) in seen:
                yield f"turn {at + 1} repeats turn {seen[turn.role, key] + 1}"
            seen[turn.role, key] = at
            continue
        if key and key == question and len(words) > 2:
            yield f"turn {at + 1} repeats its question"
        words = [word.lower() for word in _WORD.findall(plain(text))]
        if len(words) > 3 and (turn.role, key) in seen:
            yield f"turn {at + 1} repeats turn {seen[turn.role, key] + 1}"
        else:
            for other, before in answers:
                if len(words) >= 8 and len(before) >= 8 and _alike(words, before) >= NEAR_DUPLICATE:
                    yield f"turn {at + 1} says nearly what turn {other + 1} says"
                    break
        seen[turn.role, key] = at
        answers.append((at, words))
        loop = _loop(plain(text), words)
        if loop:
            yield f"turn {at + 1} loops: {loop}"


def _alike(one: Sequence[str], other: Sequence[str]) -> float:
    a, b = set(zip(one, one[1:], one[2:], strict=False)), set(zip(other, other[1:], other[2:], strict=False))
    return len(a & b) / len(a | b) if a | b else 0.0


def _loop(text: str, words: Sequence[str]) -> str | None:
    """What an answer says over and over: a sentence, a run of words three times, or, within a sentence, twice."""
    said: set[tuple[str, ...]] = set()
    for raw in re.split(r"[.!?\n]+", text.lower()):
        sentence = tuple(_WORD.findall(raw))
        if len(sentence) >= 3 and sentence in said:
            return " ".join(sentence)
        said.add(sentence)
        for size in range(3, min(len(sentence) // 2, 12) + 1):
            for at in range(len(sentence) - 2 * size + 1):
                if sentence[at : at + size] == sentence[at + size : at + 2 * size]:
                    return " ".join(sentence[at : at + 2 * size])
        runs = Counter(zip(*(sentence[at:] for at in range(8)), strict=False)).most_common(1)
        if runs and runs[0][1] > 1:
            return " ".join(runs[0][0])
    for size in range(1, 9):
        for at in range(len(words) - 3 * size + 1):
            run = words[at : at + size]
            if words[at + size : at + 2 * size] == run and words[at + 2 * size : at + 3 * size] == run:
                return " ".join([*run, *run, *run])
    if len(words) >= 30:
        gram, times = Counter(zip(words, words[1:], words[2:], words[3:], strict=False)).most_common(1)[0]
        if times >= 4 and times * 4 >= len(words) * 0.3:
            return " ".join(gram)
        if len(set(words)) / len(words) < 0.25:
            return f"{len(set(words))} different words of {len(words)}"
    return "one character" if _SAME.search(text) else None


def length_faults(turns: Sequence[Turn], kind: InstructKind) -> Iterator[str]:
    """`Reason.CHECK_LENGTH`: too short, too long, cut off."""
    fewest, most = ANSWER_WORDS[kind]
    for at, turn in enumerate(turns):
        text = plain(turn.content).strip()
        count = len(_WORD.findall(text))
        if turn.role == USER:
            least, top = QUESTION_WORDS
            if not turn.content.strip():
                continue
            if not least <= count <= top and "](box:" not in turn.content:
                yield f"turn {at + 1} has {count} words: a question has {least} to {top}"
            elif _OPEN.search(text) or (_CUT.search(text) and not _END.search(text)):
                yield f"turn {at + 1} is cut off: {text[-40:]}"
            continue
        if not turn.content.strip():
            continue
        if len(turn.content) >= MAX_CHARS:
            yield f"turn {at + 1} has {MAX_CHARS} characters or more"
        if count < fewest and "](box:" not in turn.content:
            yield f"turn {at + 1} has {count} words: an answer of a {kind} has at least {fewest}"
        elif count > most:
            yield f"turn {at + 1} has {count} words: an answer of a {kind} has at most {most}"
        elif (
            not _END.search(text)
            and (count >= 8 or kind in ("detail", "complex") or _CUT.search(text) or text.endswith((",", ";", "-")))
        ) or (_END.search(text) and count > 3 and _OPEN.search(text)):
            yield f"turn {at + 1} is cut off: {text[-40:]}"
        if unbalanced := _unbalanced(text):
            yield f"turn {at + 1} leaves {unbalanced} open"


def _unbalanced(text: str) -> str | None:
    for opening, closing in ("()", "[]", "{}", "\u201c\u201d"):
        if text.count(opening) != text.count(closing):
            return opening
    quotes = text.count('"') - len(re.findall(r"\d\"", text))
    return '"' if quotes % 2 and text.count('"') % 2 else None


def token_faults(turns: Sequence[Turn]) -> Iterator[str]:
    """`Reason.CHECK_TOKENS`."""
    for at, turn in enumerate(turns):
        text = turn.content
        for pattern in (_TOKENS, _ROLE, _MARKUP, _HTML, _URL, _JSON):
            found = pattern.search(text)
            if found:
                yield f"turn {at + 1}: {found[0].strip()!r}"
                break
        else:
            if not text.isascii() or not text.isprintable():
                for character in text:
                    kind = unicodedata.category(character)
                    if (
                        kind[0] == "C" and character not in _KEPT_FORMATS and character != "\n"
                    ) or character == "\ufffd":
                        yield f"turn {at + 1}: character U+{ord(character):04X}"
                        break


def wording_faults(turns: Sequence[Turn], innocent: str) -> Iterator[str]:
    """`Reason.CHECK_WORDING`: words that tell that the writer did not see the picture. What the texts themselves say
    (`innocent`, in lower case) is no sign of it."""
    for at, turn in enumerate(turns):
        if turn.role == USER and not _WORDING_ASKED.search(turn.content):
            continue
        for found in _WORDING.finditer(plain(turn.content)):
            if found[0].lower() not in innocent:
                yield f"turn {at + 1}: {found[0]!r}"
                break


def refusal_faults(turns: Sequence[Turn]) -> Iterator[str]:
    """`Reason.CHECK_REFUSAL`."""
    for at, turn in enumerate(turns):
        if turn.role == ASSISTANT and (found := _REFUSAL.search(turn.content)):
            yield f"turn {at + 1}: {found[0]!r}"


def number_faults(turns: Sequence[Turn]) -> Iterator[str]:
    """`Reason.CHECK_NUMBERS`: coordinates, outside of mentions."""
    for at, turn in enumerate(turns):
        for found in _TUPLES.finditer(plain(turn.content)):
            if not _ENUMERATION.fullmatch(found[0].strip()):
                yield f"turn {at + 1}: {found[0].strip()!r}"
                break
