"""How good a tiny CLIP is, measured on scenes and webs it was not trained on.

The model is loaded from its folder as any user would load it, so what is measured is what is shipped. Thresholds
are chosen on some webs (`CALIBRATION_SEEDS`) and their precision and recall measured on another (`TEST_SEED`).
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pairmill._torchvision import ensure_torchvision
from pairmill.dedup.semantic import greedy_duplicates
from pairmill.procedural.captions import CORRUPTIONS, as_typed, corrupt, describe, is_true
from pairmill.procedural.scene import Scene, render, sample_scene
from pairmill.procedural.web import Kind, WebRow, decode, make_rows, served_bytes

HELD_OUT_SEED = 900_001
CALIBRATION_SEEDS = (900_002, 900_004, 900_005)
TEST_SEED = 900_003

_BATCH = 128
_RETRIEVED = 500
_CHANGED_COPIES = (Kind.COPY_RESIZED, Kind.COPY_RECOMPRESSED, Kind.COPY_CROPPED, Kind.COPY_MIRRORED)


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP as open_clip loads it from a folder.

    Args:
        model: in evaluation mode, on the CPU.
        preprocess: turns a PIL picture into (3, side, side).
        tokenize: turns texts into (texts, context) token ids.
    """

    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[[list[str]], torch.Tensor]

    def images(self, pictures: Iterable[Image.Image]) -> NDArray[np.float32]:
        """(pictures, width) float32 embeddings of length 1."""
        parts, waiting = [], []
        for picture in pictures:
            waiting.append(self.preprocess(picture))
            if len(waiting) == _BATCH:
                parts.append(self._encode_images(waiting))
                waiting = []
        if waiting:
            parts.append(self._encode_images(waiting))
        return np.concatenate(parts)

    def _encode_images(self, waiting: list[torch.Tensor]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(self.model.encode_image(torch.stack(waiting), normalize=True).float().numpy())

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, width) float32 embeddings of length 1."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(texts), 2 * _BATCH):
                tokens = self.tokenize(list(texts[start : start + 2 * _BATCH]))
                parts.append(np.asarray(self.model.encode_text(tokens, normalize=True).float().numpy()))
        return np.concatenate(parts)


def load_clip(folder: Path) -> LoadedClip:
    """Load open_clip's folder format through open_clip's own factory."""
    ensure_torchvision()
    import open_clip

    name = f"local-dir:{folder.resolve()}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True)
    model.eval()
    return LoadedClip(model, preprocess, open_clip.get_tokenizer(name))


def measure_clip(folder: Path, *, scenes: int = 1000, pairs: int = 2000) -> dict[str, Any]:
    """Everything `metrics.json` holds about quality.

    Args:
        folder: the model.
        scenes: held-out scenes for the caption measures.
        pairs: pairs of each held-out web.
    """
    clip = load_clip(folder)
    return {
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "captions": measure_captions(clip, scenes=scenes),
        **measure_webs(clip, pairs=pairs),
    }


def measure_captions(clip: LoadedClip, *, scenes: int, seed: int = HELD_OUT_SEED) -> dict[str, Any]:
    """True captions of held-out scenes, as JPEG, against false ones of every kind.

    Returns:
        `auc`: the chance that a true caption of some scene scores above a false caption of some scene, by kind of
        falsehood; `paired`: the share of corruptions that score below the caption they were made from;
        `recall_at_1`: the share of pictures whose best caption out of `of` is true.
    """
    rng = random.Random(f"held-out:{seed}")
    drawn = [sample_scene(rng) for _ in range(scenes)]
    images = clip.images(as_jpeg(scene, rng) for scene in drawn)
    captions = [as_typed(describe(scene, rng), rng) for scene in drawn]
    texts = clip.texts(captions)
    true = (images * texts).sum(axis=1)
    auc, paired = {}, {}
    others = [(place + 1 + rng.randrange(scenes - 1)) % scenes for place in range(scenes)]
    false = [(a, b) for a, b in enumerate(others) if not is_true(captions[b], drawn[a])]
    scores = (images[[a for a, _ in false]] * texts[[b for _, b in false]]).sum(axis=1)
    auc["random"] = area_under_curve(true, scores)
    for kind in CORRUPTIONS:
        changed = [(place, corrupt(captions[place], scene, kind, rng)) for place, scene in enumerate(drawn)]
        rows = [place for place, caption in changed if caption is not None]
        scores = (images[rows] * clip.texts([caption for _, caption in changed if caption is not None])).sum(axis=1)
        auc[kind] = area_under_curve(true[rows], scores)
        paired[kind] = round(float((scores < true[rows]).mean()), 4)
    some = min(scenes, _RETRIEVED)
    best = (images[:some] @ texts[:some].T).argmax(axis=1)
    found = [bool(is_true(captions[choice], drawn[place])) for place, choice in enumerate(best)]
    return {
        "scenes": scenes,
        "auc": auc,
        "paired": paired,
        "recall_at_1": {"of": some, "share": round(float(np.mean(found)), 4)},
    }


