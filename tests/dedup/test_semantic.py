import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairmill.dedup import cells, steps
from pairmill.dedup.search import SENIORS
from pairmill.dedup.semantic import SemanticDuplicates, SemanticNeighbours, colour_distance, greedy_duplicates
from pairmill.engines import in_cells
from pairmill.errors import ConfigError, ContractError
from schemas.config import Dedup
from tests.dedup.synthetic import clusters, greedy, kept, live, measured, uid, verdicts

STAGE = SemanticNeighbours(neighbours=8)
VERDICT = SemanticDuplicates(0.95)


def neighbours(table, row):
    return table.filter(pa.compute.equal(table["uid"], uid(row)))["neighbours"].to_pylist()[0]


def test_neighbours_are_the_rows_above_the_floor_most_similar_first():
    vectors = clusters([3, 1, 4], noise=0.3)
    table = measured(STAGE, live(vectors))
    cosines = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    for row in range(8):
        expected = {uid(o): cosines[row, o] for o in range(8) if o != row and cosines[row, o] >= 0.8}
        stored = neighbours(table, row)
        assert {n["uid"] for n in stored} == set(expected)
        assert [n["similarity"] for n in stored] == sorted((n["similarity"] for n in stored), reverse=True)
        assert all(abs(n["similarity"] - expected[n["uid"]]) < 1e-6 for n in stored)


def test_rows_without_an_embedding_have_no_list_and_stay():
    vectors = [*clusters([2], noise=0.01), None, np.full(32, np.nan, dtype=np.float32)]
    table = measured(STAGE, live(vectors, chunks=2))
    assert neighbours(table, 2) is None and neighbours(table, 3) is None
    assert len(neighbours(table, 0)) == 1
    assert {uid(2), uid(3)} < kept(table, VERDICT.judge(table))


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_compare(rows):
    table = measured(STAGE, live(clusters([1] * rows, noise=0)))
    assert VERDICT.judge(table).reason.to_pylist() == [None] * rows
    none = measured(STAGE, live([None, None]))
    assert none["neighbours"].to_pylist() == [None, None]


def test_embeddings_must_be_unit_vectors_of_one_length():
    with pytest.raises(ContractError, match="length 1"):
        measured(STAGE, live(clusters([2], noise=0) * 3))
    with pytest.raises(ContractError, match="differ in length"):
        measured(STAGE, live([np.eye(4)[0], np.eye(3)[0]]))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_outcome_is_that_of_the_definition(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    vectors = clusters(
        sizes, noise=data.draw(st.sampled_from([0.05, 0.2, 0.3])), dimensions=16, seed=data.draw(st.integers(0, 99))
    )
    rows = len(vectors)
    refresh = data.draw(st.lists(st.integers(1, 3), min_size=rows, max_size=rows))
    score = data.draw(st.lists(st.sampled_from([0.1, 0.2, None]), min_size=rows, max_size=rows))
    threshold = data.draw(st.sampled_from([0.9, 0.95, 0.99]))
    table = measured(STAGE, live(vectors, refresh, score, chunks=data.draw(st.integers(1, 4))))
    judgement = SemanticDuplicates(threshold).judge(table)
    stay = kept(table, judgement)
    assert stay == greedy(table, threshold)
    for reason, duplicate_of, cluster in verdicts(table, judgement).values():
        assert (reason is None) == (duplicate_of is None)
        if reason:
            assert duplicate_of in stay and cluster == duplicate_of
    centres = {c for r, _, c in verdicts(table, judgement).values() if r}
    assert {n for n in stay if verdicts(table, judgement)[n][2]} == centres
    assert all(verdicts(table, judgement)[n][2] == n for n in centres)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_refresh_overturns_nothing_and_ends_as_if_measured_at_once(data):
    sizes = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=6))
    vectors = clusters(sizes, noise=0.2, dimensions=16, seed=data.draw(st.integers(0, 99)))
    rows = len(vectors)
    refresh = np.array(data.draw(st.lists(st.integers(1, 3), min_size=rows, max_size=rows)))
    score = np.array(data.draw(st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=rows, max_size=rows)))
    stored: dict[str, list] = {}
    before: dict[str, tuple] = {}
    for number in (1, 2, 3):
        here = np.flatnonzero(refresh <= number)
        table = live(vectors[here], refresh[here], score[here], numbers=here)
        names = table["uid"].to_pylist()
        todo = [n not in stored for n in names]
        output = STAGE.measure(table, pa.array(todo, pa.bool_()), in_cells)["neighbours"].to_pylist()
        stored |= dict(zip([n for n, t in zip(names, todo, strict=True) if t], output, strict=True))
        lists = pa.array([stored[n] for n in names], STAGE.writes[0].type)
        table = table.append_column("neighbours", lists)
        judgement = VERDICT.judge(table)
        after = verdicts(table, judgement)
        for name, (reason, duplicate_of, _) in before.items():
            assert after[name][:2] == (reason, duplicate_of)
        before = after
        assert kept(table, judgement) == greedy(table, 0.95)


