"""Every Arrow field of the store, named once. Stages refer to these in ``writes`` and by ``.name`` in ``reads``."""

import pyarrow as pa

# -- every table ------------------------------------------------------------------------------------------------------
UID = pa.field("uid", pa.string(), nullable=False)
"""sha256 of ``url + "\\n" + text``, hex."""
SHARD = pa.field("shard", pa.int32(), nullable=False)
"""The partition column: which shard of pairs the row belongs to. It is in the path, not in the file."""
REASON = pa.field("reason", pa.string())
"""A value of `schemas.reasons.Reason`, or null."""
DETAIL = pa.field("detail", pa.string())
"""Free text beside a reason."""

# -- pairs: written once, at admission --------------------------------------------------------------------------------
URL = pa.field("url", pa.string())
TEXT = pa.field("text", pa.string())
"""The alt text: the first of `TEXTS`."""
TEXTS = pa.field("texts", pa.list_(pa.struct([pa.field("text", pa.string()), pa.field("source", pa.string())])))
"""All texts that came with the pair, the web text first. ``source`` is web or human; synthetic texts are in
`CAPTIONS`."""
BOX = pa.struct(
    [
        pa.field("label", pa.string()),
        pa.field("x1", pa.float32()),
        pa.field("y1", pa.float32()),
        pa.field("x2", pa.float32()),
        pa.field("y2", pa.float32()),
        pa.field("score", pa.float32()),
        pa.field("source", pa.string()),
    ]
)
BOXES = pa.field("boxes", pa.list_(BOX))
"""Boxes that came with the pair: xyxy in pixels of the *original* image (see `TRANSFORM`)."""
LOCATOR = pa.field("locator", pa.string())
"""Where a local source holds the image's bytes (JSON, see `pairmill.sources.locator`); null: fetch `URL`."""
EXTRA = pa.field("extra", pa.string())
"""Columns of the source that pairmill does not use, as a JSON object."""
SOURCE = pa.field("source", pa.string())
"""Which source of the config the pair came from: its kind and position, such as ``url_table:0``."""
REFRESH = pa.field("refresh", pa.int32(), nullable=False)
"""The number of the refresh that admitted the pair, from 1."""

PAIRS = pa.schema([UID, URL, TEXT, TEXTS, BOXES, LOCATOR, EXTRA, SOURCE, REFRESH, REASON, DETAIL])
"""The pairs table. A reason here means that the source row was malformed; the pair never enters a stage."""

# -- images -----------------------------------------------------------------------------------------------------------
IMAGE = pa.field("image", pa.binary())
"""The stored file (JPEG, PNG or WebP): original bytes where nothing had to change, else re-encoded. Upright RGB."""
FORMAT = pa.field("format", pa.string())
"""Format of the stored file: jpeg, png or webp."""
WIDTH = pa.field("width", pa.int32())
HEIGHT = pa.field("height", pa.int32())
ORIGINAL_WIDTH = pa.field("original_width", pa.int32())
"""Width of the fetched image after EXIF orientation, pixels."""
ORIGINAL_HEIGHT = pa.field("original_height", pa.int32())
TRANSFORM = pa.field("transform", pa.list_(pa.float32()))
"""[sx, sy, dx, dy]: stored x = original x * sx + dx, stored y = original y * sy + dy, pixels."""
SHA256 = pa.field("sha256", pa.string())
"""sha256 of the bytes as fetched, hex."""
PIXEL_SHA256 = pa.field("pixel_sha256", pa.string())
"""sha256 over width, height and the upright RGB pixels of the original, hex."""
ORIGINAL_BYTES = pa.field("original_bytes", pa.int64())
"""Size of the file as fetched."""
ANIMATED = pa.field("animated", pa.bool_())
"""The fetched file had several frames; the first is stored."""
HTTP_STATUS = pa.field("http_status", pa.int32())
FINAL_URL = pa.field("final_url", pa.string())
"""Where redirects ended, when that is not `URL`."""
ETAG = pa.field("etag", pa.string())
LAST_MODIFIED = pa.field("last_modified", pa.string())

