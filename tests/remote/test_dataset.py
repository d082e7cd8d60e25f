"""A dataset in an object store is what the same one on a disk is: every verb, kills, two runs at once, what goes wrong,
and no secret anywhere."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.image_rules import ImageStats
from pairmill import storage
from pairmill.errors import StoreError
from pairmill.export import export_webdataset, known_exports, verify_export
from pairmill.integrity import examine
from pairmill.plan import Recipe
from pairmill.procedural.web import Kind, ProceduralWeb
from pairmill.query import query
from pairmill.report.progress import Silent
from pairmill.run import load_config, plan, refresh
from pairmill.sources import download_stage
from pairmill.store import Dataset
from pairmill.takedown import Selectors, check_absence, forget
from pairmill.versions import rollback, vacuum
from schemas.config import Retention, RunConfig
from tests.faults.datasets import VOLATILE, counts, write_config, write_urls
from tests.faults.zygote import Zygote
from tests.history import read
from tests.needles import find_needles
from tests.remote import conftest
from tests.remote.conftest import S3, new_bucket
from tests.remote.server import ACCESS_KEY, SECRET_KEY, TOKEN
from tests.remote.test_storage import only, profiles
from tests.test_cli import Command, command  # noqa: F401 - a fixture

SECRETS = (SECRET_KEY, SECRET_KEY.replace("/", "%2F"), ACCESS_KEY)
LOOSER = "options.words=2"


def at(url: str, *overrides: str) -> tuple[str, ...]:
    return (f"dataset={url}", *overrides)


def content(config: Path, overrides: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    """Content hashes of the last snapshot by table and column."""
    found = read(Dataset(load_config(str(config), overrides).dataset).snapshot())
    return {table: {k: v for k, v in digests.items() if k not in VOLATILE} for table, digests in found.items()}


def downloaded(bucket: str, folder: Path) -> Path:
    """All objects of a bucket as files."""
    fs, _ = storage.open_fs(f"s3://{bucket}")
    for path in fs.find(bucket):
        file = folder / path.removeprefix(f"{bucket}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(fs.cat_file(path))
    return folder


# -- every verb --


UNSTEADY = ("seconds", "created_at", "stage_seconds", "spent", "config", "at", "requests", "bytes", "files", "tables")
"""Times, names that are drawn, what depends on the length of such texts, and how many commits there were."""


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in UNSTEADY}
    return [steady(v) for v in value] if isinstance(value, list) else value


def test_every_verb_says_the_same_as_on_a_disk(s3: S3, bucket: str, tmp_path: Path, command: Command):  # noqa: F811
    remote, local = f"s3://{bucket}/data", str(tmp_path / "dataset")
    said: list[str] = []

    def both(verb: str, *arguments: str) -> Any:
        """What the command says of both datasets, which must be the same; `DATASET` stands for them."""
        answers = []
        for url in (local, remote):
            done = command(verb, *(a.replace("DATASET", url) for a in arguments))
            assert done.code == 0, done
            assert url == local or not done.err.count("Traceback")
            said.extend((done.out, done.err))
            answers.append(steady(json.loads(done.out.replace(url, "DATASET"))))
        assert answers[0] == answers[1], (verb, arguments)
        return answers[0]

    write_urls(tmp_path, 60)
    config = str(write_config(tmp_path))
    run = (config, "--set", "dataset=DATASET", "--json")
    assert both("run", *run)["published"]
    assert not both("run", *run)["published"]
    write_urls(tmp_path, 100)
    assert both("plan", *run, "--set", LOOSER)["new_rows"] == 40
    assert both("run", *run, "--set", LOOSER)["admitted_new"] == 40
    first, second = (content(Path(config), at(url, LOOSER)) for url in (local, remote))
    assert first == second
    assert [record["id"] for record in both("snapshots", "DATASET", "--json")] == [1, 2]
    assert both("status", "DATASET", "--json")["admitted"] == 100
    sql = "SELECT reason, count(*) AS n FROM pairs GROUP BY 1 ORDER BY 1"
    assert sum(row["n"] for row in both("sql", "DATASET", sql, "--format", "json")) == 100
    assert both("diff", "DATASET", "1", "2", "--format", "json")["pairs_in"] == 40
    assert both("rollback", "DATASET", "1", "--json")["admitted"] == 60
    assert content(Path(config), at(local)) == content(Path(config), at(remote)) != first
    gone = both("sql", "DATASET", "SELECT uid FROM pairs ORDER BY uid LIMIT 2", "--format", "json")[0]["uid"]
    assert both("forget", "DATASET", "--uid", gone, "--yes", "--json")["done"]
    assert both("forget", "DATASET", "--check", "--json")["absent"]
    assert both("vacuum", "DATASET", "--keep", "1", "--grace", "0", "--json")["expired"] == [1, 2, 3]
    both("verify", "DATASET", "--json")
    last = content(Path(config), at(remote))
    assert last == content(Path(config), at(local)) and len(Dataset(remote).snapshots()) == 1
    assert find_needles([downloaded(bucket, tmp_path / "objects")], SECRETS) == []
    assert not any(secret in text for secret in SECRETS for text in said)
    traces = find_needles([tmp_path / "objects"], [gone])
    assert traces and all("/data/tombstones/" in trace for trace in traces), "a uid is a hash already"


def pictures(config: RunConfig) -> Recipe:
    """Images, and what they look like."""
    return Recipe("pictures", (download_stage(config.download), ImageStats()))


def test_images_from_the_web_come_are_exported_change_and_go(s3: S3, bucket: str, tmp_path: Path):
    remote, local = f"s3://{bucket}/data", str(tmp_path / "dataset")
    stored = "SELECT i.*, p.url FROM images i JOIN pairs p USING (uid) ORDER BY uid"

    def images() -> dict[str, str]:
        """uids by URL; both have the same images."""
        here, there = (query(Dataset(url).snapshot(), stored) for url in (local, remote))
        assert here.equals(there)
        return dict(zip(here["url"].to_pylist(), here["uid"].to_pylist(), strict=True))

    with ProceduralWeb(40, seed=5, hang_s=0.1, proportions={Kind.UNAVAILABLE: 0.1, Kind.NOT_FOUND: 0.1}) as web:
        web.write(tmp_path)
        config = write_config(
            tmp_path,
            recipe="tests.remote.test_dataset:pictures",
            download={"allow_private_addresses": True, "timeout_s": 2, "retries": 0, "per_host": 32},
        )
        runs = [load_config(str(config), at(local)), load_config(str(config), at(remote))]
        workers = load_config(str(config), at(remote, "engine.workers=2"))
        first = [refresh(run, Silent()) for run in (runs[0], workers)]
        assert first[0].snapshot and first[0].snapshot.deferred
        again = [refresh(run, Silent(), retry_deferred=True) for run in runs]
        assert again[0].computed == again[1].computed == {"images": first[0].snapshot.deferred}
        before = images()
        assert content(config, at(local)) == content(config, at(remote))
        assert len(before) > 20
        web.change(sorted(set(before) & {row.url for row in web.rows if row.scene is not None})[:3])
        visits = [refresh(run, Silent(), revisit="true") for run in runs]
        assert visits[0].computed == visits[1].computed and visits[0].computed["image_stats"] == 3
        assert content(config, at(local)) == content(config, at(remote))
        assert query(Dataset(remote).snapshot(), "SELECT count(*) AS n FROM image_history")["n"].to_pylist() == [3]
        after = images()
    gone = min(after.values())
    tars = {f"s3://{bucket}/tars": remote, str(tmp_path / "from-remote"): remote, str(tmp_path / "tars"): local}
    for out, url in tars.items():
        assert export_webdataset(Dataset(url).snapshot(), out, pairs_per_shard=25).samples == len(after)
    assert len({frozenset(members(out)) for out in tars}) == 1
    with pytest.raises(StoreError, match="make the bucket first"):
        export_webdataset(Dataset(remote).snapshot(), f"s3://{bucket}-none/out")
    asked = Selectors.of(uids=[gone])
    reports = [forget(Dataset(url), asked, Silent()) for url in (local, remote)]
    here, there = ({name: (t.rows, t.files, t.copies) for name, t in r.tables.items()} for r in reports)
    assert here == there and all(r.done for r in reports)
    assert len(known_exports(Dataset(remote))) == 2
    for known in known_exports(Dataset(remote)):
        assert verify_export(known.out).ok
    absence = check_absence(Dataset(remote), asked, Silent())
    assert absence.absent and len(absence.exports) == 2
    assert rollback(Dataset(remote), 1).snapshot.admitted == rollback(Dataset(local), 1).snapshot.admitted
    removed = [vacuum(Dataset(url), Retention(snapshots=1), grace_hours=0) for url in (local, remote)]
    assert {(r.table, r.why, r.files) for r in removed[0].removed} == {
        (r.table, r.why, r.files) for r in removed[1].removed
    }
    assert content(config, at(local)) == content(config, at(remote))
    assert gone not in images().values()
    assert not examine(Dataset(remote), Silent()).damaged
    assert find_needles([downloaded(bucket, tmp_path / "objects"), tmp_path / "tars"], SECRETS) == []


def members(out: str) -> Iterator[tuple[str, bytes]]:
    """The files of an export that say nothing of where its dataset is."""
    fs, root = storage.open_fs(out)
    for path in fs.ls(root, detail=False):
        if path.endswith((".tar", ".parquet")):
            yield path.rpartition("/")[2], fs.cat_file(path)


# -- kills, and two at once --


@pytest.fixture(scope="module")
def zygote(s3_server: S3) -> Iterator[Zygote]:
    with s3_server.known():
        running = Zygote().__enter__()
    yield running
    running.__exit__()


def test_sigkill_anywhere_and_the_next_run_goes_on_at_once(zygote: Zygote, bucket: str, tmp_path: Path):
    write_urls(tmp_path, 40)
    config = write_config(tmp_path)
    assert zygote.run({"config": str(config)})[0].code == 0
    expected = content(config)
    (calm,) = zygote.run({"config": str(config), "overrides": at(f"s3://{bucket}/calm")})
    assert calm.code == 0, calm.error
    assert content(config, at(f"s3://{bucket}/calm")) == expected
    ends = [{"before": 1}, {"after": calm.steps // 2}, {"before": calm.steps - 1}, {"after": calm.steps - 1}]
    ends += [{"clock": 0.3 * calm.seconds}]
    for number, when in enumerate(ends):
        url = f"s3://{bucket}/{number}"
        (killed,) = zygote.run({"config": str(config), "overrides": at(url), **when})
        late = "clock" in when and killed.code == 0
        assert late or killed.code == -signal.SIGKILL, (when, killed.error)
        counts(Dataset(url))
        (again,) = zygote.run({"config": str(config), "overrides": at(url)})
        assert again.code == 0 and again.seconds < 30, (when, again)
        assert content(config, at(url)) == expected, when
        assert len(Dataset(url).snapshots()) == 1
        if number == 1:
            assert not examine(Dataset(url), Silent()).damaged


def test_of_two_runs_at_once_one_waits_or_is_refused(zygote: Zygote, bucket: str, tmp_path: Path):
    write_urls(tmp_path, 40)
    config = write_config(tmp_path)
    job = {"config": str(config), "overrides": at(f"s3://{bucket}/a")}
    outcomes = zygote.run(job, {**job, "delay": 0.2})
    assert sorted(o.code for o in outcomes) == [0, 1], [o.error for o in outcomes]
    (refused,) = (o for o in outcomes if o.code)
    assert refused.error.startswith("DatasetLocked") and "is being written by process " in refused.error
    job = {"config": str(config), "overrides": at(f"s3://{bucket}/b"), "arguments": {"wait_s": 60}}
    outcomes = zygote.run(job, job)
    assert [o.code for o in outcomes] == [0, 0], [o.error for o in outcomes]
    for name in "ab":
        assert len(Dataset(f"s3://{bucket}/{name}").snapshots()) == 1
    assert content(config, at(f"s3://{bucket}/a")) == content(config, at(f"s3://{bucket}/b"))


# -- credentials, and what goes wrong --


def test_a_whole_run_with_nothing_but_profile_files(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    only(monkeypatch, **profiles(tmp_path, s3.endpoint))
    write_urls(tmp_path, 40)
    run = load_config(str(write_config(tmp_path)), at(f"s3://{bucket}/data", "engine.workers=2"))
    report = refresh(run, Silent())
    assert report.published and report.snapshot is not None
    assert counts(Dataset(run.dataset)) == {None: report.snapshot.kept, **report.snapshot.reasons}


VERBS = (
    ("run", "CONFIG"),
    ("plan", "CONFIG"),
    ("status", "DATASET"),
    ("snapshots", "DATASET"),
    ("sql", "DATASET", "SELECT 1"),
    ("export", "DATASET", "--format", "parquet", "--out", "OUT"),
    ("diff", "DATASET", "1", "1"),
    ("rollback", "DATASET", "1"),
    ("vacuum", "DATASET"),
    ("forget", "DATASET", "--url", "http://host1.example/1.jpg", "--yes", "--wait", "1"),
    ("forget", "DATASET", "--check"),
    ("verify", "DATASET"),
)
WRITING = ("run", "rollback", "vacuum", "forget")


@pytest.fixture(scope="module")
def begun(s3_server: S3, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The config and the URL of a dataset with a snapshot, whose list has grown since."""
    folder = tmp_path_factory.mktemp("begun")
    with s3_server.known():
        write_urls(folder, 20)
        config = write_config(folder, dataset=f"s3://{new_bucket()}/data")
        refresh(load_config(str(config)), Silent())
    write_urls(folder, 40)
    return config, load_config(str(config)).dataset