def as_jpeg(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene after a JPEG round trip."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "JPEG", quality=rng.randint(60, 95))
    return Image.open(buffer).convert("RGB")


def area_under_curve(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """The chance that a positive scores above a negative; ties count half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return round(float(below.mean() / 2 / len(negative)), 5)


@dataclass(frozen=True)
class _WebScores:
    """One web's measures: scores of true and of mismatched texts and of junk, and the near pairs of its pictures.

    Args:
        true, mismatched, junk: cosines of picture and text.
        copies: cosine of each changed copy with its original, by kind.
        score: (rows,) cosine of each row's picture and text.
        source: (rows,) which picture a row shows: equal for copies of one picture.
        ours: rows that the search for copies judges: texts in the grammar, and no equal bytes, which need no search.
        first, second, cosine: the pairs of rows whose pictures have a cosine of at least `_NEAR`.
    """

    true: NDArray[np.float32]
    mismatched: NDArray[np.float32]
    junk: NDArray[np.float32]
    copies: dict[Kind, NDArray[np.float32]]
    score: NDArray[np.float32]
    source: NDArray[np.int64]
    ours: NDArray[np.bool_]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float32]


_NEAR = 0.9
"""Below this cosine no threshold for copies is looked for."""


@dataclass(frozen=True)
class _Verdicts:
    """How many rows were dropped as copies, how many of them rightly, and how many copies there were."""

    right: int
    dropped: int
    copies: int

    @property
    def precision(self) -> float:
        """Share of the dropped rows that are copies of what they were said to copy."""
        return self.right / self.dropped if self.dropped else 1.0

    @property
    def recall(self) -> float:
        """Share of the copies that were dropped: of m rows that show one picture, m - 1 are copies."""
        return self.right / self.copies if self.copies else 1.0


def copy_verdicts(webs: Sequence[_WebScores], clip_threshold: float, same_threshold: float) -> _Verdicts:
    """What the recipe does (`pairmill.dedup.semantic.SemanticDuplicates`) to the pairs whose text fits."""
    right = dropped = copies = 0
    for web in webs:
        judged = web.ours & (web.score >= clip_threshold)
        rank = np.empty(len(judged), dtype=np.int64)
        rank[np.lexsort((np.arange(len(judged)), -web.score))] = np.arange(len(judged))
        edge = (web.cosine >= same_threshold) & judged[web.first] & judged[web.second]
        ends = np.stack([web.first[edge], web.second[edge]])
        order = np.argsort(rank[ends], axis=0)
        senior, junior = np.take_along_axis(ends, order, axis=0)
        gone = greedy_duplicates(rank, junior, senior)
        stays = gone[junior] & ~gone[senior]
        centre = np.arange(len(judged))
        most_similar_last = np.argsort(web.cosine[edge][stays], kind="stable")
        centre[junior[stays][most_similar_last]] = senior[stays][most_similar_last]
        right += int((gone & (web.source[centre] == web.source)).sum())
        dropped += int(gone.sum())
        copies += int(judged.sum()) - len(np.unique(web.source[judged]))
    return _Verdicts(right, dropped, copies)


def best_same_threshold(webs: Sequence[_WebScores], clip_threshold: float) -> float:
    """The cosine for which the lesser of precision and recall of `copy_verdicts` is greatest, to 3 decimals.

    In the middle of the longest run of equally good values.
    """
    values = np.round(np.arange(_NEAR, 1.0, 0.001), 3)
    found = [copy_verdicts(webs, clip_threshold, value) for value in values]
    lesser = np.array([min(verdicts.precision, verdicts.recall) for verdicts in found])
    best = values[lesser == lesser.max()]
    return float(best[len(best) // 2])


def measure_webs(clip: LoadedClip, *, pairs: int) -> dict[str, Any]:
    """Mismatch detection and semantic deduplication on the webs' own pictures, texts and copies.

    Returns:
        `mismatch`: the cosine under which a text is judged not to fit, with the precision and recall of catching
        mismatched texts of the test web; `junk_caught`: boilerplate and foreign texts under it.
        `dedup`: the cosine from which two pictures are judged to show the same, with precision and recall of the
        verdict (`copy_verdicts`); `recall_by_kind`: copies whose cosine with their original reaches it.
    """
    chosen = [_score_web(clip, seed, pairs) for seed in CALIBRATION_SEEDS]
    test = _score_web(clip, TEST_SEED, pairs)
    true, mismatched = (np.concatenate([getattr(web, name) for web in chosen]) for name in ("true", "mismatched"))
    clip_threshold = round(-best_threshold(-mismatched, -true), 3)
    caught, lost = (test.mismatched < clip_threshold).sum(), (test.true < clip_threshold).sum()
    caught_before = (mismatched < clip_threshold).sum()
    same_threshold = best_same_threshold(chosen, clip_threshold)
    found, before = (copy_verdicts(webs, clip_threshold, same_threshold) for webs in ([test], chosen))
    quantiles = (0.5, 0.95, 0.99)
    return {
        "mismatch": {
            "threshold": clip_threshold,
            "precision": _share(int(caught), int(caught + lost)),
            "recall": _share(int(caught), len(test.mismatched)),
            "mismatched": len(test.mismatched),
            "true": len(test.true),
            "junk_caught": _share(int((test.junk < clip_threshold).sum()), len(test.junk)),
            "true_cosine_quantiles": _quantiles(test.true, [1 - q for q in quantiles]),
            "mismatched_cosine_quantiles": _quantiles(test.mismatched, quantiles),
            "calibration_seeds": list(CALIBRATION_SEEDS),
            "calibration_precision": _share(int(caught_before), int(caught_before + (true < clip_threshold).sum())),
            "calibration_recall": _share(int(caught_before), len(mismatched)),
            "test_seed": TEST_SEED,
        },
        "dedup": {
            "threshold": same_threshold,
            "precision": round(found.precision, 4),
            "recall": round(found.recall, 4),
            "recall_by_kind": {
                kind.value: _share(int((scores >= same_threshold).sum()), len(scores))
                for kind, scores in test.copies.items()
                if len(scores)
            },
            "copies": found.copies,
            "pictures": int((test.ours & (test.score >= clip_threshold)).sum()),
            "copy_cosine_quantiles": _quantiles(np.concatenate(list(test.copies.values())), [1 - q for q in quantiles]),
            "highest_different_cosines": [round(float(value), 4) for value in _different(test)[:5]],
            "calibration_seeds": list(CALIBRATION_SEEDS),
            "calibration_precision": round(before.precision, 4),
            "calibration_recall": round(before.recall, 4),
            "test_seed": TEST_SEED,
        },
    }


def _different(web: _WebScores) -> NDArray[np.float32]:
    """The cosines of pictures that show different scenes, highest first."""
    return np.sort(web.cosine[web.source[web.first] != web.source[web.second]])[::-1]


def _score_web(clip: LoadedClip, seed: int, pairs: int) -> _WebScores:
    rows = [row for row in make_rows(pairs, seed, "127.0.0.1", 80) if _counts(row)]
    images = clip.images(decode(served_bytes(row)) for row in rows)
    scores = (images * clip.texts([row.text for row in rows])).sum(axis=1)
    kinds = np.array([row.kind.value for row in rows])
    in_grammar = ~np.isin(kinds, [Kind.BOILERPLATE.value, Kind.FOREIGN.value, Kind.TOO_SHORT.value])
    truth = np.array([bool(row.text_is_true) for row in rows])
    places = {row.url: place for place, row in enumerate(rows)}
    source = np.array([places[row.duplicate_of_url or row.url] for row in rows])
    cosines = images @ images.T
    first, second = np.nonzero(np.triu(cosines >= _NEAR, 1))
    copies = {}
    for kind in _CHANGED_COPIES:
        members = np.flatnonzero(kinds == kind.value)
        copies[kind] = cosines[members, source[members]]
    return _WebScores(
        true=scores[in_grammar & truth],
        mismatched=scores[kinds == Kind.MISMATCHED.value],
        junk=scores[np.isin(kinds, [Kind.BOILERPLATE.value, Kind.FOREIGN.value])],
        copies=copies,
        score=scores,
        source=source,
        ours=in_grammar & ~np.isin(kinds, [Kind.COPY_EXACT.value, Kind.COPY_RECAPTIONED.value]),
        first=first,
        second=second,
        cosine=cosines[first, second],
    )


def _counts(row: WebRow) -> bool:
    """Whether the row's picture is one that a size rule keeps and a decoder reads."""
    return row.scene is not None and row.kind is not Kind.TINY


def best_threshold(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """The value whose lesser of precision and recall, for "positive when at least it", is greatest.

    In the middle of the range of equally good values.
    """
    values = np.unique(np.concatenate([positive, negative]))
    middles = np.concatenate([[values[0] - 1e-3], (values[1:] + values[:-1]) / 2])
    right = len(positive) - np.searchsorted(np.sort(positive), middles)
    wrong = len(negative) - np.searchsorted(np.sort(negative), middles)
    lesser = np.minimum(right / np.maximum(1, right + wrong), right / len(positive))
    best = middles[lesser == lesser.max()]
    return float((best[0] + best[-1]) / 2)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _quantiles(values: NDArray[Any], shares: Sequence[float]) -> dict[str, float]:
    return {f"{share:.2f}": round(float(np.quantile(values, share)), 3) for share in shares}
