"""One task of `prepare`: reads, decodes and checks a run of source files and writes one shard of them.

Runs on the cluster. It holds a row group and a handful of source files in memory, whatever the size of the shard: the
shard grows in a temporary file and goes to storage whole, so that an upload that fails can begin again.

After the shard comes its index, `index/NNNNN.parquet`: a row for each clip with the source file it is from, and in the
file's metadata everything that the task has to report. A shard with an index is done: a prepare that was killed goes on
with the others, and `beats-ray prepare --verify` accounts for every source file without opening the sources again.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from beats_ray.data.archives import read_member
from beats_ray.data.decode import BadAudio, decode_clip
from beats_ray.data.flac import WaveInt16, encode_flac
from beats_ray.data.manifest import RowGroup, Shard
from beats_ray.data.plan import SAMPLE_RATE_HZ
from beats_ray.data.source import Quarantined, SourceClip
from beats_ray.data.storage import Place, storage_errors, with_retries, write_table

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
INDEX_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int32(), nullable=False),
        pa.field("labels", pa.list_(pa.int16()), nullable=False),
    ]
)
REPORT_KEY = b"beats_ray"  # of the index file's metadata
FILES_IN_FLIGHT = 8  # source files that are fetched while others are decoded


@dataclass(frozen=True)
class ShardPlan:
    """What one task does. `groups` are runs of clips of one fold and split, in the order in which they are written."""

    source: Place
    target: Place
    index: Place
    groups: tuple[tuple[SourceClip, ...], ...]
    row_group_clips: int
    max_clip_seconds: float
    overlap_seconds: float = 0.0
    file_timeout_seconds: float | None = None
    retry_seconds: float = 0.0

    @property
    def fingerprint(self) -> str:
        """Changes with anything that the shard's bytes depend on, but for the content of the source files."""
        clips = [[vars(clip) for clip in group] for group in self.groups]
        settings = [self.source.uri, self.row_group_clips, self.max_clip_seconds, self.overlap_seconds, clips]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

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

    def to_json(self, fingerprint: str) -> bytes:
        """The report as the index file holds it."""
        shard = self.shard.model_dump(mode="json") if self.shard else None
        quarantined = [vars(item) for item in self.quarantined]
        values = {"num_files": self.num_files, "num_samples": self.num_samples, "fbank": vars(self.fbank)}
        return json.dumps(values | {"fingerprint": fingerprint, "shard": shard, "quarantined": quarantined}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "ShardResult":
        """What `to_json` wrote."""
        values = json.loads(text)
        return cls(
            shard=Shard.model_validate(values["shard"]) if values["shard"] else None,
            num_files=values["num_files"],
            num_samples=values["num_samples"],
            quarantined=[Quarantined(**item) for item in values["quarantined"]],
            fbank=FbankSums(**values["fbank"]),
        )


def finished_result(plan: ShardPlan) -> ShardResult | None:
    """What an earlier run reported for the same plan, where it finished it and the shard is still there."""
    try:
        with storage_errors(plan.index.uri), plan.index.filesystem.open_input_file(plan.index.path) as stream:
            report = (pq.read_schema(stream).metadata or {}).get(REPORT_KEY, b"{}")
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if json.loads(report).get("fingerprint") != plan.fingerprint:
        return None
    result = ShardResult.from_json(report)
    if result.shard is not None and plan.target.size_bytes() != result.shard.bytes:
        return None
    return result


def write_shard(plan: ShardPlan) -> ShardResult:
    """Writes the shard of one plan. The same plan and files give the same bytes."""
    import torch

    torch.set_num_threads(1)  # sums must not depend on the number of cores, and tasks share them
    result = ShardResult(None, plan.num_files)
    row_groups: list[RowGroup] = []
    index: list[dict[str, object]] = []
    with tempfile.TemporaryFile() as spool:
        sink = _HashingSink(spool)
        with pq.ParquetWriter(
            pa.PythonFile(sink, mode="w"),
            SCHEMA,
            compression={name: "none" if name == "audio" else "zstd" for name in ("audio", *_OTHER_COLUMNS)},
            use_dictionary=["split"],
            write_statistics=_OTHER_COLUMNS,  # statistics of the audio would copy whole clips into the footer
        ) as writer:
            for rows, sources in _row_groups(plan, result):
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=len(rows))
                index += [
                    {"source": source, "row_group": len(row_groups)} | {name: row[name] for name in _INDEXED}
                    for row, source in zip(rows, sources, strict=True)
                ]
                row_groups.append(RowGroup(clips=len(rows), fold=rows[0]["fold"], split=rows[0]["split"]))
        if row_groups:
            with_retries(lambda: plan.target.write_stream(spool), plan.retry_seconds)
        else:
            with_retries(plan.target.delete, plan.retry_seconds)
    if row_groups:
        result.shard = Shard(
            file=plan.target.name, sha256=sink.sha256.hexdigest(), bytes=sink.bytes, row_groups=tuple(row_groups)
        )
    schema = INDEX_SCHEMA.with_metadata({REPORT_KEY: result.to_json(plan.fingerprint)})
    with_retries(lambda: write_table(plan.index, pa.Table.from_pylist(index, schema)), plan.retry_seconds)
    return result


