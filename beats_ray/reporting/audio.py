"""Short excerpts of clips of a prepared data set, small enough to be part of a page.

    mp3 = read_excerpts(open_place("s3://bucket/esc50"), ["1-100032-A-0"])["1-100032-A-0"]

MP3, since every browser plays it: 4 s take about 20 KB.
"""

import io
from collections.abc import Iterable, Sequence

import numpy as np
import soundfile

from beats_ray.data.flac import WaveInt16, decode_flac
from beats_ray.data.manifest import read_manifest
from beats_ray.data.plan import SAMPLE_RATE_HZ, RowGroupRef
from beats_ray.data.shards import clip_ids_and_labels, read_row_group
from beats_ray.data.storage import Place
from beats_ray.inference import row_group_spans

EXCERPT_SECONDS = 4.0
HOP_SECONDS = 0.25


def read_excerpts(
    data: Place, clip_ids: Sequence[str], folds: Iterable[int] = (), splits: Iterable[str] = ()
) -> dict[str, bytes]:
    """The loudest EXCERPT_SECONDS of each clip as MP3, by clip id; a clip that is not in the data set is left out.

    Looks for them in the given folds and splits, all where none is named; reads ids of these, and audio only of the row
    groups that hold a wanted clip. UserError where there is no data set or its storage is away, ValueError or
    SoundFileError for audio that is damaged.
    """
    manifest = read_manifest(data)
    groups = [RowGroupRef(span.file, span.row_group, span.clips) for span in row_group_spans(manifest, folds, splits)]
    found, _ = clip_ids_and_labels(data, groups, manifest.versions, 0.0)
    wanted, excerpts = set(clip_ids), {}
    for group, names in zip(groups, found, strict=True):
        here = wanted.intersection(names)
        if here:
            place = data / "shards" / group.file
            rows = read_row_group(place, manifest.versions[group.file], group, ["clip_id", "audio", "num_samples"])
            for row in rows.to_pylist():
                if row["clip_id"] in here:
                    excerpts[row["clip_id"]] = encode_mp3(loudest(decode_flac(row["audio"], row["num_samples"])))
    return excerpts


def loudest(wave_S: WaveInt16, seconds: float = EXCERPT_SECONDS) -> WaveInt16:
    """The part of that length with the most energy, sought in steps of HOP_SECONDS; a shorter clip whole."""
    size, hop = round(seconds * SAMPLE_RATE_HZ), round(HOP_SECONDS * SAMPLE_RATE_HZ)
    if len(wave_S) <= size:
        return wave_S
    energy = np.concatenate([[0.0], np.cumsum(wave_S.astype(np.float64) ** 2)])
    starts = np.arange(0, len(wave_S) - size + 1, hop)
    start = int(starts[np.argmax(energy[starts + size] - energy[starts])])
    return wave_S[start : start + size]


def encode_mp3(wave_S: WaveInt16) -> bytes:
    """The waveform as MP3, 16 kHz, mono."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave_S, SAMPLE_RATE_HZ, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()
