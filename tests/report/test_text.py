"""Text of strangers and text with secrets, made fit to be shown."""

from __future__ import annotations

import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from pairmill.report.text import shorten, visible, without_secrets

HARMFUL = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text())
@example("\x1b]0;owned\x07\x1b[2J")
@example("abc\u202egnp.exe")
@example("\ud800")
def test_nothing_visible_acts_on_a_terminal_or_turns_a_line(text: str):
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown} & HARMFUL
    if text.isprintable():
        assert shown == text


def test_secrets_leave_urls_and_the_rest_stays():
    text = "GET https://ann:pw@host.example:8443/a/b.jpg?X-Signature=abc&k=1#f failed; s3://KEY:SECRET@bucket/x"
    assert without_secrets(text) == "GET https://host.example:8443/a/b.jpg?... failed; s3://bucket/x"


def test_secrets_with_an_at_sign_or_without_a_path_leave_too():
    assert without_secrets("http://a:p@ss@host") == "http://host"
    assert without_secrets("http://host?token=1") == "http://host?..."
    assert without_secrets("at 12:30 // no url ? here") == "at 12:30 // no url ? here"


@given(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.from_regex(r"[A-Za-z0-9]{12}", fullmatch=True))
def test_no_user_info_or_query_survives(host: str, secret: str):
    assert secret not in without_secrets(f"see 'https://u:{secret}@{host}.example/p?sig={secret}#{secret}' now")


@given(st.text(), st.integers(1, 50))
def test_shortened_text_is_no_longer_than_asked(text: str, width: int):
    short = shorten(text, width)
    assert len(short) <= width
    assert short == text or short.endswith("…")
