"""How facts are put into words: templates, and the choice among them.

Every question and every answer has several wordings. Which one is taken follows from the seed, the image and the kind
alone (`Choices`), so a conversation is the same in every run. Statements are kept to patterns that can be read back:
"X is to the left of Y", "There are three X", "The X is red". In a template ``{the}`` is a thing with its article,
``{The}`` the same at a sentence's start, ``{is}`` its verb; the other fields say what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from captioners.instruct.offline.nouns import NUMBER_WORDS

T = TypeVar("T")


class Choices:
    """A sequence of choices that follows from its key alone, on every machine and Python."""

    def __init__(self, *key: object) -> None:
        digest = hashlib.blake2b("\n".join(map(str, key)).encode("utf-8", "replace"), digest_size=8).digest()
        self._state = int.from_bytes(digest, "big")

    def below(self, number: int) -> int:
        """One of 0 to `number` - 1."""
        # Knuth's MMIX generator (The Art of Computer Programming 2, 3.3.4); its upper bits are the good ones.
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        return (self._state >> 33) % number

    def of(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All of them, in some order."""
        left = list(options)
        for last in range(len(left) - 1, 0, -1):
            other = self.below(last + 1)
            left[last], left[other] = left[other], left[last]
        return left


def number(count: int) -> str:
    """``three``, ``15``."""
    return NUMBER_WORDS.get(count, str(count))


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def capital(words: str) -> str:
    """With its first letter upper case, behind the bracket of a mention, too."""
    start = 1 if words.startswith("[") else 0
    return words[:start] + words[start : start + 1].upper() + words[start + 1 :]


SHOWS = ("The picture shows", "This picture shows", "This image shows", "The image shows")

SCENE = (
    "What does this picture show?",
    "What is going on in this picture?",
    "What can be seen in the picture?",
    "What do you see here?",
    "What is happening in this image?",
    "Can you tell me what is in the picture?",
    "What is in this image?",
    "Say in one sentence what the picture shows.",
    "Sum up this picture in a sentence.",
    "What is the picture about?",
)
MORE_SCENE = (
    "What else can you say about the picture?",
    "Is there anything else to say about the scene?",
    "Can you put that another way?",
    "Can you add anything about the scene?",
)
COUNT = (
    "How many {many} are there in the picture?",
    "How many {many} can be seen?",
    "How many {many} do you see?",
    "How many {many} are in this picture?",
    "Can you count the {many}?",
    "What is the number of {many} in this picture?",
)
COUNTED = (
    "There are {number} {many}.",
    "There are {number} {many} in the picture.",
    "{Number} {many} can be seen.",
    "I count {number} {many}.",
    "I see {number} {many}.",
    "{Number}.",
)
COLOR = (
    "What color {is} {the}?",
    "What is the color of {the}?",
    "Which color {does} {the} have?",
    "Tell me the color of {the}.",
)
COLORED = ("{The} {is} {color}.", "{It} {is} {color}.", "{Color}.", "The color of {the} is {color}.")
MATERIAL = ("What is {the} made from?", "Of what material is {the}?", "What is {the} made of, do you think?")
MADE = ("{The} is made of {material}.", "It is made of {material}.")
DOING = (
    "What {is} {the} doing?",
    "Can you tell me what {the} {is} doing?",
    "What do you see {the} doing?",
    "Describe what {the} {is} doing.",
)
DEEDS = {
    "holding": ("What {is} {the} holding?", "What does {the} have in hand?"),
    "wearing": ("What {is} {the} wearing?", "How {is} {the} dressed?"),
    "eating": ("What {is} {the} eating?",),
    "riding": ("What {is} {the} riding?", "What {is} {the} doing?"),
    "looking": ("Where {is} {the} looking?",),
    "sitting": ("Where {is} {the} sitting?", "What {is} {the} doing?"),
    "standing": ("Where {is} {the} standing?", "What {is} {the} doing?"),
    "laying": ("Where {is} {the} lying?",),
    "lying": ("Where {is} {the} lying?",),
}
"""Questions by the verb of the answer."""
WHERE = ("Where {is} {the}?", "Where can {the} be found?", "Where exactly {is} {the}?")
SIDE = (
    "In which part of the picture {is} {the}?",
    "Where in the picture {is} {the}?",
    "Whereabouts {is} {the}?",
    "Where would you look for {the} in the picture?",
)
RELATION = ("Where {is} {the} in relation to {other}?", "How {is} {the} placed relative to {other}?")
BESIDE = (*RELATION, "On which side of {other} {is} {the}?")
LEFTMOST = ("Which is further left, {the} or {other}?", "Which of the two is on the left, {the} or {other}?")
RIGHTMOST = ("Which is further right, {the} or {other}?", "Which of the two is on the right, {the} or {other}?")
HIGHER = ("Which is higher up in the picture, {the} or {other}?", "What is higher in the picture, {the} or {other}?")
LARGER = (
    "Which takes up more of the picture, {the} or {other}?",
    "Which looks larger in this picture, {the} or {other}?",
    "What is larger in the picture, {the} or {other}?",
)
MORE = (
    "Are there more {many} or more {others}?",
    "Which are there more of, {many} or {others}?",
    "What is more numerous here, {many} or {others}?",
)
PRESENT = (
    "Is there {a} in the picture?",
    "Can you see {a}?",
    "Is there {a} here?",
    "Does the picture show {a}?",
    "Do you see {a} in this image?",
    "Is {a} visible?",
    "Is there {a} anywhere in this image?",
)
PRESENT_MANY = (
    "Are there any {many} in the picture?",
    "Can you see any {many}?",
    "Does the picture show any {many}?",
    "Are any {many} visible?",
)
PLACE = ("What kind of place do you see?", "What sort of place does the picture show?", "What place is shown here?")
DETAIL = (
    "Please describe this picture in detail.",
    "Describe what you see as fully as you can.",
    "Give a detailed account of the picture.",
    "What does this picture show? Please be thorough.",
    "Walk me through this image.",
    "Describe the scene and where things are in it.",
    "Can you describe the image in detail?",
    "Tell me everything that you can make out in this picture.",
    "Write a full account of what this image shows.",
    "What is in this picture, and where? Go into detail.",
    "Describe the image to me as if I could not see it.",
    "I would like a long description of this picture.",
)
