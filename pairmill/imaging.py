"""Pictures: what a file is, its upright RGB pixels, resizing, and what of it is stored.

Files are untrusted. The format must be on the allow-list and the size within the cap before anything is decoded, and a
file is decoded whole or not at all: truncated files and bad checksums are errors. Pixels come out upright (EXIF
orientation applied), opaque (alpha composited on white), 8-bit RGB, the first frame of an animation. Embedded ICC
profiles are left as they are: no colour conversion, as in CLIP's and BLIP's own training code.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.reasons import Reason

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFile import ImageFile

    from schemas.config import Resize

_STORED = frozenset({"jpeg", "png", "webp"})
_LOSSLESS = frozenset({"png", "gif", "bmp", "tiff"})
_MAX_FRAMES = 10_000
_ORIENTATION = 0x0112


class ImagingError(Exception):
    """A file is not a picture that can be stored. Carries the row's reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail[:500]


@dataclass(frozen=True)
class ImageInfo:
    """What a file's header says."""

    format: str
    """jpeg, png, webp, gif, bmp, tiff or avif."""
    width: int
    """Pixels, before `orientation` is applied."""
    height: int
    frames: int
    """1 unless animated; counting stops at 2 for formats whose header does not say."""
    mode: str
    """Pillow's mode, such as RGB, L, P, CMYK or I;16."""
    orientation: int
    """EXIF orientation, 1 to 8."""


@dataclass(frozen=True)
class StoredImage:
    """A picture ready to be stored, and what is known of the file it came from; see schemas.fields.IMAGES."""

    image: bytes
    format: str
    width: int
    height: int
    original_width: int
    """Pixels, after EXIF orientation."""
    original_height: int
    transform: tuple[float, float, float, float]
    """(sx, sy, dx, dy): stored x = original x * sx + dx, stored y = original y * sy + dy, pixels."""
    sha256: str
    pixel_sha256: str
    original_bytes: int
    animated: bool


# -- looking ----------------------------------------------------------------------------------------------------------


