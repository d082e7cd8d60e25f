"""Tiny OWLv2, Grounding DINO and SAM checkpoints with random weights, in the files of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.blip_models import library

WORDS = ["a", "photo", "of", "dog", "cat", "red", "ball", "hot", "horse", "tree", "table", "person", "man", "traffic"]
WORDS += ["light", "kite", "bird", "cup", "the", "on"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def processor(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 0.00392156862745098}
    (folder / "preprocessor_config.json").write_text(json.dumps(shared | config))


def written(folder: Path, kind: Any, config: Any, seed: int, norms: float = 1.0) -> Path:
    """The model with seeded random weights wide enough that images and texts give different outputs; all weights of
    norms are `norms`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                scale = 0.5 if "embedding" in name else 1.5 * parameter[0].numel() ** -0.5
                scale = 0.2 * scale if "bbox_embed" in name else scale
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif parameter.ndim == 1 and bool((parameter == 1).all()):
                parameter.fill_(norms)
            elif parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def owlv2(folder: Path, seed: int = 0, side: int = 48) -> Path:
    """24 x 24 ... patches of 8 pixels; words are tokens, the last id ends a text, 0 pads, as CLIP's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    transformers = library()
    tokens = ["!", "<unk>", *WORDS, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in tokens[-2:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokens[-2]} $A {tokens[-1]}", special_tokens=ends
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="!",
        unk_token="<unk>",
        bos_token=tokens[-2],
        eos_token=tokens[-1],
        model_max_length=16,
    ).save_pretrained(folder)
    processor(
        folder,
        image_processor_type="Owlv2ImageProcessor",
        image_mean=MEAN,
        image_std=STD,
        do_pad=True,
        resample=2,
        size={"height": side, "width": side},
    )
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Owlv2Config(
        text_config=shared
        | {
            "vocab_size": len(tokens),
            "max_position_embeddings": 16,
            "bos_token_id": len(tokens) - 2,
            "eos_token_id": len(tokens) - 1,
            "pad_token_id": 0,
        },
        vision_config=shared | {"image_size": side, "patch_size": 8},
        projection_dim=32,
    )
    return written(folder, transformers.Owlv2ForObjectDetection, config, seed)


def grounding_dino(folder: Path, seed: int = 0) -> Path:
    """With BERT's ids of [CLS], [SEP], the dot and the question mark, which the model knows by number."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    transformers = library()
    places = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    taken = set(places.values())
    free = (n for n in range(1040) if n not in taken)
    pieces = [*WORDS, *"abcdefghijklmnopqrstuvwxyz-'", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = places | {piece: next(free) for piece in dict.fromkeys(pieces) if piece not in places}
    vocabulary |= {f"[unused{n}]": n for n in free}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 101), ("[SEP]", 102)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    processor(
        folder,
        image_processor_type="GroundingDinoImageProcessor",
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_pad=True,
        size={"shortest_edge": 96, "longest_edge": 160},
    )
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "image_size": 64,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 2, 2, 4],
            "window_size": 4,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        text_config=shared | {"model_type": "bert", "vocab_size": 1040, "max_position_embeddings": 64},
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=2,
        decoder_n_points=2,
        num_queries=30,
        max_text_len=24,
    )
    return written(folder, transformers.GroundingDinoForObjectDetection, config, seed, norms=0.7)


def sam(folder: Path, seed: int = 0) -> Path:
    """Images of 64 pixels at their longer side, masks of 32."""
    transformers = library()
    processor(
        folder,
        image_processor_type="SamImageProcessor",
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        do_pad=True,
        do_convert_rgb=True,
        size={"longest_edge": 64},
        mask_size={"longest_edge": 32},
        pad_size={"height": 64, "width": 64},
        mask_pad_size={"height": 32, "width": 32},
    )
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 8,
            "mlp_dim": 48,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    return written(folder, transformers.SamModel, config, seed)
