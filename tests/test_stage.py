"""`apply`: poison is isolated, contracts are enforced, the error budget stops a run that goes wrong."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairmill.errors import ContractError, StageFailed
from pairmill.stage import Batch, ErrorBudget, apply
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
