"""`apply`: poison is isolated, contracts are enforced, the error budget stops a run that goes wrong."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from pairmill.errors import ContractError, StageFailed
from pairmill.stage import Batch, ErrorBudget, PixelCache, apply
from tests.filters.rows import noise
from tests.steps import CountWords


def batch(texts: list[str]) -> Batch:
    return Batch(pa.table({"uid": [f"{i:04d}" for i in range(len(texts))], "text": pa.array(texts, pa.string())}))


def budget(rows: int = 10_000) -> ErrorBudget:
    return ErrorBudget(max_fraction=1.0, min_rows=0, rows=rows)


@given(st.lists(st.sampled_from(["one", "one two", "poison", "one two three"]), max_size=40))
def test_only_poisoned_rows_are_quarantined_and_order_is_kept(texts: list[str]):
    out = apply(CountWords(), CountWords().open(), batch(texts), budget())
    assert out["uid"].to_pylist() == [f"{i:04d}" for i in range(len(texts))]
    assert out["words"].to_pylist() == [None if t == "poison" else len(t.split()) for t in texts]
    assert out["reason"].to_pylist() == ["error.kernel" if t == "poison" else None for t in texts]


def test_the_detail_names_stage_and_error():
    out = apply(CountWords(), CountWords().open(), batch(["poison"]), budget())
    assert out["detail"].to_pylist() == ["words: ValueError: a poisoned text"]


def test_budget_stops_with_count_and_first_traceback():
    limited = ErrorBudget(max_fraction=0.0, min_rows=2, rows=50)
    with pytest.raises(StageFailed, match=r"(?s)stage 'words': 3 of 50 rows failed.*ValueError: a poisoned text"):
        apply(CountWords(), CountWords().open(), batch(["poison"] * 5), limited)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (pa.table({"words": pa.array([1], pa.int32())}), "returned 1 rows for 2"),
        (pa.table({"chars": pa.array([1, 2], pa.int32())}), "did not return the column 'words'"),
        (pa.table({"words": pa.array([1, 2], pa.int32()), "more": [1, 2]}), "returned the column 'more'"),
        (pa.table({"words": ["1", "2"]}), "returned 'words' as string, but it declares int32"),
    ],
)
def test_broken_contracts_raise(output: pa.Table, message: str):
    with pytest.raises(ContractError, match=message):
        apply(CountWords(), lambda _: output, batch(["a", "b"]), budget())


def test_defects_of_the_code_raise_instead_of_eating_rows():
    def defect(_: Batch) -> pa.Table:
        raise AttributeError("a typo")

    with pytest.raises(AttributeError, match="a typo"):
        apply(CountWords(), defect, batch(["a", "b"]), budget())


def test_out_of_memory_halves_the_batch_until_it_fits():
    sizes = []

    class OutOfMemoryError(RuntimeError):
        """As torch.cuda raises it."""

    def small_device(rows: Batch) -> pa.Table:
        sizes.append(len(rows))
        if len(rows) > 3:
            raise OutOfMemoryError("CUDA out of memory")
        return CountWords().open()(rows)

    out = apply(CountWords(), small_device, batch(["a b"] * 10), budget())
    assert out["words"].to_pylist() == [2] * 10
    assert out["reason"].null_count == 10
    assert sizes[:2] == [10, 5]


def test_a_row_that_never_fits_is_quarantined_as_memory():
    def tiny_device(_: Batch) -> pa.Table:
        raise MemoryError("too big")

    out = apply(CountWords(), tiny_device, batch(["a"]), budget())
    assert out["reason"].to_pylist() == ["error.memory"]


# -- images -----------------------------------------------------------------------------------------------------------


def pictures(count: int, pixels: PixelCache | None = None) -> Batch:
    """A batch of 50 x 40 pictures, none of them like another."""
    table = pa.table({"uid": [str(n) for n in range(count)], "image": [noise(n) for n in range(count)]})
    return Batch(table, pixels or PixelCache())


def test_images_are_decoded_when_they_are_asked_for():
    table = pictures(4).table.set_column(1, "image", pa.array([noise(0), b"no image", noise(2), noise(3)]))
    images = Batch(table).images()
    assert len(images) == 4
    assert images[2].size == images[-1].size == (50, 40)
    assert [len(images[1:3]), len(images[::2])] == [2, 2]
    assert images[1:3][1].tobytes() == images[2].tobytes() != images[3].tobytes()
    assert images[::2][1] is images[2], "decoded once"
    with pytest.raises(UnidentifiedImageError):
        images[1]
    with pytest.raises(IndexError):
        images[4]


def test_threads_share_what_is_decoded_and_the_cache_stays_within_its_bytes():
    pixels = PixelCache(max_bytes=5 * 50 * 40 * 4)
    images = pictures(40, pixels).images()
    expected = [Image.open(io.BytesIO(noise(n))).tobytes() for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: images[n].tobytes(), [n for n in range(40) for _ in range(3)]))
    assert found == [data for data in expected for _ in range(3)]
    assert len(pixels._images) == 5
    pixels.clear()
    assert not pixels._images
