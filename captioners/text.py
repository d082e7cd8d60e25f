"""How a text is prepared before BLIP reads it."""

from __future__ import annotations

import re

MAX_WORDS = 30
"""Words of a caption that BLIP's training reads."""

_PUNCTUATION = re.compile(r"""[.!"()*#:;~]""")


def prepare_text(text: str, max_words: int = MAX_WORDS) -> str:
    """A text as BLIP's training and its filter read it: lower case, each of ``.!"()*#:;~`` a space, white space single,
    the first `max_words` words (BLIP, section 4 and the function ``pre_caption`` of its code).

    White space at both ends goes, too. Preparing a prepared text changes nothing. A text of punctuation alone becomes
    empty.
    """
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split()[:max_words])
