"""The model card of a tiny CLIP, written from its config and what was measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairmill.train.clip import TrainClipConfig

_CARD = """# A tiny CLIP for procedural scenes

Trained by `pairmill train clip` ({scenes:,} procedural scenes, seed {seed}, {steps:,} steps of {batch} scenes) in
{minutes:.0f} minutes on {threads} CPU threads ({hardware}). {parameters:,} parameters: open_clip's `CLIP` with a
ModifiedResNet (width {vision_width}, blocks {vision_layers}) on {image_size} px pictures and a text transformer
(width {text_width}, {text_layers} layers); embedding width {embed_dim}; weights in fp16.

It exists so that pairmill's first command works offline and its tests measure something true. It knows pictures of
one to three coloured shapes and the captions that `pairmill.procedural.captions` writes, and nothing else.

    from pairmill._torchvision import ensure_torchvision
    from pairmill.weights import tiny_clip_dir
    ensure_torchvision()
    import open_clip
    name = f"local-dir:{{tiny_clip_dir()}}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(name)

## Recommended thresholds

| use | rule | precision | recall |
|---|---|---|---|
| mismatched alt texts | cosine of picture and text below **{clip_threshold}** | {clip_precision} | {clip_recall} |
| copies of a picture | cosine of two pictures at least **{same_threshold}** | {same_precision} | {same_recall} |

Chosen on webs (seeds {calibration_seeds}), measured on another (seed {test_seed}): {true:,} true and
{mismatched} mismatched texts; {copies} copies (resized, recompressed, cropped or mirrored) among the {pictures:,}
pictures whose text fits, judged as the recipe judges them by cosine alone. Under the first threshold also fall
{junk:.1%} of boilerplate and foreign texts. Recall of copies by kind: {by_kind}. Webs differ: over those
that the thresholds were chosen on, all together, mismatched texts were caught with precision {clip_precision_before}
and recall {clip_recall_before}, copies with {same_precision_before} and {same_recall_before}. The demo also asks that
copies have like colours (`dedup.max_colour_distance`), since this model looks at objects more than at backgrounds.

## Quality on held-out scenes

| a true caption against | area under the curve | corruption scores lower than its own caption |
|---|---|---|
{rows}

Recall@1 of {retrieved} captions: {recall_at_1:.1%} (a caption that is true of the picture counts). The model is saved,
loaded again through open_clip and measured on JPEG pictures; `metrics.json` holds these figures.

## Limits

- Out of its domain the scores mean nothing. Text outside its vocabulary is spelled in characters, and non-ASCII text
  is unknown to it.
- {weakest}
- Copies mirrored left to right are meant to stay close, so left and right are hard to tell from the embedding.

## Training data and method

Scenes, captions and truth come from `pairmill.procedural`; nothing was downloaded and no other model was used. Three
terms on one embedding: InfoNCE with true captions of other scenes left out (by the oracle) and one corrupted caption a
scene as hard negative; a pairwise sigmoid loss on the oracle's answer for every picture and caption; NT-Xent between
two augmented views of each picture. The config is `train.yaml` beside this file.
"""


def processor_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {platform.machine()}"
    return platform.machine()


def write_card(config: TrainClipConfig, metrics: Mapping[str, Any]) -> None:
    """Write `README.md` into `config.out` from the config and the metrics that `train_clip` measured."""
    captions, mismatch, dedup = metrics["captions"], metrics["mismatch"], metrics["dedup"]
    auc, paired = captions["auc"], captions["paired"]
    rows = [f"| a caption of another scene that is false | {auc['random']:.4f} | |"]
    rows += [f"| a changed {kind} | {auc[kind]:.4f} | {paired[kind]:.1%} |" for kind in paired]
    weakest = min(paired, key=lambda kind: paired[kind])
    card = _CARD.format(
        **config.model_dump(exclude={"out", "work"}),
        minutes=metrics["train_seconds"] / 60,
        hardware=processor_name(),
        parameters=metrics["parameters"],
        clip_threshold=mismatch["threshold"],
        clip_precision=mismatch["precision"],
        clip_recall=mismatch["recall"],
        same_threshold=dedup["threshold"],
        same_precision=dedup["precision"],
        same_recall=dedup["recall"],
        clip_precision_before=mismatch["calibration_precision"],
        clip_recall_before=mismatch["calibration_recall"],
        same_precision_before=dedup["calibration_precision"],
        same_recall_before=dedup["calibration_recall"],
        calibration_seeds=", ".join(map(str, mismatch["calibration_seeds"])),
        test_seed=mismatch["test_seed"],
        true=mismatch["true"],
        mismatched=mismatch["mismatched"],
        junk=mismatch["junk_caught"],
        copies=dedup["copies"],
        pictures=dedup["pictures"],
        by_kind=", ".join(
            f"{kind.removeprefix('copy_')} {share:.1%}" for kind, share in dedup["recall_by_kind"].items()
        ),
        rows="\n".join(rows),
        retrieved=captions["recall_at_1"]["of"],
        recall_at_1=captions["recall_at_1"]["share"],
        weakest=f"Weakest on a changed {weakest}: {paired[weakest]:.1%} score below the caption they were made from.",
    )
    (config.out / "README.md").write_text(card, encoding="utf-8")
