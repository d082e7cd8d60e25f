"""An S3 server on the loopback for all tests here, and an environment that knows it and nothing else."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pairmill import storage
from tests.remote.server import ACCESS_KEY, REGION, SECRET_KEY

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class S3:
    """A running server."""

    endpoint: str
    log: Path

    def requests(self) -> list[str]:
        """All that it was asked so far."""
        return self.log.read_text().splitlines()

    def fault(self, kind: str | None) -> None:
        """Make it misbehave from now on; None ends that."""
        control = Path(f"{self.log}.control")
        if kind is None:
            control.unlink(missing_ok=True)
        else:
            control.write_text(kind)

    def environment(self) -> dict[str, str]:
        """What a process needs to reach it with credentials of the environment. Nothing here asks the address at which
        machines in a cloud find their role: it is pointed to a port where nobody listens."""
        nobody = "http://127.0.0.1:9"
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": nobody,
            "AWS_METADATA_ENDPOINT": nobody,
        }

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """The environment knows the server and nothing else."""
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in self.environment().items():
                patch.setenv(name, value)
            forget()
            yield
        forget()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed; pip install -r requirements-dev.txt")
    log = tmp_path_factory.mktemp("s3") / "log"
    log.touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.remote.server", str(log)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**clean, "AWS_EC2_METADATA_DISABLED": "true"},
    )
    with server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        yield S3(f"http://127.0.0.1:{port}", log)
        server.terminate()


@pytest.fixture
def s3(s3_server: S3) -> Iterator[S3]:
    """The server, with credentials for it in the environment."""
    with s3_server.known():
        yield s3_server
    s3_server.fault(None)


def forget() -> None:
    """The environment has changed: this process makes no use of what it read there before."""
    for cache in (storage._session, storage._client, storage._region_of):
        cache.cache_clear()
    storage._secrets.clear()
    storage._s3_files().clear_instance_cache()


@pytest.fixture
def bucket(s3: S3) -> str:
    """A bucket of one's own."""
    return new_bucket()


def new_bucket() -> str:
    """Make a bucket."""
    name = f"mill-{uuid.uuid4().hex[:12]}"
    client = storage._client(os.getpid())
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    return name
