"""Text that comes from the web or from secrets, made fit to be shown."""

from __future__ import annotations

import re

_URL = re.compile(r"\b([a-zA-Z][a-zA-Z0-9+.-]*)://([^\s\"'<>]+)")


def visible(text: str) -> str:
    """The text with everything that could act on a terminal or reorder the line (control, bidi, surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_secrets(text: str) -> str:
    """The text with user info, query and fragment taken out of every URL in it: keys and signatures live there."""
    return _URL.sub(_strip, text)


def _strip(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    address, mark, _ = rest.partition("?")
    address, _, _ = address.partition("#")
    authority, slash, path = address.partition("/")
    authority = authority.rpartition("@")[2]
    return f"{scheme}://{authority}{slash}{path}" + ("?..." if mark else "")


def shorten(text: str, width: int) -> str:
    """At most `width` characters; what is cut off shows as an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"