def fails(command: Command, verb: tuple[str, ...], begun: tuple[Path, str], dataset: str = "") -> str:  # noqa: F811
    """What a verb says that fails as it should: one clear message, without a traceback and without secrets."""
    config, dataset = begun[0], dataset or begun[1]
    names = {"CONFIG": str(config), "DATASET": dataset, "OUT": str(config.parent / "out")}
    done = command(*(names.get(word, word) for word in verb), *(["--set", f"dataset={dataset}"] * ("CONFIG" in verb)))
    text = done.out + done.err
    assert done.code in (1, 2), (verb, done)
    assert "Traceback" not in text and "defect" not in text and done.err.count("error: ") == 1, (verb, text)
    assert not any(secret in text for secret in SECRETS), (verb, text)
    return done.err


def test_a_wrong_key(begun, s3: S3, tmp_path: Path, monkeypatch, command: Command):  # noqa: F811
    only(monkeypatch, **profiles(tmp_path, s3.endpoint, access_key="AKIAWRONGWRONG000001"))
    for verb in VERBS:
        said = fails(command, verb, begun)
        assert "credentials are wrong" in said or "does not know these credentials" in said, (verb, said)
        assert "AKIAWRONG" not in said


def test_no_credentials_at_all(begun, s3: S3, monkeypatch, command: Command):  # noqa: F811
    only(monkeypatch, AWS_ENDPOINT_URL=s3.endpoint)
    for verb in VERBS:
        assert "set AWS_ACCESS_KEY_ID" in fails(command, verb, begun), verb


