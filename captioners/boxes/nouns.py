"""What to look for in an image: the things that its texts name.

A detector is prompted by nouns. They are found by a list of names of visible things (`filters.instruct.vocabulary`),
which knows plurals and words of two nouns, and, for names that no list has, by a rule: the last word of a run that
begins behind a determiner or number and ends before a word that no noun phrase goes on over. A part-of-speech tagger
finds more, but needs a model to be fetched and costs more than it gives here: a wrong noun costs the detector a query
that finds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from filters.instruct.vocabulary import Noun, Vocabulary, plural, vocabulary
from filters.instruct.words import CONJUNCTIONS, DETERMINERS, FUNCTION, NUMBERS, PREPOSITIONS, sentences

MAX_WORDS = 200
"""Words of a text that are read."""

_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "persons": "person", "children": "child",
              "feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse", "leaves": "leaf", "loaves": "loaf",
              "knives": "knife", "wolves": "wolf", "shelves": "shelf", "calves": "calf", "oxen": "ox"}  # fmt: skip
_NO_NOUN_ENDINGS = ("ing", "ly", "ed", "est", "ful", "ous", "ish", "less", "able")


@functools.cache
def _words(name: str) -> frozenset[str]:
    """A list of ``words.txt``: ``groups``, ``no things``, ``stuff`` or ``adjectives``."""
    lines = resources.files("captioners.boxes").joinpath("words.txt").read_text("utf-8").splitlines()
    start = lines.index(f"{name}:") + 1
    end = next((n for n, line in enumerate(lines) if n > start and line.endswith(":")), len(lines))
    return frozenset(word for line in lines[start:end] if not line.startswith("#") for word in line.split())


def nouns(texts: Iterable[str]) -> tuple[str, ...]:
    """The things that texts name, in the singular, lower case, each once, in the order of their first mention."""
    book = vocabulary()
    found: dict[str, None] = {}
    for text in texts:
        for sentence in sentences(" ".join(text.split()[:MAX_WORDS])):
            found.update(dict.fromkeys(_of_sentence(sentence, book)))
    return tuple(found)


def named(nouns: Iterable[str], labels: Sequence[str]) -> set[str]:
    """Those of the nouns that name things of these labels, or a kind of them: ``puppy`` for ``dog``, ``man`` for
    ``person``."""
    book = vocabulary()
    words = {_plain(label) for label in labels}
    concepts = frozenset[str]().union(*(book.of_label(label)[0] for label in labels))
    return {noun for noun in nouns if _plain(noun) in words or any(c in concepts for c in _kinds(noun, book))}


def _kinds(noun: str, book: Vocabulary) -> set[str]:
    return {kind for concept in book.of_label(noun)[0] for kind in book.kinds.get(concept, {concept})}


def _plain(label: str) -> str:
    return " ".join(label.lower().replace("_", " ").replace("-", " ").split())


def _of_sentence(tokens: list[str], book: Vocabulary) -> list[str]:
    known = {noun.start: noun for noun in book.find(tokens)}
    found = []
    at = 0
    while at < len(tokens):
        noun = known.get(at)
        if noun is not None:
            if _is_meant(tokens, noun, known, book):
                found.append(singular(noun.words))
            at = noun.end
        else:
            if _is_unknown_noun(tokens, at, known):
                found.append(singular(tokens[at]))
            at += 1
    return found


def _is_meant(tokens: list[str], noun: Noun, known: Mapping[int, Noun], book: Vocabulary) -> bool:
    """Whether a name stands for a thing to look for."""
    word, after = singular(noun.words), tokens[noun.end] if noun.end < len(tokens) else ""
    if noun.name.free or word in _words("no things") or (after == "of" and word in _words("groups")):
        return False
    if ({word} | {kind for concept in noun.name.concepts for kind in book.kinds[concept]}) & _words("stuff"):
        return False
    if noun.words in _words("adjectives"):
        return noun.end not in known  # "an orange bus"
    before = tokens[noun.start - 1] if noun.start else ","
    return not noun.name.homograph or after == "of" or _may_precede(before)


def _may_precede(word: str) -> bool:
    """Whether a noun, rather than a verb, is likely behind a word."""
    groups = (DETERMINERS, NUMBERS, PREPOSITIONS, CONJUNCTIONS, _words("adjectives"), (",",))
    return any(word in group for group in groups)


def _is_unknown_noun(tokens: list[str], at: int, known: Mapping[int, Noun]) -> bool:
    """Whether a word of no list ends a noun phrase that a determiner or number began."""
    word = tokens[at]
    if len(word) < 3 or not word.isalpha() or word in FUNCTION or word in NUMBERS or word in _words("adjectives"):
        return False
    if {word, singular(word)} & (_words("no things") | _words("groups") | _words("stuff")):
        return False
    after = tokens[at + 1] if at + 1 < len(tokens) else ""
    if word.endswith(_NO_NOUN_ENDINGS) or not (after == "" or after in FUNCTION or after.endswith("ing")):
        return False  # "a Honda motorcycle": what is meant comes later
    inside = {start for noun in known.values() for start in range(noun.start, noun.end)}
    for start in range(at - 1, max(-1, at - 4), -1):
        if start in inside:
            return False  # "a restaurant together": the phrase ended there
        if tokens[start] in DETERMINERS or tokens[start] in NUMBERS:
            return True
        if tokens[start] in FUNCTION:
            return False
    return False


@functools.lru_cache(maxsize=4096)
def singular(words: str) -> str:
    """The singular of a noun or of a phrase that ends in one; a singular stays as it is."""
    names = vocabulary().names
    first, _, head = words.rpartition(" ")
    if words in names and (not names[words].plural or names[words].both) and head not in _IRREGULAR:
        return words
    for one in _singulars(head):
        whole = f"{first} {one}".strip()
        if (plural(one) == head or head in _IRREGULAR) and (words not in names or whole in names):
            return whole
    return words


def _singulars(word: str) -> list[str]:
    """What a word may be the plural of."""
    if word in _IRREGULAR:
        return [_IRREGULAR[word]]
    if word.endswith("men"):
        return [word[:-2] + "an"]
    if not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return []
    if word.endswith("ies"):
        return [word[:-3] + "y", word[:-1]]
    if word.endswith(("sses", "shes", "ches", "xes", "zes", "oes")):
        return [word[:-2], word[:-1]]
    return [word[:-1], word[:-2]] if word.endswith("es") else [word[:-1]]
