import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pairmill.dedup.groups import settle


def settled(pointers: list[int | None]) -> list[tuple[str | None, str | None]]:
    uid = pa.array([str(n) for n in range(len(pointers))], pa.string())
    groups = settle(pa.chunked_array([uid]), pa.array([None if p is None else str(p) for p in pointers], pa.string()))
    return list(zip(groups.duplicate_of.to_pylist(), groups.cluster.to_pylist(), strict=True))


def test_a_chain_ends_at_the_pair_that_stays():
    """3 is a byte copy of 2, and 2 looks like 0: all of them are one group around 0."""
    assert settled([None, None, 0, 2]) == [(None, "0"), (None, None), ("0", "0"), ("0", "0")]
    assert settled([]) == []


@given(st.lists(st.none() | st.integers(0, 30), max_size=30))
def test_every_duplicate_names_one_that_is_none(drawn):
    pointers = [p if p is not None and p < n else None for n, p in enumerate(drawn)]
    found = settled(pointers)
    for pointer, (duplicate_of, cluster) in zip(pointers, found, strict=True):
        assert (duplicate_of is None) == (pointer is None)
        if duplicate_of is not None:
            assert found[int(duplicate_of)] == (None, duplicate_of) and cluster == duplicate_of
    centres = {d for d, _ in found if d}
    assert {str(n) for n, (d, c) in enumerate(found) if d is None and c} == centres
