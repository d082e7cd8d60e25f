from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairmill.errors import SourceError
from pairmill.sources import read
from pairmill.sources.url_table import split_record
from schemas import config
from tests.sources.tables import rows

PAIRS = [
    ("http://a.example/1.jpg", "one"),
    ("http://a.example/2,3.jpg", 'a "quoted", text'),
    ("http://b.example/é", "zwei\nZeilen"),
]


def table(path: Path | str, **options: object) -> list[dict]:
    return rows(config.UrlTable(path=str(path), **options))


def pairs(found: list[dict]) -> list[tuple]:
    return [(row["url"], row["text"]) for row in found]


def reasons(found: list[dict]) -> list[str | None]:
    return [row["reason"] for row in found]


def write(path: Path, kind: str) -> Path:
    """`PAIRS` as a file."""
    records = [{"url": url, "text": text} for url, text in PAIRS]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    if kind in ("csv", "tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["url", "text"], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(records)
        data = text.getvalue().encode()
    elif kind == "json":
        data = json.dumps(records).encode()
    else:
        data = "\n".join(json.dumps(r) for r in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_format(tmp_path: Path, kind: str, ending: str) -> None:
    path = write(tmp_path / f"x.{kind}{ending}", kind)
    if kind == "parquet" and ending:
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = table(path)
    assert pairs(found) == PAIRS
    assert found[0]["texts"] == [{"text": "one", "source": "web"}]
    assert found[0]["boxes"] == []
    assert found[0]["locator"] is found[0]["extra"] is found[0]["reason"] is None


def test_globs_folders_and_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.csv"):
        (tmp_path / name).write_text(f"url,text\nhttp://x/{name},t\n")
    (tmp_path / "notes.md").write_text("no table")
    names = [f"http://x/{n}.csv" for n in "abc"]
    assert [row["url"] for row in table(tmp_path / "*.csv")] == names
    assert [row["url"] for row in table(tmp_path)] == names


def test_fsspec_urls(tmp_path: Path) -> None:
    with fsspec.open("memory://pairs/x.jsonl", "w") as file:
        file.write('{"url": "http://x/1", "text": "t"}\n')
    assert pairs(table("memory://pairs/x.jsonl")) == [("http://x/1", "t")]
    assert pairs(table("memory://pairs/*.jsonl")) == [("http://x/1", "t")]
    path = write(tmp_path / "x.csv", "csv")
    assert pairs(table(path.as_uri())) == PAIRS


def test_other_columns_are_kept(tmp_path: Path) -> None:
    when = datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.timezone.utc)
    record = {"U": "http://x/1", "T": "t", "n": 3, "x": float("nan"), "when": when, "tags": ["a"], "raw": b"\xff"}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    (row,) = table(tmp_path / "x.parquet", url="U", text="T")
    extra = {"n": 3, "x": None, "when": "2024-05-06T07:08:00+00:00", "tags": ["a"], "raw": "/w=="}
    assert json.loads(row["extra"]) == extra
    (tmp_path / "x.csv").write_text("id,url,text\n7,http://x/1,t\n")
    assert json.loads(table(tmp_path / "x.csv")[0]["extra"]) == {"id": "7"}
    (tmp_path / "x.jsonl").write_text('{"url": "http://x/1", "text": "t", "deep": {"a": [1, null]}}')
    assert json.loads(table(tmp_path / "x.jsonl")[0]["extra"]) == {"deep": {"a": [1, None]}}


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_a_missing_column_names_the_near_one(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"x.{kind}", kind)
    with pytest.raises(SourceError, match=r"no column 'URL'\. Did you mean 'url'\?.*'url', 'text'.*source\.url"):
        table(path, url="URL")
    with pytest.raises(SourceError, match=r"no column 'caption'\. Did you mean 'text'\?"):
        table(path, text="caption")


def test_no_text_column(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("url\nhttp://x/1\n")
    assert pairs(table(tmp_path / "x.csv", text=None)) == [("http://x/1", None)]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.json", "x.tsv.gz"])
def test_empty_tables_are_no_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    assert table(tmp_path / name) == []
    (tmp_path / "header.csv").write_text("url,text\n")
    assert table(tmp_path / "header.csv") == []
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "e.parquet"
    )
    assert table(tmp_path / "e.parquet") == []


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file matches"):
        read(config.UrlTable(path=str(tmp_path / "absent.csv")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(SourceError, match=r"x\.parquet"):
        table(tmp_path / "x.parquet")
    (tmp_path / "x.json").write_text('[{"url": "http://x/1", "text": "t"}, {"url":')
    with pytest.raises(SourceError, match="is not JSON"):
        table(tmp_path / "x.json")
    whole = gzip.compress(b"url,text\n" + b"http://x/1,t\n" * 10_000)
    (tmp_path / "x.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"x\.csv\.gz"):
        table(tmp_path / "x.csv.gz")
    (tmp_path / "x.dat").write_text("url,text\n")
    with pytest.raises(SourceError, match=r"source\.format"):
        table(tmp_path / "x.dat")
    assert table(tmp_path / "x.dat", format="csv") == []


def test_empty_urls_are_rows_with_a_reason(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": [None, "", " ", "http://x/1"], "text": ["a", None, "c", None]}), tmp_path / "x.parquet"
    )
    found = table(tmp_path / "x.parquet")
    assert reasons(found) == ["source.empty_url"] * 3 + [None]
    assert pairs(found) == [(None, "a"), (None, None), (None, "c"), ("http://x/1", None)]
    assert found[3]["texts"] == []


def test_text_is_capped_and_made_valid(tmp_path: Path) -> None:
    records = [
        '{"url": "http://x/1", "text": "a\\u0000b\\ud800c \\ud83d\\ude00"}',
        json.dumps({"url": "http://x/2", "text": "é" * 5_000_000}),
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(records))
    one, two = table(tmp_path / "x.jsonl")
    assert one["text"] == "ab\ufffdc \U0001f600"
    assert two["text"] == "é" * 32_768
    (tmp_path / "x.csv").write_text(f"url,text\nhttp://x/1,{'a' * 300_000}\nhttp://x/2,b\n")
    assert [len(row["text"]) for row in table(tmp_path / "x.csv")] == [32_768, 1]


def test_overlong_urls_are_malformed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"url,text\ndata:image/png;base64,{'A' * 10_000},t\nhttp://x/2,b\n")
    found = table(tmp_path / "x.csv")
    assert reasons(found) == ["source.malformed_row", None]
    assert found[0]["url"] is None


# -- damage costs the row, not the rest -------------------------------------------------------------------------------

HOSTILE_CSV = b"""url,text
http://x/1,ok
http://x/2,"unclosed
http://x/3,"good, ""quoted"" text"
http://x/4,"two
lines"
"http://x/5?a=1,2",comma in the URL
http://x/6,caf\xe9 in Latin-1
http://x/7,too,many
http://x/8
http://x/9,5" nail
http://x/10,"text" after
,empty
http://x/11,"a
b

c"

http://x/12,nul \x00 here
http://x/13,line separator \xe2\x80\xa8 here
http://x/14,"never closed
"""


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_damaged_csv(tmp_path: Path, newline: bytes, bom: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(bom + HOSTILE_CSV.replace(b"\n", newline))
    found = table(tmp_path / "x.csv")
    good = [(row["url"].removeprefix("http://x/"), row["text"]) for row in found if row["reason"] is None]
    assert good == [
        ("1", "ok"),
        ("3", 'good, "quoted" text'),
        ("4", "two\nlines"),
        ("5?a=1,2", "comma in the URL"),
        ("9", '5" nail'),
        ("11", "a\nb\n\nc"),
        ("12", "nul  here"),
        ("13", "line separator \u2028 here"),
    ]
    bad = [(row["reason"], row["url"], row["text"]) for row in found if row["reason"] is not None]
    assert [reason for reason, _, _ in bad] == ["source.malformed_row"] * 5 + [
        "source.empty_url",
        "source.malformed_row",
    ]
    assert all(url is None for _, url, _ in bad)
    assert [text[:11] for reason, _, text in bad if "malformed" in reason] == [
        "http://x/2,",
        "http://x/6,",
        "http://x/7,",
        "http://x/8 ",
        "http://x/10",
        "http://x/14",
    ]
    assert len({text for _, _, text in bad}) == len(bad)


def test_an_unclosed_quote_far_from_any_other(tmp_path: Path) -> None:
    lines = [f"http://x/{i},text {i}" for i in range(50_000)]
    lines[100] = 'http://x/100,"unclosed'
    (tmp_path / "x.csv").write_text("url,text\n" + "\n".join(lines))
    found = table(tmp_path / "x.csv")
    assert len(found) == 50_000
    assert [i for i, row in enumerate(found) if row["reason"]] == [100]
    assert found[-1]["text"] == "text 49999"


def test_many_unclosed_quotes_stay_cheap(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("url,text\n" + "".join(f'http://x/{i},"open {i}\n' for i in range(20_000)))
    assert reasons(table(tmp_path / "x.csv")) == ["source.malformed_row"] * 20_000


def test_records_over_a_block_border(tmp_path: Path) -> None:
    long = "word\n" * 100_000
    path = tmp_path / "x.csv"
    path.write_text(f'url,text\nhttp://x/1,"{long}"\n' * 1 + f'http://x/2,"{long}"\nhttp://x/3,end\n')
    found = table(path)
    assert [row["url"] for row in found] == ["http://x/1", "http://x/2", "http://x/3"]
    assert found[1]["text"] == long[:32_768]


def test_tsv_written_without_quoting(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('url\ttext\nhttp://x/1\t"he said\nhttp://x/2\tplain\nhttp://x/3\t"quoted\ttab"\n')
    assert pairs(table(tmp_path / "x.tsv")) == [
        ("http://x/1", '"he said'),
        ("http://x/2", "plain"),
        ("http://x/3", "quoted\ttab"),
    ]


def test_old_line_ends(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"url,text\rhttp://x/1,a\rhttp://x/2,b\r")
    assert pairs(table(tmp_path / "x.csv")) == [("http://x/1", "a"), ("http://x/2", "b")]


def test_torn_json_lines(tmp_path: Path) -> None:
    lines = [
        b'{"url": "http://x/1", "text": "a"}',
        b'{"url": "http://x/2", "te',
        b'["http://x/3", "c"]',
        b'{"url": "http://x/4", "text": "caf\xe9"}',
        b"",
        b"[" * 100_000,
        b'{"url": "http://x/5"}',
        b'{"url": null, "text": "f"}',
        b'{"url": ["a"], "text": 5}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = table(tmp_path / "x.jsonl")
    bad = "source.malformed_row"
    assert reasons(found) == [None, bad, bad, bad, bad, None, "source.empty_url", None]
    assert pairs(found)[5] == ("http://x/5", None)
    assert pairs(found)[7] == ('["a"]', "5")


def test_json_shapes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (
        {"url": ["http://x/1"], "text": ["t"]},
        {"url": {"0": "http://x/1"}, "text": {"0": "t"}},
        {"url": "http://x/1", "text": "t"},
    ):
        path.write_text(json.dumps(content))
        assert pairs(table(path)) == [("http://x/1", "t")]
    path.write_text('{"url": "http://x/1", "text": "t"}\n{"url": "http://x/2", "text": "u"}\n{"url": ')
    assert reasons(table(path)) == [None, None, "source.malformed_row"]


def test_parquet_that_lies_about_utf8(tmp_path: Path) -> None:
    lying = pa.StringArray.from_buffers(3, *pa.array([b"fine", b"caf\xe9", b"good"]).buffers()[1:])
    pq.write_table(pa.table({"url": [f"http://x/{i}" for i in range(3)], "text": lying}), tmp_path / "x.parquet")
    found = table(tmp_path / "x.parquet")
    assert reasons(found) == [None, "source.malformed_row", None]
    assert [row["url"] for row in found] == ["http://x/0", None, "http://x/2"]


def test_column_types_of_other_writers(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(["http://x/1", None]).cast(kind) if kind != pa.binary() else pa.array([b"http://x/1", None])
        pq.write_table(pa.table({"url": column, "text": pa.array([1.5, 2.5])}), tmp_path / "x.parquet")
        assert pairs(table(tmp_path / "x.parquet")) == [("http://x/1", "1.5"), (None, "2.5")]


def test_tables_come_in_pieces(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": [f"http://x/{i}" for i in range(25_000)], "text": ["t"] * 25_000}), tmp_path / "x.parquet"
    )
    sizes = [t.num_rows for t in read(config.UrlTable(path=str(tmp_path / "x.parquet")))]
    assert sizes == [10_000, 10_000, 5_000]


# -- laws -------------------------------------------------------------------------------------------------------------

FIELD = st.text(st.characters(blacklist_characters="\r\x00", blacklist_categories=("Cs",)), max_size=12)


@given(st.lists(st.lists(FIELD, min_size=2, max_size=2), max_size=8), st.sampled_from([",", "\t"]))
@settings(max_examples=150, deadline=None)
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[list[str]], delimiter: str
) -> None:
    records = [[f"http://x/{url.replace(chr(10), '')}", text] for url, text in records]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerows([["url", "text"], *records])
    path = tmp_path_factory.mktemp("csv") / ("x.csv" if delimiter == "," else "x.tsv")
    path.write_bytes(text.getvalue().encode())
    assert pairs(table(path)) == [(url.strip(), text or None) for url, text in records]


@given(st.lists(st.one_of(st.binary(max_size=20), st.just(b'"'), st.just(b'http://x/,"a')), max_size=30))
@settings(max_examples=150, deadline=None)
def test_no_bytes_break_the_csv_reader(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(b"url,text\n" + b"\n".join([*lines, b"http://x/last,good"]))
    found = table(path)
    assert pairs(found)[-1] == ("http://x/last", "good")


@given(st.lists(FIELD.map(lambda f: f.replace("\n", "")), min_size=1, max_size=5))
def test_split_record_agrees_with_the_csv_module(fields: list[str]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)
    assert split_record(text.getvalue(), ",") == next(csv.reader([text.getvalue()]), [""])
