"""WebDataset: tar files whose members of one stem are a sample, `000017.flac` with `000017.cls` or `000017.json`.

The stem ends at the first dot, as in the webdataset package. The label is in the member with the extension
`layout.label_column`: a whole number in `cls`, the value of `label` (one or a list) in `json`, text in any other. By
default that is `label`, and where a sample has none, `cls` and then `json` are looked at. Listing reads headers and
these small members; the tars must not be compressed.
"""

import io
import json
import tarfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from beats_ray.config import LayoutSettings, UserError
from beats_ray.data.archives import MAX_MEMBER_BYTES
from beats_ray.data.source import (
    LabelledClip,
    Quarantined,
    SourceClip,
    SourceListing,
    add_labelled,
    is_audio,
    list_containers,
    source_root,
)
from beats_ray.data.storage import Place, storage_errors

FILES_AT_ONCE = 16
READ_AHEAD_BYTES = 1 << 15  # one request gets a header, the small members beside it and their headers
MAX_LABEL_BYTES = 1 << 20
DEFAULT_LABEL = LayoutSettings().label_column


@dataclass
class Sample:
    """The members of one stem that matter."""

    audio: list[tarfile.TarInfo] = field(default_factory=list)
    labels: dict[str, bytes] = field(default_factory=dict)
    """Content of the members that may hold the label, by extension."""


def read_webdataset(source: Place, layout: LayoutSettings) -> SourceListing:
    """The audio of every sample with its label; a clip's id is its tar's name and its stem."""
    root = source_root(source)
    names = list_containers(source, ".tar")
    extensions = (DEFAULT_LABEL, "cls", "json") if layout.label_column == DEFAULT_LABEL else (layout.label_column,)
    listing = SourceListing()
    clips: list[LabelledClip] = []
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        for part, part_clips in threads.map(lambda name: _list_tar(root, name, extensions), names):
            clips += part_clips
            listing.quarantined += part.quarantined
            listing.skipped += part.skipped
    add_labelled(listing, clips, f"layout.label_column={layout.label_column}")
    if not listing.num_files:
        raise UserError(
            f"source={source.uri}: its tar files hold no audio; give samples of .wav, .flac, .ogg, .mp3, ..."
        )
    return listing


def _list_tar(root: Place, name: str, extensions: tuple[str, ...]) -> tuple[SourceListing, list[LabelledClip]]:
    """What cannot be used or is not wanted of one tar, and its clips with their labels."""
    listing = SourceListing()
    clips: list[LabelledClip] = []
    for stem, sample in _read_samples(root / name, extensions).items():
        paths = [f"{name}!/{audio.offset_data}/{audio.size}/{audio.name}" for audio in sample.audio]
        for path, audio in list(zip(paths, sample.audio, strict=True))[1:]:
            listing.skipped.append(
                Quarantined(path, "second-audio", f"{sample.audio[0].name} is of the same sample", audio.size)
            )
        if not sample.audio:
            if sample.labels:
                listing.quarantined.append(Quarantined(f"{name}!/{stem}", "missing-file", "a label without audio"))
            continue
        size = sample.audio[0].size
        if size > MAX_MEMBER_BYTES:
            detail = f"{size} bytes, at most {MAX_MEMBER_BYTES} are read"
            listing.quarantined.append(Quarantined(paths[0], "too-large", detail, size))
            continue
        try:
            labels = _parse_labels(sample.labels, extensions)
        except (ValueError, RecursionError) as error:
            listing.quarantined.append(Quarantined(paths[0], "bad-label", " ".join(str(error).split()), size))
            continue
        clips.append((SourceClip(paths[0], f"{name[: -len('.tar')]}/{stem}", size), labels))
    return listing, clips


def _read_samples(place: Place, extensions: tuple[str, ...]) -> dict[str, Sample]:
    """The samples of one tar. UserError where it is compressed, cut or damaged."""
    samples: dict[str, Sample] = defaultdict(Sample)
    with storage_errors(place.uri), place.filesystem.open_input_file(place.path) as stream:
        file = io.BufferedReader(stream, READ_AHEAD_BYTES)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is what is open
            for member in archive:
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, _, extension = base.partition(".")
                if not member.isreg() or not stem:
                    continue
                if is_audio(base):
                    samples[folder + slash + stem].audio.append(member)
                elif extension.lower() in extensions:
                    file.seek(member.offset_data)
                    content = file.read(min(member.size, MAX_LABEL_BYTES))
                    samples[folder + slash + stem].labels[extension.lower()] = content
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes any rubbish for the end
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
        except tarfile.TarError as error:
            raise UserError(f"{place.uri}: damaged, or no plain tar file ({error}); fetch or make it again") from None
    return samples


def _parse_labels(labels: dict[str, bytes], extensions: tuple[str, ...]) -> tuple[int | str, ...]:
    """What the first of these extensions says. ValueError where that is none."""
    extension = next((extension for extension in extensions if extension in labels), "")
    if not extension:
        return ()
    text = labels[extension].decode().strip()
    if extension == "cls":
        return (int(text),)
    if extension != "json":
        return (text,) if text else ()
    content = json.loads(text)
    value = content.get("label") if isinstance(content, dict) else content
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(label, (int, str)) and not isinstance(label, bool) for label in values):
        raise ValueError(f"label {value!r} is neither a whole number nor text, nor a list of them")
    return tuple(values)
