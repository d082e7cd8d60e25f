from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.text_rules import TextStats, count_words, normalise, repetition
from filters.threshold import text_verdicts
from pairmill.stage import ErrorBudget, Kernel, apply
from schemas.config import Keep
from schemas.reasons import Reason
from tests.filters.rows import texts_batch


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return TextStats().open()


def measure(kernel: Kernel, texts: list[str | None]) -> pa.Table:
    return apply(TextStats(), kernel, texts_batch(texts), ErrorBudget())


def reasons(table: pa.Table, keep: Keep) -> list[str | None]:
    """The first reason of each row."""
    first: list[str | None] = [None] * table.num_rows
    for verdict in text_verdicts(keep):
        said = verdict.judge(table).reason.to_pylist()
        first = [old or new for old, new in zip(first, said, strict=True)]
    return first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red car", 3),
        ("Red  -  car | blue", 3),
        ("t-shirt with logo", 3),
        ("blue-mosque-istanbul-turkey", 4),
        ("old_barn_door.jpg", 3),
        ("villa-in-the-hills (9)", 5),
        ("", 0),
        ("— !!", 0),
        ("红色汽车在路上", 4),
        ("赤い車 photo", 3),
        ("รถยนต์สีแดง", 3),
        ("красная машина", 2),
    ],
)
def test_words_are_counted_in_every_script(text: str, words: int) -> None:
    assert count_words(text) == words


def test_normalised_text_is_what_a_reader_sees() -> None:
    assert normalise("  caf&eacute;\u200b \t\n au\u00a0lait\u202e \x00") == "café au lait"


@given(st.text())
def test_normalising_twice_changes_nothing_more_than_entities(text: str) -> None:
    once = normalise(text.replace("&", ""))
    assert normalise(once) == once
    assert once == once.strip()


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("a red car on a street", 0.0, 0.2),
        ("hat hat hat hat", 0.75, 0.75),
        ("hat red hat blue hat", 0.4, 0.5),
        ("aaaaaaaaaaaaaaaaaaaaaaaa", 0.9, 1.0),
        ("sofa sale, sofa sale, sofa sale, sofa sale", 0.7, 1.0),
        ("美女美女美女美女", 0.7, 1.0),
        ("", 0.0, 0.0),
        ("A very hungry caterpillar, first edition, in a very good condition for a first edition", 0.2, 0.5),
    ],
)
def test_repetition_is_the_share_that_repeats(text: str, low: float, high: float) -> None:
    assert low <= repetition(text) <= high


@given(st.text(max_size=80), st.integers(2, 4))
def test_repeating_a_text_never_lowers_its_repetition(text: str, times: int) -> None:
    once = " ".join(text.split())
    assert 0 <= repetition(once) <= 1
    assert repetition(" ".join([once] * times)) >= repetition(once) - 1e-9


def test_null_and_blank_texts_are_measured_and_empty(kernel: Kernel) -> None:
    table = measure(kernel, [None, "", "  \n", "12 345"])
    assert table["words"].to_pylist() == [0, 0, 0, 2]
    assert table["chars"].to_pylist() == [0, 0, 0, 6]
    assert table["language"].to_pylist() == [None] * 4
    assert reasons(table, Keep())[:3] == [Reason.TEXT_EMPTY] * 3


def test_each_rule_gives_its_reason(kernel: Kernel) -> None:
    texts = {
        "A red car parked on a street in Boston": None,
        "blue-mosque-istanbul-turkey": None,
        "IMG_2034.jpg": Reason.TEXT_BOILERPLATE,
        "Lake Tahoe": Reason.TEXT_TOO_FEW_WORDS,
        "a b c": Reason.TEXT_TOO_FEW_CHARS,
        "word " + "wide world of sports " * 60: Reason.TEXT_TOO_MANY_CHARS,
        "sofa sale sofa sale sofa sale sofa sale": Reason.TEXT_REPETITION,
        "Das alte Segelboot liegt auf dem See vor der Stadt": Reason.TEXT_LANGUAGE,
        "Красная машина стоит на улице": Reason.TEXT_LANGUAGE,
    }
    assert reasons(measure(kernel, list(texts)), Keep()) == list(texts.values())


def test_rules_set_to_null_are_off(kernel: Kernel) -> None:
    keep = Keep(
        min_words=None,
        min_chars=None,
        max_chars=None,
        max_repetition=None,
        language=None,
        boilerplate=True,
    )
    assert reasons(measure(kernel, ["IMG_2034.jpg", "das Boot", "a a a a a"]), keep) == [None] * 3


@given(st.lists(st.one_of(st.none(), st.text(max_size=40)), min_size=1, max_size=12), st.data())
def test_measures_depend_on_neither_batch_nor_order(texts: list[str | None], data: st.DataObject) -> None:
    kernel = _shared_kernel()
    order = data.draw(st.permutations(range(len(texts))))
    whole = measure(kernel, texts).drop(["uid"]).to_pylist()
    shuffled = measure(kernel, [texts[i] for i in order]).drop(["uid"]).to_pylist()
    alone = [measure(kernel, [text]).drop(["uid"]).to_pylist()[0] for text in texts]
    assert [whole[i] for i in order] == shuffled
    assert whole == alone


_KERNELS: list[Kernel] = []


def _shared_kernel() -> Kernel:
    if not _KERNELS:
        _KERNELS.append(TextStats().open())
    return _KERNELS[0]


def test_a_huge_text_is_measured_quickly(kernel: Kernel) -> None:
    table = measure(kernel, ["spam and eggs " * 100_000])
    assert table["chars"].to_pylist() == [1_399_999]
