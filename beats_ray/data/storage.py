"""The one place that opens file systems: local folders, `s3://` and `gs://` behind the same few operations.

    place = open_place("s3://bucket/runs/a")        # or "runs/a"
    (place / "run.json").write_json({"done": True})

A `Place` is small and pickles, so it travels to Ray workers. Endpoints and keys come from the environment, see
`beats_ray.data.stores`. Every write is atomic: a reader sees the old content or the new, never half of it.
"""

import io
import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from beats_ray.data.stores import STORES, open_file, store_of
from beats_ray.errors import UserError

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 15.0
COPY_BYTES = 8 * 2**20
KINDS_OF_PATH = "a local path, s3://bucket/key or gs://bucket/key"

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Place:
    """A file or folder on some storage, whether or not it exists."""

    uri: str
    """What the user would write: `s3://bucket/key`, `gs://bucket/key`, or an absolute local path."""
    path: str = field(repr=False)
    """The same without its scheme: what `filesystem` takes."""

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.uri}/{name}", f"{self.path}/{name}")

    @cached_property
    def filesystem(self) -> fs.FileSystem:
        """The pyarrow file system that `path` belongs to."""
        store = store_of(self.uri)
        return store.open() if store else fs.LocalFileSystem()

    @cached_property
    def keyless_filesystem(self) -> fs.FileSystem:
        """The same storage for Ray's own bookkeeping: on S3, making a folder there writes nothing."""
        store = store_of(self.uri)
        return store.open_for_ray() if store else self.filesystem

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "path": self.path}  # the receiving process opens its own connection

    @property
    def is_remote(self) -> bool:
        return store_of(self.uri) is not None

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
        store = store_of(self.uri)
        everything = recursive or (store is not None and not store.lists_folders)
        selector = fs.FileSelector(self.path, recursive=everything, allow_not_found=True)
        with storage_errors(self.uri):
            infos = self.filesystem.get_file_info(selector)
        names = set()
        for info in infos:
            parts = info.path[len(self.path) + 1 :].split("/")
            names |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1 if recursive else 2)}
        return [self / name for name in sorted(names)]

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
        store = store_of(self.uri)
        with storage_errors(self.uri), (store.open_whole if store else open_file)(self.filesystem, self.path) as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes) -> None:
        """Replaces the content atomically; missing parent folders are made."""
        self.write_stream(io.BytesIO(data))

    def write_stream(self, source: IO[bytes]) -> None:
        """As `write_bytes`, with all that `source` holds, from its beginning, a part of it in memory at a time."""
        source.seek(0)
        with storage_errors(self.uri, writing=True):
            if self.is_remote:
                with self.filesystem.open_output_stream(self.path) as stream:
                    shutil.copyfileobj(source, stream, COPY_BYTES)
                return
            target = Path(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
            try:
                with partial.open("wb") as file:
                    shutil.copyfileobj(source, file, COPY_BYTES)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)

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
            store = store_of(self.uri)
            if store:
                store.delete(self.path)
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


def existing_place(field: str, uri: str) -> Place:
    """As `open_place`. UserError naming the field where there is nothing."""
    place = open_place(uri)
    if not place.exists():
        raise UserError(f"{field}={uri}: does not exist; check the path")
    return place


def open_place(uri: str) -> Place:
    """The place that a user's path names. UserError for a scheme that is not supported and for an empty path."""
    if not uri:
        raise UserError(f"a path is empty; give {KINDS_OF_PATH}")
    scheme, separator, path = uri.partition("://")
    if scheme in STORES and separator:
        path = path.strip("/")
        if not path:
            raise UserError(f"{uri}: names no bucket; give {scheme}://bucket/key")
        return Place(f"{scheme}://{path}", path)
    if separator:
        raise UserError(f"{uri}: unknown scheme; give {KINDS_OF_PATH}")
    path = str(Path(uri).expanduser().absolute())
    return Place(path, path)


class storage_errors:
    """Turns an unreachable or refusing object store into one line; a missing file stays FileNotFoundError.

    `writing`: an object store has no missing files, but may miss the bucket, or an upload that it has begun.
    """

    def __init__(self, uri: str, writing: bool = False) -> None:
        self.uri = uri
        self.writing = writing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        store = store_of(self.uri)
        failed = isinstance(error, OSError) or (store is not None and error is not None and store.is_failure(error))
        if not failed or isinstance(error, StorageError):
            return
        if isinstance(error, FileNotFoundError) and not (store and self.writing):
            return
        text = " ".join(str(error).split())
        if not store:
            raise StorageError(f"{self.uri}: {getattr(error, 'strerror', None) or text}") from error
        reason, passing = store.explain(text)
        failure = StorageError(f"{self.uri}: object store at {store.endpoint()} {reason}")
        failure.passing = passing
        raise failure from error


class StorageError(UserError, OSError):
    """The object store did not do what it was asked for.

    `passing`: whether asking again may help, as for time-outs, cut connections, 429 and 5xx.
    """

    passing: bool = False


def with_retries(work: Callable[[], ResultT], seconds: float) -> ResultT:
    """The result of `work`, repeated with growing pauses while storage fails in a way that passes.

    The last try begins at most so long after the first failure; how long `work` takes when it succeeds does not count.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

    failures: list[float] = []

    def out_of_time(_state: RetryCallState) -> bool:
        failures.append(time.monotonic())
        return failures[-1] - failures[0] >= seconds

    attempts = Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, StorageError) and error.passing),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS),
        stop=out_of_time,
        reraise=True,
    )
    return attempts(work)


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
