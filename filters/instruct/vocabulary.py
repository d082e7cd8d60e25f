"""The nouns of visible things: names, kinds, parts (``nouns.txt``) and what goes with them (``company.txt``).

A list made by hand: it holds which names a careful writer may use for a thing that a caption or a label names. See
docs/decisions/instruct_checks.md for what was weighed against it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources


@dataclass(frozen=True, slots=True)
class Name:
    """A word or phrase that names things."""

    concepts: frozenset[str]
    """What it may mean."""
    plural: bool
    """Whether it is a plural; false for a form that is both (``sheep``)."""
    both: bool
    """Whether singular and plural are the same."""
    homograph: bool
    """Whether it is a verb or adjective as well."""
    free: bool
    """Whether it names too much to be held against an answer."""


@dataclass(frozen=True, slots=True)
class Noun:
    """A name found in a sentence: tokens ``start`` to ``end``."""

    start: int
    end: int
    words: str
    name: Name
    before: tuple[str, ...] = ()
    """Up to four words before it, the nearest last."""


@dataclass
class Vocabulary:
    """Names and how the things that they name are related."""

    names: dict[str, Name] = field(default_factory=dict)
    """By tokens joined with spaces, singular and plural."""
    kinds: dict[str, frozenset[str]] = field(default_factory=dict)
    """Of each concept: itself and all that it is a kind of."""
    parts: dict[str, frozenset[str]] = field(default_factory=dict)
    """Of each concept: the concepts of its parts, those of what it is a kind of included."""
    company: dict[str, frozenset[str]] = field(default_factory=dict)
    """Of a word of a text: the concepts that come with it."""
    first: dict[str, int] = field(default_factory=dict)
    """Of the first word of a name: the most words that a name with it has."""

    def find(self, tokens: Sequence[str], more: dict[str, Name] | None = None) -> list[Noun]:
        """The names in a sentence, longest first, from left to right, not overlapping."""
        found: list[Noun] = []
        at, count, first = 0, len(tokens), self.first
        while at < count:
            longest = first.get(tokens[at], 4 if more else 0)
            for size in range(min(longest, count - at), 0, -1):
                words = tokens[at] if size == 1 else " ".join(tokens[at : at + size])
                name = (more and more.get(words)) or self.names.get(words)
                if name:
                    found.append(Noun(at, at + size, words, name, tuple(tokens[max(at - 4, 0) : at])))
                    at += size
                    break
            else:
                at += 1
        return found

    def of_label(self, label: str) -> tuple[frozenset[str], tuple[str, ...]]:
        """What a box's label names, and the words before its head noun; concepts are empty for an unknown noun."""
        words = label.lower().replace("_", " ").replace("-", " ").split()
        for start in range(len(words)):
            name = self.names.get(" ".join(words[start:]))
            if name:
                return name.concepts, tuple(words[:start])
        return frozenset(), tuple(words[:-1])


def plural(name: str) -> str:
    """The regular plural of a noun or of a phrase that ends in one."""
    if name.endswith(("s", "x", "z", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    if name.endswith(("ato", "cho", "ngo")):
        return name + "es"
    if name.endswith("man") and not name.endswith(("human", "german")):
        return name[:-2] + "en"
    if name.endswith("child"):
        return name + "ren"
    if name.endswith(("foot", "tooth", "goose")):
        return name.replace("oo", "ee")
    if name.endswith("person"):
        return name[:-6] + "people"
    return name + "s"


@functools.cache
def vocabulary() -> Vocabulary:
    """The vocabulary of this package; read once a process."""
    drafts: dict[str, tuple[set[str], bool, bool, bool, bool]] = {}
    parents: dict[str, set[str]] = {}
    own_parts: dict[str, list[str]] = {}

    def add(word: str, concept: str | None = None) -> str:
        marks = word[: len(word) - len(word.lstrip("~*"))]
        singular, _, irregular = word.lstrip("~*").partition("/")
        many = irregular or plural(singular)
        key = concept or singular
        for form, is_plural in {singular: False, many: True}.items() if singular != many else ((singular, False),):
            concepts, _, _, homograph, free = drafts.get(form, (set(), False, False, False, False))
            concepts.add(key)
            drafts[form] = (concepts, is_plural, singular == many, homograph or "~" in marks, free or "*" in marks)
        return singular

    stack: list[tuple[int, str]] = []
    for line in _lines("nouns.txt"):
        depth = len(line) - len(line.lstrip())
        names, _, parts = line.strip().partition(" + ")
        first, *others = (name.strip() for name in names.split(","))
        concept = add(first)
        for other in others:
            add(other, concept)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents.setdefault(concept, set()).update(name for _, name in stack[-1:])
        own_parts.setdefault(concept, []).extend(part.strip() for part in parts.split(",") if part.strip())
        stack.append((depth, concept))
    for listed in list(own_parts.values()):
        for part in listed:
            if part.lstrip("~*") not in drafts:
                parents.setdefault(add(part), set())

    book = Vocabulary()
    for form, (concepts, is_plural, both, homograph, free) in drafts.items():
        book.names[form] = Name(frozenset(concepts), is_plural, both, homograph, free)
        head, *rest = form.split()
        book.first[head] = max(book.first.get(head, 0), 1 + len(rest))

    def kinds(concept: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        above = {concept}
        for parent in parents.get(concept, ()):
            if parent not in seen:
                above |= kinds(parent, seen | {concept})
        return frozenset(above)

    for concept in parents:
        book.kinds[concept] = kinds(concept)
    for concept, above in book.kinds.items():
        listed = [part for kind in above for part in own_parts.get(kind, ())]
        book.parts[concept] = _concepts(book, listed)
    for line in _lines("company.txt"):
        words, _, names = line.partition(":")
        company = _concepts(book, [name.strip() for name in names.split(",")])
        for word in words.split(","):
            book.company[word.strip()] = book.company.get(word.strip(), frozenset()) | company
    return book


def _concepts(book: Vocabulary, names: Iterable[str]) -> frozenset[str]:
    found: set[str] = set()
    for name in names:
        plain = name.lstrip("~*").partition("/")[0]
        if plain in book.kinds:
            found.add(plain)
            continue
        known = book.names.get(plain)
        if known is None:
            raise ValueError(f"filters/instruct: {name!r} is no name of nouns.txt; add a line for it")
        found |= known.concepts
    return frozenset(found)


def _lines(name: str) -> list[str]:
    text = resources.files("filters.instruct").joinpath(name).read_text("utf-8")
    return [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
