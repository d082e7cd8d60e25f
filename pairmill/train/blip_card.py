"""The model card of a captioner or filter, written from its config and what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from pairmill.train.blip_model import CAPTIONER, write_text
from pairmill.train.clip_card import processor_name
from pairmill.train.fit import FitConfig
from pairmill.train.samples import CocoData, ProceduralData, SeveralData

_USE = {
    True: """    from transformers import BlipForConditionalGeneration
    model = BlipForConditionalGeneration.from_pretrained("{folder}")""",
    False: """    from transformers import BlipForImageTextRetrieval
    model = BlipForImageTextRetrieval.from_pretrained("{folder}")    # [ENC] as the first token, then itm_head""",
}


def write_card(config: FitConfig, kind: str, metrics: Mapping[str, Any]) -> None:
    """Write `README.md` into `config.out`."""
    captioner = kind == CAPTIONER
    what, key = ("captioner", "captioner") if captioner else ("image-text matching filter", "itm")
    minutes = metrics["train_seconds"] / 60
    batch = config.batch * config.accumulate
    start = "from scratch" if config.scratch else f"from {config.model.name or 'a local checkpoint'}"  # type: ignore[union-attr]
    threads = f"{metrics['threads']} CPU thread{'s' if metrics['threads'] > 1 else ''} ({processor_name()})"
    place = threads if metrics["device"] == "cpu" else "a GPU"
    told = (
        f"`{kind}` of transformers, {metrics['parameters']:,} parameters, weights in {config.save}. Trained by "
        f"`pairmill train {'captioner' if captioner else 'filter'}` {start} on {_data(config)}: "
        f"{metrics['steps']:,} steps of {batch} images ({metrics['samples_seen']:,} seen), seed {config.seed}, "
        f"{config.precision} arithmetic, in {minutes:.0f} minutes on {place}. "
        "`train.yaml` beside this file does it again; `curves.png` shows loss and learning rate."
    )
    lines = [
        f"# A BLIP {what}: {config.out.name}",
        "",
        *textwrap.wrap(told, 116),
        "",
        f"In a run: `models: {{{key}: {{path: FOLDER}}}}`. In Python:",
        "",
        _USE[captioner].format(folder="FOLDER"),
        "",
    ]
    if metrics["evaluation"]:
        lines += [f"## Quality on {metrics['held_out']:,} held-out images", "", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics["evaluation"].items()] + [""]
    if "oracle" in metrics:
        lines += _captioner_quality(metrics["oracle"]) if captioner else _filter_quality(metrics["oracle"])
    if isinstance(config.data, ProceduralData):
        lines += [
            "## Limits",
            "",
            "It knows pictures of one to three coloured shapes and the captions that `pairmill.procedural.captions`",
            "writes, and nothing else. It exists so that pairmill's first command works offline and its tests measure",
            "something true. Scenes, captions and truth come from `pairmill.procedural`; nothing was downloaded and no",
            "other model was used.",
            "",
        ]
    write_text(config.out / "README.md", "\n".join(lines))


def _data(config: FitConfig) -> str:
    told = []
    for part in config.data.parts if isinstance(config.data, SeveralData) else (config.data,):
        if isinstance(part, ProceduralData):
            told.append(f"{part.scenes:,} procedural scenes")
        else:
            told.append("COCO captions" if isinstance(part, CocoData) else "a pairmill dataset")
    return " and ".join(told)


def _captioner_quality(found: Mapping[str, Any]) -> list[str]:
    lines = [f"## Captions of {found['scenes']:,} held-out scenes, judged by the oracle", ""]
    lines += ["| decoding | true | in the grammar | words | different |", "|---|---|---|---|---|"]
    for method in ("greedy", "nucleus"):
        row = found[method]
        name = "nucleus, top_p 0.9" if method == "nucleus" else method
        lines.append(f"| {name} | {row['true']:.1%} | {row['grammar']:.1%} | {row['words']} | {row['different']:.1%} |")
    examples = "; ".join(f'"{text}"' for text in found["nucleus"]["examples"][:4])
    return [*lines, "", *textwrap.wrap(f"Such as: {examples}.", 116), ""]


def _filter_quality(found: Mapping[str, Any]) -> list[str]:
    lines = [f"## True captions of {found['scenes']:,} held-out scenes against false ones", ""]
    lines += ["| falsehood | area under the curve | below its own caption | below 0.5 |", "|---|---|---|---|"]
    for kind, auc in found["auc"].items():
        paired = f"{found['paired'][kind]:.1%}" if kind in found["paired"] else ""
        lines.append(f"| {kind} | {auc:.4f} | {paired} | {found['at_half'][kind]:.1%} |")
    return [*lines, "", f"Of the true captions {found['at_half']['true']:.1%} have a probability of at least 0.5.", ""]
