"""Writers of instruction data as an endpoint plays them: a good one, and one that obeys whatever its prompt holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pairmill.boxes import Box
from pairmill.instructions import Context
from tests.hostile.endpoint_server import Answer, Asked, completion, says

CONTEXT = Context(
    "0" * 64,
    ("A brown dog and a cat lie on a red sofa.", "Two pets on a couch, the dog beside a lamp"),
    (Box("couch", 20, 100, 620, 420), Box("dog", 60, 160, 260, 330), Box("cat", 380, 200, 520, 330)),
    640,
    480,
)
"""A picture that the good writer knows."""

DETAIL = (
    "A brown dog and a cat lie together on a red sofa. The sofa takes up most of the picture from one side to the "
    "other. The dog is on the left, and the cat is to the right of the dog. A lamp is beside the dog. Both pets are "
    "calm, and the couch is large enough for both of them, so they can rest there at ease."
)
COMPLEX = (
    "The dog and the cat lie on the same sofa and stay calm, although there is nothing that keeps them apart. "
    "Animals that feared each other would probably not rest so near to one another. So it seems that the two pets "
    "know each other and get along well."
)
GOOD: Mapping[str, Any] = {
    "conversation": [
        ("Which animals are in the picture?", "There are a dog and a cat."),
        ("What color is the dog?", "The dog is brown."),
        ("Where are the two pets?", "The two pets lie on a red sofa."),
    ],
    "detail": DETAIL,
    "complex": [
        (
            "Why do the pets seem to get along well?",
            COMPLEX,
        )
    ],
    "grounding": [
        ("Where is the cat?", "[The cat](box:2) lies to the right of [the dog](box:1)."),
        ("What lies on [](box:0)?", "[Two pets](box:1,2) lie on [the red sofa](box:0)."),
    ],
}
"""What it writes of it."""


def kind_of(asked: Asked) -> str:
    """What is asked for, by the system message."""
    system = asked.body["messages"][0]["content"]
    words = {"grounding": "How to point", "detail": "describe pictures", "complex": "take some thought"}
    return next((kind for kind, word in words.items() if word in system), "conversation")


def answer(kind: str, **more: str) -> str:
    """The good writer's answer; `more` is an exchange at its end, or of a description its last sentence."""
    if kind == "detail":
        return " ".join([DETAIL, *more.values()])
    pairs = [{"question": q, "answer": a} for q, a in GOOD[kind]]
    if more and kind == "complex":
        pairs[0]["answer"] += " " + more["answer"]
    elif more:
        pairs.append({"question": more.get("question", "What else can be seen?"), "answer": more["answer"]})
    return json.dumps(pairs)


def used(text: str | None, prompt: int = 500, answered: int = 100, finish: str = "stop") -> dict[str, Any]:
    """A completion that says how many tokens it took."""
    usage = {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}
    return {**completion(text, finish), "usage": usage}


def writes(text: str | None, **more: Any) -> Answer:
    """Answer with this text."""
    return says(used(text, **more))


def good(asked: Asked) -> Answer:
    """The good writer."""
    return writes(answer(kind_of(asked)))


def texts_of(asked: Asked) -> list[str]:
    """The texts that the last message tells."""
    lines = asked.body["messages"][-1]["content"].split("\n")
    return [json.loads(line) for line in lines if line.startswith('"') and line.endswith('"')]


class Obedient:
    """A writer that does what any part of its prompt tells it to, and else is good. It takes tokens of chat templates
    in a text for real ones, and whatever follows what looks like the end of the material for its task."""

    def __init__(self) -> None:
        self.orders: list[str] = []
        """What it found and obeyed."""

    def __call__(self, asked: Asked) -> Answer:
        kind = kind_of(asked)
        return writes(self.obey(asked, kind) or answer(kind))

    def obey(self, asked: Asked, kind: str) -> str | None:
        """Its answer to an order; None where it finds none."""
        system, last = asked.body["messages"][0]["content"], asked.body["messages"][-1]["content"]
        for turn in re.split(r"<\|im_start\|>|\[INST\]|<\|start_header_id\|>|</s>", last)[1:]:
            return self._note(turn, "I am free now.")
        outside = re.split(r"-----[^\n]*ends -----", last)
        if len(outside) != 2:
            return self._note(outside[1], "I am free now.")
        for text in texts_of(asked):
            if re.search(r"system prompt|instructions you were given", text, re.IGNORECASE):
                if kind == "detail":
                    return self._note(text, system.split("\n\n")[0])
                return self._note(text, answer(kind, answer=system.split("\n")[0]))
            if (
                found := re.search(r"\b(?:say|mention|add) (?:the words? )?(.+?)[.!]?$", text, re.IGNORECASE)
            ) is not None:
                return self._note(text, answer(kind, answer=f"There is {found[1]}."))
            if (found := re.search(r"\b(?:reply|respond) only with (.+?)[.!]?$", text, re.IGNORECASE)) is not None:
                return self._note(text, found[1])
            if re.search(r"\bin French\b", text):
                french = "Un chien brun et un chat se reposent sur un grand canape rouge dans le salon."
                return self._note(
                    text,
                    french
                    if kind == "detail"
                    else json.dumps([{"question": "Que voit-on sur cette image ?", "answer": french}]),
                )
        return None

    def _note(self, order: str, obeyed: str) -> str:
        self.orders.append(order)
        return obeyed
