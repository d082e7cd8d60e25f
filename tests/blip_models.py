"""Small BLIP, BLIP-2 and InstructBLIP checkpoints with random (seeded) weights, in the formats that are published.

Images are 32 px, widths 32. The tokenizers are whole: every lower-case ASCII text encodes. Weights are spread widely
enough that different images and texts give different outputs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pairmill._torchvision import ensure_torchvision

SIDE = 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WORDS = ["a", "an", "the", "picture", "of", "red", "blue", "green", "circle", "square", "triangle", "on", "in", "left"]
WORDS += ["right", "and", "small", "large", "photo"]
QUERIES = 4


def library() -> Any:
    """transformers, where its vision parts load."""
    ensure_torchvision()
    import transformers

    return transformers


_REAL = {
    "special": False,
    "words": 30522,
    "vision_image_size": 384,
    "vision_patch_size": 16,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
REAL = {
    size: _REAL | {f"vision_{name}": value for name, value in vision.items()}
    for size, vision in (("base", _BASE), ("large", _LARGE))
}
"""Keywords of `write_blip` for the sizes of Salesforce/blip-image-captioning-base and -large, and of blip-itm-*."""


def write_blip(folder: Path, kind: str, seed: int = 0, *, special: bool = True, words: int = 0, **sizes: Any) -> Path:
    """A BLIP captioner (`kind` captioner) or filter (`kind` itm).

    Args:
        special: false: the tokenizer lacks [DEC] and [ENC] although the model has rows for them, as in the checkpoints
            of Salesforce.
        words: invented words fill the vocabulary up to so many.
        sizes: of both towers, other than the small ones: hidden_size, intermediate_size, num_hidden_layers,
            num_attention_heads, vocab_size, image_size, patch_size (vision: vision_hidden_size ...).
    """
    transformers = library()
    tokens = bert_tokenizer(folder, special, words)
    begin = tokens["[DEC]"] if special else len(tokens)
    text = {
        "vocab_size": len(tokens) if special else len(tokens) + 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": begin,
        "pad_token_id": tokens["[PAD]"],
        "sep_token_id": tokens["[SEP]"],
        "eos_token_id": tokens["[SEP]"],
    }
    vision = vision_config(seed)
    for name, value in sizes.items():
        target, key = (vision, name.removeprefix("vision_")) if name.startswith("vision_") else (text, name)
        target[key] = value
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    classes = {"captioner": "BlipForConditionalGeneration", "itm": "BlipForImageTextRetrieval"}
    image_processor(folder, vision["image_size"])
    return write_model(folder, getattr(transformers, classes[kind]), config, seed)


def write_blip2(folder: Path, kind: str, seed: int = 0) -> Path:
    """A BLIP-2 captioner (`kind` opt or t5) or filter (`kind` itm)."""
    transformers = library()
    qformer = qformer_config(bert_vocabulary())
    image_processor(folder, SIDE)
    if kind == "itm":
        bert_tokenizer(folder)
        config = transformers.Blip2Config(
            vision_config=vision_config(seed, qkv_bias=True),
            qformer_config=qformer | {"use_qformer_text_input": True},
            num_query_tokens=QUERIES,
            image_text_hidden_size=16,
        )
        return write_model(folder, transformers.Blip2ForImageTextRetrieval, config, seed)
    text, image_token = language_model(folder, kind)
    config = transformers.Blip2Config(
        vision_config=vision_config(seed, qkv_bias=True),
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=image_token,
    )
    return write_model(folder, transformers.Blip2ForConditionalGeneration, config, seed)


def write_instructblip(folder: Path, kind: str, seed: int = 0) -> Path:
    """An InstructBLIP captioner with an OPT or T5 language model."""
    transformers = library()
    image_processor(folder, SIDE)
    bert_tokenizer(folder / "qformer_tokenizer")
    text, image_token = language_model(folder, kind)
    config = transformers.InstructBlipConfig(
        vision_config=vision_config(seed, qkv_bias=True),
        qformer_config=qformer_config(bert_vocabulary()),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=image_token,
    )
    return write_model(folder, transformers.InstructBlipForConditionalGeneration, config, seed)


def vision_config(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": 8,
        **more,
    }


def qformer_config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }


def language_model(folder: Path, kind: str) -> tuple[dict[str, Any], int]:
    """Write a tokenizer; the config of an OPT or T5 that fits it, and the id of the image token."""
    if kind == "opt":
        tokens = word_tokenizer(folder, ["<pad>", "<unk>", "</s>", "<image>"], begin="</s>")
        text: dict[str, Any] = {
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "bos_token_id": tokens["</s>"],
            "eos_token_id": tokens["circle"],  # published ones end at a line's end rather than at </s>
        }
    else:
        tokens = word_tokenizer(folder, ["<pad>", "</s>", "<unk>", "<image>"], end="</s>")
        text = {
            "model_type": "t5",
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "eos_token_id": tokens["</s>"],
            "decoder_start_token_id": tokens["<pad>"],
        }
    return text | {"vocab_size": len(tokens), "pad_token_id": tokens["<pad>"]}, tokens["<image>"]


def write_model(folder: Path, kind: Any, config: Any, seed: int) -> Path:
    """The model with seeded random weights, as safetensors; the caller's random state is left alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            scale = 0.3 if parameter.ndim == 1 or "embed" in name or "query_tokens" in name else 2.0
            size = 1.0 if parameter.ndim == 1 or "embed" in name else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale * size)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return folder


def image_processor(folder: Path, side: int) -> None:
    """preprocessor_config.json as the published checkpoints have it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "BlipImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": side, "width": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def bert_vocabulary(special: bool = True, words: int = 0) -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [*(SPECIAL if special else SPECIAL[:5]), *letters, *("##" + letter for letter in letters)]
    tokens += [word for word in WORDS if len(word) > 1]
    tokens += [f"word{n}" for n in range(words - len(tokens))]
    return {token: place for place, token in enumerate(tokens)}


def bert_tokenizer(folder: Path, special: bool = True, words: int = 0) -> dict[str, int]:
    """A WordPiece tokenizer, with [DEC] and [ENC] or as Salesforce's checkpoints have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = bert_vocabulary(special, words)
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    extra = {"additional_special_tokens": ["[DEC]", "[ENC]"]} if special else {}
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **extra).save_pretrained(folder)
    return vocabulary


def word_tokenizer(folder: Path, special: list[str], begin: str = "", end: str = "") -> dict[str, int]:
    """A tokenizer of whole words for a language model, with the image token that BLIP-2's processor adds."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}".strip(),
        special_tokens=[(token, vocabulary[token]) for token in (begin, end) if token],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(folder)
    return vocabulary
