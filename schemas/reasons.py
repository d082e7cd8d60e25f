"""The closed vocabulary of reasons for which a pair, a text, a box or a conversation is not kept.

A reason reads ``family.what``; free text (a status line, a measured value) goes into the ``detail`` column beside it.
"""

import math
import re
from enum import Enum


class Reason(str, Enum):  # enum.StrEnum needs Python 3.11
    """Why a pair was dropped or deferred. ``None`` in a table means kept."""

    # the source row itself
    MALFORMED_ROW = "source.malformed_row"
    EMPTY_URL = "source.empty_url"

    # the address: refused before a socket is opened
    URL_INVALID = "url.invalid"
    URL_SCHEME = "url.scheme"
    URL_PRIVATE_ADDRESS = "url.private_address"
    URL_USERINFO = "url.userinfo"
    URL_REDIRECT_REFUSED = "url.redirect_refused"

    # the answer
    HTTP_NOT_FOUND = "http.not_found"
    HTTP_CLIENT_ERROR = "http.client_error"
    HTTP_SERVER_ERROR = "http.server_error"
    HTTP_TOO_MANY_REQUESTS = "http.too_many_requests"
    HTTP_TIMEOUT = "http.timeout"
    HTTP_CONNECTION = "http.connection"
    HTTP_DNS = "http.dns"
    HTTP_TLS = "http.tls"
    HTTP_REDIRECT_LOOP = "http.redirect_loop"
    HTTP_PROTOCOL = "http.protocol"
    HTTP_TOO_LARGE = "http.too_large"
    HTTP_EMPTY = "http.empty"
    HTTP_NOT_AN_IMAGE = "http.not_an_image"
    HTTP_OPT_OUT = "http.opt_out"

    # the picture
    IMAGE_MISSING = "image.missing"
    IMAGE_FORMAT = "image.format"
    IMAGE_UNDECODABLE = "image.undecodable"
    IMAGE_TRUNCATED = "image.truncated"
    IMAGE_TOO_MANY_PIXELS = "image.too_many_pixels"
    IMAGE_TOO_SMALL = "image.too_small"
    IMAGE_ASPECT = "image.aspect"
    IMAGE_BLANK = "image.blank"

    # the text
    TEXT_EMPTY = "text.empty"
    TEXT_TOO_FEW_WORDS = "text.too_few_words"
    TEXT_TOO_MANY_WORDS = "text.too_many_words"
    TEXT_TOO_FEW_CHARS = "text.too_few_chars"
    TEXT_TOO_MANY_CHARS = "text.too_many_chars"
    TEXT_REPETITION = "text.repetition"
    TEXT_BOILERPLATE = "text.boilerplate"
    TEXT_LANGUAGE = "text.language"
    TEXT_NO_CONCEPT = "text.no_concept"

    # one of several texts of a pair, and a pair none of whose texts is kept
    TEXT_NOT_CHOSEN = "text.not_chosen"
    TEXT_REPEATED = "text.repeated"
    TEXT_NONE_KEPT = "text.none_kept"

    # the captioner: no answer (the pair is deferred), or none that can be used (that caption is left out)
    CAPTION_RATE_LIMITED = "caption.rate_limited"
    CAPTION_SERVER_ERROR = "caption.server_error"
    CAPTION_TIMEOUT = "caption.timeout"
    CAPTION_CONNECTION = "caption.connection"
    CAPTION_REFUSED = "caption.refused"
    CAPTION_MALFORMED = "caption.malformed"
    CAPTION_CUT_OFF = "caption.cut_off"
    CAPTION_EMPTY = "caption.empty"

    # a box: rejected, its pair stays
    BOX_MALFORMED = "box.malformed"
    BOX_NO_LABEL = "box.no_label"
    BOX_NOT_FINITE = "box.not_finite"
    BOX_DEGENERATE = "box.degenerate"
    BOX_OUTSIDE = "box.outside"
    BOX_TOO_SMALL = "box.too_small"
    BOX_REPEATED = "box.repeated"
    BOX_SIZE_MISMATCH = "box.size_mismatch"

    # the writer of instruction data; that conversation is left out, its pair stays.
    # No answer (a later refresh asks again):
    WRITER_RATE_LIMITED = "writer.rate_limited"
    WRITER_SERVER_ERROR = "writer.server_error"
    WRITER_TIMEOUT = "writer.timeout"
    WRITER_CONNECTION = "writer.connection"
    WRITER_BUDGET = "writer.budget"
    WRITER_PENDING = "writer.pending"
    # none that can be used:
    WRITER_NOTHING_TO_SAY = "writer.nothing_to_say"
    WRITER_REFUSED = "writer.refused"
    WRITER_MALFORMED = "writer.malformed"
    WRITER_CUT_OFF = "writer.cut_off"
    WRITER_EMPTY = "writer.empty"
    # or an answer that a check found fault with:
    CHECK_TURNS = "check.turns"
    CHECK_REPEATED = "check.repeated"
    CHECK_LENGTH = "check.length"
    CHECK_TOKENS = "check.tokens"
    CHECK_WORDING = "check.wording"
    CHECK_REFUSAL = "check.refusal"
    CHECK_NUMBERS = "check.numbers"
    CHECK_BOXES = "check.boxes"
    CHECK_COUNT = "check.count"
    CHECK_POSITION = "check.position"
    CHECK_NOUN = "check.noun"
    CHECK_LEAK = "check.leak"

    # scores
    CLIP_BELOW_THRESHOLD = "clip.below_threshold"
    CLIP_BELOW_QUANTILE = "clip.below_quantile"
    ITM_BELOW_THRESHOLD = "itm.below_threshold"
    CONCEPT_NOT_NEAR = "concept.not_near"
    SCORE_BELOW_THRESHOLD = "score.below_threshold"

    # duplicates of a kept, more senior pair
    DUPLICATE_BYTES = "duplicate.bytes"
    DUPLICATE_PIXELS = "duplicate.pixels"
    DUPLICATE_SEMANTIC = "duplicate.semantic"

    # taken down for good: the image's bytes are on the list, whatever URL serves them
    TAKEDOWN_IMAGE = "takedown.image"

    # rows that a stage could not process: quarantined by `pairmill.stage.apply`
    ERROR_KERNEL = "error.kernel"
    ERROR_MEMORY = "error.memory"
    ERROR_CRASH = "error.crash"

    __str__ = str.__str__


