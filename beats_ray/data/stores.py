"""The object stores behind `s3://` and `gs://`: how each is opened, what its errors mean, where pyarrow needs help.

Endpoints and credentials come from the environment, in the variables that the vendors' own programs read.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

CONNECT_TIMEOUT_SECONDS = 10.0
REQUEST_TIMEOUT_SECONDS = 60.0
NO_BUCKET = "has no bucket of that name; create it first"
GCS_RETRY_SECONDS = 10  # of pyarrow itself; a write that fails asks twice


@dataclass(frozen=True)
class ObjectStore:
    """What differs between the stores; `beats_ray.data.storage` does the rest."""

    open: Callable[[], fs.FileSystem]
    open_for_ray: Callable[[], fs.FileSystem]
    """The same storage for Ray's own bookkeeping."""
    open_whole: Callable[[fs.FileSystem, str], pa.NativeFile]
    """Opens an object that will be read from its beginning to its end."""
    delete: Callable[[str], None]
    """Deletes `bucket/key` and everything below it."""
    endpoint: Callable[[], str]
    """Where it is, as an error names it."""
    explain: Callable[[str], tuple[str, bool]]
    """From the text of an error: what is wrong and what to check, and whether asking again may help."""
    is_failure: Callable[[BaseException], bool]
    """Whether an error that is no OSError comes from the store all the same."""
    lists_folders: bool
    """Whether a listing of one folder holds the folders in it."""


def open_file(remote: fs.FileSystem, path: str) -> pa.NativeFile:
    """A file for reading at any place in it."""
    return remote.open_input_file(path)


# --- S3 ---------------------------------------------------------------------------------------------------------------


def _s3_environment() -> tuple[str | None, str | None, bool]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return endpoint, region, os.environ.get("AWS_S3_ANONYMOUS", "") == "1"


def _s3_keys() -> int:
    return hash(
        tuple(os.environ.get(f"AWS_{name}") for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
    )


@lru_cache(maxsize=8)
def _s3_file_system(endpoint: str | None, region: str | None, anonymous: bool, _keys: int) -> fs.S3FileSystem:
    if endpoint:  # servers other than AWS rarely take the newer trailing checksums
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else None),
        anonymous=anonymous,
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        request_timeout=REQUEST_TIMEOUT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=5),
        allow_delayed_open=True,  # one request, not three, for a small object
    )


def _s3_keyless_file_system() -> fs.FileSystem:
    """Making a folder writes nothing: pyarrow would mark it by an object with a trailing slash, which not every S3
    server takes."""
    import s3fs

    endpoint, region, anonymous = _s3_environment()
    client = {"region_name": region} if region else {}
    remote = s3fs.S3FileSystem(anon=anonymous, endpoint_url=endpoint, client_kwargs=client, skip_instance_cache=True)
    return fs.PyFileSystem(fs.FSSpecHandler(remote))


