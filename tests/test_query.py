import signal
import threading
from pathlib import Path

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pairmill.query as query_module
from pairmill.errors import ConfigError, StoreError
from pairmill.query import VIEWS, _SharedFile, _SnapshotFiles, connect, query
from schemas import fields
from tests.export.dataset import IMAGES_TABLE, Built, Pair, build

PAIRS = [
    Pair(0, 0, "a red circle", ("ein roter Kreis",), boxes=(("circle", -4, 4, 20, 90), ("gone", 80, 0, 99, 9))),
    Pair(1, 0, 'it\'s "quoted"', extra={"licence": "cc"}, format="png", score=0.25),
    Pair(2, 0, "copy", reason="duplicate.bytes"),
    Pair(3, 1, "gone", format=None, reason="http.not_found"),
    Pair(4, 1, "later", format=None, reason="http.timeout"),
    Pair(5, 1, None, malformed=True, format=None, reason="source.empty_url"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    return build(str(tmp_path_factory.mktemp("it's") / "data"), PAIRS)


def rows(built: Built, sql: str) -> list[dict]:
    return query(built.snapshot, sql).to_pylist()


def test_pairs_has_one_row_a_pair_with_its_fate_and_its_measures(built):
    found = {row["uid"]: row for row in rows(built, "SELECT * FROM pairs")}
    assert len(found) == 6
    first = found[PAIRS[0].uid]
    assert list(first)[:20] == [
        "uid",
        "url",
        "text",
        "caption",
        "shard",
        "refresh",
        "status",
        "reason",
        "detail",
        "duplicate_of",
        "cluster",
        "attempts",
        "retry_at",
        "width",
        "height",
        "sha256",
        "clip_score",
        "itm_score",
        "source",
        "extra",
    ]
    assert (first["status"], first["reason"], first["width"], first["shard"]) == ("kept", None, 32, 0)
    assert first["clip_score"] == pytest.approx(0.3)
    assert (first["original_width"], first["format"], first["source"]) == (64, "jpeg", "url_table:0")
    assert not {"image", "clip_image", "clip_scores", "transform", "texts"} & set(first)
    assert found[PAIRS[1].uid]["extra"] == '{"licence": "cc"}'
    gone = found[PAIRS[3].uid]
    assert (gone["status"], gone["reason"], gone["width"], gone["clip_score"]) == (
        "dropped",
        "http.not_found",
        None,
        None,
    )
    counts = rows(built, "SELECT status, count(*) AS n FROM pairs GROUP BY 1 ORDER BY 1")
    assert counts == [{"status": "deferred", "n": 1}, {"status": "dropped", "n": 3}, {"status": "kept", "n": 2}]
    assert rows(built, "SELECT count(*) AS n FROM pairs WHERE (reason IS NULL) != (status = 'kept')") == [{"n": 0}]


def test_texts_has_one_row_a_text(built):
    found = rows(built, f"SELECT * FROM texts WHERE uid = '{PAIRS[0].uid}' ORDER BY ordinal")
    assert [(r["ordinal"], r["text"], r["source"], r["kept"]) for r in found] == [
        (0, "a red circle", "web", True),
        (1, "ein roter Kreis", "human", True),
    ]
    assert [r["clip_score"] for r in found] == pytest.approx([0.3, 0.1])
    assert rows(built, "SELECT reason FROM texts WHERE text = 'gone'") == [{"reason": "http.not_found"}]


MIXED = [
    Pair(0, 0, "IMG_1.jpg", ("a circle",), captions=(("a red circle", None), (None, "caption.empty")),
         choice=("text.boilerplate", 1, 0, "caption.empty")),
    Pair(1, 0, "a square", captions=(("two squares", None),), choice=(0, 1), reason="duplicate.semantic"),
    Pair(2, 1, "x", captions=(("y", None),), choice=("itm.below_threshold", "clip.x"), reason="text.none_kept"),
    Pair(3, 1, "gone", format=None, reason="http.not_found"),
]  # fmt: skip
TEXTS_SQL = (
    "SELECT ordinal, text, source, itm_score, kept, rank, reason, detail FROM texts WHERE uid = '{}' ORDER BY ordinal"
)


def told(built, pair):
    return [tuple(row.values()) for row in rows(built, TEXTS_SQL.format(pair.uid))]


def test_texts_say_what_was_chosen_and_why_not_the_others(tmp_path):
    built = build(str(tmp_path), MIXED)
    assert told(built, MIXED[0]) == [
        (0, "IMG_1.jpg", "web", 0.25, False, None, "text.boilerplate", "said"),
        (1, "a circle", "human", 0.25, True, 1, None, None),
        (2, "a red circle", "blip", 0.75, True, 0, None, None),
        (3, None, "blip", None, False, None, "caption.empty", "said"),
    ]
    # a dropped pair: its reason, unless the text has one of its own
    assert [(t[4], t[5], t[6]) for t in told(built, MIXED[1])] == [(False, None, "duplicate.semantic")] * 2
    assert [t[6] for t in told(built, MIXED[2])] == ["itm.below_threshold", "clip.x"]
    assert [t[6] for t in told(built, MIXED[3])] == ["http.not_found"]
    captions = {r["url"]: r["caption"] for r in rows(built, "SELECT url, caption FROM pairs")}
    assert captions == {p.url: c for p, c in zip(MIXED, ["a red circle", "a square", None, "gone"], strict=True)}
    assert rows(built, "SELECT count(*) AS n FROM texts") == [{"n": 4 + 2 + 2 + 1}]


def test_captions_without_a_mixing_recipe_are_kept_beside_the_alt_text(tmp_path):
    pair = Pair(0, 0, "a circle", captions=((None, "caption.empty"), ("a red circle", None)))
    built = build(str(tmp_path), [pair, Pair(1, 0, "x", captions=(("y", None),), reason="clip.below_threshold")])
    assert [(t[1], t[4], t[5], t[6]) for t in told(built, pair)] == [
        ("a circle", True, 0, None),
        (None, False, None, "caption.empty"),
        ("a red circle", True, 2, None),
    ]
    assert rows(built, "SELECT DISTINCT reason FROM texts WHERE text IN ('x', 'y')") == [
        {"reason": "clip.below_threshold"}
    ]


def test_a_ledger_from_before_there_was_mixing(tmp_path):
    old = pa.schema([f for f in fields.LEDGER if not f.name.startswith("text_")])
    built, new = build(str(tmp_path / "old"), PAIRS, ledger=old), build(str(tmp_path / "new"), PAIRS)
    for view in ("pairs", "texts"):
        sql = f"FROM {view} ORDER BY ALL"
        assert query(built.snapshot, sql).equals(query(new.snapshot, sql))
    assert rows(built, "SELECT caption FROM pairs WHERE caption IS DISTINCT FROM text") == []


def test_images_has_the_stored_images(built):
    found = {row["uid"]: row for row in rows(built, "SELECT * FROM images")}
    assert set(found) == {p.uid for p in PAIRS[:3]}
    assert found[PAIRS[1].uid]["image"] == PAIRS[1].image
    assert found[PAIRS[1].uid]["format"] == "png"


def test_boxes_are_in_pixels_of_the_stored_image_and_inside_it(built):
    box = {"label": "circle", "x1": 0, "y1": 2, "x2": 10, "y2": 24, "score": 1, "source": "human", "ordinal": 0}
    none = dict.fromkeys(["mask", "mask_area", "mask_score"])
    assert rows(built, "SELECT * FROM boxes") == [{"uid": PAIRS[0].uid, **box, **none, "shard": 0}]
    assert rows(built, "SELECT * FROM rejected_boxes") == []


def test_snapshots_and_instructions(built):
    assert rows(built, "SELECT id, kept FROM snapshots") == [{"id": 1, "kept": 2}]
    names = query(built.snapshot, "FROM instructions").column_names
    assert {"uid", "id", "kind", "messages", "boxes", "writer", "prompt_digest", "cost", "reason"} <= set(names)


@pytest.mark.parametrize(
    "sql", ["SHOW TABLES", "DESCRIBE pairs", "SUMMARIZE texts", "WITH a AS (FROM boxes) SELECT * FROM a"]
)
def test_ways_of_looking_around(built, sql):
    assert rows(built, sql)


def test_a_recipe_without_scores_leaves_nulls(tmp_path):
    built = build(str(tmp_path), PAIRS[:2], clip=False)
    assert rows(built, "SELECT DISTINCT clip_score FROM pairs") == [{"clip_score": None}]
    table = query(built.snapshot, "SELECT clip_score, itm_score FROM texts")
    assert table.schema.types == [pa.float32(), pa.float32()] and table["clip_score"].null_count == 3


def test_a_recipe_without_images_leaves_the_views_empty(tmp_path):
    snapshot = build(str(tmp_path), PAIRS[:2], clip=False).snapshot
    for field in fields.IMAGES:
        del snapshot.record.columns[field.name]
    assert query(snapshot, "SELECT DISTINCT width, sha256, clip_score FROM pairs").to_pylist() == [
        {"width": None, "sha256": None, "clip_score": None}
    ]
    images = query(snapshot, "SELECT uid, image, width, transform FROM images")
    assert images.num_rows == query(snapshot, "FROM boxes").num_rows == 0
    assert images.schema.types == [pa.string(), pa.binary(), pa.int32(), pa.list_(pa.field("l", pa.float32()))]


def test_tables_without_files_are_empty_with_the_right_types(tmp_path):
    built = build(str(tmp_path), [PAIRS[5]])
    assert [r["reason"] for r in rows(built, "FROM pairs")] == ["source.empty_url"]
    full = build(str(tmp_path / "full"), PAIRS)
    for view in VIEWS:
        assert query(built.snapshot, f"FROM {view}").schema == query(full.snapshot, f"FROM {view}").schema
    assert rows(built, "FROM images") == rows(built, "FROM boxes") == []


def test_an_old_snapshot_stays_as_it_was(tmp_path):
    build(str(tmp_path), PAIRS[:3])
    later = [Pair(0, 0, "a red circle", ("ein roter Kreis",), reason="clip.below_threshold"), *PAIRS[1:]]
    built = build(str(tmp_path), later)
    count = "SELECT count(*) AS n, count(*) FILTER (status = 'kept') AS kept FROM pairs"
    assert query(built.dataset.snapshot(1), count).to_pylist() == [{"n": 3, "kept": 2}]
    assert query(built.dataset.snapshot(2), count).to_pylist() == [{"n": 6, "kept": 1}]


class _Counted:
    """A file that counts the bytes read from it."""

    def __init__(self, file, read: list[int]):
        self._file, self._read = file, read

    def __getattr__(self, name):
        return getattr(self._file, name)

    def read(self, size=-1):
        data = self._file.read(size)
        self._read.append(len(data))
        return data


def test_image_bytes_are_read_only_when_asked_for(tmp_path, monkeypatch):
    built = build(str(tmp_path), [Pair(n, 0, size=(300, 300), format="png") for n in range(12)])
    volume = sum(f.size for f in built.snapshot.files(IMAGES_TABLE))
    read: list[int] = []
    plain = _SnapshotFiles._open
    monkeypatch.setattr(_SnapshotFiles, "_open", lambda *args, **options: _Counted(plain(*args, **options), read))
    rows(built, "SELECT sum(width) FROM images")
    rows(built, "SELECT * FROM pairs")
    assert 0 < sum(read) < volume / 3
    rows(built, "SELECT sum(octet_length(image)) FROM images")
    assert sum(read) > volume / 2


@pytest.mark.parametrize("sql", ["SELECT nothing FROM pairs", "SELEC", "SELECT * FROM elsewhere", "SELECT 1/0 +", ""])
def test_wrong_sql_names_the_views(built, sql):
    with pytest.raises(ConfigError) as caught:
        query(built.snapshot, sql)
    assert "pairs, texts, images" in str(caught.value) or "one SELECT" in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "COPY pairs TO '{out}'",
        "SELECT 1; SELECT 2",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM '{inside}'",
        "SELECT * FROM glob('/*')",
        "ATTACH '{out}'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "DROP VIEW pairs",
        "EXPLAIN ANALYZE COPY pairs TO '{out}'",
        "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    ],
)
def test_a_query_cannot_write_or_read_elsewhere(built, tmp_path, sql):
    inside = built.dataset.path(".secret.csv")
    with open(inside, "w", encoding="utf-8") as file:
        file.write("a,b\n1,2\n")
    with pytest.raises(ConfigError):
        query(built.snapshot, sql.format(out=tmp_path / "out.parquet", inside=inside))
    assert not list(tmp_path.iterdir())
    assert query(built.snapshot, "FROM read_text('snapshot:///etc/hostname')").num_rows == 0


@pytest.mark.parametrize("target", ["{out}", "snapshot://new.parquet", "{dataset}/new.parquet"])
def test_not_even_the_connection_itself_can_write(built, tmp_path, target):
    target = target.format(out=tmp_path / "x.parquet", dataset=built.dataset.root.replace("'", "''"))
    with connect(built.snapshot) as connection, pytest.raises(duckdb.Error):
        connection.execute(f"COPY (SELECT 1) TO '{target}'")


def test_a_remote_dataset_reads_through_fsspec(tmp_path):
    """All that the views need goes through the dataset's own file system."""
    built = build(str(tmp_path), PAIRS)
    snapshot, memory = built.snapshot, fsspec.filesystem("memory")
    for file in [f for table in snapshot.record.tables for f in snapshot.files(table)]:
        memory.pipe_file(file.path, Path(file.path).read_bytes())
        Path(file.path).unlink()
    snapshot.dataset.fs = memory
    assert query(snapshot, "SELECT count(*) AS n FROM pairs WHERE width > 0").to_pylist() == [{"n": 3}]


def test_threads_that_share_a_file_each_read_at_their_own_place(tmp_path):
    """DuckDB seeks and reads in two calls; another thread may seek in between."""
    (tmp_path / "file").write_bytes(bytes(range(256)))
    with (tmp_path / "file").open("rb") as opened:
        shared = _SharedFile(opened)
        shared.seek(10)
        found = []
        other = threading.Thread(target=lambda: (shared.seek(200), found.append(shared.read(3)), shared.seek(-1, 2)))
        other.start()
        other.join()
        assert shared.read(2) == bytes([10, 11]) and shared.tell() == 12
        assert found == [bytes([200, 201, 202])]
        assert shared.seek(0, 2) == 256 and shared.seek(-6, 1) == 250 and shared.read() == bytes(range(250, 256))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_long_query_can_be_interrupted(built, monkeypatch, sent):
    # DuckDB does not look for signals by itself: this query went on for hours.
    monkeypatch.setattr(query_module, "interruptible", _interrupted_once_it_runs(sent))
    many = ", ".join(f"range(9999) t{n}(i{n})" for n in range(5))
    before = signal.signal(sent, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            query(built.snapshot, f"SELECT count(*) FROM {many} WHERE i0 + i1 * i2 + i3 = i4")
    finally:
        signal.signal(sent, before)


def _interrupted_once_it_runs(sent: signal.Signals):
    original = query_module.interruptible

    def ask_and_send(connection, ask):
        def tell_first():
            threading.Timer(0, signal.pthread_kill, (threading.main_thread().ident, sent)).start()
            return ask()

        return original(connection, tell_first)

    return ask_and_send


def test_a_query_that_memory_does_not_hold_is_no_damage(built, monkeypatch):
    plain = duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda at, config: plain(at, config={**config, "memory_limit": "20MB"}))
    with pytest.raises(StoreError, match=r"Out of Memory Error.*ask for fewer rows") as caught:
        query(built.snapshot, "SELECT list(a || repeat('x', 1000)) FROM range(1000000) t(a)")
    assert "damaged" not in str(caught.value)


def test_duckdb_finds_nulls_in_a_column_whose_other_values_are_equal(tmp_path: Path):
    # DuckDB 2.0.0 takes every row for a null there, by the row group's statistics.
    values = pa.table({"reason": pa.array([None, "http.empty", None], pa.string())})
    pq.write_table(values, tmp_path / "one.parquet")
    with duckdb.connect() as connection:
        rows = connection.execute(f"SELECT count(*) FROM '{tmp_path / 'one.parquet'}' WHERE reason IS NULL").fetchall()
    assert rows == [(2,)]


@pytest.mark.parametrize("damage", ["missing", "truncated", "page"])
def test_a_damaged_file_is_no_fault_of_the_query(tmp_path: Path, damage: str):
    snapshot = build(str(tmp_path / "dataset"), PAIRS).snapshot
    path = Path(snapshot.files("ledger")[0].path)
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        column = pq.read_metadata(path).row_group(0).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"pairmill verify .* --repair"):
        query(snapshot, "SELECT uid, status FROM pairs")
