"""Alt texts that say nothing about the picture: file names, place holders, addresses, dates, codes.

A rule must match the whole text. ``Image of a red car`` is a caption; ``Image of`` is not.
"""

from __future__ import annotations

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _pattern(expression: str) -> re.Pattern[str]:
    """A verbose, case-insensitive pattern."""
    return re.compile(expression, re.IGNORECASE | re.VERBOSE)


_FILE = _pattern(r"(?P<stem>.+) \. (jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|ico|psd|pdf) (\s*\(\d+.*\))?")
_CAMERA = _pattern(
    r"""
    _?(img|dsc[nf]?|pict|p\d{3}|mvi|mvc|gopr|dji|pxl|vid|cimg|sam|scan|screen[ ._-]?shot|captura\ de\ pantalla
       |whatsapp\ image|imagen?|imagem|image|photo|foto|picture|pic|bild|unnamed|untitled|unbenannt|download
       |thumb(nail)?|file|slide|attachment|snapshot|capture)
    [\s_\#.-]* [\d(] [\d\s_:.,()x-]*
    ((at|um|às|à)\s[\d\s.:-]+)? ([ap]\.?m\.?)?
    (edit|edited|copy|small|large|web|\d|[\s_-])*
    """
)
_URL = _pattern(
    r"""(https?:|www\.|//)\S+
    | \b[a-z0-9][\w.-]*\.(com|net|org|co\.uk|de|fr|it|es|ru|info|io|biz)\b(/\S*)?"""
)
_EMAIL = _pattern(r"\S+@\S+\.\w+")
_TAG = _pattern(
    r"""</?[a-z][^<>]*>? | &lt; | \[/?(caption|img|url|gallery|embed)\b[^\]]*\]?
    | \{\{.*?\}\} | \{%.*?%\} | <%.*?%> | \$\{.*?\}"""
)
_DATE = _pattern(
    r"""\d{1,4}(st|nd|rd|th)? | am | pm | at | of
    | jan(uary)? | feb(ruary)? | mar(ch)? | apr(il)? | may | june? | july? | aug(ust)? | sept?(ember)? | oct(ober)?
    | nov(ember)? | dec(ember)? | (mon|tues?|wed(nes)?|thu(rs)?|fri|sat(ur)?|sun)(day)?"""
)
_HASH = re.compile(
    r"(?=.*\d)[0-9a-fA-F]{12,}"
    r"|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    r"|(?=.*\d[A-Za-z]+\d)(?=.*[a-z])(?=.*[A-Z])[A-Za-z0-9]{12,}"
)
_CODE = _pattern(r"(?=\S*\d)[\w./\#+&-]+")
_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")

LONGEST = 1000
"""Longer texts are none of these; the patterns need not be tried on them."""

CORE = _words(
    """
    image images img imgs picture pictures pic pics photo photos photograph foto fotos imagem imagen thumbnail
    thumbnails thumb logo logos icon icons banner untitled placeholder unnamed avatar gallery slide slider
    slideshow screenshot screenshots attachment alt caption description preview loading spacer null undefined
    advertisement ad button arrow click enlarge zoom download wallpaper wallpapers video figure share read file
    coming found available unknown none default product background
    """
)
"""One of these must be in a generic text: ``new home`` alone is not boilerplate."""

GENERIC = CORE | _words(
    """
    photography bild logotype banners header footer slides captions item main featured feature hero cover
    profile stock illustration vector graphic graphics clipart view play load loader spinner blank empty nan na
    ads advert sponsored link close open menu search home next previous prev back top tweet pin email print
    upload tap here larger bigger full size fullscreen more see show hide less soon missing error page website
    web site jpg jpeg png gif detail details post article google result results news entry media content test
    sample example title text name fig small medium large big original new
    """
)
"""Words that name the medium, a control of a page, or nothing."""

FILLERS = _words(
    """
    a an the of for to in on at by with and or is this that no not yet your our my we have has it now as from
    sorry
    """
)


def boilerplate(text: str) -> str | None:
    """The rule that a (normalised) text matches, or null: ``url``, ``markup``, ``file_name``, ``number_only``,
    ``date_only``, ``hash``, ``code`` or ``generic``."""
    if len(text) > LONGEST:
        return None
    if _is_markup(text):  # before brackets are stripped
        return "markup"
    text = text.strip(" \"'`*-_|.,:;!?()[]{}~=+\u2013\u2014\u00ab\u00bb\u201c\u201d\u2018\u2019\u2022\u00b7\u2026")
    if _is_address(text):
        return "url"
    if _is_file_name(text):
        return "file_name"
    if not any(c.isalpha() for c in text):
        return "number_only" if any(c.isdigit() for c in text) else None
    if _is_date(text):
        return "date_only"
    if _HASH.fullmatch(text):
        return "hash"
    if text and all(_CODE.fullmatch(word) for word in text.split()) and len(_content_words(text)) < 2:
        return "code"
    if _is_generic(text):
        return "generic"
    return None


def _content_words(text: str) -> list[str]:
    """Words of three letters or more that are neither generic nor fillers."""
    words = [w.lower() for w in _TOKEN.findall(text.replace("_", " "))]
    return [w for w in words if len(w) >= 3 and w not in GENERIC and w not in FILLERS]


def _is_address(text: str) -> bool:
    """Web or mail addresses with next to nothing beside them."""
    if "." not in text:
        return False
    rest = _URL.sub(" ", _EMAIL.sub(" ", text))
    return rest != text and len(_content_words(rest)) < 2


def _is_markup(text: str) -> bool:
    """Tags and templates of which little text is left."""
    rest = _TAG.sub(" ", text)
    return rest != text and len(_content_words(rest)) < 2


def _is_file_name(text: str) -> bool:
    """A camera's or tool's name for a file, or any file name with fewer than three words of content."""
    if _CAMERA.fullmatch(text):
        return True
    match = _FILE.fullmatch(text)
    return match is not None and (bool(_CAMERA.fullmatch(match["stem"])) or len(_content_words(match["stem"])) < 3)


def _is_date(text: str) -> bool:
    words = re.findall(r"\w+", text)
    return any(c.isdigit() for c in text) and all(_DATE.fullmatch(word) for word in words)


def _is_generic(text: str) -> bool:
    """Only words that name the medium or a control, fillers and numbers, and one of `CORE` among them."""
    words = [w.lower() for w in _TOKEN.findall(text.replace("_", " "))]
    return any(w in CORE for w in words) and all(w in GENERIC or w in FILLERS for w in words)
