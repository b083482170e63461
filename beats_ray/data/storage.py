"""The one place that opens file systems: local folders and `s3://` behind the same few operations.

    place = open_place("s3://bucket/runs/a")        # or "runs/a"
    (place / "run.json").write_json({"done": True})

A `Place` is small and pickles, so it travels to Ray workers. Endpoint and keys of S3 come from the standard AWS
environment variables. Every write is atomic: a reader sees the old content or the new, never half of it.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from beats_ray.errors import UserError

CONNECT_TIMEOUT_SECONDS = 10.0
REQUEST_TIMEOUT_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Place:
    """A file or folder on some storage, whether or not it exists."""

    uri: str
    """What the user would write: `s3://bucket/key`, or an absolute local path."""
    path: str = field(repr=False)
    """The same without its scheme: what `filesystem` takes."""

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.uri}/{name}", f"{self.path}/{name}")

    @cached_property
    def filesystem(self) -> fs.FileSystem:
        """The pyarrow file system that `path` belongs to."""
        return _s3_file_system(*_s3_environment(), _s3_keys()) if self.is_remote else fs.LocalFileSystem()

    @cached_property
    def keyless_filesystem(self) -> fs.FileSystem:
        """The same storage for Ray's own bookkeeping: making a folder there writes nothing.

        pyarrow marks every folder that Ray makes by an object with a trailing slash, which not every S3 server takes.
        """
        if not self.is_remote:
            return self.filesystem
        import s3fs

        endpoint, region, anonymous = _s3_environment()
        client = {"region_name": region} if region else {}
        remote = s3fs.S3FileSystem(
            anon=anonymous, endpoint_url=endpoint, client_kwargs=client, skip_instance_cache=True
        )
        return fs.PyFileSystem(fs.FSSpecHandler(remote))

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "path": self.path}  # the receiving process opens its own connection

    @property
    def is_remote(self) -> bool:
        return self.uri.startswith("s3://")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "Place":
        """The folder that this place lies in."""
        return Place(self.uri.rsplit("/", 1)[0], self.path.rsplit("/", 1)[0])

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def size_bytes(self) -> int:
        return int(self._info().size or 0)

    def list(self, recursive: bool = False) -> "list[Place]":
        """What lies directly below (or anywhere below), sorted; empty where the folder does not exist."""
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        with storage_errors(self.uri):
            infos = self.filesystem.get_file_info(selector)
        paths = sorted(info.path for info in infos)
        return [Place(self.uri + path[len(self.path) :], path) for path in paths]

    def sizes(self, recursive: bool = False) -> dict[str, int]:
        """Names below this folder and sizes in bytes of the files directly (or anywhere) below, sorted by name.

        Empty where the folder does not exist. A listing, without a request for each file.
        """
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        with storage_errors(self.uri):
            infos = self.filesystem.get_file_info(selector)
        start = len(self.path) + 1
        return dict(sorted((info.path[start:], int(info.size)) for info in infos if info.type == fs.FileType.File))

    def read_bytes(self) -> bytes:
        """The whole content. FileNotFoundError where there is none."""
        with storage_errors(self.uri), self.filesystem.open_input_file(self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Replaces the content atomically; missing parent folders are made."""
        with storage_errors(self.uri):
            if self.is_remote:
                self._make_bucket()
                with self.filesystem.open_output_stream(self.path) as stream:
                    stream.write(data)
                return
            target = Path(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
            try:
                partial.write_bytes(data)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def open_output(self) -> Iterator[pa.NativeFile]:
        """A stream that replaces the content as it goes: for files that count only once an index names them."""
        with storage_errors(self.uri):
            if self.is_remote:
                self._make_bucket()
            else:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            with self.filesystem.open_output_stream(self.path) as stream:
                yield stream

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def delete(self) -> None:
        """Removes a file or a whole folder; nothing happens where there is none."""
        with storage_errors(self.uri):
            kind = self._info().type
            if kind == fs.FileType.NotFound:
                return
            if self.is_remote:
                _delete_objects(self.path)
            elif kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            else:
                self.filesystem.delete_file(self.path)

    def upload(self, folder: Path) -> None:
        """Copies every file below a local folder to below this place."""
        open_place(str(folder)).copy_to(self)

    def download(self, folder: Path) -> Path:
        """Copies this file to a local path, or every file below this place to below it, and returns that path."""
        self.copy_to(open_place(str(folder)))
        return folder

    def copy_to(self, target: "Place") -> None:
        """Copies this file to another place, or every file below this place to below it."""
        if self._info().type == fs.FileType.File:
            target.write_bytes(self.read_bytes())
            return
        for name in self.sizes(recursive=True):
            (target / name).write_bytes((self / name).read_bytes())

    def _info(self) -> fs.FileInfo:
        with storage_errors(self.uri):
            return self.filesystem.get_file_info(self.path)

    def _make_bucket(self) -> None:
        bucket = self.path.split("/", 1)[0]
        if self.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise UserError(f"{self.uri}: bucket {bucket!r} does not exist; create it first")


def existing_place(field: str, uri: str) -> Place:
    """As `open_place`. UserError naming the field where there is nothing."""
    place = open_place(uri)
    if not place.exists():
        raise UserError(f"{field}={uri}: does not exist; check the path")
    return place


def open_place(uri: str) -> Place:
    """The place that a user's path names. UserError for a scheme that is not supported and for an empty path."""
    if not uri:
        raise UserError("a path is empty; give a local path or s3://bucket/key")
    if uri.startswith("s3://"):
        path = uri.removeprefix("s3://").strip("/")
        if not path:
            raise UserError(f"{uri}: names no bucket; give s3://bucket/key")
        return Place(f"s3://{path}", path)
    if "://" in uri:
        raise UserError(f"{uri}: unknown scheme; give a local path or s3://bucket/key")
    path = str(Path(uri).expanduser().absolute())
    return Place(path, path)


class storage_errors:
    """Turns an unreachable or refusing object store into one line; a missing file stays FileNotFoundError."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, StorageError)):
            return
        if not self.uri.startswith("s3://"):
            raise StorageError(f"{self.uri}: {error.strerror or ' '.join(str(error).split())}") from error
        endpoint = os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        text = " ".join(str(error).split())
        passing = False
        if "ACCESS_DENIED" in text or "ACCESS_KEY" in text or "HTTP status 403" in text or "SIGNATURE" in text.upper():
            reason = "refused the request; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        elif "HTTP status 400" in text:  # what a request without keys, or with another region's, gets
            reason = "refused the request; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION"
        elif "NETWORK_CONNECTION" in text or "onnect" in text:
            reason, passing = "cannot be reached; check AWS_ENDPOINT_URL and that the store runs", True
        else:
            reason, passing = text[:300], True
        failure = StorageError(f"{self.uri}: object store at {endpoint} {reason}")
        failure.passing = passing
        raise failure from error


class StorageError(UserError, OSError):
    """The object store did not do what it was asked for.

    `passing`: whether asking again may help, as for time-outs, cut connections, 429 and 5xx.
    """

    passing: bool = False


def with_retries(work: Callable[[], ResultT], seconds: float) -> ResultT:
    """The result of `work`, repeated with growing pauses while storage fails in a way that passes, at most so long."""
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    attempts = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, StorageError) and error.passing),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS),
        stop=stop_after_delay(seconds),
        reraise=True,
    )
    return attempts(work)


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


def _delete_objects(path: str) -> None:
    """Deletes `bucket/key` and everything below it.

    Not through pyarrow: it puts an object in the place of the parent folder afterwards, which `rclone serve s3`
    refuses, ten seconds later.
    """
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


def read_table(place: Place, columns: list[str] | None = None) -> pa.Table:
    """A small Parquet file as a table. FileNotFoundError where there is none."""
    import pyarrow.parquet as pq

    with storage_errors(place.uri):
        return pq.read_table(place.path, filesystem=place.filesystem, columns=columns)


def write_table(place: Place, table: pa.Table, row_group_rows: int | None = None) -> None:
    """Writes a Parquet file atomically."""
    import pyarrow.parquet as pq

    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=row_group_rows, compression="zstd")
    place.write_bytes(buffer.getvalue().to_pybytes())
