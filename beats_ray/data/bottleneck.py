"""Why a training worker waits for data: storage, decoding, or the way from the object store to the worker."""

from beats_ray.config import StreamSettings, TrainSettings
from beats_ray.data.stream import READ_CPUS

MOST_WAIT_FRACTION = 0.05
"""Part of the time that a worker may stand still before it is worth a warning."""


def name_bottleneck(
    metrics: dict[str, float], data: StreamSettings, train: TrainSettings, cluster_cpus: float
) -> str | None:
    """A line that names what holds a run back and what to change; None where it hardly waits for data.

    metrics: a record of a training step. Storage and decoding could bring so many clips a second as their tasks'
    measured times and numbers allow; the slower of them is to blame, unless both could bring far more than arrives.
    """
    wait, rate = metrics.get("data/wait_fraction", 0.0), metrics.get("perf/clips_per_s", 0.0)
    read, decode = metrics.get("data/read_seconds_per_clip"), metrics.get("data/decode_seconds_per_clip")
    if wait <= MOST_WAIT_FRACTION or read is None or decode is None or rate <= 0.0:
        return None
    free = cluster_cpus - train.max_workers * train.cpus_per_worker - data.read_tasks * READ_CPUS
    decode_tasks = max(1.0, free // data.decode_cpus)
    storage_rate, decode_rate = data.read_tasks / max(read, 1e-9), decode_tasks / max(decode, 1e-9)
    facts = f"workers wait for data {wait:.0%} of the time: storage could bring {storage_rate:.0f} clips/s"
    facts += f" ({data.read_tasks} read tasks), decoding {decode_rate:.0f} ({decode_tasks:.0f} tasks)"
    if min(storage_rate, decode_rate) > 2.0 * rate:
        return f"{facts}, {rate:.0f} arrive: the transfer holds them up; raise data.prefetch_blocks or data.buffer_mib"
    if storage_rate < decode_rate:
        return f"{facts}: storage is the bottleneck; raise data.read_tasks, or move the shards nearer"
    return f"{facts}: decoding is the bottleneck; add CPU nodes (label beats-ray/role=data), or lower train.num_workers"
