"""Streaming needs the same memory whatever the size of the data set."""

import hashlib
import shutil
import threading
from pathlib import Path

import psutil
import pytest

from beats_ray.config import PrepareConfig, PrepareSettings, RaySettings, StreamSettings
from beats_ray.data.batches import iterate_micro_batches
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.sample import make_sample_set
from beats_ray.data.storage import open_place
from beats_ray.launch import ray_cluster

pytestmark = pytest.mark.slow

COPIES = 10


class PeakMemory:
    """The largest sum of private memory of this process and all below it, MiB, sampled while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self.mib = 0.0
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
            self.mib = max(self.mib, total / 2**20)


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


def read_epoch(dataset: Path) -> int:
    """Streams every clip once, as one training worker does; returns how many came."""
    from beats_ray.data.stream import build_stream, execution_options

    place = open_place(str(dataset))
    manifest = read_manifest(place)
    settings = StreamSettings(path=str(dataset), clip_seconds=5.0, shuffle_window_clips=128, buffer_mib=64)
    stream = build_stream(
        place,
        manifest,
        settings,
        seed=0,
        global_batch_size=16,
        micro_batch_size=16,
        start_step=0,
        stop_step=manifest.clips // 16,
    )
    stream.context.execution_options = execution_options(settings)
    batches = iterate_micro_batches(stream.iterator(), 16, 2, first_step=0, global_batch_size=16, rank=0, world_size=1)
    return sum(len(batch.clip_ids) for batch in batches)
