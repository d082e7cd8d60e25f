from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pairmill import imaging
from pairmill.imaging import ImagingError
from schemas.config import Resize
from schemas.reasons import Reason
from tests.hostile import pictures
from tests.hostile.pictures import encoded, quadrants

AS_IT_IS = Resize(mode="no")
ARRAY = np.asarray(quadrants()).astype(int)


def seen(data: bytes) -> np.ndarray:
    """What a reader of the stored file sees."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + pictures.png_chunk(b"IHDR", header)
        + extra
        + pictures.png_chunk(b"IDAT", zlib.compress(rows))
        + pictures.png_chunk(b"IEND", b"")
    )


# -- what keeps its bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {"quality": 90}),
        ("JPEG", "RGB", {"quality": 90, "progressive": True}),
        ("JPEG", "L", {}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_plain_files_keep_their_bytes(kind: str, mode: str, options: dict) -> None:
    data = encoded(quadrants().convert(mode), kind, **options)
    stored = imaging.store(data, AS_IT_IS)
    assert stored.image == data
    assert stored.format == kind.lower()
    assert np.array_equal(seen(stored.image), np.asarray(imaging.decode(data)))
    assert stored.transform == (1, 1, 0, 0)
    assert not stored.animated


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_bytes_after_the_picture_are_cut_off(kind: str) -> None:
    data = encoded(quadrants(), kind)
    for tail in (b"PK\x03\x04 a zip file \xff\xd9 and more", b"\0" * 7, b"\xff\xd8\xff\xe0 another \xff\xd9"):
        stored = imaging.store(data + tail, AS_IT_IS)
        assert stored.image == data
        assert stored.original_bytes == len(data) + len(tail)
    progressive = encoded(quadrants(), "JPEG", progressive=True)
    assert imaging.store(progressive + b"tail\xff\xd9", AS_IT_IS).image == progressive


def test_a_phone_s_second_picture_is_cut_off() -> None:
    data = encoded(quadrants(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 24))])
    stored = imaging.store(data, AS_IT_IS)
    assert not stored.animated
    assert stored.format == "jpeg"
    assert len(stored.image) < len(data)
    assert np.abs(seen(stored.image) - ARRAY).mean() < 12


# -- right pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int) -> None:
    stored = imaging.store(pictures.turned(orientation, kind), AS_IT_IS)
    got = seen(stored.image)
    assert got.shape == ARRAY.shape
    assert np.abs(got - ARRAY).mean() < 12
    assert (stored.original_width, stored.original_height) == (40, 24)
    assert Image.open(io.BytesIO(stored.image)).getexif().get(0x0112, 1) == 1


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 256).round().astype(">u2").reshape(16, 16)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    stored = imaging.store(png(16, 16, 16, 0, rows), AS_IT_IS)
    assert np.abs(seen(stored.image)[..., 0].ravel() - np.arange(256)).max() <= 1
    tiff = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    assert np.abs(seen(imaging.store(tiff, AS_IT_IS).image)[..., 0].ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bit_colour(alpha: bool) -> None:
    levels = np.linspace(0, 65535, 16).round().astype(np.uint16)
    pixel = np.zeros((4, 4, 4 if alpha else 3), ">u2")
    pixel[..., 0] = levels.reshape(4, 4)
    pixel[..., 1] = levels.reshape(4, 4)[::-1]
    if alpha:
        pixel[..., 3] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in pixel)
    stored = imaging.store(png(4, 4, 16, 6 if alpha else 2, rows), AS_IT_IS)
    assert stored.format == "png"
    assert np.abs(seen(stored.image) - pixel[..., :3] / 257).max() <= 1


def test_transparency_is_composited_on_white() -> None:
    clear = quadrants().convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    half = quadrants().convert("RGBA")
    half.putalpha(Image.new("L", half.size, 128))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {}), ("AVIF", {})):
        assert (seen(imaging.store(encoded(clear, kind, **options), AS_IT_IS).image) >= 253).all()
        wanted = ARRAY * 128 / 255 + 127
        got = seen(imaging.store(encoded(half, kind, **options), AS_IT_IS).image)
        assert np.abs(got - wanted)[2:8, 2:16].mean() < 6
    grey = Image.merge("LA", (Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 0)))
    assert (seen(imaging.store(encoded(grey, "PNG"), AS_IT_IS).image) == 255).all()


def test_transparent_colours_without_an_alpha_channel() -> None:
    rgb = encoded(quadrants(), "PNG", transparency=(255, 0, 0))
    grey = encoded(Image.new("L", (8, 8), 7), "PNG", transparency=7)
    palette = quadrants().convert("P", palette=Image.Palette.ADAPTIVE)
    indexed = encoded(palette, "PNG", transparency=palette.getpixel((0, 0)))
    gif = encoded(palette, "GIF", transparency=palette.getpixel((0, 0)))
    for data in (rgb, grey, indexed, gif):
        stored = imaging.store(data, AS_IT_IS)
        assert tuple(seen(stored.image)[0, 0]) == (255, 255, 255)
        assert stored.image != data


def test_cmyk_palette_bits_and_bitmaps() -> None:
    for data in (
        encoded(quadrants().convert("CMYK"), "JPEG", quality=100),
        encoded(quadrants().convert("CMYK"), "TIFF"),
        encoded(quadrants().convert("P"), "GIF"),
        encoded(quadrants(), "BMP"),
        encoded(quadrants().convert("P"), "BMP"),
    ):
        assert np.abs(seen(imaging.store(data, AS_IT_IS).image) - ARRAY).mean() < 12
    bits = quadrants().convert("1")
    for kind in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(seen(imaging.store(encoded(bits, kind), AS_IT_IS).image), np.asarray(bits.convert("RGB")))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    second = Image.new("RGB", quadrants().size, (1, 2, 3))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(quadrants(), kind, save_all=True, append_images=[second] * 3, duration=50, **options)
    stored = imaging.store(data, AS_IT_IS)
    assert stored.animated
    assert np.abs(seen(stored.image) - ARRAY).mean() < 12
    assert getattr(Image.open(io.BytesIO(stored.image)), "n_frames", 1) == 1


def test_lossless_files_stay_lossless_unless_resampled() -> None:
    data = encoded(pictures.noise(64, 48).convert("RGBA"), "PNG")
    assert imaging.store(data, AS_IT_IS).format == "png"
    assert np.array_equal(seen(imaging.store(data, AS_IT_IS).image), np.asarray(pictures.noise(64, 48)))
    assert imaging.store(data, Resize(size=32)).format == "jpeg"


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.IMAGE_FORMAT),
        (b"<html></html>", Reason.IMAGE_FORMAT),
        (b"%PDF-1.4", Reason.IMAGE_FORMAT),
        (b"%!PS-Adobe-3.0 EPSF-3.0", Reason.IMAGE_FORMAT),
        (b"8BPS" + bytes(100), Reason.IMAGE_FORMAT),
        (b"BM is how some texts begin, too", Reason.IMAGE_FORMAT),
        (b"", Reason.HTTP_EMPTY),
        (pictures.gif_bomb(), Reason.IMAGE_TOO_MANY_PIXELS),
        (pictures.webp_canvas_bomb(), Reason.IMAGE_TOO_MANY_PIXELS),
        (pictures.png_bomb(60_000, 60_000, 1, 0), Reason.IMAGE_TOO_MANY_PIXELS),
        (pictures.png_bomb(8_000, 8_000, 8, 6), Reason.IMAGE_TOO_MANY_PIXELS),
        (pictures.png_bomb(0, 8, 8, 6), Reason.IMAGE_UNDECODABLE),
        (b"\x89PNG\r\n\x1a\n", Reason.IMAGE_TRUNCATED),
        (encoded(Image.new("F", (8, 8)), "TIFF"), Reason.IMAGE_UNDECODABLE),
    ],
)
def test_refused(data: bytes, reason: Reason) -> None:
    with pytest.raises(ImagingError) as error:
        imaging.store(data, AS_IT_IS, max_pixels=10_000_000)
    assert error.value.reason is reason
    assert error.value.detail


def test_the_pixel_cap_is_exact_and_from_the_header() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        data = encoded(quadrants(), kind)
        assert imaging.probe(data, 960).format == kind.lower()
        with pytest.raises(ImagingError) as error:
            imaging.decode(data, 959)
        assert error.value.reason is Reason.IMAGE_TOO_MANY_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_files_are_errors(kind: str) -> None:
    data = encoded(pictures.noise(120, 80), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(ImagingError):
            imaging.store(data[: int(len(data) * share)], AS_IT_IS)
    progressive = encoded(pictures.noise(120, 80), "JPEG", progressive=True)
    with pytest.raises(ImagingError):
        imaging.store(progressive[: len(progressive) // 2], AS_IT_IS)


@given(at=st.integers(8, 10_000), flip=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_flipped_byte_of_a_png_is_found(at: int, flip: int) -> None:
    data = bytearray(encoded(pictures.noise(40, 30), "PNG"))
    data[8 + at % (len(data) - 8)] ^= flip
    with pytest.raises(ImagingError):
        imaging.store(bytes(data), AS_IT_IS)


@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_damage_never_raises_anything_else(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(quadrants(), kind))
    for at in rng.integers(0, len(data), rng.integers(1, 8)):
        data[at] = rng.integers(0, 256)
    try:
        stored = imaging.store(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]), Resize(size=16), 1_000_000)
    except ImagingError:
        return
    assert seen(stored.image).shape == (stored.height, stored.width, 3)


# -- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("keep_ratio", (200, 100)),
        ("keep_ratio_largest", (100, 50)),
        ("center_crop", (100, 100)),
        ("border", (100, 100)),
    ],
)
def test_the_modes_of_img2dataset(mode: str, size: tuple[int, int]) -> None:
    assert imaging.resize(Image.new("RGB", (400, 200)), Resize(mode=mode, size=100)).image.size == size
    small = Image.new("RGB", (40, 20))
    assert not imaging.resize(small, Resize(mode=mode, size=100)).changed
    assert imaging.resize(small, Resize(mode=mode, size=100, only_if_bigger=False)).image.size == size


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(1, 128),
    mode=st.sampled_from(["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]),
    only_if_bigger=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_the_transform_maps_the_original_onto_the_stored_picture(
    width: int, height: int, size: int, mode: str, only_if_bigger: bool
) -> None:
    if max(width, height) > 20 * min(width, height):
        return  # a strip of one pixel, blown up, is a matter of memory only
    resized = imaging.resize(
        Image.new("RGB", (width, height)), Resize(mode=mode, size=size, only_if_bigger=only_if_bigger)
    )
    sx, sy, dx, dy = resized.transform
    centre = (width * sx / 2 + dx, height * sy / 2 + dy)
    assert abs(centre[0] - resized.image.width / 2) <= 1
    assert abs(centre[1] - resized.image.height / 2) <= 1
    if mode in ("keep_ratio", "keep_ratio_largest", "no"):
        assert (width * sx, height * sy) == pytest.approx(resized.image.size)
    if only_if_bigger:
        assert resized.image.width <= max(width, size)
        assert sx <= 1


def test_a_box_lands_where_its_object_is() -> None:
    image = Image.new("RGB", (640, 400), (255, 255, 255))
    image.paste((255, 0, 0), (200, 120, 280, 200))
    for mode in ("keep_ratio", "keep_ratio_largest", "center_crop", "border"):
        resized = imaging.resize(image, Resize(mode=mode, size=160))
        sx, sy, dx, dy = resized.transform
        x1, y1, x2, y2 = 200 * sx + dx, 120 * sy + dy, 280 * sx + dx, 200 * sy + dy
        red = np.argwhere((np.asarray(resized.image) == (255, 0, 0)).all(-1))
        assert np.abs(np.array([red[:, 1].min(), red[:, 0].min()]) - (x1, y1)).max() <= 1.5
        assert np.abs(np.array([red[:, 1].max() + 1, red[:, 0].max() + 1]) - (x2, y2)).max() <= 1.5


def test_shrinking_averages_all_pixels() -> None:
    checks = np.indices((512, 512)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8))
    small = np.asarray(imaging.resize(image, Resize(size=100)).image).astype(int)
    assert np.abs(small[2:-2, 2:-2] - 127).max() < 12  # picking pixels would give stripes


# -- digests ----------------------------------------------------------------------------------------------------------


def test_the_pixel_digest_is_of_the_picture_not_of_the_file() -> None:
    formats = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
    digests = {imaging.store(encoded(quadrants(), kind, **o), Resize(size=8)).pixel_sha256 for kind, o in formats}
    digests |= {imaging.store(pictures.turned(o, "PNG"), AS_IT_IS).pixel_sha256 for o in range(1, 9)}
    assert digests == {imaging.pixel_digest(quadrants())}
    assert imaging.pixel_digest(Image.new("RGB", (2, 8))) != imaging.pixel_digest(Image.new("RGB", (8, 2)))


def test_storing_is_deterministic() -> None:
    data = encoded(pictures.noise(700, 600), "JPEG")
    assert imaging.store(data, Resize(size=128)) == imaging.store(data, Resize(size=128))
