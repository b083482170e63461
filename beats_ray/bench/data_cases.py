"""The data plane beside what one would use instead: the same clips, as batches of 16 kHz int16 samples, once through.

The cases read the same FLAC bytes from local files and pad them alike. The bare limit is the decoder alone: one process
that decodes them from memory, times the number of cores.
"""

import hashlib
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np

from beats_ray.bench.cases import Step
from beats_ray.config import BenchConfig, RaySettings, StreamSettings

BATCH_CLIPS = 16
ROW_GROUP_CLIPS = 64
SHARD_ROW_GROUPS = 4
STORE_MIB = 2048
DISTINCT_CLIPS = 64
"""Synthesised clips; the data set repeats them under other names."""


def bare_limit(config: BenchConfig) -> Step:
    """Decodes the clips of one core's share: the time of all cores together, without any way to or from them."""
    from beats_ray.data.clips import clip_samples_of

    clips = [data for _, data in encoded_clips(config)][: max(1, config.num_clips // (os.cpu_count() or 1))]
    samples = clip_samples_of(config.seconds)

    def step() -> float | None:
        for start in range(0, len(clips), BATCH_CLIPS):
            part = clips[start : start + BATCH_CLIPS]
            batch = np.zeros((len(part), samples), np.int16)
            for row, data in zip(batch, part, strict=True):
                wave = _decode(data)[:samples]
                row[: len(wave)] = wave
        return None

    return step


def our_stream(config: BenchConfig) -> Step:
    """The stream as training reads it: shards through Ray Data to one consumer."""
    from beats_ray.data.manifest import read_manifest
    from beats_ray.data.storage import open_place
    from beats_ray.data.stream import read_alone
    from beats_ray.launch import ray_cluster

    folder = write_shards(config)
    cluster = ray_cluster(RaySettings(address="local", object_store_mib=STORE_MIB))
    cluster.__enter__()
    Finalize(None, cluster.__exit__, (None, None, None), exitpriority=0)  # when the process of this case ends
    dataset = open_place(folder)
    manifest = read_manifest(dataset)
    cores = os.cpu_count() or 1
    settings = StreamSettings(
        path=folder, clip_seconds=config.seconds, read_tasks=max(1, cores // 2), decode_cpus=0.6, prefetch_blocks=4,
        buffer_mib=STORE_MIB // 2,
    )  # fmt: skip

    def step() -> float:
        steps = config.num_clips // BATCH_CLIPS
        batches = read_alone(dataset, manifest, settings, batch_size=BATCH_CLIPS, num_steps=steps, seed=config.seed)
        return _consume((len(batch.clip_ids) for batch in batches), config)

    return step


def torch_loader(config: BenchConfig) -> Step:
    """PyTorch's DataLoader over the same Parquet shards: one item a row group, a worker process for each core."""
    import pyarrow.parquet as pq
    from torch.utils.data import DataLoader, Dataset

    folder = write_shards(config)

    class RowGroups(Dataset[Any]):
        def __init__(self) -> None:
            files = sorted(Path(folder, "shards").iterdir())
            groups = {str(file): pq.ParquetFile(file).num_row_groups for file in files}
            self.places = [(file, group) for file, count in groups.items() for group in range(count)]

        def __len__(self) -> int:
            return len(self.places)

        def __getitem__(self, index: int) -> list[bytes]:
            return _read_row_group(*self.places[index])

    cores = os.cpu_count() or 1
    loader = DataLoader(
        RowGroups(), batch_size=None, shuffle=True, num_workers=cores, persistent_workers=True, collate_fn=_Pad(config),
        multiprocessing_context="fork",
    )  # fmt: skip

    def step() -> float:
        return _consume((sum(len(one) for one in tensors) for tensors in loader), config)

    return step


def webdataset_loader(config: BenchConfig) -> Step:
    """webdataset over tar files of the same clips, shuffled, a worker process for each core."""
    import webdataset
    from torch.utils.data import DataLoader

    files = _tars(config)
    cores = os.cpu_count() or 1
    source = (
        webdataset.WebDataset(files, shardshuffle=len(files), nodesplitter=None, seed=config.seed)
        .shuffle(ROW_GROUP_CLIPS)
        .to_tuple("flac")
        .map(lambda item: item[0])
        .batched(BATCH_CLIPS, collation_fn=list)
    )
    loader: Any = DataLoader(
        source, batch_size=None, num_workers=min(cores, len(files)), persistent_workers=True, collate_fn=_Pad(config),
        multiprocessing_context="fork",
    )  # fmt: skip

    def step() -> float:
        return _consume((sum(len(one) for one in tensors) for tensors in loader), config)

    return step


def _consume(sizes: Iterator[int], config: BenchConfig) -> float:
    """Takes all batches and returns the seconds until the first one; RuntimeError where clips are missing."""
    started = time.perf_counter()
    clips = next(sizes)
    first = time.perf_counter() - started
    clips += sum(sizes)
    if clips < config.num_clips // BATCH_CLIPS * BATCH_CLIPS:
        raise RuntimeError(f"{clips} of {config.num_clips} clips came")
    return first


class _Pad:
    """Turns FLAC bytes into batches of padded samples, in the worker process."""

    def __init__(self, config: BenchConfig) -> None:
        self._samples = round(config.seconds * 16_000)

    def __call__(self, clips: list[bytes]) -> list[Any]:
        import torch

        batches = []
        for start in range(0, len(clips), BATCH_CLIPS):
            part = clips[start : start + BATCH_CLIPS]
            batch = np.zeros((len(part), self._samples), np.int16)
            for row, data in zip(batch, part, strict=True):
                wave = _decode(data)[: self._samples]
                row[: len(wave)] = wave
            batches.append(torch.from_numpy(batch))
        return batches


def _decode(data: bytes) -> np.ndarray:
    """What one would write: soundfile on bytes in memory."""
    import soundfile

    wave: np.ndarray = soundfile.read(io.BytesIO(data), dtype="int16")[0]
    return wave


def _read_row_group(path: str, group: int) -> list[bytes]:
    import pyarrow.parquet as pq

    found: list[bytes] = pq.ParquetFile(path).read_row_group(group, columns=["audio"])["audio"].to_pylist()
    return found


# --- the clips --------------------------------------------------------------------------------------------------------


def encoded_clips(config: BenchConfig) -> Iterator[tuple[str, bytes]]:
    """Names and FLAC bytes of all clips."""
    distinct = _distinct(config.seconds)
    for index in range(config.num_clips):
        yield f"clip-{index:06d}", distinct[index % len(distinct)]


@lru_cache(maxsize=1)
def _distinct(seconds: float) -> list[bytes]:
    from beats_ray.data.flac import encode_flac
    from beats_ray.data.sample import make_clip

    waves = [make_clip(index, 0, seconds) for index in range(DISTINCT_CLIPS)]
    return [encode_flac((wave * 32_767).astype(np.int16)) for wave in waves]


def _folder(config: BenchConfig) -> Path:
    key = hashlib.sha256(f"{config.num_clips}/{config.seconds}/{ROW_GROUP_CLIPS}".encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"beats_ray_bench_{os.getuid()}" / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_shards(config: BenchConfig) -> str:
    """A prepared data set of the clips, made once on this machine."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
    from beats_ray.data.shard_writer import SCHEMA

    folder = _folder(config)
    if (folder / "dataset.json").exists():
        return str(folder)
    (folder / "shards").mkdir(exist_ok=True)
    rows = [
        {"clip_id": name, "audio": data, "num_samples": round(config.seconds * 16_000), "labels": [], "fold": -1,
         "split": ""}
        for name, data in encoded_clips(config)
    ]  # fmt: skip
    per_shard = ROW_GROUP_CLIPS * SHARD_ROW_GROUPS
    shards = []
    for first in range(0, len(rows), per_shard):
        part = rows[first : first + per_shard]
        path = folder / "shards" / f"{first // per_shard:05d}.parquet"
        table = pa.Table.from_pylist(part, SCHEMA)
        pq.write_table(table, path, row_group_size=ROW_GROUP_CLIPS, compression="none")
        data = path.read_bytes()
        groups = tuple(
            RowGroup(clips=len(part[start : start + ROW_GROUP_CLIPS]), fold=-1, split="")
            for start in range(0, len(part), ROW_GROUP_CLIPS)
        )
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(file=path.name, sha256=digest, bytes=len(data), row_groups=groups))
    manifest = DatasetManifest(
        name="bench", label_names=(), clips=len(rows), clips_by_fold={"-1": len(rows)}, clips_by_split={"": len(rows)},
        seconds=config.seconds * len(rows), fbank_mean=0.0, fbank_std=1.0, source="bench", source_files=len(rows),
        quarantined=0, shards=tuple(shards),
    )  # fmt: skip
    (folder / "dataset.json").write_text(manifest.model_dump_json())
    return str(folder)


def _tars(config: BenchConfig) -> list[str]:
    """The same clips as tar files, made once on this machine."""
    folder = _folder(config) / "tars"
    per_tar = ROW_GROUP_CLIPS * SHARD_ROW_GROUPS
    count = -(-config.num_clips // per_tar)
    files = [folder / f"{index:05d}.tar" for index in range(count)]
    if not files[-1].exists():
        folder.mkdir(exist_ok=True)
        clips = list(encoded_clips(config))
        for index, file in enumerate(files):
            with tarfile.open(file, "w") as archive:
                for name, data in clips[index * per_tar : (index + 1) * per_tar]:
                    entry = tarfile.TarInfo(f"{name}.flac")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    return [str(file) for file in files]