def _delete_from_s3(path: str) -> None:
    """Not through pyarrow: it puts an object in the place of the parent folder afterwards, which `rclone serve s3`
    refuses, ten seconds later."""
    import botocore.session
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    endpoint, region, _ = _s3_environment()
    try:
        client = botocore.session.get_session().create_client(
            "s3", region_name=region or "us-east-1", endpoint_url=endpoint
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
        for page in pages:
            keys = [item["Key"] for item in page.get("Contents", ())]
            wanted = [{"Key": name} for name in keys if not key or name == key or name.startswith(f"{key}/")]
            if not wanted:
                continue
            failed = client.delete_objects(Bucket=bucket, Delete={"Objects": wanted, "Quiet": True}).get("Errors")
            if failed:
                raise OSError(f"cannot delete {failed[0]['Key']}: {failed[0].get('Message', 'no reason given')}")
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


def _explain_s3(text: str) -> tuple[str, bool]:
    if "NO_SUCH_BUCKET" in text:
        return NO_BUCKET, False
    if "ACCESS_DENIED" in text or "ACCESS_KEY" in text or "HTTP status 403" in text or "SIGNATURE" in text.upper():
        return "refused the request; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", False
    if "HTTP status 400" in text:  # what a request without keys, or with another region's, gets
        return "refused the request; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION", False
    if "NETWORK_CONNECTION" in text or "onnect" in text:
        return "cannot be reached; check AWS_ENDPOINT_URL and that the store runs", True
    return text[:300], True


# --- Google Cloud Storage ---------------------------------------------------------------------------------------------


def _gcs_endpoint() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    return host if not host or "://" in host else f"http://{host}"


def _open_gcs() -> fs.FileSystem:
    keys = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    return _gcs_file_system(_gcs_endpoint(), os.environ.get("GCS_ANONYMOUS", "") == "1", keys)


@lru_cache(maxsize=8)
def _gcs_file_system(endpoint: str, anonymous: bool, _keys: str | None) -> fs.FileSystem:
    address = urlsplit(endpoint)
    return fs.GcsFileSystem(
        anonymous=anonymous or address.scheme == "http",  # an emulator: a token never travels unencrypted
        scheme=address.scheme or None,
        endpoint_override=address.netloc or None,
        retry_time_limit=timedelta(seconds=GCS_RETRY_SECONDS),
    )


def _delete_from_gcs(path: str) -> None:
    remote = _open_gcs()
    if "/" not in path:  # what the bucket holds, never the bucket
        remote.delete_dir_contents(path, accept_root_dir=True)
    elif remote.get_file_info(path).type == fs.FileType.File:
        remote.delete_file(path)
    else:
        with suppress(FileNotFoundError):  # of an object for the folder itself, once everything below is gone
            remote.delete_dir(path)


def _open_gcs_stream(remote: fs.FileSystem, path: str) -> pa.NativeFile:
    """One request. `open_input_file` makes two, one of them while it holds the interpreter's lock, and finds nothing
    where the object was replaced between them."""
    return remote.open_input_stream(path, compression=None)


def _is_gcs_failure(error: BaseException) -> bool:
    """Credentials that cannot be read, and a file whose stream could not be opened, which pyarrow then calls closed."""
    text = str(error)
    of_google = isinstance(error, pa.ArrowException) and "google::cloud::Status" in text
    return of_google or (isinstance(error, ValueError) and "closed file" in text)


def _explain_gcs(text: str) -> tuple[str, bool]:
    if "OAuth2 access token" in text:  # asking again helps where the server that hands out tokens is there, but busy
        elsewhere = "resolve host" in text or "UNAVAILABLE" not in text
        return (
            "got no credentials; check GOOGLE_APPLICATION_CREDENTIALS, or set GCS_ANONYMOUS=1 for a public bucket",
            not elsewhere,
        )
    if "NOT_FOUND" in text and "CreateResumableUpload" in text:
        return NO_BUCKET, False
    if "UNAUTHENTICATED" in text or "PERMISSION_DENIED" in text:
        return "refused the request; check GOOGLE_APPLICATION_CREDENTIALS and the roles of that account", False
    if "CURL error" in text:
        return "cannot be reached; check the network, and STORAGE_EMULATOR_HOST where it is set", True
    return text[:300], "INVALID_ARGUMENT" not in text


STORES = {
    "s3": ObjectStore(
        open=lambda: _s3_file_system(*_s3_environment(), _s3_keys()),
        open_for_ray=_s3_keyless_file_system,
        open_whole=open_file,
        delete=_delete_from_s3,
        endpoint=lambda: os.environ.get("AWS_ENDPOINT_URL") or "AWS",
        explain=_explain_s3,
        is_failure=lambda _error: False,
        lists_folders=True,
    ),
    "gs": ObjectStore(
        open=_open_gcs,
        open_for_ray=_open_gcs,
        open_whole=_open_gcs_stream,
        delete=_delete_from_gcs,
        endpoint=lambda: _gcs_endpoint() or "Google Cloud",
        explain=_explain_gcs,
        is_failure=_is_gcs_failure,
        lists_folders=False,
    ),
}
"""Scheme of an address to its store."""


def store_of(uri: str) -> ObjectStore | None:
    """The store that an address lies in; None for a local path, and for a scheme that is not known."""
    scheme, separator, _ = uri.partition("://")
    return STORES.get(scheme) if separator else None
