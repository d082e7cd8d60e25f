"""The oracle of `captions`, for every pair of many scenes and many claims at once.

Training and evaluation need the truth of whole batches (every image against every caption), where calling
`captions.is_true` for each pair would cost more than the model. `truth_matrix` gives the same answers (a test says
so) with numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from pairmill.procedural.captions import Claim, Mention, parse
from pairmill.procedural.scene import COLOURS, RELATIONS, SHAPES, SIZES, Scene

MOST_OBJECTS = 3
MOST_RELATIONS = 3
MOST_COUNTS = 2

_VALUES = {name: {word: place for place, word in enumerate(words)} for name, words in
           (("colour", tuple(COLOURS)), ("size", tuple(SIZES)), ("shape", SHAPES))}  # fmt: skip
_NAMES = tuple(_VALUES)
_MIRRORED = [RELATIONS.index(word) for word in ("right of", "left of", "above", "below")]


@dataclass(frozen=True)
class SceneTable:
    """Scenes as arrays.

    Args:
        attributes: (scenes, objects, 3) int8, indices of colour, size and shape; -2 where there is no object.
        relations: (scenes, 4, objects, objects) bool, `relations[s, r, a, b]` = object a stands in relation r to b.
    """

    attributes: NDArray[np.int8]
    relations: NDArray[np.bool_]

    def take(self, rows: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> SceneTable:
        """The given rows; those flagged in `mirrored` with left and right exchanged."""
        relations = self.relations[rows]
        if mirrored is not None:
            relations = np.where(mirrored[:, None, None, None], relations[:, _MIRRORED], relations)
        return SceneTable(self.attributes[rows], relations)


@dataclass(frozen=True)
class ClaimTable:
    """Captions' claims as arrays.

    Args:
        mentions: (claims, objects, 3) int8, indices of colour, size and shape; -1 where nothing is said.
        named: (claims, objects) bool, which mentions exist.
        relations: (claims, relations, 3) int8, (subject, relation, other); relation -1 where there is none.
        counts: (claims, counts, 4) int8, colour, size, shape and how many; 0 where there is none.
        false: (claims,) bool, claims that no scene fulfils (contradictory, or no caption of the grammar).
    """

    mentions: NDArray[np.int8]
    named: NDArray[np.bool_]
    relations: NDArray[np.int8]
    counts: NDArray[np.int8]
    false: NDArray[np.bool_]

    def take(self, rows: NDArray[np.int64]) -> ClaimTable:
        """The given rows."""
        return ClaimTable(
            self.mentions[rows], self.named[rows], self.relations[rows], self.counts[rows], self.false[rows]
        )

    def mirrored(self, flags: NDArray[np.bool_]) -> ClaimTable:
        """The claims with left and right exchanged where the flag is set."""
        swap = np.array([*_MIRRORED, -1], dtype=np.int8)
        relations = self.relations.copy()
        relations[flags, :, 1] = swap[relations[flags, :, 1]]
        return ClaimTable(self.mentions, self.named, relations, self.counts, self.false)


def scene_table(scenes: Sequence[Scene]) -> SceneTable:
    """Scenes (of at most `MOST_OBJECTS` objects) as arrays."""
    attributes = np.full((len(scenes), MOST_OBJECTS, 3), -2, dtype=np.int8)
    relations = np.zeros((len(scenes), len(RELATIONS), MOST_OBJECTS, MOST_OBJECTS), dtype=bool)
    for row, scene in enumerate(scenes):
        for place, thing in enumerate(scene.objects):
            attributes[row, place] = [_VALUES[name][getattr(thing, name)] for name in _NAMES]
        for subject, other in permutations(range(len(scene.objects)), 2):
            for kind, relation in enumerate(RELATIONS):
                relations[row, kind, subject, other] = scene.holds(subject, relation, other)
    return SceneTable(attributes, relations)


def claim_table(captions: Sequence[str]) -> ClaimTable:
    """Captions as arrays; one that is not in the grammar, or claims more than any sampled scene holds, is false."""
    size = len(captions)
    mentions = np.full((size, MOST_OBJECTS, 3), -1, dtype=np.int8)
    named = np.zeros((size, MOST_OBJECTS), dtype=bool)
    relations = np.full((size, MOST_RELATIONS, 3), -1, dtype=np.int8)
    counts = np.zeros((size, MOST_COUNTS, 4), dtype=np.int8)
    false = np.zeros(size, dtype=bool)
    for row, caption in enumerate(captions):
        claim = parse(caption)
        if claim is None or not _fill(claim, mentions[row], named[row], relations[row], counts[row]):
            false[row] = True
    return ClaimTable(mentions, named, relations, counts, false)


def _fill(
    claim: Claim,
    mentions: NDArray[np.int8],
    named: NDArray[np.bool_],
    relations: NDArray[np.int8],
    counts: NDArray[np.int8],
) -> bool:
    """Write one claim into its rows; False when no scene fulfils it."""
    single = [place for place, mention in enumerate(claim.mentions) if mention.count is None]
    counted = [mention for mention in claim.mentions if mention.count is not None]
    if claim.contradictory or len(single) > MOST_OBJECTS:
        return False
    if len(claim.relations) > MOST_RELATIONS or len(counted) > MOST_COUNTS:
        return False
    for place, index in enumerate(single):
        mentions[place] = _indices(claim.mentions[index])
        named[place] = True
    for place, (subject, relation, other) in enumerate(claim.relations):
        if subject not in single or other not in single:
            return False
        relations[place] = (single.index(subject), RELATIONS.index(relation), single.index(other))
    for place, mention in enumerate(counted):
        counts[place] = [*_indices(mention), mention.count or 0]
    return True


def _indices(mention: Mention) -> list[int]:
    said = ((name, getattr(mention, name)) for name in _NAMES)
    return [-1 if word is None else _VALUES[name][word] for name, word in said]


def truth_matrix(scenes: SceneTable, claims: ClaimTable) -> NDArray[np.bool_]:
    """(scenes, claims) bool: whether the claim is true of the scene."""
    things = scenes.attributes[:, None, None, :, :]
    said = claims.mentions[None, :, :, None, :]
    present = things[..., 0] >= 0
    fits = ((said == things) | (said == -1)).all(axis=-1) & present
    fits |= ~claims.named[None, :, :, None]
    rows = np.arange(len(scenes.attributes))[:, None]
    truth = np.zeros(fits.shape[:2], dtype=bool)
    for choice in permutations(range(MOST_OBJECTS)):
        chosen = np.array(choice)
        holds = fits[:, :, np.arange(MOST_OBJECTS), chosen].all(axis=2)
        for place in range(MOST_RELATIONS):
            subject, relation, other = (claims.relations[:, place, part] for part in range(3))
            related = scenes.relations[rows, relation[None, :], chosen[subject][None, :], chosen[other][None, :]]
            holds &= related | (relation < 0)[None, :]
        truth |= holds
    for place in range(MOST_COUNTS):
        wanted = claims.counts[None, :, place]
        matches = ((wanted[:, :, None, :3] == things[:, :, 0]) | (wanted[:, :, None, :3] == -1)).all(axis=-1)
        number = (matches & present[:, :, 0]).sum(axis=-1)
        truth &= (wanted[:, :, 3] == 0) | (number == wanted[:, :, 3])
    return truth & ~claims.false[None, :]
