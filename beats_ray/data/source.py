"""What a reader of raw clips returns, and the parts that every reader needs.

A reader is one function, `read_NAME(source: Place, layout: LayoutSettings) -> SourceListing`, in
`beats_ray.data.datasets`. It decides from names and tables alone; files are opened later, on the cluster, by
`beats_ray.data.prepare`. Every file of the source ends in exactly one list: `clips`, `quarantined` with the reason why
it cannot be used, or `skipped` with the reason why it is not wanted. A source that cannot be read as this layout at all
is a UserError.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.archives import member_fault, open_zip
from beats_ray.data.manifest import NO_FOLD
from beats_ray.data.storage import Place

AUDIO_SUFFIXES = frozenset(
    "wav flac ogg oga opus mp3 aif aiff au caf w64 rf64 m4a aac mp4 wma webm".split()  # noqa: SIM905 - shorter
)
MAX_FOLD = 127  # the shards' column is int8
MAX_LABELS = 32_768  # the shards' column is int16


@dataclass(frozen=True)
class SourceClip:
    """One raw recording that is to be decoded."""

    path: str
    """Below `source_root`, as `beats_ray.data.archives.read_member` takes it: files inside archives too."""
    clip_id: str
    """Unique in the data set."""
    bytes: int
    labels: tuple[int, ...] = ()
    """Label ids: places in the listing's `label_names`."""
    fold: int = NO_FOLD
    split: str = ""


@dataclass(frozen=True)
class Quarantined:
    """A file that is left out, because it is unusable or not wanted, and why."""

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
    skipped: list[Quarantined] = field(default_factory=list)
    """Files that the layout leaves out on purpose: of another subset, not named by any table."""
    missing: list[Quarantined] = field(default_factory=list)
    """Recordings that the tables name and the source does not hold, where that is usual (AudioSet)."""

    @property
    def num_files(self) -> int:
        """Files that are wanted: skipped ones do not count."""
        return len(self.clips) + len(self.quarantined)


LabelledClip = tuple[SourceClip, tuple[int | str, ...]]
"""A clip and its labels as the source has them."""
Reader = Callable[[Place, LayoutSettings], SourceListing]


def source_root(source: Place) -> Place:
    """What the paths of a listing are below: the source, or the folder that it lies in where it is a file."""
    return source.parent if source.exists() and not source.is_dir() else source


def in_zip_too(reader: Reader) -> Reader:
    """The same reader, which also takes a zip archive, as the folder that it holds.

    Members that cannot be read are quarantined: encrypted, too-large, bad-compression.
    """

    def read(source: Place, layout: LayoutSettings) -> SourceListing:
        if not source.name.lower().endswith(".zip") or source_root(source) == source:
            return reader(source, layout)
        folder = open_zip(source)
        listing = reader(folder, layout)
        prefix = f"{source.name}!/{folder.view.top}"
        faults = {clip.path: member_fault(folder.view.members[clip.path]) for clip in listing.clips}
        bad = [Quarantined(clip.path, *fault, clip.bytes) for clip in listing.clips if (fault := faults[clip.path])]
        good = [clip for clip in listing.clips if not faults[clip.path]]
        return replace(
            listing,
            clips=[replace(clip, path=prefix + clip.path) for clip in good],
            quarantined=[replace(item, path=prefix + item.path) for item in listing.quarantined + bad],
            skipped=[replace(item, path=prefix + item.path) for item in listing.skipped],
        )

    return read


def require_folder(source: Place) -> None:
    """UserError unless `source` is a folder with something in it."""
    if not source.exists():
        raise UserError(f"source={source.uri}: does not exist; give a folder of audio clips, local, s3:// or gs://")
    if not source.is_dir():
        raise UserError(f"source={source.uri}: is a file; give the folder that holds the clips, or a .zip of it")
    if not source.list():
        raise UserError(f"source={source.uri}: the folder is empty; give a folder of audio clips")


def list_files(folder: Place) -> dict[str, int]:
    """Names below `folder` of all files with their sizes in bytes, sorted.

    Left out: hidden files and folders, and local names that are not UTF-8 (see `undecodable_files`).
    """
    try:
        sizes = folder.sizes(recursive=True)
    except UnicodeDecodeError:  # pyarrow gives up on the whole folder for the sake of one name
        sizes = {name: _local_size(folder, name) for name in sorted(_local_files(folder)) if _is_utf8(name)}
    return {name: size for name, size in sizes.items() if not _is_hidden(name)}


def undecodable_files(source: Place) -> list[Quarantined]:
    """Local audio files whose names are not UTF-8: no shard and no table can name them."""
    if type(source) is not Place or source.is_remote or not source.is_dir():
        return []
    bad = [name for name in _local_files(source) if not _is_utf8(name) and is_audio(name) and not _is_hidden(name)]
    return [
        Quarantined(
            path=name.encode(errors="surrogateescape").decode(errors="backslashreplace"),
            reason="bad-name",
            detail="not UTF-8",
            bytes=_local_size(source, name),
        )
        for name in sorted(bad)
    ]


