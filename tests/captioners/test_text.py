from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioners.text import prepare_text


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("A Red Circle.", "a red circle"),
        ('"Best (cheap) shoes!" #sale; 50%', "best cheap shoes sale 50%"),
        ("  two\n\tlines ~ here: it's ", "two lines here it's"),
        ("...", ""),
        ("", ""),
    ],
)
def test_examples(text: str, prepared: str) -> None:
    assert prepare_text(text) == prepared


def test_only_the_first_words_are_read() -> None:
    words = [f"w{n}" for n in range(40)]
    assert prepare_text(" ".join(words)) == " ".join(words[:30])
    assert prepare_text(" ".join(words), 3) == "w0 w1 w2"


@given(st.text(alphabet=st.characters(codec="utf-8")), st.integers(1, 40))
def test_it_is_idempotent_and_bounded(text: str, words: int) -> None:
    prepared = prepare_text(text, words)
    assert prepare_text(prepared, words) == prepared
    assert len(prepared.split()) <= words
    assert not set(prepared) & set('.!"()*#:;~\n\t')
