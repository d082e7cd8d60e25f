"""The object store: conditional writes, credentials of the usual chain alone, messages without secrets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from pairmill import storage
from pairmill.errors import ConfigError, StoreError
from tests.remote.conftest import ROOT, S3, forget
from tests.remote.server import ACCESS_KEY, REGION, SECRET_KEY, TOKEN


def test_an_object_is_made_once(bucket: str):
    fs, root = storage.open_fs(f"s3://{bucket}/data/")
    assert (root, storage.is_s3(fs), storage.is_local(fs)) == (f"{bucket}/data", True, False)
    assert storage.read(fs, f"{root}/x") is None
    etag = storage.put_if_absent(fs, f"{root}/x", b"one")
    assert etag
    assert storage.put_if_absent(fs, f"{root}/x", b"two") is None
    assert storage.read(fs, f"{root}/x") == storage.Stored(b"one", etag)
    assert fs.cat_file(f"{root}/x") == b"one"


def test_an_object_changes_only_from_the_state_that_was_seen(bucket: str):
    fs, root = storage.open_fs(f"s3://{bucket}/data")
    first = storage.put_if_absent(fs, f"{root}/x", b"one")
    second = storage.put_if_match(fs, f"{root}/x", b"two", first)
    assert second and second != first
    assert storage.put_if_match(fs, f"{root}/x", b"three", first) is None
    assert storage.put_if_match(fs, f"{root}/gone", b"three", first) is None
    assert storage.read(fs, f"{root}/x") == storage.Stored(b"two", second)
    assert not fs.exists(f"{root}/gone")


def test_of_eight_processes_one_wins(s3: S3, bucket: str):
    code = """
import sys
from pairmill import storage
fs, root = storage.open_fs(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(sum(storage.put_if_absent(fs, f"{root}/{i}", sys.argv[2].encode()) is not None for i in range(20)))
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"s3://{bucket}/race", str(n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for n in range(8)
    ]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 8
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [int(racer.communicate(timeout=60)[0]) for racer in racers]
    assert sum(won) == 20
    fs, root = storage.open_fs(f"s3://{bucket}/race")
    written = [int(fs.cat_file(f"{root}/{i}")) for i in range(20)]
    assert [written.count(n) for n in range(8)] == won


def test_files_are_seen_as_soon_as_another_client_wrote_them(s3: S3, bucket: str):
    fs, root = storage.open_fs(f"s3://{bucket}/data")
    assert not fs.exists(f"{root}/a/x")
    fs.pipe_file(f"{root}/a/one", b"1")
    assert fs.ls(f"{root}/a", detail=False) == [f"{root}/a/one"]
    storage.put_if_absent(fs, f"{root}/a/x", b"2")
    assert fs.exists(f"{root}/a/x")
    assert fs.ls(f"{root}/a", detail=False) == [f"{root}/a/one", f"{root}/a/x"]


def test_narrow_columns_fetch_no_images(s3: S3, bucket: str):
    fs, root = storage.open_fs(f"s3://{bucket}/data")
    table = pa.table({"uid": [str(i) for i in range(200)], "image": [os.urandom(10_000) for _ in range(200)]})
    with fs.open(f"{root}/x.parquet", "wb") as file:
        pq.write_table(table, file, compression="none", use_dictionary=False, row_group_size=50)
    source = pads.dataset([f"{root}/x.parquet"], format="parquet", filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(fs)))
    before = len(s3.requests())
    assert source.to_table(columns=["uid"])["uid"].to_pylist() == table["uid"].to_pylist()
    sent = [int(r.split()[2]) for r in s3.requests()[before:] if r.startswith("GET")]
    assert 0 < sum(sent) < 200_000, sent


# -- credentials --