def test_no_bucket(begun, s3: S3, command: Command):  # noqa: F811
    for verb in VERBS:
        assert "make the bucket first" in fails(command, verb, begun, "s3://no-such-bucket/data"), verb


def test_a_source_that_cannot_be_reached(s3: S3, tmp_path: Path, command: Command):  # noqa: F811
    config = write_config(tmp_path, source={"kind": "url_table", "path": "s3://no-such-bucket/*.parquet"})
    for name in ("*.parquet", "list.parquet", "list.csv.gz"):
        verb = ("plan", "CONFIG", "--set", f"source.path=s3://no-such-bucket/{name}")
        assert "make the bucket first" in fails(command, verb, (config, str(tmp_path / "dataset")))
    s3.fault("down")
    assert "run again when the store answers" in fails(command, verb, (config, str(tmp_path / "dataset")))


def test_a_log_of_all_that_is_known_holds_no_secret(begun, s3: S3, monkeypatch, command: Command):  # noqa: F811
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    conftest.forget()
    plain = command("--debug", "plan", str(begun[0]))
    s3.fault("readonly")
    refused = command("--debug", "run", str(begun[0]))
    assert (plain.code, refused.code) == (0, 1) and "Traceback" in refused.err
    for done in (plain, refused):
        assert not any(secret in done.out + done.err for secret in (*SECRETS, TOKEN))


