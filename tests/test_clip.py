"""CLIP-like models: short texts, preprocessing and layers give what the library gives."""

from __future__ import annotations

import copy
import itertools
import random
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from pairmill._torchvision import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402 (needs torchvision)
from open_clip.transform import image_transform  # noqa: E402

from pairmill import clip as clip_module  # noqa: E402
from pairmill import onednn  # noqa: E402
from pairmill.clip import LoadedClip, ShortTexts  # noqa: E402
from pairmill.clip_pixels import recognised  # noqa: E402
from pairmill.models import ModelRef, load_clip  # noqa: E402
from pairmill.weights import tiny_clip_dir  # noqa: E402

SMALL_VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
VIT_B_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
SMALL_TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TEXTS = [
    "cat",
    "a photo of a dog on the beach at sunset",
    "",
    "PU Leather Passport Holder Case Cover Travel Wallet -- Colorful World map design, Keep calm and travel on, custom",
    "word " * 100,
    "used Peugeot 108 PURETECH ALLURE in wirral-cheshire, five doors, one owner from new, with a full service history",
    "two words",
]


def model_of(text: dict[str, Any], kind: Any = open_clip.CLIP, vision: dict[str, Any] = SMALL_VISION) -> Any:
    torch.manual_seed(0)
    return kind(embed_dim=64, vision_cfg=vision, text_cfg=text).eval()


def loaded(model: Any, context: int = 77) -> LoadedClip:
    transform = image_transform(32, is_train=False)
    tokenizer = open_clip.SimpleTokenizer(context_length=context)
    return LoadedClip(model, transform, tokenizer, "cpu", torch.float32)


def of_library(model: Any, ids: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return normalize(model.encode_text(ids), dim=-1).numpy()


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text"),
    [(open_clip.CLIP, VIT_B_TEXT), (open_clip.CustomTextCLIP, SMALL_TEXT | {"context_length": 77})],
    ids=["text tower of ViT-B", "small tower of its own"],
)
def test_short_passes_give_what_the_full_context_gives(kind: Any, text: dict[str, Any]) -> None:
    clip = loaded(model_of(text, kind))
    found = clip.embed_texts(TEXTS)
    assert np.abs(found - of_library(clip.model, clip.tokenizer(TEXTS))).max() < 1e-6
    assert sorted(set(clip._lengths(clip.tokenizer(TEXTS)).tolist())) == [8, 16, 24, 32, 77]


def test_short_passes_give_what_the_full_context_gives_for_the_shipped_model() -> None:
    clip = load_clip(ModelRef(path=str(tiny_clip_dir())), "cpu")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip_dir()}", require_pretrained=True)
    texts = ["red circle", "a small red square to the left of a large blue triangle", "a photo", "x", ""] * 3
    assert len(set(clip._lengths(clip.tokenizer(texts)).tolist())) > 1
    assert np.abs(clip.embed_texts(texts) - of_library(model.eval(), clip.tokenizer(texts))).max() < 1e-6


def test_a_text_has_the_pass_of_its_own_length_whatever_comes_with_it() -> None:
    clip = loaded(model_of(SMALL_TEXT), 24)
    together = clip.embed_texts(TEXTS)
    alone = np.concatenate([clip.embed_texts([text]) for text in TEXTS])
    assert np.array_equal(together, alone)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    assert np.array_equal(clip.embed_texts([TEXTS[n] for n in order]), together[order])


@pytest.mark.parametrize(
    "text",
    [
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},  # SigLIP
        {"no_causal_mask": True},  # CLIPA
        {"pool_type": "last"},
        {"embed_cls": True},  # CoCa
    ],
)
def test_towers_that_may_see_what_follows_a_text_read_the_full_context(text: dict[str, Any]) -> None:
    clip = loaded(model_of({**SMALL_TEXT, **text}, open_clip.CustomTextCLIP), 24)
    assert ShortTexts.of(clip.model) is None
    assert set(clip._lengths(clip.tokenizer(TEXTS)).tolist()) == {24}
    assert np.abs(clip.embed_texts(TEXTS) - of_library(clip.model, clip.tokenizer(TEXTS))).max() < 1e-6


