"""One task of `prepare`: reads, decodes and checks a run of source files and writes one shard of them.

Runs on the cluster. It holds a row group and a handful of source files in memory, whatever the size of the shard.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beats_ray.data.decode import BadAudio, WaveInt16, decode_clip, encode_flac
from beats_ray.data.manifest import SAMPLE_RATE_HZ, RowGroup, Shard
from beats_ray.data.source import Quarantined, SourceClip
from beats_ray.data.storage import Place

SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("audio", pa.binary(), nullable=False),
        pa.field("num_samples", pa.int32(), nullable=False),
        pa.field("labels", pa.list_(pa.int16()), nullable=False),
        pa.field("fold", pa.int8(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
FILES_IN_FLIGHT = 8  # source files that are fetched while others are decoded


@dataclass(frozen=True)
class ShardPlan:
    """What one task does. `groups` are runs of clips of one fold and split, in the order in which they are written."""

    source: Place
    target: Place
    groups: tuple[tuple[SourceClip, ...], ...]
    row_group_clips: int
    max_clip_seconds: float

    @property
    def num_files(self) -> int:
        return sum(len(group) for group in self.groups)


@dataclass
class FbankSums:
    """Sums from which mean and deviation of the filterbank follow."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, wave: WaveInt16) -> None:
        import torch

        from beats_ray.models.fbank import compute_fbank

        fbank_1TF, _ = compute_fbank(torch.from_numpy(wave)[None])
        values = fbank_1TF.double()
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())

    def __add__(self, other: "FbankSums") -> "FbankSums":
        return FbankSums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def std(self) -> float:
        return max(self.squares / max(self.count, 1) - self.mean**2, 0.0) ** 0.5


@dataclass
class ShardResult:
    """What a task reports; `shard` is None where no clip of its files was usable (then there is no file either)."""

    shard: Shard | None
    num_files: int
    num_samples: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)
    fbank: FbankSums = field(default_factory=FbankSums)


def write_shard(plan: ShardPlan) -> ShardResult:
    """Writes the shard of one plan. The same plan and files give the same bytes."""
    import torch

    torch.set_num_threads(1)  # sums must not depend on the number of cores, and tasks share them
    result = ShardResult(None, plan.num_files)
    row_groups: list[RowGroup] = []
    with plan.target.open_output() as stream:
        sink = _HashingSink(stream)
        with pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            SCHEMA,
            compression={name: "none" if name == "audio" else "zstd" for name in ("audio", *_OTHER_COLUMNS)},
            use_dictionary=["split"],
            write_statistics=_OTHER_COLUMNS,  # statistics of the audio would copy whole clips into the footer
        ) as writer:
            for rows in _row_groups(plan, result):
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=len(rows))
                row_groups.append(RowGroup(clips=len(rows), fold=rows[0]["fold"], split=rows[0]["split"]))
    if row_groups:
        result.shard = Shard(
            file=plan.target.name, sha256=sink.sha256.hexdigest(), bytes=sink.bytes, row_groups=tuple(row_groups)
        )
    else:
        plan.target.delete()
    return result


_OTHER_COLUMNS = ["clip_id", "num_samples", "labels.list.element", "fold", "split"]


class _HashingSink:
    """The file-like object that Parquet is written through, so that the checksum needs no second reading."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.closed = False
        self._stream = stream

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        self._stream.write(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True  # the stream belongs to the caller


def _row_groups(plan: ShardPlan, result: ShardResult) -> Iterator[list[dict[str, object]]]:
    for group in plan.groups:
        rows: list[dict[str, object]] = []
        for clip, wave in _decoded(plan.source, group, result.quarantined):
            pieces = cut(wave, plan.max_clip_seconds)
            for index, piece in enumerate(pieces):
                result.num_samples += piece.size
                result.fbank.add(piece)
                rows.append(_row(clip, piece, "" if len(pieces) == 1 else f"-part{index:04d}"))
                if len(rows) == plan.row_group_clips:
                    yield rows
                    rows = []
        if rows:
            yield rows


def cut(wave: WaveInt16, max_seconds: float) -> list[WaveInt16]:
    """Pieces of equal length (one sample more or less), none over `max_seconds`: no rest too short to use."""
    count = -(-wave.size // max(1, int(max_seconds * SAMPLE_RATE_HZ)))
    return np.array_split(wave, count)


def _row(clip: SourceClip, wave: WaveInt16, suffix: str) -> dict[str, object]:
    return {
        "clip_id": clip.clip_id + suffix,
        "audio": encode_flac(wave),
        "num_samples": wave.size,
        "labels": list(clip.labels),
        "fold": clip.fold,
        "split": clip.split,
    }


def _decoded(
    source: Place, clips: tuple[SourceClip, ...], quarantined: list[Quarantined]
) -> Iterator[tuple[SourceClip, WaveInt16]]:
    with ThreadPoolExecutor(FILES_IN_FLIGHT) as threads:
        for start in range(0, len(clips), FILES_IN_FLIGHT):
            batch = clips[start : start + FILES_IN_FLIGHT]
            for clip, data in zip(batch, threads.map(lambda clip: _read(source / clip.path), batch), strict=True):
                if data is None:
                    quarantined.append(Quarantined(clip.path, "missing-file", "gone since the folder was listed"))
                    continue
                try:
                    yield clip, decode_clip(data, clip.path.rsplit("/", 1)[-1])
                except BadAudio as error:
                    quarantined.append(Quarantined(clip.path, error.reason, error.detail, len(data)))


def _read(place: Place) -> bytes | None:
    try:
        return place.read_bytes()
    except FileNotFoundError:
        return None