DEFERRED = frozenset(
    {
        Reason.HTTP_SERVER_ERROR,
        Reason.HTTP_TOO_MANY_REQUESTS,
        Reason.HTTP_TIMEOUT,
        Reason.HTTP_CONNECTION,
        Reason.HTTP_DNS,
        Reason.CAPTION_RATE_LIMITED,
        Reason.CAPTION_SERVER_ERROR,
        Reason.CAPTION_TIMEOUT,
        Reason.CAPTION_CONNECTION,
        Reason.WRITER_RATE_LIMITED,
        Reason.WRITER_SERVER_ERROR,
        Reason.WRITER_TIMEOUT,
        Reason.WRITER_CONNECTION,
        Reason.WRITER_BUDGET,
        Reason.WRITER_PENDING,
    }
)
"""Reasons that may pass with time: such a pair has status ``deferred`` and a later refresh may try it again."""


class Status(str, Enum):
    """What became of a pair in a snapshot."""

    KEPT = "kept"
    DROPPED = "dropped"
    DEFERRED = "deferred"

    __str__ = str.__str__


class Visit(str, Enum):
    """What a second visit to an image that is already stored found."""

    UNCHANGED = "unchanged"
    """The server says so (HTTP 304), or the bytes are the same."""
    CHANGED = "changed"
    """Other bytes, which are an image."""
    FAILED = "failed"
    """Neither; a reason says why. What is stored is neither confirmed nor refuted."""

    __str__ = str.__str__


def with_retry_after(detail: str, seconds: float) -> str:
    """A detail that ends with how long the server asked to be left alone; `retry_after_s` reads it back."""
    return f"{detail}, Retry-After: {math.ceil(seconds)} s"


_RETRY_AFTER = re.compile(r", Retry-After: (\d{1,12}) s\Z", re.ASCII)


def retry_after_s(detail: str | None) -> float | None:
    """How long a server asked to be left alone, in whole seconds, from the detail of a deferred pair
    (`with_retry_after`); None where it did not ask. It is a server's wish and may be years: put a cap on it."""
    found = _RETRY_AFTER.search(detail or "")
    return float(found[1]) if found else None


def status_of(reason: str | None) -> Status:
    """The status that follows from a reason; ``None`` means the pair is kept."""
    if reason is None:
        return Status.KEPT
    return Status.DEFERRED if reason in DEFERRED_VALUES else Status.DROPPED


DEFERRED_VALUES = frozenset(reason.value for reason in DEFERRED)
"""The values of `DEFERRED`, for comparison with stored strings."""