def test_measuring_again_gives_the_same_bytes_whatever_the_threads_and_the_chunks():
    vectors = clusters([1, 2, 3, 40, 5] * 12, noise=0.25, seed=3)
    stage = SemanticNeighbours(neighbours=8, cells=6, probe=2)
    outputs = []
    for threads, chunks in ((1, 1), (2, 7), (2, 1)):
        faiss.omp_set_num_threads(threads)
        table = live(vectors, chunks=chunks)
        outputs.append(stage.measure(table, pa.array([True] * table.num_rows), in_cells)["neighbours"].combine_chunks())
    assert outputs[0].equals(outputs[1]) and outputs[0].equals(outputs[2])
    assert sum(len(n) for n in outputs[0].to_pylist()) > 1000


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_thousand_copies_collapse_to_one(noise):
    """Far more copies than neighbours are stored: the star around the most senior row holds them together."""
    table = measured(STAGE, live(clusters([1000, 1, 1], noise=noise), score=np.linspace(0.2, 0.4, 1002)))
    judgement = VERDICT.judge(table)
    assert kept(table, judgement) == {uid(999), uid(1000), uid(1001)}
    assert verdicts(table, judgement)[uid(0)][1:] == (uid(999), uid(999))
    lists = [n for n in table["neighbours"].to_pylist() if n]
    assert max(map(len, lists)) < 100


def test_a_senior_row_further_away_does_not_hide_the_centre():
    """The most senior near row lies below the threshold: the star must hold at every similarity."""
    copies = clusters([600], noise=0.02)
    sideways = np.linalg.qr(np.stack([copies[0], clusters([1], 0, seed=9)[0]], axis=1))[0].T
    old = (0.85 * np.sign(sideways[0] @ copies[0]) * sideways[0] + (1 - 0.85**2) ** 0.5 * sideways[1]).astype(
        np.float32
    )
    table = measured(STAGE, live([*copies, old], refresh=[2] * 600 + [1]))
    assert len(kept(table, VERDICT.judge(table))) == 2


def test_when_the_centre_falls_the_next_senior_row_takes_its_place_without_a_search():
    table = measured(STAGE, live(clusters([500], noise=0.02), score=np.linspace(0.2, 0.4, 500)))
    for fallen in range(1, SENIORS):
        gone = pa.array([uid(499 - n) for n in range(fallen)])
        left = table.filter(pa.compute.invert(pa.compute.is_in(table["uid"], value_set=gone)))
        assert kept(left, VERDICT.judge(left)) == {uid(499 - fallen)}


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_row_that_comes_late_but_is_senior_becomes_the_centre(noise):
    """A relaxed threshold brings back a row of the first refresh; 400 others were measured without it."""
    table = live(clusters([401], noise=noise), score=np.linspace(0.2, 0.4, 401), refresh=[2] * 400 + [1])
    late = np.array([name == uid(400) for name in table["uid"].to_pylist()])
    early = measured(STAGE, table.filter(pa.array(~late)))["neighbours"].to_pylist()
    added = STAGE.measure(table, pa.array(late), in_cells)["neighbours"].to_pylist()[0]
    early.insert(int(np.flatnonzero(late)[0]), added)
    both = table.append_column("neighbours", pa.array(early, STAGE.writes[0].type))
    assert kept(both, VERDICT.judge(both)) == {uid(400)}


def test_clusters_far_bigger_than_the_lists_stay_close_to_the_definition():
    """Loose clusters, where similarity is not transitive: pruned lists may keep a few more, never fewer than none."""
    table = measured(SemanticNeighbours(), live(clusters([300] * 4, noise=0.25, seed=5)))
    exact, found = greedy(table, 0.95), kept(table, VERDICT.judge(table))
    assert 4 <= len(exact) <= len(found) <= 1.1 * len(exact) + 1


def test_cells_find_what_a_flat_search_finds():
    vectors = clusters([2] * 400 + [1] * 400, noise=0.2, seed=1)
    flat = measured(SemanticNeighbours(cells=1), live(vectors))["neighbours"].to_pylist()
    found = measured(SemanticNeighbours(cells=30, probe=4), live(vectors))["neighbours"].to_pylist()
    edges = [{(i, n["uid"], n["similarity"]) for i, row in enumerate(rows) for n in row} for rows in (flat, found)]
    assert edges[1] <= edges[0]
    assert len(edges[1]) > 0.97 * len(edges[0]) > 500


def test_more_cells_than_rows():
    table = measured(SemanticNeighbours(cells=50, probe=9), live(clusters([3, 2], noise=0.05)))
    assert len(kept(table, VERDICT.judge(table))) == 2