def test_an_end_of_text_by_its_id_may_also_be_the_padding() -> None:
    clip = loaded(model_of({**SMALL_TEXT, "pool_type": "eos", "eos_id": 49407}), 24)
    ids = clip.tokenizer(TEXTS)
    ids[ids == 0] = 49407
    short = LoadedClip(clip.model, clip.preprocess, lambda _: ids, "cpu", torch.float32)
    assert len(set(short._lengths(ids).tolist())) > 1
    assert np.abs(short.embed_texts(TEXTS) - of_library(clip.model, ids)).max() < 1e-6


def test_a_tokenizer_neither_keeps_all_words_nor_reads_on_behind_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_module, "KNOWN_WORDS", 50)
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(300)]
    texts = ["".join(words * 4), "=" * 9000, "  \n" * 5000 + "a dog", "", "<end_of_text>", "&amp;" * 3000]
    texts += [" ".join(words[n : n + 10]) for n in range(0, 300, 10)]
    tokenizer = clip_module.bounded(open_clip.SimpleTokenizer())
    expected = open_clip.SimpleTokenizer()(texts)
    for _ in range(2):
        found = torch.cat([tokenizer(texts[n : n + 4]) for n in range(0, len(texts), 4)])
        assert torch.equal(found, expected)
    assert len(tokenizer.cache) == 50
    assert max(map(len, tokenizer.cache)) < 77 * 50
    other = object()
    assert clip_module.bounded(other) is other


