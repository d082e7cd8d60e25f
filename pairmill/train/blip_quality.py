"""How good a tiny captioner or filter is: on scenes it was not trained on, judged by the oracle.

Models are loaded from their folders by transformers, as any user would load them, so what is measured is what is
shipped. Pictures are held-out scenes at their native size, JPEG or not as the web serves them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from captioners.text import prepare_text
from pairmill._torchvision import ensure_torchvision
from pairmill.blip import quiet_transformers
from pairmill.procedural.captions import CORRUPTIONS, as_typed, corrupt, describe, is_true
from pairmill.procedural.scene import Scene, sample_scene
from pairmill.train.clip_quality import HELD_OUT_SEED, area_under_curve, as_jpeg

_BATCH = 64
_RETRIEVED = 500


def held_out(scenes: int, objects: Sequence[int] | None = None) -> tuple[list[Scene], list[Image.Image], random.Random]:
    """Scenes of a seed that no training uses, their pictures, and the source of chance to go on with.

    Args:
        scenes: how many.
        objects: numbers of objects to draw from, all equally often; null: as `sample_scene` does.
    """
    rng = random.Random(f"held-out:{HELD_OUT_SEED}")
    drawn = [sample_scene(rng, objects=rng.choice(objects) if objects else None) for _ in range(scenes)]
    return drawn, [as_jpeg(scene, rng) for scene in drawn], rng


def measure_captioner(
    folder: Path, *, scenes: int = 1000, prompt: str = "a picture of ", max_length: int = 40
) -> dict[str, Any]:
    """Captions of held-out scenes.

    Returns:
        `greedy` and `nucleus` (top_p 0.9): the share that the oracle finds true; `grammar`: the share that it can
        judge; `words`: mean length; `different`: the share of different texts.
    """
    ensure_torchvision()
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration

    with quiet_transformers():
        model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    drawn, pictures, _ = held_out(scenes)
    ids = tokenizer([prompt.strip()], return_tensors="pt")["input_ids"]
    torch.manual_seed(HELD_OUT_SEED)
    found: dict[str, Any] = {"scenes": scenes, "parameters": sum(p.numel() for p in model.parameters())}
    for method, keywords in (
        ("greedy", {"do_sample": False}),
        ("nucleus", {"do_sample": True, "top_p": 0.9, "top_k": 0}),
    ):
        texts: list[str] = []
        for start in range(0, scenes, _BATCH):
            some = pictures[start : start + _BATCH]
            pixels = processor(images=some, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                tokens = model.generate(
                    pixel_values=pixels,
                    input_ids=ids.expand(len(some), -1).clone(),
                    max_length=max_length,
                    num_beams=1,
                    **keywords,
                )
            texts += [
                t.removeprefix(prompt.strip()).strip() for t in tokenizer.batch_decode(tokens, skip_special_tokens=True)
            ]
        judged = [is_true(text, scene) for text, scene in zip(texts, drawn, strict=True)]
        found[method] = {
            "true": round(sum(bool(j) for j in judged) / scenes, 4),
            "grammar": round(sum(j is not None for j in judged) / scenes, 4),
            "words": round(sum(len(t.split()) for t in texts) / scenes, 2),
            "different": round(len(set(texts)) / scenes, 4),
            "examples": texts[:6],
        }
    return found


def measure_filter(folder: Path, *, scenes: int = 1000, objects: Sequence[int] | None = None) -> dict[str, Any]:
    """True captions of held-out scenes against false ones of every kind.

    Returns:
        `auc`: the chance that a true caption of some scene scores above a false caption of some scene, by kind of
        falsehood; `paired`: the share of corruptions that score below the caption they were made from; `at_half`:
        the share of true captions whose probability is at least 0.5, and of each kind of false ones whose is below;
        `recall_at_1`: the share of pictures whose best caption by cosine, out of 500 or all, is true.
    """
    ensure_torchvision()
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

    with quiet_transformers():
        model = BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    drawn, pictures, rng = held_out(scenes, objects)
    captions = [prepare_text(as_typed(describe(scene, rng), rng)) for scene in drawn]
    with torch.inference_mode():
        parts = [
            model.vision_model(processor(images=pictures[s : s + _BATCH], return_tensors="pt")["pixel_values"])[0]
            for s in range(0, scenes, _BATCH)
        ]
        images = torch.cat(parts)
        enc = tokenizer.convert_tokens_to_ids("[ENC]")

        def probabilities(rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
            scores = []
            for start in range(0, len(rows), _BATCH):
                encoded = tokenizer(list(texts[start : start + _BATCH]), padding=True, return_tensors="pt")
                encoded["input_ids"][:, 0] = enc
                hidden = model.text_encoder(
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    encoder_hidden_states=images[list(rows[start : start + _BATCH])],
                )[0]
                scores.append(model.itm_head(hidden[:, 0]).softmax(1)[:, 1].numpy())
            return np.concatenate(scores)

        some = min(scenes, _RETRIEVED)
        encoded = tokenizer(captions[:some], padding=True, return_tensors="pt")
        words = model.text_proj(
            model.text_encoder(encoded["input_ids"], attention_mask=encoded["attention_mask"])[0][:, 0]
        )
        cosines = (
            functional.normalize(model.vision_proj(images[:some, 0]), dim=1) @ functional.normalize(words, dim=1).T
        )
        found = [bool(is_true(captions[c], drawn[row])) for row, c in enumerate(cosines.argmax(1).tolist())]
        everyone = list(range(scenes))
        true = probabilities(everyone, captions)
        others = [(place + 1 + rng.randrange(scenes - 1)) % scenes for place in range(scenes)]
        false = [(a, b) for a, b in enumerate(others) if not is_true(captions[b], drawn[a])]
        wrong = probabilities([a for a, _ in false], [captions[b] for _, b in false])
        auc = {"random": area_under_curve(true, wrong)}
        at_half = {"true": _share(true >= 0.5), "random": _share(wrong < 0.5)}
        paired = {}
        for kind in CORRUPTIONS:
            changed = [(place, corrupt(captions[place], scene, kind, rng)) for place, scene in enumerate(drawn)]
            pairs = [(place, prepare_text(text)) for place, text in changed if text is not None]
            rows = [place for place, _ in pairs]
            wrong = probabilities(rows, [text for _, text in pairs])
            auc[kind] = area_under_curve(true[rows], wrong)
            paired[kind] = _share(wrong < true[rows])
            at_half[kind] = _share(wrong < 0.5)
    return {
        "scenes": scenes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "auc": auc,
        "paired": paired,
        "at_half": at_half,
        "recall_at_1": {"of": some, "share": _share(np.array(found))},
    }


def _share(flags: np.ndarray) -> float:
    return round(float(np.mean(flags)), 4)