def test_blocks_do_not_change_what_is_found(monkeypatch):
    vectors = clusters([30, 5, 1, 1], noise=0.1)
    whole = measured(STAGE, live(vectors))
    monkeypatch.setattr(cells, "BLOCK", 7)
    monkeypatch.setattr(cells, "PAIRS", 20)
    monkeypatch.setattr(cells, "RAM", 100)  # the vectors go to a file
    assert measured(STAGE, live(vectors, chunks=3))["neighbours"].to_pylist() == whole["neighbours"].to_pylist()


class _LikeGpu:
    """FAISS's GPU index as far as we use it: no range search."""

    def __init__(self, index):
        self.cpu, self.ntotal = index, index.ntotal

    def getDevice(self):  # noqa: N802 - FAISS's name
        return 0

    def search(self, asked, k):
        return self.cpu.search(asked, k)


def test_the_way_of_the_gpu_finds_the_same(monkeypatch):
    vectors = clusters([40, 5, 1, 1], noise=0.1)
    whole = measured(STAGE, live(vectors))
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda _, device, index: _LikeGpu(index), raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index.cpu, raising=False)
    monkeypatch.setattr(cells, "_GPU_NEAREST", 16)
    assert measured(STAGE, live(vectors))["neighbours"].to_pylist() == whole["neighbours"].to_pylist()


def test_the_number_of_cells_follows_the_size_and_the_work():
    assert cells.default_cells(19_999, 19_999) == 1
    assert cells.default_cells(1_000_000, 1_000_000) == 1000
    assert cells.default_cells(1_000_000, 500) == 1  # a small refresh: comparing with everything costs less


@given(st.integers(1, 30), st.data())
def test_rounds_settle_rows_as_one_by_one(rows, data):
    rank = np.array(data.draw(st.permutations(range(rows))))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, rows - 1)), max_size=60))
    edges = [(a, b) if rank[a] > rank[b] else (b, a) for a, b in pairs if a != b]
    expected: set[int] = set()
    for row in np.argsort(rank):
        if any(j == row and s not in expected for j, s in edges):
            expected.add(int(row))
    junior, senior = (np.array([e[i] for e in edges], dtype=np.int64) for i in (0, 1))
    assert set(np.flatnonzero(greedy_duplicates(rank, junior, senior))) == expected


def test_the_threshold_is_no_part_of_what_is_measured():
    first, second = (steps(Dedup(semantic=s)) for s in (0.95, 0.9))
    assert [s.name for s in first] == ["exact", "neighbours", "semantic"]
    assert first[1].fingerprint() == second[1].fingerprint()
    assert first[2].fingerprint() != second[2].fingerprint()
    assert (
        len(
            {
                steps(Dedup(**{k: v}))[1].fingerprint()
                for k, v in [("floor", 0.7), ("neighbours", 9), ("cells", 3), ("probe", 2)]
            }
        )
        == 4
    )


def test_kinds_can_be_switched_off():
    assert steps(Dedup(exact=False, semantic=None)) == ()
    assert [s.name for s in steps(Dedup(semantic=None))] == ["exact"]
    with pytest.raises(ConfigError, match="lower dedup"):
        steps(Dedup(semantic=0.7))


def test_pairs_of_other_colours_are_no_duplicates_when_asked_but_mirrored_ones_are():
    table = measured(STAGE, live(clusters([5], noise=0.001), score=[0.5, 0.4, 0.3, 0.2, 0.1]))
    rng = np.random.default_rng(0)
    picture = rng.random((4, 4, 3), dtype=np.float32)
    near = np.clip(picture + 0.02, 0, 1)
    layouts = {uid(0): picture, uid(1): near, uid(2): picture[:, ::-1], uid(3): 1 - picture}
    drawn = [layouts.get(u) for u in table["uid"].to_pylist()]
    column = pa.array([None if p is None else p.ravel() for p in drawn], pa.list_(pa.float32()))
    table = table.append_column("colour_layout", column)
    order = [uid(n) for n in range(5)]
    alone = verdicts(table, SemanticDuplicates(0.9).judge(table))
    assert [alone[u][0] is None for u in order] == [True, False, False, False, False]
    together = verdicts(table, SemanticDuplicates(0.9, max_colour_distance=0.05).judge(table))
    assert [together[u][0] is None for u in order] == [True, False, False, True, False]


def test_colour_distance_is_the_root_mean_square_of_the_nearer_view():
    layout = np.zeros((3, 48), dtype=np.float32)
    layout[1] = 0.5
    layout[2].reshape(4, 4, 3)[:, 0] = 1.0  # white on the left
    mirrored = layout[2].reshape(4, 4, 3)[:, ::-1].ravel()
    layout = np.vstack([layout, mirrored, np.full(48, np.nan, np.float32)])
    found = colour_distance(layout, np.array([0, 2, 0, 0]), np.array([1, 3, 2, 4]))
    assert np.allclose(found, [0.5, 0.0, 0.5, 0.0])
