"""AudioSet: the published tables, and whatever recordings somebody has of it, in any folders.

A file is a segment's if its name holds the YouTube id, followed by nothing or by the start in seconds or milliseconds:
`ID.wav`, `YID.wav`, `ID_30.wav`, `ID_30.000_40.000.flac`, `ID_30000_40000.wav`. Of videos with several segments the
start is needed. Tables: `class_labels_indices.csv` and any of `SUBSET_segments.csv`, which becomes the clips' split.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.source import Quarantined, SourceClip, SourceListing, read_csv, read_text, require_audio
from beats_ray.data.storage import Place, open_place

SUBSETS = ("balanced_train", "unbalanced_train", "eval")
ID_LENGTH = 11
ROW = re.compile(r'([\w-]{11}),\s*(\d+(?:\.\d+)?),\s*\d+(?:\.\d+)?,\s*"([^"]+)"\s*', re.ASCII)
START = re.compile(r"[_-](\d+(?:\.\d+)?)(?![^_-])")  # after the id; an end and more may follow


@dataclass(frozen=True, slots=True)
class Segment:
    """A row of a table: ten seconds of a video."""

    video: str
    start: float
    labels: tuple[int, ...]
    subset: str

    def starts_at(self, number: float) -> bool:
        """Whether a number of a file's name is this start: in milliseconds, in seconds, or those cut to whole ones."""
        return any(abs(number - start) < 1e-3 for start in (self.start, int(self.start), 1000 * self.start))


def read_audioset(source: Place, layout: LayoutSettings) -> SourceListing:
    """The recordings that the tables name, with their labels; segments without a recording are listed as missing.

    UserError where a table is not as published or no recording belongs to any segment.
    """
    tables = open_place(layout.table) if layout.table else source
    sizes = require_audio(source)
    label_names, label_of = read_labels(tables / "class_labels_indices.csv")
    segments: dict[str, list[Segment]] = defaultdict(list)
    for subset in _subsets(tables, layout.subsets):
        for segment in _read_segments(tables / f"{subset}_segments.csv", subset, label_of):
            if all(segment.start != other.start for other in segments[segment.video]):
                segments[segment.video].append(segment)
    listing = SourceListing(label_names, multi_label=True)
    used: dict[Segment, str] = {}
    for name, size in sizes.items():
        found = _find_segment(PurePosixPath(name).stem, segments)
        if isinstance(found, Segment) and found in used:
            found = "duplicate-segment", f"{used[found]} is of the same segment"
        if isinstance(found, Segment):
            used[found] = name
            clip_id = f"{found.video}_{found.start:.3f}"
            listing.clips.append(SourceClip(name, clip_id, size, found.labels, split=found.subset))
        else:
            listing.skipped.append(Quarantined(name, *found, size))
    if not used:
        raise UserError(
            f"source={source.uri}: none of {len(sizes)} audio files is named by the id of a segment in {tables.uri}; "
            "name them by YouTube id, or choose other layout.subsets"
        )
    listing.missing = [
        Quarantined(f"{segment.video}_{segment.start:.3f}", "missing-clip", f"a segment of {segment.subset}")
        for video in segments.values()
        for segment in video
        if segment not in used
    ]
    return listing


def _find_segment(stem: str, segments: dict[str, list[Segment]]) -> Segment | tuple[str, str]:
    """The segment that a file of this name is, or the reason why it is none."""
    places = range(len(stem) - ID_LENGTH + 1)
    place = next((place for place in places if stem[place : place + ID_LENGTH] in segments), None)
    if place is None:
        return "not-in-tables", "no table in use names it"
    video = stem[place : place + ID_LENGTH]
    start = START.match(stem, place + ID_LENGTH)
    found = segments[video]
    if start:
        found = [segment for segment in found if segment.starts_at(float(start[1]))]
    if len(found) == 1:
        return found[0]
    if not found:
        return "not-in-tables", f"no table in use names a segment of {video} that starts there"
    return "ambiguous", f"the tables name {len(found)} segments of {video}, and the name does not say which start"


def _subsets(tables: Place, wanted: tuple[str, ...]) -> list[str]:
    for name in wanted:
        if name not in SUBSETS:
            raise UserError(f"layout.subsets={name}: no subset of AudioSet; choose of {', '.join(SUBSETS)}")
        if not (tables / f"{name}_segments.csv").exists():
            raise UserError(
                f"layout.subsets={name}: {tables.uri} has no {name}_segments.csv; set layout.table or fetch it"
            )
    present = [
        name for name in SUBSETS if name in wanted or (not wanted and (tables / f"{name}_segments.csv").exists())
    ]
    if not present:
        raise UserError(
            f"{tables.uri}: holds none of the segment tables, as eval_segments.csv; set layout.table to their folder"
        )
    return present


def read_labels(table: Place) -> tuple[tuple[str, ...], dict[str, int]]:
    """The display names in the order of their indices, and the index of each mid."""
    if not table.exists():
        raise UserError(
            f"{table.uri}: does not exist; fetch it, or set layout.table to the folder of AudioSet's tables"
        )
    names: dict[int, str] = {}
    label_of: dict[str, int] = {}
    for line, row in read_csv(table, ("index", "mid", "display_name")):
        if not row["index"].isdecimal() or int(row["index"]) in names:
            raise UserError(
                f"{table.uri}: line {line}: index={row['index']} is no number, or there before; fetch it again"
            )
        names[int(row["index"])] = row["display_name"]
        label_of[row["mid"]] = int(row["index"])
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{table.uri}: its {len(names)} indices are not 0 to {len(names) - 1}; fetch it again")
    return tuple(names[index] for index in range(len(names))), label_of


def _read_segments(table: Place, subset: str, label_of: dict[str, int]) -> Iterator[Segment]:
    for line, text in enumerate(read_text(table).splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        row = ROW.fullmatch(text)
        if not row:
            raise UserError(f'{table.uri}: line {line}: is not `ID, start, end, "mid,mid"`; fetch the table again')
        video, start, mids = row.groups()
        labels = set()
        for mid in mids.split(","):
            if mid not in label_of:
                raise UserError(
                    f"{table.uri}: line {line}: {mid!r} is not in class_labels_indices.csv; fetch both again"
                )
            labels.add(label_of[mid])
        yield Segment(video, float(start), tuple(sorted(labels)), subset)
