"""Look at alt text alone: nothing is downloaded."""

from __future__ import annotations

from filters.text_rules import TextStats
from filters.threshold import text_verdicts
from pairmill.plan import Recipe
from schemas.config import RunConfig


def recipe(config: RunConfig) -> Recipe:
    """Measure the alt text of every admitted pair and judge it by the text rules of `keep`. Nothing is fetched, so this
    shows within minutes what a list of URLs is worth and what the rules would drop."""
    return Recipe("text_only", (TextStats(), *text_verdicts(config.keep)))
