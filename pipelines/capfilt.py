"""CapFilt and its kin: caption every image, score all texts, and choose among them."""

from __future__ import annotations

from captioners import caption_stage
from captioners.instruct import instruct_steps
from captioners.mixing import mix_step
from filters.clip_score import CaptionClipScore, ClipScore
from filters.heads import EmbeddingHead
from filters.image_rules import ImageStats
from filters.itm import ItmScore
from filters.text_rules import TextStats
from filters.threshold import blank_verdicts, score_verdicts, size_verdicts, text_verdicts
from pairmill.dedup import steps as dedup_steps
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Download everything, since a good image may have a bad alt text; drop images that are too small, too thin or
    blank. Caption what is left, score the alt text and the captions by CLIP and by image-text matching, and let
    ``mix.recipe`` (see `captioners.mixing`) choose which of them stay. Then the further conditions of `keep`, and
    duplicates. Last, of the pairs that are left, the conversations that ``instruct.kinds`` asks for.

    The rules of `keep` over texts judge the alt text here, not the pair: a caption may take its place. So does
    ``mix.clip`` instead of ``keep.clip_score``, which is not asked.

    The steps are the same for every ``mix.recipe``: changing it runs no model, and `web_only` has captions that it does
    not use. Of duplicates, the pair whose alt text fits best by CLIP stays, also where captions stand in for alt texts:
    captions of equal images are equally good, so the alt text tells the pairs apart.
    """
    return Recipe(
        "capfilt",
        (
            TextStats(),
            download_stage(config.download),
            *size_verdicts(config.keep),
            ImageStats(),
            *blank_verdicts(config.keep),
            ClipScore.of(config.models),
            caption_stage(config),
            CaptionClipScore.of(config.models),
            ItmScore.of(config.models, captions=True),
            *EmbeddingHead.all_of(config.models),
            mix_step(config.mix, config.keep.itm, text_verdicts(config.keep)),
            *score_verdicts(config.keep),
            *dedup_steps(config.dedup),
            *instruct_steps(config, captions=True),
        ),
    )