# -- preprocessing ----------------------------------------------------------------------------------------------------


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3))
    return Image.fromarray(noise.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


SIZES = [(64, 64), (65, 64), (63, 64), (1, 1), (400, 300), (333, 501), (57, 91), (640, 31), (64, 400), (127, 255)]


@pytest.mark.parametrize("size", [64, (64, 64), (72, 48)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("mode", "fill"), [("shortest", 0), ("longest", 0), ("longest", 127), ("squash", 0)])
def test_preprocessing_is_the_librarys_to_the_bit(size: Any, interpolation: str, mode: str, fill: int) -> None:
    transform = image_transform(
        size, is_train=False, resize_mode=mode, interpolation=interpolation, fill_color=fill, mean=(0.48, 0.45, 0.41)
    )
    pixels = recognised(transform)
    assert pixels is not None
    images = [picture(*size) for size in SIZES]
    prepared = torch.stack([pixels.prepare(image) for image in images])
    assert prepared.dtype == torch.uint8
    assert torch.equal(pixels.normalise(prepared), torch.stack([transform(image) for image in images]))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_of_a_line_only_the_middle_is_resized(interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what the library makes of it, which resizes all of it."""
    transform = image_transform(64, is_train=False, interpolation=interpolation)
    pixels = recognised(transform)
    assert pixels is not None
    images = [picture(*size) for size in ((3, 300), (701, 7), (1, 70), (90, 1), (4, 321), (3, 1000), (999, 12))]
    expected, resize, sizes = [transform(image) for image in images], Image.Image.resize, []

    def resized(image: Image.Image, size: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", resized)
    found = pixels.normalise(torch.stack([pixels.prepare(image) for image in images]))
    apart = (found - torch.stack(expected)).abs()
    assert apart.max() < 1.1 / 255 / 0.26
    assert (apart > 1e-6).float().mean() < 0.05
    assert set(sizes) == {(64, 64)}


def test_an_image_too_thin_for_the_library_has_one_row() -> None:
    transform = image_transform(64, is_train=False, resize_mode="longest")
    pixels = recognised(transform)
    assert pixels is not None
    with pytest.raises(ValueError, match="must be > 0"):
        transform(picture(2000, 3))
    assert pixels.prepare(picture(2000, 3)).shape == (64, 64, 3)


def test_a_transform_that_is_not_known_is_used_as_it_is() -> None:
    from torchvision.transforms import Compose, GaussianBlur

    plain = image_transform(32, is_train=False)
    other = Compose([GaussianBlur(3, 1.0), *plain.transforms])
    assert recognised(other) is None
    assert recognised(Compose(plain.transforms[-2:])) is None
    assert recognised(image_transform(32, is_train=True)) is None
    model = model_of(SMALL_TEXT)
    images = [picture(50, 40), picture(40, 40)]
    found = LoadedClip(model, other, open_clip.SimpleTokenizer(context_length=24), "cpu", torch.float32).embed_images(
        images
    )
    with torch.inference_mode():
        expected = normalize(model.encode_image(torch.stack([other(image) for image in images])), dim=-1)
    assert np.allclose(found, expected.numpy(), atol=1e-6)


# -- layers -----------------------------------------------------------------------------------------------------------

packing = pytest.mark.skipif(not onednn.usable(), reason="needs an x86 CPU")


def encoded(model: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    pixels = torch.randn(5, 3, side, side, generator=generator)
    ids = torch.randint(1, 49000, (5, 24), generator=generator)
    with torch.inference_mode():
        return normalize(model.encode_image(pixels), dim=-1), normalize(model.encode_text(ids), dim=-1)


VISIONS: dict[str, dict[str, Any]] = {
    "vit": SMALL_VISION,
    "vit of odd size": {**SMALL_VISION, "image_size": 33},
    "layer scale": {**SMALL_VISION, "ls_init_value": 0.1},
    "query and key norms": {**SMALL_VISION, "block_type": "custom", "qk_norm": True},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "attention pool": {**SMALL_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
}


@packing
@pytest.mark.parametrize("vision", VISIONS.values(), ids=VISIONS)
@pytest.mark.parametrize("gelu", ["gelu", "quick gelu", "gelu by tanh"])
def test_packed_layers_give_what_the_librarys_give(vision: dict[str, Any], gelu: str) -> None:
    torch.manual_seed(0)
    text = SMALL_TEXT | ({"act_kwargs": {"approximate": "tanh"}} if gelu == "gelu by tanh" else {})
    model = open_clip.CLIP(64, vision, text, quick_gelu=gelu == "quick gelu").eval()
    expected = encoded(model)
    onednn.pack(model)
    assert any(isinstance(module, onednn.PackedLinear) for module in model.modules())
    for found, wanted in zip(encoded(model), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-6


@packing
def test_packed_siglip_gives_what_the_librarys_gives() -> None:
    text = {**SMALL_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    model = model_of(text, open_clip.CustomTextCLIP)
    expected = encoded(model)
    onednn.pack(model)
    for found, wanted in zip(encoded(model), expected, strict=True):
        assert (found - wanted).abs().max() < 1e-6


@packing
def test_layers_whose_weights_a_module_takes_are_left() -> None:
    from timm.models.beit import Attention

    torch.manual_seed(0)
    attention = Attention(32, num_heads=2, qkv_bias=True).eval()
    inputs = torch.randn(2, 5, 32)
    with torch.inference_mode():
        expected = attention(inputs)
        onednn.pack(attention)
        assert torch.allclose(attention(inputs), expected, atol=1e-6)


@pytest.mark.parametrize("folder", [None, tiny_clip_dir()], ids=["random weights", "shipped model"])
def test_bf16_is_as_near_to_fp32_as_the_docs_say(folder: Any) -> None:
    """docs/config.md tells of 0.0062 at most."""
    if folder is None:
        precise = model_of({**SMALL_TEXT, "width": 256, "heads": 4, "layers": 6})
        rough = copy.deepcopy(precise)
        open_clip.model.convert_weights_to_lp(rough, torch.bfloat16)
        onednn.pack(rough)
        clips = [loaded(precise, 24), LoadedClip(rough, *_rest(loaded(precise, 24)), torch.bfloat16)]
        texts = TEXTS
    else:
        clips = [load_clip(ModelRef(path=str(folder)), "cpu", precision) for precision in ("fp32", "bf16")]
        texts = ["red circle", "a small red square to the left of a large blue triangle", "a photo", "x"]
    images = [picture(w, h) for w, h in itertools.product((40, 90, 64), (40, 64))]
    fp32, bf16 = (clip.embed_images(images) @ clip.embed_texts(texts).T for clip in clips)
    assert 0 < np.abs(bf16 - fp32).max() < 0.01


def _rest(clip: LoadedClip) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    return clip.preprocess, clip.tokenizer, clip.device
