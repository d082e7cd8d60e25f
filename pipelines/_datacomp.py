"""What the DataComp recipes share: DataComp's baseline filters (Gadre et al., 2023, section 3.4 and appendix E).

Each names the model that the paper scored with, unless the config names one of its own (anything but the default, the
shipped tiny model). None removes duplicates, as in the paper.
"""

from __future__ import annotations

from filters.clip_score import ClipScore
from filters.concepts import NamesConcept, NearReference
from filters.text_rules import TextStats
from filters.threshold import InLanguage, clip_verdict
from pairmill.errors import ConfigError
from pairmill.models import TINY
from pairmill.plan import Recipe
from pairmill.sources import download_stage
from pairmill.stage import Step
from schemas.config import ModelChoice, RunConfig

L14 = ModelChoice(name="ViT-L-14", pretrained="openai")
B32 = ModelChoice(name="ViT-B-32", pretrained="openai")

ENGLISH = InLanguage(("en",), min_score=0.0)
"""English is the most probable language, however unsure: as in the paper."""


def clip_score(config: RunConfig, published: ModelChoice) -> ClipScore:
    """The CLIP score of the config's model, or of the published one when the config only has the default."""
    models = config.models
    if models.clip == ModelChoice(name=TINY):
        models = models.model_copy(update={"clip": published})
    return ClipScore.of(models)


def clip_recipe(name: str, config: RunConfig, published: ModelChoice, condition: str) -> Recipe:
    """Download everything, score it, and keep what meets the condition."""
    return Recipe(name, (download_stage(config.download), clip_score(config, published), clip_verdict(condition)))


def text_steps(config: RunConfig) -> tuple[Step, ...]:
    """English texts that name a concept of the file in ``options.concept_words``."""
    return (TextStats(), ENGLISH, NamesConcept.from_file(_option(config, "concept_words")))


def near_reference(config: RunConfig) -> NearReference:
    """The verdict of the embeddings in ``options.concept_images``, with ``options.cells`` cells."""
    return NearReference.from_file(_option(config, "concept_images"), config.options.get("cells"), config.seed)


def _option(config: RunConfig, key: str) -> str:
    value = config.options.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"recipe {config.recipe} needs options.{key}: the path of a file (see its docstring)")
    return value
