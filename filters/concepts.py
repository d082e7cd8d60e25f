"""DataComp's concept filters: texts that name a concept, and images near reference images.

After Gadre et al., DataComp (2023), section 3.4 and appendix E: "text-based" and "image-based" filtering.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from filters.threshold import NO_SCORE, judgement
from pairmill.errors import ConfigError
from pairmill.stage import GlobalVerdict, Judgement, Verdict
from schemas import fields
from schemas.reasons import Reason

Matrix = npt.NDArray[np.float32]

_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)?")

MAX_CELLS = 100_000
"""DataComp clusters its pools into 100,000 cells."""
ROWS_PER_CELL = 40
"""FAISS asks for at least 39 training rows a cell; smaller pools get fewer cells."""


@dataclass(frozen=True)
class NamesConcept(Verdict):
    """A text stays when it names one of `words`: words or phrases, without regard to case or a plural s.

    DataComp looks up WordNet synsets of ImageNet-21k; here the list is a file, so that it can hold any concepts.
    """

    name = "concept_words"
    reads = (fields.TEXT.name,)

    words: frozenset[str]

    @classmethod
    def from_file(cls, path: str) -> NamesConcept:
        """The verdict for a text file with one word or phrase a line.

        Raises:
            ConfigError: the file cannot be read or holds no words.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"options.concept_words: {path} cannot be read as UTF-8 text ({error})") from error
        words = frozenset(" ".join(_singular(line)) for line in lines) - {""}
        if not words:
            raise ConfigError(f"options.concept_words: {path} holds no words; write one word or phrase a line")
        return cls(words)

    def judge(self, rows: pa.Table) -> Judgement:
        """Judge rows on their own."""
        longest = max(phrase.count(" ") + 1 for phrase in self.words)
        passes = [self._names_one(text or "", longest) for text in rows.column(fields.TEXT.name).to_pylist()]
        return judgement(pa.array(passes, pa.bool_()), Reason.TEXT_NO_CONCEPT, lambda _: None)

    def _names_one(self, text: str, longest: int) -> bool:
        tokens = _singular(text)
        phrases = (tokens[i : i + n] for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))
        return any(" ".join(phrase) in self.words for phrase in phrases)


def _singular(text: str) -> list[str]:
    """The words of a text in lower case, without a plural s."""
    words = _TOKEN.findall(text.lower().replace("_", " "))
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words]


@dataclass(frozen=True)
class NearReference(GlobalVerdict):
    """An image stays when it lies in a cell that is, for one of the reference images, the cell with the nearest centre.

    The cells come from k-means (FAISS, cosine, seeded) over the embeddings of all live rows, so a row's fate depends on
    the pool it is in, as in the paper. Rows without an embedding are dropped.
    """

    name = "concept_images"
    reads = (fields.CLIP_IMAGE.name,)

    reference_sha256: str
    """sha256 of the file with the reference embeddings."""
    path: str = field(metadata={"identity": False})
    """A .npy file of shape (images, dimensions), or a .parquet file with a column ``clip_image``."""
    cells: int | None = None
    """k-means cells; null: one for every 40 rows, at most 100,000."""
    seed: int = 0

    @classmethod
    def from_file(cls, path: str, cells: int | None = None, seed: int = 0) -> NearReference:
        """The verdict for a file of reference embeddings, made by the same model as the pool's.

        Raises:
            ConfigError: the file cannot be read.
        """
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"options.concept_images: {path} cannot be read ({error}); correct the path") from error
        return cls(digest, path, cells, seed)

    def judge(self, live: pa.Table) -> Judgement:
        """Judge all live rows."""
        vectors, rows = _vectors(live.column(fields.CLIP_IMAGE.name))
        passes = np.zeros(live.num_rows, dtype=bool)
        if len(rows):
            near = _near_cells(vectors, _references(self.path, self.reference_sha256), self.cells, self.seed)
            passes[rows] = near
        known = set(rows.tolist())
        return judgement(pa.array(passes), Reason.CONCEPT_NOT_NEAR, lambda i: None if i in known else NO_SCORE)


def _vectors(column: pa.ChunkedArray) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """The embeddings that are there, as a matrix, and their rows."""
    present = [(i, v) for i, v in enumerate(column) if v.is_valid]
    matrix = [v.values.to_numpy(zero_copy_only=False) for _, v in present]
    return _unit(np.array(matrix, dtype=np.float32)), np.array([i for i, _ in present], dtype=np.int64)


def _unit(vectors: Matrix) -> Matrix:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


@lru_cache(maxsize=4)
def _references(path: str, sha256: str) -> Matrix:  # noqa: ARG001 - part of the cache's key
    """The reference embeddings, unit length."""
    try:
        if path.endswith(".npy"):
            vectors = np.load(path, allow_pickle=False)
        else:
            column: Any = pq.read_table(path, columns=[fields.CLIP_IMAGE.name]).column(0)
            vectors, _ = _vectors(column)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
        raise ConfigError(
            f"options.concept_images: {path} holds no embeddings ({error}); give a .npy matrix, or a .parquet file "
            "with a column clip_image"
        ) from error
    if vectors.ndim != 2 or not len(vectors):
        raise ConfigError(f"options.concept_images: {path} has shape {vectors.shape}, not (images, dimensions)")
    return _unit(vectors.astype(np.float32))


def _near_cells(vectors: Matrix, references: Matrix, cells: int | None, seed: int) -> npt.NDArray[np.bool_]:
    """Which vectors lie in a cell that is the nearest one of some reference."""
    import faiss

    dimensions = vectors.shape[1]
    if references.shape[1] != dimensions:
        raise ConfigError(
            f"options.concept_images: the references have {references.shape[1]} dimensions and the pool has "
            f"{dimensions}; embed them with the model that models.clip names"
        )
    count = min(cells or max(1, min(MAX_CELLS, len(vectors) // ROWS_PER_CELL)), len(vectors))
    kmeans = faiss.Kmeans(dimensions, count, niter=20, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans.train(vectors)
    chosen = np.unique(kmeans.index.search(references, 1)[1])
    near: npt.NDArray[np.bool_] = np.isin(kmeans.index.search(vectors, 1)[1][:, 0], chosen)
    return near
