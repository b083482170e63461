"""Streaming needs the same memory whatever the size of the data set."""

import hashlib
import shutil
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beats_ray.config import PrepareConfig, PrepareSettings, RaySettings, StreamSettings
from beats_ray.data.batches import iterate_micro_batches
from beats_ray.data.flac import encode_flac
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard, read_manifest
from beats_ray.data.sample import make_sample_set
from beats_ray.data.shard_writer import SCHEMA
from beats_ray.data.storage import open_place
from beats_ray.launch import ray_cluster

pytestmark = pytest.mark.slow

COPIES = 10


class PeakMemory:
    """The sum of private memory of this process and all below it, MiB, sampled while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self.samples_mib: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.samples_mib.append(total / 2**20)

    @property
    def mib(self) -> float:
        """The largest sample."""
        return max(self.samples_mib)


def test_peak_memory_is_flat_when_the_data_set_is_ten_times_as_large(tmp_path: Path) -> None:
    make_sample_set(tmp_path / "clips", num_clips=400)
    peaks = {}
    with ray_cluster(RaySettings(address="local", object_store_mib=512)):
        prepare_small(tmp_path)
        read_epoch(tmp_path / "small")  # starts the worker processes, so that both measurements find them there
        for name in ("small", "large"):
            if name == "large":
                copy_ten_times(tmp_path / "small", tmp_path / "large")
            with PeakMemory() as peak:
                clips = read_epoch(tmp_path / name)
            assert clips == (400 if name == "small" else 400 * COPIES)
            peaks[name] = peak.mib
    print(f"peak memory: {peaks['small']:.0f} MiB for 400 clips, {peaks['large']:.0f} MiB for {400 * COPIES}")
    assert peaks["large"] < 1.2 * peaks["small"] + 100


def prepare_small(tmp_path: Path) -> None:
    from beats_ray.data.prepare import prepare

    settings = PrepareSettings(shard_mib=4.0, row_group_clips=40)
    config = PrepareConfig(output=str(tmp_path / "small"), source=str(tmp_path / "clips"), data=settings)
    prepare(config, lambda _done, _total: None)


def copy_ten_times(small: Path, large: Path) -> None:
    """A data set with the same shards ten times over, under other names."""
    manifest = read_manifest(open_place(str(small)))
    (large / "shards").mkdir(parents=True)
    shards = []
    for copy in range(COPIES):
        for shard in manifest.shards:
            name = f"{copy:02d}-{shard.file}"
            shutil.copy(small / "shards" / shard.file, large / "shards" / name)
            mark = hashlib.sha256(f"{copy}{shard.sha256}".encode()).hexdigest()
            shards.append(shard.model_copy(update={"file": name, "sha256": mark}))
    grown = manifest.model_dump() | {"shards": shards, "clips": manifest.clips * COPIES}
    (large / "dataset.json").write_text(DatasetManifest.model_validate(grown).model_dump_json())


def read_epoch(dataset: Path, clip_seconds: float = 5.0) -> int:
    """Streams every clip once, as one training worker does; returns how many came."""
    from beats_ray.data.lanes import Dealing
    from beats_ray.data.stream import build_streams

    place = open_place(str(dataset))
    manifest = read_manifest(place)
    settings = StreamSettings(path=str(dataset), clip_seconds=clip_seconds, shuffle_window_clips=128, buffer_mib=64)
    dealing, steps = Dealing(16, 16, num_workers=1), manifest.clips // 16
    (stream,) = build_streams(place, manifest, settings, dealing=dealing, seed=0, start_step=0, stop_step=steps)
    batches = iterate_micro_batches([stream.iterator()], dealing, 0, 2, first_step=0, stop_step=steps)
    return sum(len(batch.clip_ids) for batch in batches)


BOUND_MIB = 4096
"""Of everything together (driver, consumer, Ray's own processes, 512 MiB of object store), whatever the data set."""


def test_ten_gigabytes_of_shards_stream_within_a_stated_bound_that_does_not_grow(tmp_path: Path) -> None:
    """One shard of noise, which FLAC hardly shrinks, under many names: the stream reads and decodes each anew."""
    write_noise(tmp_path / "noise", total_bytes=10 * 10**9)
    with ray_cluster(RaySettings(address="local", object_store_mib=512)), PeakMemory() as peak:
        clips = read_epoch(tmp_path / "noise", clip_seconds=10.0)
    half = len(peak.samples_mib) // 2
    early, late = max(peak.samples_mib[:half]), max(peak.samples_mib[half:])
    print(f"10 GB, {clips} clips: peak {early:.0f} MiB in the first half of the epoch, {late:.0f} MiB in the second")
    assert max(early, late) < BOUND_MIB
    assert late < 1.1 * early + 100


def write_noise(folder: Path, total_bytes: int) -> None:
    """A data set of 10 s clips of white noise: a single file, linked as often as it takes."""
    random = np.random.default_rng(0)
    distinct = [
        encode_flac((random.normal(size=160_000) * 8000).clip(-32000, 32000).astype(np.int16)) for _ in range(16)
    ]
    groups, clips_per_group = 12, 64
    rows = [
        {"clip_id": f"noise-{index}", "audio": distinct[index % 16], "num_samples": 160_000, "labels": [], "fold": -1,
         "split": ""}
        for index in range(groups * clips_per_group)
    ]  # fmt: skip
    first = folder / "shards" / "00000.parquet"
    first.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), first, row_group_size=clips_per_group, compression="none")
    size, digest = first.stat().st_size, hashlib.sha256(first.read_bytes()).hexdigest()
    count = -(-total_bytes // size)
    row_groups = tuple(RowGroup(clips=clips_per_group, fold=-1, split="") for _ in range(groups))
    shards = []
    for index in range(count):
        name = f"{index:05d}.parquet"
        if index:
            (folder / "shards" / name).hardlink_to(first)
        shards.append(Shard(file=name, sha256=digest, bytes=size, row_groups=row_groups))
    clips = count * len(rows)
    manifest = DatasetManifest(
        name="noise", label_names=(), clips=clips, clips_by_fold={"-1": clips}, clips_by_split={"": clips},
        seconds=10.0 * clips, fbank_mean=0.0, fbank_std=1.0, source="noise", source_files=clips, quarantined=0,
        shards=tuple(shards),
    )  # fmt: skip
    (folder / "dataset.json").write_text(manifest.model_dump_json())
