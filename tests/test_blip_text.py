from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pairmill import onednn
from pairmill.blip import Checkpoint, load_captioner
from pairmill.blip_attention import attend_by_parts
from pairmill.blip_text import SeenImages, TextTower
from pairmill.models import ModelRef
from tests.blip_models import library, write_blip

PACKING = onednn.usable()
SIZES = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = SIZES | {f"vision_{name}": value for name, value in SIZES.items()}
    return write_blip(tmp_path_factory.mktemp("text"), "captioner", **sizes)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return library().BlipForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=["packed", "stacked"])
def blip(folder: Path, request: pytest.FixtureRequest) -> Any:
    """With products by oneDNN, and as on a GPU or another processor."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stacked":
            patch.setattr(onednn, "usable", lambda: False)
        yield load_captioner(ModelRef(path=str(folder)), "cpu")


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(7, 60, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_a_decoder_reads_token_by_token_what_transformers_reads_at_once(blip: Checkpoint, plain: Any) -> None:
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = tokens(6, 9)
    expected = plain(pixel_values=pixels.repeat_interleave(2, 0), input_ids=ids)
    states = blip.model.vision_model(pixel_values=pixels).last_hidden_state
    assert torch.allclose(states.repeat_interleave(2, 0), expected.image_embeds, atol=1e-5)
    images = SeenImages(list(states))
    assert blip.text is not None
    past = blip.text.past(6, 9)
    read = [blip.text.read(ids[:, :4], images, past=past)]
    read += [blip.text.read(ids[:, n : n + 1], images, past=past, start=n) for n in range(4, 9)]
    found = blip.model.text_decoder.cls(torch.cat(read, dim=1))
    assert expected.logits.abs().max() > 1
    assert torch.allclose(found, expected.logits, atol=1e-4)


@torch.inference_mode()
def test_an_encoders_padding_is_not_read(plain: Any) -> None:
    """Texts of one image and of several, padded to more than they need."""
    tower = TextTower(plain.text_decoder.bert)
    states = torch.randn(2, 17, 96, generator=torch.Generator().manual_seed(2))
    ids, which, lengths = tokens(4, 8), [0, 1, 1, 0], [8, 3, 5, 1]
    mask = torch.tensor([[n < length for n in range(8)] for length in lengths])
    found = tower.read(ids, SeenImages([states[n] for n in which]), mask=mask)
    for row, (image, length) in enumerate(zip(which, lengths, strict=True)):
        alone = plain.text_decoder.bert(
            ids[row : row + 1, :length], encoder_hidden_states=states[image : image + 1], is_decoder=False
        ).last_hidden_state
        assert torch.allclose(found[row, :length], alone[0], atol=1e-4)


@torch.inference_mode()
def test_a_text_has_the_same_bits_in_any_place_and_company(blip: Checkpoint) -> None:
    assert blip.text is not None
    states = list(torch.randn(5, 17, 96, generator=torch.Generator().manual_seed(3)))
    ids, mask = tokens(5, 12), torch.arange(12)[None] < torch.tensor([[12], [4], [7], [9], [2]])
    expected = blip.text.read(ids, SeenImages(states), mask=mask)
    order = [3, 0, 4, 1, 2]
    other = blip.text.read(ids[order], SeenImages([states[n] for n in order]), mask=mask[order])
    assert torch.equal(other, expected[order])
    same = blip.text.read(ids, SeenImages([states[0]] * 5), mask=mask)
    assert torch.equal(same[0], expected[0])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["by tiles", "by oneDNN", "by neither"])
@pytest.mark.parametrize("logits", [10, 1000, 2**19], ids=["one head", "some heads", "all heads"])
def test_attention_is_the_plain_one(
    folder: Path, dtype: torch.dtype, way: str, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of any size, and the same for an image alone."""
    if way == "by oneDNN" and not PACKING:
        pytest.skip("needs an x86 CPU")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: way == "by tiles")
    monkeypatch.setattr(onednn, "usable", lambda: way == "by oneDNN")
    monkeypatch.setattr(onednn, "LOGITS", logits)
    models = [library().BlipForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval() for _ in range(2)]
    attend_by_parts(models[1].vision_model)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected, found = (model.vision_model(pixel_values=pixels).last_hidden_state.float() for model in models)
    assert (found - expected).abs().max() < (1e-5 if dtype is torch.float32 else 0.1) * expected.abs().max()
    if dtype is torch.bfloat16 and way != "by tiles":
        assert torch.equal(found, expected), "the products and their order are those of transformers"
    other = models[1].vision_model(pixel_values=pixels[[2, 1, 0]]).last_hidden_state.float()
    assert torch.equal(other, found[[2, 1, 0]])