def test_no_dataset(begun, bucket: str, command: Command):  # noqa: F811
    for verb in VERBS[2:]:
        assert "no pairmill dataset" in fails(command, verb, begun, f"s3://{bucket}/nothing"), verb
    fs, _ = storage.open_fs(f"s3://{bucket}")
    assert not fs.exists(f"{bucket}/nothing")


def test_the_server_does_not_answer(begun, s3: S3, monkeypatch, command: Command):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(storage, "_RETRIES", {"mode": "standard", "max_attempts": 1})
    conftest.forget()
    for verb in (VERBS[0], VERBS[2], VERBS[-2]):
        assert "is the store up" in fails(command, verb, begun), verb


def test_the_server_has_no_time(begun, s3: S3, monkeypatch, command: Command):  # noqa: F811
    monkeypatch.setattr(storage, "_RETRIES", {"mode": "standard", "max_attempts": 1})
    conftest.forget()
    s3.fault("down")
    for verb in (VERBS[0], VERBS[2]):
        assert "run again when the store answers" in fails(command, verb, begun), verb


def test_who_may_only_read_reads(begun, s3: S3, tmp_path: Path, command: Command):  # noqa: F811
    s3.fault("readonly")
    for verb in VERBS:
        if verb[0] in WRITING and "--check" not in verb:
            said = fails(command, verb, begun)
            assert "do not allow it" in said, (verb, said)
    for verb, *arguments in (
        ("plan", str(begun[0])),
        ("status", begun[1]),
        ("sql", begun[1], "SELECT count(*) FROM pairs"),
        ("diff", begun[1], "1", "1"),
        ("verify", begun[1]),
    ):
        done = command(verb, *arguments)
        assert done.code == 0, (verb, done)