def profiles(folder: Path, endpoint: str, access_key: str = ACCESS_KEY) -> dict[str, str]:
    """Profile files with the right keys in the profile `mill`, and an environment that has nothing but them."""
    (folder / "credentials").write_text(
        f"[default]\naws_access_key_id = WRONG\naws_secret_access_key = WRONG\n"
        f"[mill]\naws_access_key_id = {access_key}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    (folder / "config").write_text(f"[profile mill]\nregion = {REGION}\nendpoint_url = {endpoint}\n")
    return {
        "AWS_CONFIG_FILE": str(folder / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_PROFILE": "mill",
    }


def only(monkeypatch: pytest.MonkeyPatch, **environment: str) -> None:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget()


def delta_round_trip(url: str) -> list[int]:
    from deltalake import DeltaTable, write_deltalake

    write_deltalake(f"{url}/t", pa.table({"a": [1, 2]}), mode="append", storage_options=storage.delta_options(url))
    delta = DeltaTable(f"{url}/t", storage_options=storage.delta_options(url))
    return sorted(delta.to_pyarrow_table()["a"].to_pylist())


def test_credentials_of_the_environment(bucket: str):
    assert delta_round_trip(f"s3://{bucket}/data") == [1, 2]


def test_credentials_of_a_profile_reach_both_libraries(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    only(monkeypatch, **profiles(tmp_path, s3.endpoint))
    assert delta_round_trip(f"s3://{bucket}/data") == [1, 2]
    fs, root = storage.open_fs(f"s3://{bucket}/data")
    assert fs.exists(f"{root}/t/_delta_log/00000000000000000000.json")
    assert storage.put_if_absent(fs, f"{root}/x", b"1")


def test_a_stray_token_in_the_environment_is_not_sent_with_a_profiles_keys(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    only(monkeypatch, **profiles(tmp_path, s3.endpoint), AWS_SESSION_TOKEN=TOKEN)
    assert storage.delta_options(f"s3://{bucket}")["session_token"] == ""
    assert delta_round_trip(f"s3://{bucket}/data") == [1, 2]


def test_credentials_of_a_process_that_a_profile_names(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found = profiles(tmp_path, s3.endpoint)
    (tmp_path / "keys.json").write_text(
        f'{{"Version": 1, "AccessKeyId": "{ACCESS_KEY}", "SecretAccessKey": "{SECRET_KEY}", "SessionToken": "{TOKEN}"}}'
    )
    with (tmp_path / "config").open("a") as config:
        config.write(f"[profile process]\ncredential_process = cat {tmp_path}/keys.json\n")
        config.write(f"region = {REGION}\nendpoint_url = {s3.endpoint}\n")
    only(monkeypatch, **{**found, "AWS_PROFILE": "process"})
    assert storage.delta_options(f"s3://{bucket}")["session_token"] == TOKEN
    assert delta_round_trip(f"s3://{bucket}/data") == [1, 2]


def test_the_region_is_asked_of_the_bucket_where_nobody_names_it(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    forget()
    assert storage.delta_options(f"s3://{bucket}/data")["region"] == REGION


def test_buckets_in_the_host_name(s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tmp_path / "config"
    config.write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example:9000")
    forget()
    options = storage.delta_options("s3://mill/data")
    assert options["endpoint_url"] == "https://mill.store.example:9000"
    assert options["virtual_hosted_style_request"] == "true"
    assert options["allow_http"] == "false"


def test_a_local_dataset_needs_no_options(tmp_path: Path):
    fs, root = storage.open_fs(f"{tmp_path}/")
    assert (storage.delta_options(str(tmp_path)), root, storage.is_local(fs)) == ({}, str(tmp_path), True)
    with pytest.raises(StoreError, match="S3"):
        storage.put_if_absent(fs, f"{root}/x", b"1")


@pytest.mark.parametrize("url", [f"s3://{ACCESS_KEY}:{SECRET_KEY.replace('/', '%2F')}@bucket/data", "s3://me@b/d"])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str):
    with pytest.raises(ConfigError, match="holds credentials") as caught:
        storage.open_fs(url)
    assert "canary" not in str(caught.value) and ACCESS_KEY not in str(caught.value)


def test_commits_are_conditional_writes(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    delta_round_trip(f"s3://{bucket}/data")
    commits = [r for r in s3.requests() if r.startswith(f"PUT /{bucket}/data/t/_delta_log/0")]
    assert commits and all(r.endswith("If-None-Match=*") for r in commits), commits


def test_two_writers_of_one_table_both_land(s3: S3, bucket: str):
    code = """
import sys, pyarrow as pa
from deltalake import write_deltalake
from pairmill import storage
for i in range(5):
    write_deltalake(sys.argv[1], pa.table({"a": [int(sys.argv[2]) * 10 + i]}), mode="append",
                    storage_options=storage.delta_options(sys.argv[1]))
"""
    assert delta_round_trip(f"s3://{bucket}/data") == [1, 2]
    url = f"s3://{bucket}/data/t"
    writers = [subprocess.Popen([sys.executable, "-c", code, url, str(n)], cwd=ROOT) for n in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    from deltalake import DeltaTable

    delta = DeltaTable(url, storage_options=storage.delta_options(url))
    assert sorted(delta.to_pyarrow_table()["a"].to_pylist()) == [0, 1, 1, 2, 2, 3, 4, 10, 11, 12, 13, 14]


# -- messages --


def test_no_credentials(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, AWS_ENDPOINT_URL=s3.endpoint)
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        storage.delta_options(f"s3://{bucket}/data")
    fs, root = storage.open_fs(f"s3://{bucket}/data")
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"):
        storage.put_if_absent(fs, f"{root}/x", b"1")
    with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID"), storage.explained("cannot list"):
        fs.ls(root)


def test_an_unknown_profile(s3: S3, monkeypatch: pytest.MonkeyPatch):
    only(monkeypatch, AWS_PROFILE="nobody")
    with pytest.raises(StoreError, match=r"nobody.*AWS_PROFILE must name a profile"):
        storage.delta_options("s3://bucket/data")


def test_wrong_credentials_are_said_without_them(s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from deltalake import DeltaTable

    only(monkeypatch, **profiles(tmp_path, s3.endpoint, access_key="AKIAWRONGWRONG000001"))
    url = f"s3://{bucket}/data"
    with pytest.raises(StoreError, match="InvalidAccessKeyId") as caught, storage.explained("cannot open"):
        DeltaTable(url, storage_options=storage.delta_options(url))
    assert "WRONG" not in str(caught.value) and "canary" not in str(caught.value)
    assert caught.value.__cause__ is None and "\n" not in str(caught.value)


def test_a_store_that_may_only_be_read(s3: S3, bucket: str):
    fs, root = storage.open_fs(f"s3://{bucket}/data")
    s3.fault("readonly")
    with pytest.raises(storage.AccessDenied, match="do not allow it"):
        storage.put_if_absent(fs, f"{root}/x", b"1")
    with pytest.raises(storage.AccessDenied), storage.explained("cannot write"):
        fs.pipe_file(f"{root}/x", b"1")


def test_no_bucket_and_no_server(s3: S3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    fs, _ = storage.open_fs("s3://no-such-bucket/data")
    with pytest.raises(StoreError, match="make the bucket first"):
        storage.put_if_absent(fs, "no-such-bucket/x", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget()
    with pytest.raises(StoreError, match="is the store up, and AWS_ENDPOINT_URL right"):
        storage.put_if_absent(fs, f"{bucket}/x", b"1")


def test_redaction_keeps_code_and_message_alone(bucket: str):
    storage.delta_options(f"s3://{bucket}")
    answer = (
        f"failed\n  \x1b[31mx\x1b[0m 403 <?xml version='1.0'?>\n<Error><Code>SignatureDoesNotMatch</Code><Message>the\n"
        f"signature</Message><CanonicalRequest>x-amz-security-token:{TOKEN}</CanonicalRequest></Error> {SECRET_KEY}"
    )
    assert storage.redact(answer) == "failed x 403 SignatureDoesNotMatch: the signature ***"


def test_defects_pass():
    with pytest.raises(ZeroDivisionError), storage.explained("cannot count"):
        1 / 0  # noqa: B018
