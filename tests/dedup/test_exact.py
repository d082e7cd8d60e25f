import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pairmill.dedup.exact import ExactDuplicates
from tests.dedup.synthetic import uid, verdicts


def live(rows, chunks=1):
    """Rows of (refresh, sha256, pixel_sha256, clip_score), numbered in their order."""
    table = pa.table(
        {
            "uid": pa.array([uid(n) for n in range(len(rows))], pa.string()),
            "refresh": pa.array([r[0] for r in rows], pa.int32()),
            "sha256": pa.array([r[1] for r in rows], pa.string()),
            "pixel_sha256": pa.array([r[2] for r in rows], pa.string()),
            "clip_score": pa.array([r[3] for r in rows], pa.float32()),
        }
    ).sort_by("uid")
    middle = len(rows) // 2
    return table if chunks == 1 else pa.concat_tables([table.slice(0, middle), table.slice(middle)])


def judge(rows, **kwargs):
    table = live(rows, **kwargs)
    return verdicts(table, ExactDuplicates().judge(table))


def test_the_best_of_equal_bytes_stays():
    found = judge([(1, "a", "p", 0.2), (1, "a", "p", 0.3), (1, "b", "q", 0.1)])
    assert found[uid(0)] == ("duplicate.bytes", uid(1), uid(1))
    assert found[uid(1)] == (None, None, uid(1))
    assert found[uid(2)] == (None, None, None)


def test_other_bytes_with_equal_pixels():
    found = judge([(1, "a", "p", 0.3), (1, "b", "p", 0.2), (1, "b", "p", 0.1)])
    assert [found[uid(n)][:2] for n in (1, 2)] == [("duplicate.pixels", uid(0))] * 2


def test_an_earlier_refresh_goes_before_quality():
    assert judge([(2, "a", "p", 0.9), (1, "a", "p", 0.1)])[uid(0)][1] == uid(1)


def test_a_score_that_is_missing_is_the_worst():
    assert judge([(1, "a", "p", None), (1, "a", "p", 0.0)])[uid(0)][1] == uid(1)


def test_rows_without_hashes_stay():
    assert set(judge([(1, None, None, 0.1)] * 3).values()) == {(None, None, None)}
    assert judge([]) == {}


def test_equal_bytes_are_one_even_when_a_new_decoder_gave_other_pixels():
    found = judge([(1, "a", "p", 0.1), (2, "a", "q", 0.1), (3, "b", "q", 0.1)])
    assert found[uid(1)][:2] == ("duplicate.bytes", uid(0))
    assert found[uid(2)][0] is None


rows = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from("abcdef"), st.none(), st.sampled_from([0.1, 0.2, None])), max_size=25
).map(lambda drawn: [(r, sha, "abc".find(sha) if sha in "abc" else "same", s) for r, sha, _, s in drawn])


@given(rows)
def test_one_row_of_each_content_stays_and_the_rest_points_at_it(drawn):
    drawn = [(r, sha, str(pixels), s) for r, sha, pixels, s in drawn]
    found = judge(drawn)
    assert judge(drawn, chunks=2) == found
    stay = [row for n, row in enumerate(drawn) if found[uid(n)][0] is None]
    assert len(stay) == len({row[2] for row in drawn})
    for n, row in enumerate(drawn):
        reason, centre, cluster = found[uid(n)]
        if reason:
            other = drawn[next(m for m in range(len(drawn)) if uid(m) == centre)]
            assert other[2] == row[2] and other[0] <= row[0] and cluster == centre
            assert reason == ("duplicate.bytes" if other[1] == row[1] else "duplicate.pixels")


@given(rows, st.integers(0, 25))
def test_a_refresh_overturns_nothing(drawn, cut):
    old = [(1, sha, str(pixels), s) for _, sha, pixels, s in drawn[:cut]]
    new = [(2, sha, str(pixels), s) for _, sha, pixels, s in drawn[cut:]]
    before, after = judge(old), judge(old + new)
    assert all(after[name][:2] == verdict[:2] for name, verdict in before.items())
