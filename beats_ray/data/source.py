"""What a reader of raw clips returns, and the parts that every reader needs.

A reader is one function, `read_NAME(source: Place) -> SourceListing`, in `beats_ray.data.datasets`. It decides from
names and tables alone; files are opened later, on the cluster, by `beats_ray.data.prepare`. A file that cannot be used
is `Quarantined` with a reason; a source that cannot be read as this layout at all is a UserError.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyarrow import fs

from beats_ray.config import UserError
from beats_ray.data.manifest import NO_FOLD
from beats_ray.data.storage import Place, storage_errors

AUDIO_SUFFIXES = frozenset(
    "wav flac ogg oga opus mp3 aif aiff au caf w64 rf64 m4a aac mp4 wma webm".split()  # noqa: SIM905 - shorter
)
MAX_FOLD = 127  # the shards' column is int8


@dataclass(frozen=True)
class SourceClip:
    """One raw recording that is to be decoded."""

    path: str
    """Below the source folder."""
    clip_id: str
    """Unique in the data set."""
    bytes: int
    labels: tuple[int, ...] = ()
    """Label ids: places in the listing's `label_names`."""
    fold: int = NO_FOLD
    split: str = ""


@dataclass(frozen=True)
class Quarantined:
    """A file that is left out, and why."""

    path: str
    reason: str
    """A short code, the same for the same kind of fault."""
    detail: str
    bytes: int = 0


@dataclass
class SourceListing:
    """Everything that a source holds."""

    label_names: tuple[str, ...] = ()
    multi_label: bool = False
    clips: list[SourceClip] = field(default_factory=list)
    quarantined: list[Quarantined] = field(default_factory=list)

    @property
    def num_files(self) -> int:
        return len(self.clips) + len(self.quarantined)


def require_folder(source: Place) -> None:
    """UserError unless `source` is a folder with something in it."""
    if not source.exists():
        raise UserError(f"source={source.uri}: does not exist; give a folder of audio clips, local or s3://")
    if not source.is_dir():
        raise UserError(f"source={source.uri}: is a file; give the folder that holds the clips")
    if not source.list():
        raise UserError(f"source={source.uri}: the folder is empty; give a folder of audio clips")


def list_audio(folder: Place) -> dict[str, int]:
    """Names below `folder` of all files that look like audio, with their sizes in bytes, sorted."""
    selector = fs.FileSelector(folder.path, recursive=True, allow_not_found=True)
    with storage_errors(folder.uri):
        infos = folder.filesystem.get_file_info(selector)
    sizes = {
        info.path[len(folder.path) + 1 :]: int(info.size)
        for info in infos
        if info.type == fs.FileType.File
        and not info.base_name.startswith(".")
        and info.extension.lower() in AUDIO_SUFFIXES
    }
    return dict(sorted(sizes.items()))


def read_csv(place: Place, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with a header line, each with its line number.

    UserError, with line and column, where the table is malformed: not UTF-8, a column missing in the header, a row with
    too few or too many values, or an empty value in the first of `columns`.
    """
    try:
        text = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{place.uri}: line {line}: not UTF-8 text; save the table as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or ()
        for column in columns:
            if column not in header:
                found = ", ".join(header) or "nothing"
                raise UserError(f"{place.uri}: line 1: column {column!r} is missing; found: {found}")
        for row in reader:
            short = next((name for name, value in row.items() if value is None), None)
            if short:
                raise UserError(f"{place.uri}: line {reader.line_num}: no value for column {short!r}")
            if None in row:
                raise UserError(f"{place.uri}: line {reader.line_num}: a value after the last column {header[-1]!r}")
            if not row[columns[0]].strip():
                raise UserError(f"{place.uri}: line {reader.line_num}: column {columns[0]!r} is empty")
            yield reader.line_num, {name: value.strip() for name, value in row.items()}
    except csv.Error as error:
        raise UserError(f"{place.uri}: line {reader.line_num}: {error}") from None