_INDEXED = ("clip_id", "num_samples", "labels")
_OTHER_COLUMNS = ["clip_id", "num_samples", "labels.list.element", "fold", "split"]


class _HashingSink:
    """The file-like object that Parquet is written through, so that the checksum needs no second reading."""

    def __init__(self, stream: IO[bytes]) -> None:
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


def _row_groups(plan: ShardPlan, result: ShardResult) -> Iterator[tuple[list[dict[str, object]], list[str]]]:
    """Runs of rows that become one row group each, with the source file of every row."""
    for group in plan.groups:
        rows: list[dict[str, object]] = []
        sources: list[str] = []
        for clip, wave in _decoded(plan, group, result.quarantined):
            pieces = cut(wave, plan.max_clip_seconds, plan.overlap_seconds)
            for index, piece in enumerate(pieces):
                result.num_samples += piece.size
                result.fbank.add(piece)
                rows.append(_row(clip, piece, "" if len(pieces) == 1 else f"-part{index:04d}"))
                sources.append(clip.path)
                if len(rows) == plan.row_group_clips:
                    yield rows, sources
                    rows, sources = [], []
        if rows:
            yield rows, sources


def cut(wave: WaveInt16, max_seconds: float, overlap_seconds: float = 0.0) -> list[WaveInt16]:
    """Pieces of a recording, none over `max_seconds` and no rest too short to use.

    Without overlap they are of equal length (one sample more or less). With it, all have `max_seconds`, start that much
    less the overlap apart, and the last one ends with the recording.
    """
    longest = max(1, int(max_seconds * SAMPLE_RATE_HZ))
    if overlap_seconds == 0.0 or wave.size <= longest:
        return np.array_split(wave, -(-wave.size // longest))
    hop = longest - int(overlap_seconds * SAMPLE_RATE_HZ)
    starts = [*range(0, wave.size - longest, hop), wave.size - longest]
    return [wave[start : start + longest] for start in starts]


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
    plan: ShardPlan, clips: tuple[SourceClip, ...], quarantined: list[Quarantined]
) -> Iterator[tuple[SourceClip, WaveInt16]]:
    with ThreadPoolExecutor(FILES_IN_FLIGHT) as threads:
        for start in range(0, len(clips), FILES_IN_FLIGHT):
            batch = clips[start : start + FILES_IN_FLIGHT]
            for clip, data in zip(batch, threads.map(lambda clip: _read(plan, clip), batch), strict=True):
                if isinstance(data, Quarantined):
                    quarantined.append(data)
                    continue
                try:
                    yield clip, decode_clip(data, clip.path.rsplit("/", 1)[-1], plan.file_timeout_seconds)
                except BadAudio as error:
                    quarantined.append(Quarantined(clip.path, error.reason, error.detail, len(data)))


def _read(plan: ShardPlan, clip: SourceClip) -> bytes | Quarantined:
    try:
        return with_retries(lambda: read_member(plan.source, clip.path), plan.retry_seconds)
    except FileNotFoundError:
        return Quarantined(clip.path, "missing-file", "gone since the folder was listed")
    except BadAudio as error:
        return Quarantined(clip.path, error.reason, error.detail, clip.bytes)
