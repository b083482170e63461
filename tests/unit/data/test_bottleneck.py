"""The warning about waiting for data names what is slow."""

import pytest

from beats_ray.config import StreamSettings, TrainSettings
from beats_ray.data.bottleneck import name_bottleneck

pytestmark = pytest.mark.unit

DATA = StreamSettings(read_tasks=2, decode_cpus=1.0)
TRAIN = TrainSettings(num_workers=2, cpus_per_worker=1.0, global_batch_size=16, micro_batch_size=8)


def named(wait: float, read: float, decode: float, rate: float, cpus: float = 8.0) -> str | None:
    metrics = {
        "data/wait_fraction": wait,
        "data/read_seconds_per_clip": read,
        "data/decode_seconds_per_clip": decode,
        "perf/clips_per_s": rate,
    }
    return name_bottleneck(metrics, DATA, TRAIN, cpus)


@pytest.mark.parametrize(
    ("read", "decode", "rate", "expected"),
    [
        (0.05, 0.001, 39.0, "storage is the bottleneck; raise data.read_tasks"),
        (0.001, 0.1, 48.0, "decoding is the bottleneck; add CPU nodes"),
        (0.0001, 0.0001, 100.0, "100 arrive: the transfer holds them up"),
    ],
)
def test_the_slowest_part_is_named_with_its_rate(read: float, decode: float, rate: float, expected: str) -> None:
    line = named(0.2, read, decode, rate)
    assert line is not None
    assert expected in line
    assert "workers wait for data 20% of the time" in line
    assert f"storage could bring {2 / read:.0f} clips/s" in line
    assert f"decoding {5 / decode:.0f} (5 tasks)" in line


def test_hardly_waiting_is_no_warning() -> None:
    assert named(0.05, 1.0, 1.0, 2.0) is None
    assert named(0.2, 1.0, 1.0, 2.0) is not None
    assert name_bottleneck({"data/wait_fraction": 0.5, "perf/clips_per_s": 3.0}, DATA, TRAIN, 8.0) is None
