"""Where datasets lie: local disks, and object stores that speak S3.

Credentials come from where every AWS tool takes them, in botocore's order: the environment, the profile files
(``AWS_PROFILE``), a role of the machine. They are resolved here, stay in memory, and are in no message (`redact`).
delta-rs reads no profile files: `delta_options` hands it what botocore found.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import fsspec

from pairmill.errors import ConfigError, PairmillError, StoreError

_S3 = ("s3", "s3a")
_TRIES = 5
"""How often a write is sent that the store refuses for another one under way at the same moment (409)."""

_RETRIES = {"mode": "standard", "max_attempts": 3}
"""How often a request is sent when the store does not answer, or says that it cannot."""

_SMALL = 2**18
"""Bytes up to which a file is fetched whole: one request, instead of one for its end and one for each column."""

_AHEAD = 2**23
"""Bytes that are read ahead from a file that is read as a stream."""

_REFUSED = ("PreconditionFailed", "412", "NoSuchKey", "404")
_OF_THE_OBJECT = ("NoSuchKey", "404", "NoSuchVersion", "InvalidRange", "416", "PreconditionFailed", "412")
_FORBIDDEN = ("AccessDenied", "AllAccessDisabled", "403")
_UNKNOWN = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidClientTokenId")

_secrets: set[str] = set()
"""Credentials that were handed on, so that `redact` knows them."""


class AccessDenied(StoreError):
    """The credentials are good, but do not allow this."""


@dataclass(frozen=True)
class Stored:
    """An object and the etag that names this state of it."""

    data: bytes
    etag: str


def open_fs(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it (without a slash at its end).

    Object stores are asked each time: listings are not remembered, since other processes write too, and a read fetches
    the bytes it asks for and no more. (fsspec's read-ahead of 50 MB made reading two narrow columns of 80 MB of images
    fetch all 80 MB instead of 0.3.)

    Raises:
        ConfigError: the URL holds credentials, a package for it is missing, or nobody answers there.
    """
    parts = urlsplit(url)
    if parts.scheme and "@" in parts.netloc:
        raise ConfigError(
            f"the URL {parts.scheme}://...@{parts.netloc.rpartition('@')[2]}{parts.path} holds credentials; "
            "take them out of it: they are read from the environment and from profile files"
        )
    try:
        if parts.scheme in _S3:
            fs = _s3_files()(
                use_listings_cache=False,
                default_cache_type="none",
                fixed_upload_size=True,  # R2 takes no parts of different sizes
                config_kwargs={"retries": _RETRIES},
            )
            root = fs._strip_protocol(url)
        else:
            fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:  # some file systems connect at once
        raise ConfigError(f"cannot open {url}: {redact(str(error))}") from error
    return fs, os.path.abspath(root) if is_local(fs) else root.rstrip("/")


@functools.cache
def _s3_files() -> Any:
    """s3fs, with errors as `explained` has them: botocore's own are no OSErrors, so nobody would expect them. What the
    store says of the object alone, that it is missing or shorter, stays an OSError as on a disk."""
    import s3fs

    class S3Files(s3fs.S3FileSystem):
        async def _call_s3(self, method: str, *more: Any, **given: Any) -> Any:
            place = "/".join(given[name] for name in ("Bucket", "Key", "Prefix") if given.get(name))
            try:
                return await super()._call_s3(method, *more, **given)
            except Exception as error:
                cause = error.__cause__ or error  # s3fs makes an OSError of what the store said
                if _code(cause) in _OF_THE_OBJECT:
                    raise
                with explained(f"{method} of s3://{place}"):
                    raise cause from None

    return S3Files


def open_known(fs: Any, path: str, size: int) -> Any:
    """Open a file whose size is known for reading, without asking an object store for it. A small one is fetched whole
    by the first read."""
    if not is_s3(fs):
        return fs.open(path, "rb")
    how = {"cache_type": "first", "block_size": size} if size <= _SMALL else {}
    file = fs.open(path, "rb", size=size, **how)
    file.details = {"name": path, "size": size, "type": "file"}
    return file


def open_url(url: str) -> Any:
    """Open a file by its URL, to be read from its start on."""
    if urlsplit(url).scheme not in _S3:
        return fsspec.open(url, "rb").open()
    fs, path = open_fs(url)
    return fs.open(path, "rb", cache_type="readahead", block_size=_AHEAD)


