from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.concepts import NamesConcept, NearReference
from pairmill.errors import ConfigError
from schemas import fields
from schemas.reasons import Reason


def test_a_text_stays_when_it_names_a_word_or_phrase(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("golden retriever\nCar\n\nbus stop\n", encoding="utf-8")
    texts = ["Two golden retrievers run", "A retriever", "Red CARS!", "scar tissue", "the bus-stop at night", None]
    judged = NamesConcept.from_file(str(path)).judge(pa.table({"text": texts}))
    dropped = Reason.TEXT_NO_CONCEPT.value
    assert judged.reason.to_pylist() == [None, dropped, None, dropped, None, dropped]


def test_a_missing_or_empty_word_list_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="concept_words"):
        NamesConcept.from_file(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="no words"):
        NamesConcept.from_file(str(tmp_path / "empty.txt"))


@pytest.fixture
def pool() -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Four tight groups of 50 in 16 dimensions, a row without embedding, the centres, and each row's group."""
    rng = np.random.default_rng(0)
    centres = np.eye(16, dtype=np.float32)[:4]
    groups = np.repeat(np.arange(4), 50)
    vectors = centres[groups] + 0.05 * rng.standard_normal((200, 16)).astype(np.float32)
    column = pa.array([*vectors.tolist(), None], fields.CLIP_IMAGE.type)
    return pa.table({"uid": [f"{i:04d}" for i in range(201)], "clip_image": column}), centres, groups


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_images_in_the_cells_nearest_to_references_stay(
    pool: tuple[pa.Table, np.ndarray, np.ndarray], tmp_path: Path, kind: str
) -> None:
    table, centres, groups = pool
    path = tmp_path / f"references.{kind}"
    wanted = centres[[1, 3]]
    if kind == "npy":
        np.save(path, wanted)
    else:
        pq.write_table(pa.table({"clip_image": pa.array(wanted.tolist(), fields.CLIP_IMAGE.type)}), path)
    verdict = NearReference.from_file(str(path), cells=4)
    judged = verdict.judge(table)
    kept = [i for i, reason in enumerate(judged.reason.to_pylist()) if reason is None]
    assert kept == np.flatnonzero(np.isin(groups, [1, 3])).tolist()
    assert judged.detail is not None
    assert judged.detail.to_pylist()[200] == "no score"
    assert verdict.judge(table).reason.equals(judged.reason)


def test_references_of_another_model_are_refused(pool: tuple[pa.Table, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", np.eye(8, dtype=np.float32))
    with pytest.raises(ConfigError, match="8 dimensions"):
        NearReference.from_file(str(tmp_path / "r.npy")).judge(pool[0])
    with pytest.raises(ConfigError, match="concept_images"):
        NearReference.from_file(str(tmp_path / "none.npy"))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="no embeddings"):
        NearReference.from_file(str(tmp_path / "pickled.npy")).judge(pool[0])


def test_identity_is_the_content_of_the_references(tmp_path: Path) -> None:
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, np.eye(4, dtype=np.float32))
    a, b = (NearReference.from_file(str(tmp_path / name)) for name in ("a.npy", "b.npy"))
    assert a.fingerprint() == b.fingerprint()
