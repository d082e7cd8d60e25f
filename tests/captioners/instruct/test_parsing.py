"""What is read from a model's answer: leniently where that does no harm, and else not at all."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioners.instruct import parsing
from captioners.instruct.parsing import Parsed, parse, render
from pairmill.boxes import Box
from pairmill.instructions import Finding, Mention, Turn, parts

TOLD = tuple(Box(name, n, n, n + 5, n + 5) for n, name in enumerate(("tree", "dog", "cat", "cup")))
PAIR = [{"question": "What is there?", "answer": "A dog."}]
ONE = json.dumps(PAIR)
TWO = json.dumps([*PAIR, {"question": "Where is it?", "answer": 'It is on a "red" sofa.'}], indent=1)


def said(answer: str, kind="conversation", **more) -> list[str]:
    read = parse(answer, kind, TOLD, **more)
    assert isinstance(read, Parsed), read
    assert [turn.role for turn in read.turns] == ["user", "assistant"] * (len(read.turns) // 2)
    return [turn.content for turn in read.turns]


def wrong(answer: str, kind="conversation") -> str:
    read = parse(answer, kind, TOLD, "Describe it.")
    assert isinstance(read, Finding), read
    assert read.detail and len(read.detail) < 300 and read.detail.isprintable()
    return read.reason


# -- questions and answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        ONE,
        f"```json\n{ONE}\n```",
        f"```\n{ONE}\n```\n",
        f"Here is the conversation:\n\n{ONE}",
        f"Sure! Here it is:\n```json\n{ONE}\n```",
        f"<think>\nA [dog], so {{\n</think>\n{ONE}",
        f"<thinking>so</thinking>{ONE}",
        ONE.replace('"', "\u201c", 1).replace('"', "\u201d"),
        "[{\u201cquestion\u201d: \u201cWhat is there?\u201d, \u201canswer\u201d: \u201cA dog.\u201d}]",
        '[{"question": "What is there?", "answer": "A dog.",},]',
        '[{"Question": "What is there?", "ANSWER": "A dog.", "type": "object"}]',
        '[{"question": "What is\nthere?", "answer": "A\tdog.\u202e"}]',
        f'{{"conversation": {ONE}}}',
        json.dumps(PAIR[0]),
        '[{"role": "user", "content": "What is there?"}, {"role": "assistant", "content": "A dog."}]',
        '[{"from": "human", "value": "What is there?"}, {"from": "gpt", "value": "A dog."}]',
        "Question: What is there?\nAnswer: A dog.",
        "**Question 1:** What is there?\n\n**Answer 1:** A\ndog.\n",
        "Question:\nWhat is there?\n===\nAnswer:\nA dog.\n===",
        "Q: What is there?\nA: A dog.",
    ],
)
def test_harmless_ways_to_say_it(answer: str):
    assert said(answer) == ["What is there?", "A dog."]
    assert said(answer, "complex") == ["What is there?", "A dog."]


def test_several_pairs_and_quotation_marks():
    assert said(TWO) == ["What is there?", "A dog.", "Where is it?", 'It is on a "red" sofa.']
    assert said('[{"question": "It\u2019s what, [a, ]?", "answer": "A \u201cbig\u201d dog",}]') == [
        "It's what, [a, ]?",
        'A "big" dog',
    ]
    assert said("Q1: What?\nA1: A dog.\n\nQ2: Where?\nA2: There.") == ["What?", "A dog.", "Where?", "There."]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "writer.empty"),
        (" \n\u200b", "writer.empty"),
        ("<think>hm</think>", "writer.empty"),
        ("<think>hm [", "writer.cut_off"),
        ("A dog on a sofa.", "writer.malformed"),
        ("I'm sorry, I cannot see the picture.", "writer.refused"),
        (ONE[:-1], "writer.cut_off"),
        (ONE[:-5], "writer.cut_off"),
        (TWO[: len(ONE) + 20], "writer.cut_off"),
        (ONE + "\n\nLet me know if you need more!", "writer.malformed"),
        (ONE + ONE, "writer.malformed"),
        (f"```json\n{ONE}\n```\nI hope this helps.", "writer.malformed"),
        (f"As I said: {'x' * 300}:\n{ONE}", "writer.malformed"),
        ('[{"question": "What does "stop" say?", "answer": "A dog."}]', "writer.malformed"),
        ('[{"question": "What?", "answer": "A dog.", "answer": "A cat."}]', "writer.malformed"),
        ("[]", "check.turns"),
        ("{}", "check.turns"),
        ("[1, 2]", "writer.malformed"),
        ('[{"question": ["a"], "answer": "b"}]', "writer.malformed"),
        ('[{"question": "What?"}]', "check.turns"),
        ('[{"answer": "A dog."}]', "check.turns"),
        ('[{"question": "What?", "answer": "\u200b "}]', "check.turns"),
        ('[{"question": "", "answer": "A dog."}]', "check.turns"),
        ('[{"role": "user", "content": "What?"}]', "check.turns"),
        ('[{"role": "assistant", "content": "A dog."}, {"role": "user", "content": "What?"}]', "check.turns"),
        ('[{"role": "system", "content": "Be good."}, {"role": "assistant", "content": "Yes."}]', "check.turns"),
        ('[{"role": "user"}, {"role": "assistant", "content": "A dog."}]', "writer.malformed"),
        ("Question: What?\nQuestion: Where?\nAnswer: There.", "check.turns"),
        ("Question: What?\nAnswer: A dog.\nQuestion: Where?", "check.turns"),
        ("Question: What?\nAnswer:\nQuestion: Where?\nAnswer: There.", "check.turns"),
        ("Question: What?\nAnswer: A dog.\n\nI hope this helps!", "writer.malformed"),
        (json.dumps(PAIR * 31), "check.turns"),
        ("[" * 100_000, "writer.cut_off"),
        (f'[{{"question": "a", "answer": {"9" * 5000}}}]', "writer.malformed"),
    ],
)
def test_what_is_not_taken(answer: str, reason: str):
    assert wrong(answer) == reason


def test_complex_is_one_question():
    assert wrong(TWO, "complex") == "check.turns"


clean_line = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=40).map(parsing.line).filter(bool)


@given(
    st.lists(st.tuples(clean_line, clean_line), min_size=1, max_size=5), st.sampled_from(("conversation", "complex"))
)
def test_turns_are_read_as_they_were_written(pairs: list[tuple[str, str]], kind):
    pairs = pairs[:1] if kind == "complex" else pairs
    turns = tuple(turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a)))
    if any(isinstance(part, Mention) for turn in turns for part in parts(turn.content)):
        return
    answer = render(turns, kind)
    for written in (answer, f"```json\n{answer}\n```", answer.replace("}", ",}") if "}" not in str(pairs) else answer):
        assert parse(written, kind) == Parsed(turns)


@given(st.lists(st.tuples(clean_line, clean_line), min_size=1, max_size=3), st.data())
def test_no_part_of_an_answer_is_taken_for_the_whole(pairs: list[tuple[str, str]], data):
    answer = render([turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a))], "conversation")
    cut = data.draw(st.integers(0, len(answer) - 1))
    assert isinstance(parse(answer[:cut], "conversation"), Finding)


@given(
    st.text(st.one_of(st.sampled_from('[]{}",:\\`<>/*#=\n()'), st.sampled_from("questionaswerbox 012")), max_size=80)
)
def test_any_text_is_read_or_refused(text: str):
    for kind in ("conversation", "detail", "complex", "grounding"):
        read = parse(text, kind, TOLD, "Describe it.")
        if isinstance(read, Parsed):
            assert read.turns and len(read.turns) % 2 == 0 and all(turn.content for turn in read.turns)
            assert {n for t in read.turns for p in parts(t.content) if isinstance(p, Mention) for n in p.boxes} == set(
                range(len(read.boxes))
            )


@pytest.mark.parametrize(
    "unit", ["[x](box:1", "[x](box:" + "1" * 40, "**a", "Q:", "```\n", '"\\', "{[", "[a](box 1,2 and ", "<think>"]
)
@pytest.mark.parametrize("kind", ["detail", "grounding"])
def test_no_answer_takes_long(unit: str, kind):
    began = time.monotonic()
    parse((unit * 20_000)[:40_000], kind, TOLD)
    parse(json.dumps([{"question": (unit * 20_000)[:40_000], "answer": "A dog."}]), kind, TOLD)
    assert time.monotonic() - began < 3


# -- boxes ------------------------------------------------------------------------------------------------------------


def grounded(*contents: str) -> str:
    return json.dumps([{"question": q, "answer": a} for q, a in zip(contents[::2], contents[1::2], strict=True)])


def test_mentioned_boxes_are_numbered_anew():
    read = parse(
        grounded("What is [](box:3)?", "A cup, near [the dog](box:1).", "Who?", "[Both pets](box:2, 1)"),
        "grounding",
        TOLD,
    )
    assert isinstance(read, Parsed)
    assert [turn.content for turn in read.turns] == [
        "What is [](box:0)?",
        "A cup, near [the dog](box:1).",
        "Who?",
        "[Both pets](box:2,1)",
    ]
    assert read.boxes == (TOLD[3], TOLD[1], TOLD[2])


@pytest.mark.parametrize("mention", ["(box 1)", "(Box: 1)", "(boxes:1)", "(box:01)", "(box:1,1)", " (box=1)"])
def test_mentions_that_are_almost_right(mention: str):
    assert said(grounded("Where?", f"[The dog]{mention} is here."), "grounding")[1] == "[The dog](box:0) is here."


def test_mentions_of_several():
    for numbers in ("1,2", "1, 2", "1 and 2", "1, box 2", "1 & box:2"):
        answer = grounded("Where?", f"[Two pets](box:{numbers}) are here.")
        assert said(answer, "grounding")[1] == "[Two pets](box:0,1) are here."


@pytest.mark.parametrize(
    "content",
    [
        "[The cow](box:4) is here.",
        "[The cow](box:9999) is here.",
        "The dog is here.",
        "[The dog](box:1) is left of box 2.",
        "[The dog](box:1) is left of the cat (box:2).",
        "[The dog](box:1) is left of [the cat].",
        "[The dog](box:1) and [the cat](2)",
        "[The dog](box:1) and [the [big] cat](box:2)",
        "[The dog](box:99999) and [the cat](box:2)",
    ],
)
def test_mentions_that_mean_no_box(content: str):
    assert wrong(grounded("Where is it?", content), "grounding") == "check.boxes"


@pytest.mark.parametrize("kind", ["conversation", "detail", "complex"])
def test_only_grounding_mentions_boxes(kind):
    text = "There is [a dog](box:0)."
    assert wrong(text if kind == "detail" else grounded("What?", text), kind) == "check.boxes"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "the dog", 'Two "big" cups']), st.lists(st.integers(0, 3), min_size=1, unique=True)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_mentions_keep_their_boxes(mentions: list[tuple[str, list[int]]]):
    content = " then ".join(str(Mention(phrase, tuple(boxes))) for phrase, boxes in mentions)
    read = parse(render([Turn("user", "Where?"), Turn("assistant", content)], "grounding"), "grounding", TOLD)
    assert isinstance(read, Parsed)
    found = [part for part in parts(read.turns[1].content) if isinstance(part, Mention)]
    assert [(m.phrase, [read.boxes[n] for n in m.boxes]) for m in found] == [
        (phrase, [TOLD[n] for n in boxes]) for phrase, boxes in mentions
    ]
    first = list(dict.fromkeys(n for m in found for n in m.boxes))
    assert first == list(range(len(read.boxes)))


# -- descriptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A dog lies on a sofa.", "A dog lies on a sofa."),
        ("```\nA dog\nlies on a sofa.\n```", "A dog lies on a sofa."),
        ("<think>hm</think>Description: A **dog**.\n\n\nA\u202e cat\u2019s bed.", "A dog.\n\nA cat's bed."),
        ("Here is a description of it:\n\nA dog.", "A dog."),
        ("A sign reads 'Q: who?' in 3. Street.", "A sign reads 'Q: who?' in 3. Street."),
    ],
)
def test_descriptions(answer: str, expected: str):
    assert said(answer, "detail", question="Describe it.") == ["Describe it.", expected]


@pytest.mark.parametrize(
    "answer",
    [
        ONE,
        json.dumps({"description": "A dog."}),
        ONE[:-3],
        "# A dog\n\nIt lies there.",
        "There is:\n- a dog\n- a cat",
        "1. A dog.\n2. A cat.",
        "A dog.\n\nLet me know if you need more.",
        "A dog. Would you like me to go on?",
        "Question: What?\nAnswer: A dog.",
    ],
)
def test_descriptions_that_are_not_taken(answer: str):
    assert wrong(answer, "detail") == "writer.malformed"


def test_empty_descriptions():
    assert wrong("Description: ", "detail") == wrong("```\n\n```", "detail") == "writer.empty"