IMAGES = (
    IMAGE,
    FORMAT,
    WIDTH,
    HEIGHT,
    ORIGINAL_WIDTH,
    ORIGINAL_HEIGHT,
    TRANSFORM,
    SHA256,
    PIXEL_SHA256,
    ORIGINAL_BYTES,
    ANIMATED,
    HTTP_STATUS,
    FINAL_URL,
    ETAG,
    LAST_MODIFIED,
)
"""What a download stage writes."""

# -- text measures ----------------------------------------------------------------------------------------------------
WORDS = pa.field("words", pa.int32())
CHARS = pa.field("chars", pa.int32())
REPETITION = pa.field("repetition", pa.float32())
"""Share of the text that repeats itself, 0 to 1."""
BOILERPLATE = pa.field("boilerplate", pa.string())
"""Which boilerplate rule the text matches (such as ``file_name``), or null."""
LANGUAGE = pa.field("language", pa.string())
"""ISO 639-1 code."""
LANGUAGE_SCORE = pa.field("language_score", pa.float32())
"""Probability of `LANGUAGE`, 0 to 1."""

# -- image measures ---------------------------------------------------------------------------------------------------
CONTRAST = pa.field("contrast", pa.float32())
"""Standard deviation of the grey levels, 0 to 255; near 0 for a blank image."""

COLOUR_LAYOUT = pa.field("colour_layout", pa.list_(pa.float32()))
"""Mean red, green and blue, 0 to 1, of each cell of a 4 x 4 grid over the image, row by row: 48 values. A plain kin of
MPEG-7's colour layout descriptor."""

# -- clip -------------------------------------------------------------------------------------------------------------
CLIP_IMAGE = pa.field("clip_image", pa.list_(pa.float32()))
"""Unit-length image embedding."""
CLIP_SCORES = pa.field("clip_scores", pa.list_(pa.float32()))
"""Cosine of the image with each of `TEXTS`."""
CLIP_SCORE = pa.field("clip_score", pa.float32())
"""Cosine of the image with `TEXT`: the first of `CLIP_SCORES`."""

# -- synthetic texts --------------------------------------------------------------------------------------------------
CAPTIONS = pa.field(
    "captions",
    pa.list_(
        pa.struct(
            [
                pa.field("text", pa.string()),
                pa.field("source", pa.string()),
                pa.field("reason", pa.string()),
                pa.field("detail", pa.string()),
            ]
        )
    ),
)
"""Texts that a captioner wrote, in the order it wrote them. ``source`` is blip, blip2, instructblip or vlm. A try that
gave no usable text has a null text and a reason of `schemas.reasons.Reason`."""
CAPTION_CLIP_SCORES = pa.field("caption_clip_scores", pa.list_(pa.float32()))
"""Cosine of the image with each of `CAPTIONS`; null for a null text."""
ITM_SCORES = pa.field("itm_scores", pa.list_(pa.float32()))
"""Probability, 0 to 1, that the image matches each of `TEXTS`."""
ITM_SCORE = pa.field("itm_score", pa.float32())
"""Probability that the image matches `TEXT`: the first of `ITM_SCORES`."""
CAPTION_ITM_SCORES = pa.field("caption_itm_scores", pa.list_(pa.float32()))
"""Probability that the image matches each of `CAPTIONS`; null for a null text."""