def is_local(fs: Any) -> bool:
    """Whether it is this machine's own file system."""
    return "file" in _protocols(fs)


def is_s3(fs: Any) -> bool:
    """Whether it is an object store that speaks S3."""
    return bool(set(_S3) & set(_protocols(fs)))


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


# -- credentials --


def delta_options(url: str) -> dict[str, str]:
    """What delta-rs must be told to open tables below a URL; empty for a local one.

    Ask anew for each table that is opened: credentials of a role expire, and are renewed here.

    Raises:
        StoreError: there are no credentials, or no such profile.
    """
    parts = urlsplit(url)
    if parts.scheme not in _S3:
        return {}
    with explained(f"cannot open {url}"):
        session = _session(os.getpid())
        found = session.get_credentials()
        if found is None:
            from botocore.exceptions import NoCredentialsError

            raise NoCredentialsError
        keys = found.get_frozen_credentials()
        _secrets.update(secret for secret in (keys.access_key, keys.secret_key, keys.token) if secret)
        region = session.get_config_variable("region") or _region_of(os.getpid(), parts.netloc)
        endpoint = _client(os.getpid(), region).meta.endpoint_url
        style = (session.get_scoped_config().get("s3") or {}).get("addressing_style", "path")
        if style == "virtual":
            scheme, _, rest = endpoint.partition("://")
            endpoint = f"{scheme}://{parts.netloc}.{rest}"
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "session_token": keys.token or "",  # empty, not absent: else a stray AWS_SESSION_TOKEN would be sent
            "region": region,
            "endpoint_url": endpoint,
            "virtual_hosted_style_request": "true" if style == "virtual" else "false",
            "allow_http": "true" if endpoint.startswith("http://") else "false",
            "conditional_put": "etag",  # of two commits of one version, one is refused, whatever the environment says
        }


@functools.lru_cache(maxsize=1)
def _session(process: int) -> Any:  # noqa: ARG001 - a fork must not share connections with its parent
    import botocore.session

    return botocore.session.get_session()


@functools.lru_cache(maxsize=8)
def _client(process: int, region: str | None = None) -> Any:
    from botocore.config import Config

    config = Config(connect_timeout=5, read_timeout=20, retries=_RETRIES)
    return _session(process).create_client("s3", region_name=region, config=config)


@functools.lru_cache(maxsize=32)
def _region_of(process: int, bucket: str) -> str:
    """The region a bucket says it is in: delta-rs, unlike botocore, does not follow a redirect to it."""
    from botocore.exceptions import ClientError

    client = _client(process)
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:  # a redirect says it too
        answer = error.response
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers.get("x-amz-bucket-region") or client.meta.region_name or "us-east-1"


# -- writes with a condition --


def read(fs: Any, path: str) -> Stored | None:
    """An object and its etag; None when there is none.

    Raises:
        StoreError: the store cannot be reached or refuses.
    """
    from botocore.exceptions import ClientError

    client, bucket, key = _object(fs, path)
    with explained(f"cannot read {path}"):
        try:
            answer = client.get_object(Bucket=bucket, Key=key)
            with contextlib.closing(answer["Body"]) as body:
                return Stored(body.read(), answer["ETag"])
        except ClientError as error:
            if _code(error) == "NoSuchKey":
                return None
            raise


def put_if_absent(fs: Any, path: str, data: bytes) -> str | None:
    """Write an object where none is; of many writers at once, one wins.

    Returns the new etag, or None when there is an object already: perhaps the caller's own, if the answer to a first
    try was lost, so a caller who must know reads it.

    Raises:
        AccessDenied: the credentials do not allow writing.
        StoreError: the store cannot be reached, or knows no conditional writes.
    """
    return _put(fs, path, data, {"IfNoneMatch": "*"})


def put_if_match(fs: Any, path: str, data: bytes, etag: str) -> str | None:
    """Replace the state of an object that has this etag.

    Returns the new etag, or None when the object has changed or is gone; as for `put_if_absent`, the change may be the
    caller's own.

    Raises:
        AccessDenied: the credentials do not allow writing.
        StoreError: the store cannot be reached, or knows no conditional writes.
    """
    return _put(fs, path, data, {"IfMatch": etag})