# -- what it costs --


def test_what_a_run_asks_of_the_store(begun, s3: S3):
    """Upper bounds, near to what was measured: five tables of two shards, each of which is a request."""
    run = load_config(str(begun[0]))
    refresh(run, Silent())

    def asked(what: Any) -> int:
        start = len(s3.requests())
        what()
        lines = s3.requests()[start:]
        again = {line for line in lines if "HEAD" in line and ".parquet" in line}
        assert not again, "the size of a file is in the log"
        return len(lines)

    assert asked(lambda: refresh(run, Silent())) < 120
    assert asked(lambda: plan(run, Silent())) < 110
    assert asked(lambda: query(Dataset(run.dataset).snapshot(), "SELECT count(*) FROM pairs")) < 90


def test_a_source_in_an_object_store(s3: S3, bucket: str, tmp_path: Path):
    fs, root = storage.open_fs(f"s3://{bucket}/lists")
    with fs.open(f"{root}/urls.parquet", "wb") as file:
        pq.write_table(pa.table({"url": ["http://a.example/1.jpg"], "text": ["one two three four"]}), file)
    source = {"kind": "url_table", "path": f"s3://{bucket}/lists/*.parquet"}
    run = load_config(str(write_config(tmp_path, dataset=f"s3://{bucket}/data", source=source)))
    assert refresh(run, Silent()).admitted_new == 1
    assert not refresh(run, Silent()).published