def account_for_others(source: Place, listing: SourceListing) -> None:
    """Enters what the reader of a folder did not look at: files that are no audio, and links that lead nowhere.

    Hidden files and folders are in no list.
    """
    if not source.is_dir():
        return
    paths = [clip.path for clip in listing.clips]
    paths += [item.path for item in (*listing.quarantined, *listing.skipped)]
    accounted = {path.partition("!/")[0] for path in paths}
    sizes = list_files(source)
    listing.skipped += [
        Quarantined(name, "other-file", "not audio by its suffix, or not in a place that this kind looks at", size)
        for name, size in sizes.items()
        if name not in accounted
    ]
    if type(source) is not Place or source.is_remote:
        return
    unseen = (
        {name for name in _local_files(source) if _is_utf8(name) and not _is_hidden(name)} - sizes.keys() - accounted
    )
    listing.quarantined += [
        Quarantined(name, "dangling-link", "a link to a file that is not there")
        for name in sorted(unseen)
        if is_audio(name) and Path(source.path, name).is_symlink()
    ]


def _local_files(folder: Place) -> Iterator[str]:
    """Names of all files below a local folder, undecodable bytes as lone surrogates; nothing is opened or measured."""
    for parent, _, names in os.walk(folder.path):
        below = f"{parent}/"[len(folder.path) + 1 :]
        yield from (below + name for name in names)


def _local_size(folder: Place, name: str) -> int:
    return Path(folder.path, name).stat().st_size


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def list_audio(folder: Place) -> dict[str, int]:
    """Names below `folder` of all files that look like audio, with their sizes in bytes, sorted."""
    return {name: size for name, size in list_files(folder).items() if is_audio(name)}


def require_audio(source: Place) -> dict[str, int]:
    """As `list_audio`; UserError where `source` is no folder, or one without audio files."""
    require_folder(source)
    sizes = list_audio(source)
    if not sizes:
        raise UserError(
            f"source={source.uri}: holds no audio files; give a folder of .wav, .flac, .ogg, .mp3 or others"
        )
    return sizes


def list_containers(source: Place, suffix: str) -> dict[str, int]:
    """Names and sizes of the files with this suffix, below `source_root`: the source itself, or all of its folder's.

    UserError where there is none.
    """
    if source.exists() and not source.is_dir():
        if not source.name.lower().endswith(suffix):
            raise UserError(f"source={source.uri}: is no {suffix} file; give one, or a folder of them")
        return {source.name: source.size_bytes()}
    require_folder(source)
    sizes = {name: size for name, size in list_files(source).items() if name.lower().endswith(suffix)}
    if not sizes:
        raise UserError(f"source={source.uri}: holds no {suffix} files; give a folder of them")
    return sizes


def is_audio(name: str) -> bool:
    return PurePosixPath(name).suffix[1:].lower() in AUDIO_SUFFIXES


def clip_ids(names: Iterable[str]) -> dict[str, str]:
    """A unique clip id for each file: its name without the extension, or with it where another file needs that."""
    stems = {name: name.removesuffix(PurePosixPath(name).suffix) for name in names}
    shared = Counter(stems.values())
    return {name: stem if shared[stem] == 1 and stem not in stems else name for name, stem in stems.items()}


def parse_fold(value: str) -> int | None:
    """The fold that a table gives, NO_FOLD where it is empty, None where it is no whole number from 0 to MAX_FOLD."""
    if not value:
        return NO_FOLD
    return int(value) if value.isdecimal() and int(value) <= MAX_FOLD else None


def add_labelled(listing: SourceListing, clips: list[LabelledClip], origin: str) -> None:
    """Adds clips with the labels that the source gives them, and fills in the vocabulary.

    Numbers are label ids, named "0", "1", ..., and a negative one is no label; where any label is text, all are, in
    their order as text. Quarantined: a clip id that was there before, and clips without a label where no clip has
    several. UserError, beginning with `origin`, where there are more labels than fit.
    """
    labels_of = [tuple(label for label in labels if isinstance(label, str) or label >= 0) for _, labels in clips]
    values = {label for labels in labels_of for label in labels}
    numbers = [value for value in values if isinstance(value, int)]
    count = max(numbers, default=-1) + 1 if len(numbers) == len(values) else len(values)
    if count > MAX_LABELS:
        raise UserError(f"{origin}: gives {count} labels, at most {MAX_LABELS} fit; choose one that holds classes")
    names = map(str, range(count)) if len(numbers) == len(values) else sorted(map(str, values))
    place_of = {name: place for place, name in enumerate(names)}
    listing.label_names = tuple(place_of)
    listing.multi_label = any(len(set(labels)) > 1 for labels in labels_of)
    seen: set[str] = set()
    for (clip, _), labels in zip(clips, labels_of, strict=True):
        if place_of and not labels and not listing.multi_label:
            listing.quarantined.append(Quarantined(clip.path, "unlabelled", "has no label", clip.bytes))
        elif clip.clip_id in seen:
            detail = f"another clip is called {clip.clip_id} too"
            listing.quarantined.append(Quarantined(clip.path, "duplicate-id", detail, clip.bytes))
        else:
            ids = sorted({place_of[str(label)] for label in labels})
            listing.clips.append(replace(clip, labels=tuple(ids)))
        seen.add(clip.clip_id)


def read_text(place: Place) -> str:
    """The content of a text file. UserError where it is missing or not UTF-8."""
    try:
        return place.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{place.uri}: does not exist; check the path") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{place.uri}: line {line}: not UTF-8 text; save the table as UTF-8") from None


def read_csv(place: Place, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with a header line, each with its line number; a .tsv file has tabs between its values.

    UserError, with line and column, where the table is malformed: not UTF-8, a column missing in the header, a row with
    too few or too many values, or an empty value in the first of `columns`.
    """
    delimiter = "\t" if place.name.lower().endswith(".tsv") else ","
    reader = csv.DictReader(io.StringIO(read_text(place), newline=""), strict=True, delimiter=delimiter)
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