# -- boxes ------------------------------------------------------------------------------------------------------------
REGIONS = pa.field("regions", pa.list_(BOX))
"""The boxes of `BOXES` in pixels of the *stored* image, clipped to it. Those that cannot be kept are in
`REJECTED_BOXES`."""
DETECTIONS = pa.field("detections", pa.list_(BOX))
"""Boxes that a detector found: as `REGIONS`, best score first."""
REJECTED_BOXES = pa.field(
    "rejected_boxes",
    pa.list_(pa.struct([pa.field("box", BOX), pa.field("reason", pa.string()), pa.field("detail", pa.string())])),
)
"""Boxes that came with the pair and are not in `REGIONS`, in pixels of the stored image, each with its reason."""
CROWDED = pa.field("crowded", pa.list_(pa.string()))
"""Labels of which the source says that some instances have no box of their own."""
MASKS = pa.field(
    "masks",
    pa.list_(
        pa.struct(
            [
                pa.field("box", pa.int32()),
                pa.field("counts", pa.string()),
                pa.field("area", pa.int64()),
                pa.field("score", pa.float32()),
            ]
        )
    ),
)
"""One mask a box, of `REGIONS` and then `DETECTIONS`: ``box`` is its position among these; ``counts`` is COCO's
compressed run-length encoding over the stored image's height x width; ``area`` is in pixels; ``score`` is the model's
own estimate of its IoU."""

# -- instruction data -------------------------------------------------------------------------------------------------
INSTRUCTION = pa.struct(
    [
        pa.field("kind", pa.string()),
        pa.field("messages", pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))),
        pa.field("boxes", pa.list_(BOX)),
        pa.field("writer", pa.string()),
        pa.field("prompt_digest", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("cost", pa.float64()),
        pa.field("answers", pa.int32()),
        pa.field("checks", pa.list_(pa.struct([pa.field("reason", pa.string()), pa.field("detail", pa.string())]))),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)
"""One conversation, or why there is none: see `pairmill.instructions.Instruction`."""
INSTRUCTIONS = pa.field("instructions", pa.list_(INSTRUCTION))
"""The conversations of a pair, one of each kind that was asked for, in the order of `pairmill.instructions.KINDS`."""
INSTRUCTED_RANKS = pa.field("instructed_ranks", pa.list_(pa.int32()))
"""`TEXT_RANKS` as they were when `INSTRUCTIONS` were written: when other texts are kept they are written anew."""
INSTRUCTION_OUTCOMES = pa.field(
    "instruction_outcomes",
    pa.list_(pa.struct([pa.field("kind", pa.string()), pa.field("reason", pa.string())])),
)
"""Kind and reason of each of `INSTRUCTIONS`: what can be counted without reading them."""

# -- dedup ------------------------------------------------------------------------------------------------------------
NEIGHBOURS = pa.field(
    "neighbours", pa.list_(pa.struct([pa.field("uid", pa.string()), pa.field("similarity", pa.float32())]))
)
"""Rows searched before or together with this one whose cosine is above the floor, most similar first."""

# -- ledger: written at publishing ------------------------------------------------------------------------------------
STATUS = pa.field("status", pa.string(), nullable=False)
DUPLICATE_OF = pa.field("duplicate_of", pa.string())
"""uid of the kept, more senior pair that this one duplicates."""
CLUSTER = pa.field("cluster", pa.string())
"""uid of the pair at the centre of this pair's group of duplicates; null for a pair without duplicates."""
TEXT_RANKS = pa.field("text_ranks", pa.list_(pa.int32()))
"""Of each text of a pair (`TEXTS`, then `CAPTIONS`): its place among the kept texts, 0 first; null for one that is not
kept. Null as a whole where no mixing recipe chose among texts: then the first text is the pair's caption."""
TEXT_REASONS = pa.field("text_reasons", pa.list_(pa.string()))
"""Of each text of a pair (`TEXTS`, then `CAPTIONS`): why it is not kept; null for a kept one."""
TEXT_DETAILS = pa.field("text_details", pa.list_(pa.string()))
"""Free text beside each of `TEXT_REASONS`."""

ATTEMPTS = pa.field("attempts", pa.int32())
"""Of a deferred pair: how often it was tried. Null for all others."""
RETRY_AT = pa.field("retry_at", pa.string())
"""Of a deferred pair: from when on a refresh tries it again, UTC, ISO 8601; null when it has had all its attempts."""

LEDGER = pa.schema(
    [
        UID,
        STATUS,
        REASON,
        DETAIL,
        DUPLICATE_OF,
        CLUSTER,
        TEXT_RANKS,
        TEXT_REASONS,
        TEXT_DETAILS,
        ATTEMPTS,
        RETRY_AT,
    ]
)
