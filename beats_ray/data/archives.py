"""Files inside zip, tar and Parquet files, read where they lie: nothing is unpacked, and object stores serve ranges.

    data = read_member(source, "ESC-50.zip!/ESC-50-master/audio/1-100032-A-0.wav")
    folder = open_zip(open_place("s3://bucket/ESC-50.zip"))      # a Place whose files are the archive's members

A member's path is the archive's, `!/`, and what is needed to find it: the name in a zip; `OFFSET/SIZE/NAME` in a tar;
`ROW_GROUP/ROW/COLUMN` in a Parquet file. Plain paths are plain files.
"""

import io
import lzma
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pyarrow import fs

from beats_ray.config import UserError
from beats_ray.data.decode import BadAudio
from beats_ray.data.storage import Place, storage_errors

MEMBER_PATH = re.compile(r"(.*?\.(zip|tar|parquet))!/(.+)", re.IGNORECASE | re.DOTALL)
MAX_MEMBER_BYTES = 4 * 2**30  # a larger one is no clip, but it could fill the memory of a task
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of its name and its extra field
EXTRA_BYTES = 1 << 10  # read along with the header, so that one request mostly does
ENCRYPTED = 0x1
UTF8_NAME = 0x800
COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
CACHED_DIRECTORIES = 4
CACHED_ROW_GROUPS = 2  # of some hundred MB each

_cache_lock = threading.Lock()  # threads that ask for the same thing at one time read it once


def read_member(source: Place, path: str) -> bytes:
    """The whole content of a file below `source`, plain or inside an archive.

    FileNotFoundError where archive or member is missing; BadAudio where the archive is damaged there, the member is
    encrypted, or larger than MAX_MEMBER_BYTES.
    """
    match = MEMBER_PATH.fullmatch(path)
    if not match:
        return (source / path).read_bytes()
    archive, kind, inside = match.groups()
    return _READ[kind.lower()](source / archive, inside)


def zip_members(archive: Place) -> dict[str, zipfile.ZipInfo]:
    """The files of a zip archive by name, as its directory lists them; of several with one name, the last one.

    UserError where it is no zip archive, FileNotFoundError where there is none.
    """
    with _cache_lock:
        return _zip_directory(archive, *_version(archive))


def member_fault(member: zipfile.ZipInfo) -> tuple[str, str] | None:
    """Reason and detail where a member of a zip cannot be read at all."""
    if member.flag_bits & ENCRYPTED:
        return "encrypted", f"{member.filename} needs a password; make the archive again without one"
    if member.file_size > MAX_MEMBER_BYTES:
        return "too-large", f"{member.filename} has {member.file_size} bytes, at most {MAX_MEMBER_BYTES} are read"
    if member.compress_type not in COMPRESSIONS:
        return "bad-compression", f"{member.filename}: method {member.compress_type}; use store or deflate"
    return None


def open_zip(archive: Place) -> "ZipPlace":
    """The archive as the folder that it holds; a single top-level folder is passed over. UserError as `zip_members`."""
    return ZipPlace(archive.uri, archive.path, ZipView(archive))


class ZipView:
    """The members of a zip, in the two operations that a `ZipPlace` needs. Folders follow from names."""

    def __init__(self, archive: Place) -> None:
        members = {name: info for name, info in zip_members(archive).items() if not name.startswith("__MACOSX/")}
        tops = {name.split("/")[0] if "/" in name else "" for name in members if not name.startswith(".")}
        top = f"{tops.pop()}/" if len(tops) == 1 and "" not in tops else ""
        self.archive = archive
        self.top = top
        """What comes before a name of this folder in the archive."""
        self.members = {name.removeprefix(top): info for name, info in members.items()}
        self._infos = {archive.path: fs.FileInfo(archive.path, fs.FileType.Directory)}
        for name, info in self.members.items():
            path = f"{archive.path}/{name}"
            self._infos[path] = fs.FileInfo(path, fs.FileType.File, size=info.file_size)
            while (path := path.rpartition("/")[0]) not in self._infos:
                self._infos[path] = fs.FileInfo(path, fs.FileType.Directory)

    def get_file_info(self, asked: str | fs.FileSelector) -> fs.FileInfo | list[fs.FileInfo]:
        if isinstance(asked, str):
            return self._infos.get(asked) or fs.FileInfo(asked, fs.FileType.NotFound)
        below = f"{asked.base_dir}/"
        paths = [path for path in self._infos if path.startswith(below)]
        return [self._infos[path] for path in paths if asked.recursive or "/" not in path[len(below) :]]

    def read(self, path: str) -> bytes:
        try:
            return _read_zip(self.archive, self.top + path[len(self.archive.path) + 1 :])
        except BadAudio as error:
            raise UserError(f"{self.archive.uri}: {error.detail}") from None


@dataclass(frozen=True)
class ZipPlace(Place):
    """A file or folder inside a zip, for reading."""

    view: ZipView = field(repr=False, compare=False)

    def __truediv__(self, name: str) -> "ZipPlace":
        return ZipPlace(f"{self.uri}/{name}", f"{self.path}/{name}", self.view)

    @property
    def filesystem(self) -> ZipView:
        return self.view

    def read_bytes(self) -> bytes:
        return self.view.read(self.path)


