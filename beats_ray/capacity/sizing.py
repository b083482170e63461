"""What a stream of clips needs of a cluster: cores that decode, storage, network, memory, and Ray's coordinator.

    load = Load(clips_per_s=680.0, clip_seconds=10.0, bytes_per_clip=180e3, workers=1, clips_per_block=70)
    need = data_plane(load, buffer_mib=512, measured=MeasuredSettings())
    need.decode_cores, need.coordinator_busy

The formulas are one line each; their constants are measured (`MeasuredSettings`). How many clips a block holds is
asked of the stream itself.
"""

import sys
from dataclasses import dataclass

from beats_ray.capacity.settings import MeasuredSettings

MIB = 2**20
SAMPLE_BYTES_PER_SECOND = 2 * 16_000
"""Of decoded sound, as blocks carry it to the workers: int16, 16 kHz."""
OBJECT_STORE_SHARE = 0.5
"""Of an object store that Ray lets a stream fill."""


@dataclass(frozen=True)
class Load:
    """Clips that are streamed to the workers of a run."""

    clips_per_s: float
    """All workers together."""
    clip_seconds: float
    bytes_per_clip: float
    """In the shards."""
    workers: int
    clips_per_block: int | None
    """Clips that go through Ray as one object; None where the coordinator's part was never measured."""
    streams: int = 1
    """Streams that the clips come from, each with a coordinator."""


@dataclass(frozen=True)
class DataPlane:
    """What a load needs."""

    decode_cores: float
    storage_mib_per_s: float
    """Read from object storage."""
    network_mib_per_s: float
    """Decoded clips on their way to the workers; between nodes where others decode than train."""
    object_store_mib: float
    """Of all nodes together, so that every worker's buffer can be full."""
    coordinator_busy: float | None
    """Share of its time that each of Ray's coordinators works; above 1 it cannot keep up. None where unknown."""


def data_plane(load: Load, buffer_mib: float, measured: MeasuredSettings) -> DataPlane:
    """What the cluster has to give, so that workers never wait for clips."""
    seconds_per_s = load.clips_per_s * load.clip_seconds
    limit = None if load.clips_per_block is None else coordinator_limit(load.clips_per_block, measured, load.streams)
    return DataPlane(
        decode_cores=seconds_per_s * measured.decode_ms_per_second / 1000.0,
        storage_mib_per_s=load.clips_per_s * load.bytes_per_clip / MIB,
        network_mib_per_s=seconds_per_s * SAMPLE_BYTES_PER_SECOND / MIB,
        object_store_mib=load.workers * buffer_mib / OBJECT_STORE_SHARE,
        coordinator_busy=None if limit is None else load.clips_per_s / limit,
    )


def clips_of_a_block(workers: int, micro_batch_size: int, clip_seconds: float) -> int:
    """Clips of a block of a training stream that serves so many workers: whole micro-batches of one of them."""
    from beats_ray.data.stream import rounds_of_a_block  # which loads Ray Data

    clip_bytes = round(clip_seconds * SAMPLE_BYTES_PER_SECOND)
    return micro_batch_size * rounds_of_a_block(micro_batch_size, workers, sys.maxsize, clip_bytes)


def coordinator_limit(clips_per_block: int, measured: MeasuredSettings, streams: int = 1) -> float:
    """Clips/s of so many streams at which the processes that hand out their blocks have no time left."""
    return streams * clips_per_block * 1000.0 / measured.coordinator_ms_per_block


def cache_mib(seconds: float) -> float:
    """Object store of all nodes together that lets so much decoded sound stay in it."""
    from beats_ray.data.cache import STORE_FRACTION  # which loads Ray

    return seconds * SAMPLE_BYTES_PER_SECOND / STORE_FRACTION / MIB