def _put(fs: Any, path: str, data: bytes, condition: dict[str, str]) -> str | None:
    from botocore.exceptions import ClientError

    client, bucket, key = _object(fs, path)
    with explained(f"cannot write {path}"):
        for again in range(1, _TRIES + 1):
            try:
                etag: str = client.put_object(Bucket=bucket, Key=key, Body=data, **condition)["ETag"]
                return etag
            except ClientError as error:
                if _code(error) in _REFUSED:
                    return None
                if error.response["ResponseMetadata"].get("HTTPStatusCode") != 409 or again == _TRIES:
                    raise
                time.sleep(0.1 * again)
    return None


def _object(fs: Any, path: str) -> tuple[Any, str, str]:
    if not is_s3(fs):
        raise StoreError(f"{path} does not lie in an object store that speaks S3; conditional writes need one")
    bucket, _, key = path.partition("/")
    with explained(f"cannot open s3://{path}"):
        return _client(os.getpid()), bucket, key


def _code(error: Any) -> str:
    """What S3 calls an error; delta-rs has it in the text."""
    if not hasattr(error, "response"):
        return next(iter(re.findall(r"<Code>(\w+)</Code>", str(error))), "")
    code: str = error.response.get("Error", {}).get("Code", "")
    return code


# -- errors --


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what the storage libraries raise into a StoreError that says `what`, why, and what to do, and no secret.

    The cause is left off, since its message may hold what was signed.
    """
    try:
        yield
    except PairmillError:
        raise
    except Exception as error:
        told = store_error(what, error)
        if told is None:
            raise
        raise told from None


def store_error(what: str, error: Exception) -> StoreError | None:
    """The error to raise in the place of one of a storage library; None for a defect of the code. See `explained`."""
    reason = _reason(error)
    return reason and reason[0](f"{what}: {redact(str(error))}; {reason[1]}")


def _reason(error: Exception) -> tuple[type[StoreError], str] | None:
    """The class of the error to raise, and what to do about it; None for a defect of the code."""
    from botocore import exceptions as aws
    from deltalake.exceptions import DeltaError

    if isinstance(error, (aws.NoCredentialsError, aws.PartialCredentialsError)):
        return StoreError, (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile of your AWS configuration"
        )
    if isinstance(error, aws.ProfileNotFound):
        return StoreError, "AWS_PROFILE must name a profile of your AWS configuration files"
    silent = re.search(r"\bConnect\b.*\berror\b", str(error), re.S)  # as delta-rs says it
    if isinstance(error, aws.EndpointConnectionError) or (silent and isinstance(error, (DeltaError, OSError))):
        return StoreError, "is the store up, and AWS_ENDPOINT_URL right?"
    if isinstance(error, (aws.ClientError, DeltaError, OSError)):
        code = _code(error)
        if code in _UNKNOWN:
            return StoreError, "the store does not know these credentials, or no longer: check where they come from"
        if code in _FORBIDDEN:
            return AccessDenied, "the credentials are wrong, or do not allow it"
        if code in ("NotImplemented", "501"):
            return StoreError, "the store knows no conditional writes, which datasets need"
        if code == "NoSuchBucket":
            return StoreError, "make the bucket first"
    if isinstance(error, PermissionError):
        return AccessDenied, "the credentials are wrong, or do not allow it"
    if isinstance(error, (aws.ClientError, aws.BotoCoreError, DeltaError, OSError)):
        return StoreError, "run again when the store answers"
    return None


def redact(message: str) -> str:
    """A message of a storage library on one line, without credentials and without what was signed with them.

    Of an XML answer its code and message remain: others of its fields repeat the signed request.
    """
    message = re.sub(r"\x1b\[[0-9;]*m", "", message)
    message = re.sub(
        r"(<\?xml.*?)?<Error>.*?(</Error>|$)", lambda m: ": ".join(_fields(m[0])) or "an error", message, flags=re.S
    )
    for secret in sorted(_secrets, key=len, reverse=True):
        message = message.replace(secret, "***")
    return " ".join(message.split())


def _fields(answer: str) -> list[str]:
    return [found[1] for name in ("Code", "Message") if (found := re.search(rf"<{name}>(.*?)</{name}>", answer, re.S))]