def _version(place: Place) -> tuple[int, int | None]:
    """Changes when the file does. FileNotFoundError where there is none."""
    with storage_errors(place.uri):
        info = place.filesystem.get_file_info(place.path)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(place.uri)
    return int(info.size), info.mtime_ns


@lru_cache(maxsize=CACHED_DIRECTORIES)
def _zip_directory(archive: Place, _size: int, _mtime: int | None) -> dict[str, zipfile.ZipInfo]:
    try:
        with storage_errors(archive.uri), archive.filesystem.open_input_file(archive.path) as stream:
            members = zipfile.ZipFile(stream).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise UserError(f"{archive.uri}: cannot be read as a zip archive ({error}); fetch or make it again") from None
    return {_member_name(member): member for member in members if not member.is_dir()}


def _member_name(member: zipfile.ZipInfo) -> str:
    """Programs that write UTF-8 without saying so are more common than those that write code page 437."""
    if member.flag_bits & UTF8_NAME:
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _read_zip(archive: Place, name: str) -> bytes:
    member = zip_members(archive).get(name)
    if member is None:
        raise FileNotFoundError(f"{archive.uri}!/{name}")
    fault = member_fault(member)
    if fault:
        raise BadAudio(*fault)
    length = LOCAL_HEADER.size + len(member.orig_filename.encode()) + EXTRA_BYTES + member.compress_size
    with storage_errors(archive.uri), archive.filesystem.open_input_file(archive.path) as stream:
        data = _read_range(stream, member.header_offset, length)
        if data[:4] != b"PK\3\4" or len(data) < LOCAL_HEADER.size:
            _complain(name, "there is no member where the archive's directory says")
        _, name_length, extra_length = LOCAL_HEADER.unpack_from(data)
        start = LOCAL_HEADER.size + name_length + extra_length
        missing = start + member.compress_size - len(data)
        if missing > 0:
            data += _read_range(stream, member.header_offset + len(data), missing)
    try:  # ZipExtFile also compares the checksum, and never returns more than the declared size
        packed = io.BytesIO(data[start : start + member.compress_size])
        content = zipfile.ZipExtFile(packed, "r", member).read(max(1, member.file_size))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        _complain(name, str(error))
    if len(content) != member.file_size:
        _complain(name, f"{len(content)} of {member.file_size} bytes are there")
    return content


def _read_range(stream: pa.NativeFile, offset: int, length: int) -> bytes:
    """What there is of a range: beyond the end, a store would complain where a local file gives nothing."""
    return bytes(stream.read_at(length, min(offset, stream.size())))


def _read_tar(archive: Place, inside: str) -> bytes:
    offset, size, name = inside.split("/", 2)
    with storage_errors(archive.uri), archive.filesystem.open_input_file(archive.path) as stream:
        data = _read_range(stream, int(offset), int(size))
    if len(data) < int(size):
        _complain(name, f"{archive.name} ends after {len(data)} of its {size} bytes")
    return data


def _read_parquet(archive: Place, inside: str) -> bytes:
    group, row, column = inside.split("/", 2)
    with _cache_lock:
        rows = _row_group(archive, *_version(archive), int(group), column)
    if rows is None or int(row) >= len(rows):
        raise FileNotFoundError(f"{archive.uri}!/{inside}")
    data = rows[int(row)].as_py()
    if data is None:
        raise BadAudio("empty-file", f"row {row} of row group {group}: no bytes in column {column!r}")
    return bytes(data)


@lru_cache(maxsize=CACHED_ROW_GROUPS)
def _row_group(archive: Place, _size: int, _mtime: int | None, group: int, column: str) -> pa.ChunkedArray | None:
    """The audio of one row group, other columns unread; None where there is no such row group or column."""
    with parquet_errors(archive), pq.ParquetFile(archive.path, filesystem=archive.filesystem) as file:
        if group >= file.num_row_groups or column not in file.schema_arrow.names:
            return None
        is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
        values = file.read_row_group(group, columns=[f"{column}.bytes" if is_struct else column]).column(0)
    return pa.compute.struct_field(values, "bytes") if is_struct else values


@contextmanager
def parquet_errors(place: Place) -> Iterator[None]:
    """What storage does wrong is a StorageError, and what is wrong in the Parquet file itself is BadAudio."""
    with storage_errors(place.uri):
        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:  # a broken page is an OSError too, one without a number
            if isinstance(error, OSError) and (
                error.errno is not None or any(name in str(error) for name in ("AWS Error", "google::cloud"))
            ):
                raise
            _complain(place.name, " ".join(str(error).split()))


def _complain(name: str, detail: str) -> NoReturn:
    raise BadAudio("damaged", f"{name}: {detail}")


_READ: dict[str, Callable[[Place, str], bytes]] = {"zip": _read_zip, "tar": _read_tar, "parquet": _read_parquet}