def sniff(head: bytes) -> str | None:
    """The format by a file's first bytes (32 are enough), or None when it is not on the allow-list."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith((b"II*\x00", b"MM\x00*")):
        return "tiff"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:32] or b"avis" in head[8:32]):
        return "avif"
    if (
        head.startswith(b"BM")
        and len(head) >= 18
        and struct.unpack_from("<I", head, 14)[0] in (12, 40, 52, 56, 108, 124)
    ):
        return "bmp"
    return None


def probe(data: bytes, max_pixels: int | None = None) -> ImageInfo:
    """What the header says; no pixel is decoded.

    Raises:
        ImagingError: the format is not on the allow-list, the header is damaged, or it declares more than `max_pixels`.
    """
    info, _ = _open(data, max_pixels)
    return info


def _open(data: bytes, max_pixels: int | None) -> tuple[ImageInfo, ImageFile]:
    from PIL import Image

    kind = sniff(data[:32])
    if kind is None:
        raise ImagingError(Reason.IMAGE_FORMAT, _describe(data))
    _check_pixels(_declared_size(data, kind), max_pixels)
    if kind == "png":
        _check_png(data)
    try:
        image = Image.open(io.BytesIO(data), formats=(kind.upper(),))
        info = ImageInfo(kind, *image.size, _frames(image, kind), image.mode, _orientation(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImagingError(Reason.IMAGE_TOO_MANY_PIXELS, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged header makes them stumble over
        raise ImagingError(Reason.IMAGE_UNDECODABLE, _say(error, kind)) from error
    _check_pixels(image.size, max_pixels)
    return info, image


def _describe(data: bytes) -> str:
    head = data[:1024].lstrip().lower()
    if b"<svg" in head:
        return "SVG is not allowed"
    if head.startswith((b"<!doctype", b"<html", b"<")):
        return "HTML or XML, not an image"
    return f"not a known image format (begins with {data[:8].hex()})" if data else "no bytes"


def _say(error: BaseException, kind: str) -> str:
    return f"{kind}: {type(error).__name__}: {error}"[:300]


def _check_pixels(size: tuple[int, int] | None, max_pixels: int | None) -> None:
    if size is None:
        return
    width, height = size
    if width <= 0 or height <= 0:
        raise ImagingError(Reason.IMAGE_UNDECODABLE, f"the header says {width} x {height} pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise ImagingError(
            Reason.IMAGE_TOO_MANY_PIXELS, f"the header says {width} x {height} pixels; at most {max_pixels} are allowed"
        )


def _declared_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """Width and height from the header without Pillow, whose WebP plugin allocates the canvas when it opens a file, and
    whose own cap is a global. None where only Pillow can tell; its plugins for those read headers only."""
    try:
        if kind == "png":
            return struct.unpack_from(">II", data, 16)
        if kind == "gif":
            return struct.unpack_from("<HH", data, 6)
        if kind == "bmp" and struct.unpack_from("<I", data, 14)[0] >= 40:
            width, height = struct.unpack_from("<ii", data, 18)
            return abs(width), abs(height)
        if kind == "jpeg":
            return _jpeg_size(data)
        if kind == "webp":
            return _webp_size(data)
    except struct.error as error:
        raise ImagingError(Reason.IMAGE_TRUNCATED, f"{kind}: the file ends inside its header") from error
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _frames(image: ImageFile, kind: str) -> int:
    if kind in ("jpeg", "bmp"):
        return 1  # a JPEG's further pictures (MPO) are previews and depth maps, not an animation
    if kind == "gif":
        return 2 if getattr(image, "is_animated", False) else 1  # counting them all would parse the whole file
    frames = getattr(image, "n_frames", 1)
    return min(int(frames), _MAX_FRAMES)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 damaged EXIF says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _check_png(data: bytes) -> None:
    """Raise unless every chunk is whole and its CRC right: Pillow skips the CRC of image data."""
    at = 8
    while True:
        if at + 12 > len(data):
            raise ImagingError(Reason.IMAGE_TRUNCATED, "png: the file ends before its last chunk")
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 12 + length
        if end > len(data):
            raise ImagingError(Reason.IMAGE_TRUNCATED, "png: the file ends inside a chunk")
        name = data[at + 4 : at + 8]
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImagingError(Reason.IMAGE_UNDECODABLE, f"png: bad CRC in chunk {name!r}")
        if name == b"IEND":
            return
        at = end


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """The upright, opaque RGB picture of a file.

    16-bit grey is scaled to 8 bits (65535 becomes 255), transparency is composited on white, CMYK is converted without
    a profile, of an animation the first frame is taken.

    Raises:
        ImagingError: not a picture, damaged, truncated, or larger than `max_pixels` (from its header, before decoding).
    """
    info, opened = _open(data, max_pixels)
    return _pixels(info, opened)


def _pixels(info: ImageInfo, opened: ImageFile) -> Image.Image:
    try:
        opened.load()
        turned = _upright(opened, info)
        return _opaque_rgb(turned)
    except ImagingError:
        raise
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ... for bad data
        words = str(error).lower()
        cut = "truncated" in words or "unexpected end" in words or "not enough" in words
        reason = Reason.IMAGE_TRUNCATED if cut else Reason.IMAGE_UNDECODABLE
        raise ImagingError(reason, _say(error, info.format)) from error


def _upright(image: Image.Image, info: ImageInfo) -> Image.Image:
    from PIL.Image import Transpose

    if info.orientation == 1 or info.format == "tiff":  # Pillow turns TIFF upright by itself when it loads
        return image
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }[info.orientation]
    return image.transpose(turn)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode == "RGB":
        image.info = {}  # what the file said of itself must not reach the encoder
        return image
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits as mode L."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or (values.size and (values.min() < 0 or values.max() > 65535)):
        raise ImagingError(Reason.IMAGE_UNDECODABLE, f"grey values of mode {image.mode} have no known range")
    scaled = (values.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(scaled.astype(np.uint8))


def pixel_digest(image: Image.Image) -> str:
    """sha256 over width, height (32-bit little-endian each) and the RGB bytes, hex: equal for equal pictures."""
    digest = hashlib.sha256(struct.pack("<II", *image.size))
    digest.update(image.tobytes())
    return digest.hexdigest()


# -- resizing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resized:
    """A resized picture and where its pixels came from."""

    image: Image.Image
    transform: tuple[float, float, float, float]
    """(sx, sy, dx, dy), as in `StoredImage`."""
    changed: bool


_UNCHANGED = (1.0, 1.0, 0.0, 0.0)


def resize(image: Image.Image, how: Resize) -> Resized:
    """Resize in one of img2dataset's modes (see `schemas.config.Resize`).

    Downwards with Pillow's Hamming window: on photographs 46 dB from exact area averaging, at its price (Pillow's BOX:
    36 dB, for it takes whole pixels only; bicubic: 44 dB at twice the price). Pictures at least four times too large
    are halved by averaging first (48 dB, at 40% of the price). Upwards with Lanczos, as img2dataset does.
    """
    width, height = image.size
    if how.mode == "no":
        return Resized(image, _UNCHANGED, False)
    side = min(width, height) if how.mode in ("keep_ratio", "center_crop") else max(width, height)
    if how.only_if_bigger and side <= how.size:
        return Resized(image, _UNCHANGED, False)
    new_width = max(1, round(width * how.size / side))
    new_height = max(1, round(height * how.size / side))
    scaled = _scale(image, new_width, new_height)
    sx, sy = new_width / width, new_height / height
    dx = dy = 0
    if how.mode == "center_crop":
        left, top = (new_width - how.size) // 2, (new_height - how.size) // 2
        scaled = scaled.crop((left, top, left + how.size, top + how.size))
        dx, dy = -left, -top
    elif how.mode == "border":
        from PIL import Image

        dx, dy = (how.size - new_width) // 2, (how.size - new_height) // 2
        framed = Image.new("RGB", (how.size, how.size), (255, 255, 255))
        framed.paste(scaled, (dx, dy))
        scaled = framed
    transform = (sx, sy, float(dx), float(dy))
    return Resized(scaled, transform, scaled is not image)


def _scale(image: Image.Image, width: int, height: int) -> Image.Image:
    from PIL.Image import Resampling

    if (width, height) == image.size:
        return image
    if width > image.width:
        return image.resize((width, height), Resampling.LANCZOS)
    return image.resize((width, height), Resampling.HAMMING, reducing_gap=2.0)


# -- storing ----------------------------------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str, quality: int = 95) -> bytes:
    """An RGB picture as a file: ``jpeg`` (4:2:0, as img2dataset writes) or ``png``; without metadata."""
    buffer = io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def store(data: bytes, how: Resize, max_pixels: int | None = None) -> StoredImage:
    """Decode, resize and encode a fetched file.

    A JPEG, PNG or WebP that needs no change keeps its bytes: upright, opaque, not animated, 8 bits a channel, no
    resize; so a reader who does ``Image.open(...).convert("RGB")`` sees the right pixels. Only bytes after the
    picture's end are cut off, since nothing says what they are. Anything else is re-encoded: as PNG when the file was
    lossless and no pixel was resampled, else as JPEG.

    Raises:
        ImagingError: see `decode`.
    """
    if not data:
        raise ImagingError(Reason.HTTP_EMPTY, "no bytes")
    info, opened = _open(data, max_pixels)
    plain = _is_plain(data, info, opened)
    picture = _pixels(info, opened)
    resized = resize(picture, how)
    if plain and not resized.changed:
        image, kind = data[: _end(data, info.format)], info.format
    else:
        kind = "png" if info.format in _LOSSLESS and resized.transform == _UNCHANGED else "jpeg"
        image = encode(resized.image, kind, how.quality)
    return StoredImage(
        image=image,
        format=kind,
        width=resized.image.width,
        height=resized.image.height,
        original_width=picture.width,
        original_height=picture.height,
        transform=resized.transform,
        sha256=hashlib.sha256(data).hexdigest(),
        pixel_sha256=pixel_digest(picture),
        original_bytes=len(data),
        animated=info.frames > 1,
    )


def _is_plain(data: bytes, info: ImageInfo, image: ImageFile) -> bool:
    """Whether any reader of the file itself, without EXIF or alpha in mind, sees its right pixels."""
    if info.format not in _STORED or info.frames > 1 or info.orientation != 1 or "transparency" in image.info:
        return False
    if info.format == "png":
        return info.mode in ("RGB", "L", "P", "1") and data[24] <= 8
    return info.mode in ("RGB", "L")


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _end(data: bytes, kind: str) -> int:
    """Where the picture's last byte is (exclusive); the file may go on with bytes that are none of it."""
    if kind == "webp":
        return min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    if kind == "png":
        return data.rindex(b"IEND\xaeB`\x82") + 8 if data.endswith(b"IEND\xaeB`\x82") else _png_end(data)
    return _jpeg_end(data)


def _png_end(data: bytes) -> int:
    at = 8
    while data[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return at + 12


def _jpeg_end(data: bytes) -> int:
    """After the end-of-image marker. Marker segments say their length; in entropy-coded data a marker cannot occur."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return len(data)
        marker = data[at + 1]
        if marker == 0xD9:
            return at + 2
        if marker == 0xFF:
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:  # a scan: entropy-coded data follow
            if data.find(b"\xff\xd9", at) == len(data) - 2:
                return len(data)  # the usual case, at memchr's speed
            found = _JPEG_MARKER.search(data, at)
            if found is None:
                return len(data)
            at = found.start()
    return len(data)
