"""What beats_ray exports to Prometheus beside the reports of training runs, which `train/loggers.py` exports.

    DECODED_CLIPS.add(64)
    SWEEP_TRIALS.set(3, run="runs/first/sweep", state="running")

Ray serves the metrics of all processes of a node on that node's metrics port, with `ray_` before the name and, of a
counter, `_total` behind it: `data/decoded_clips` is scraped as `ray_beats_ray_data_decoded_clips_total`. In a process
that has no part in a Ray cluster nothing happens and nothing is imported: the tasks of the data plane start fast.
"""

import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

RUN_NAME_PARTS = 3
"""Last parts of a run's place that name it: a stage's name alone is the same in every run of `iterate`."""


@dataclass(frozen=True)
class ExportedMetric:
    """One metric that this package's own code exports, with the labels that each of its series has."""

    name: str
    """As the docs write it: `sweep/trials`."""
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    meaning: str
    """With its unit; what Prometheus shows as help."""

    @property
    def scraped_name(self) -> str:
        """What a query asks for."""
        return f"ray_{prometheus_name(self.name)}" + ("_total" if self.kind == "counter" else "")

    def add(self, amount: float, **labels: str) -> None:
        """Counts up; an amount of zero is none."""
        assert self.kind == "counter", self.name
        metric = self._opened()
        if metric is not None and amount > 0:
            metric.inc(float(amount), tags=labels)

    def set(self, value: float, **labels: str) -> None:
        """Replaces the newest value, which stays until the process ends."""
        assert self.kind == "gauge", self.name
        metric = self._opened()
        if metric is not None:
            metric.set(float(value), tags=labels)

    def _opened(self) -> Any:
        """Ray's object behind this metric, made once for each time that this process joins a cluster; None outside."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return None
        return _open(self, ray.get_runtime_context().get_worker_id())


@lru_cache(maxsize=256)
def _open(metric: ExportedMetric, _worker_id: str) -> Any:
    from ray.util import metrics

    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(prometheus_name(metric.name), metric.meaning, tag_keys=metric.labels)


def prometheus_name(name: str) -> str:
    """`train/loss` -> `beats_ray_train_loss`, to which Ray adds `ray_`; what Prometheus does not allow becomes `_`."""
    return "beats_ray_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)


def run_name(uri: str) -> str:
    """The label `run` of what writes to this place: `first/iteration-1/pretrain` for s3://b/first/iteration-1/pretrain.

    The trials of a sweep are named below it: `runs/first/sweep/trials/ID`.
    """
    parts = uri.rpartition("://")[2].strip("/").split("/")
    last = max((index for index, part in enumerate(parts) if part == "trials"), default=len(parts))
    return "/".join(parts[max(0, last - RUN_NAME_PARTS) :])


RUN_UNDER_WAY = ExportedMetric(
    "run/under_way", "gauge", ("run",), "1 from when a run on Ray Train asks for its workers until it has ended, then 0"
)
RUN_ACTIVE = ExportedMetric("run/active", "gauge", ("run",), "1 while a run trains, 0 once it has ended, well or not")
DECODED_CLIPS = ExportedMetric("data/decoded_clips", "counter", (), "clips decoded by data tasks, for whatever job")
DECODED_SECONDS = ExportedMetric("data/decoded_audio_seconds", "counter", (), "seconds of audio in those clips")
SOURCE_FILES = ExportedMetric("prepare/source_files", "gauge", ("dataset",), "files of the source of `prepare`")
DONE_FILES = ExportedMetric("prepare/done_files", "gauge", ("dataset",), "of these, files done, the bad ones included")
QUARANTINED_FILES = ExportedMetric("prepare/quarantined_files", "gauge", ("dataset",), "of these, files put aside")
SWEEP_TRIALS = ExportedMetric("sweep/trials", "gauge", ("run", "state"), "trials of a sweep by state")
SWEEP_BEST = ExportedMetric("sweep/best", "gauge", ("run", "metric"), "best value of the sweep's metric up to now")

EXPORTED = (
    RUN_UNDER_WAY, RUN_ACTIVE, DECODED_CLIPS, DECODED_SECONDS, SOURCE_FILES, DONE_FILES, QUARANTINED_FILES,
    SWEEP_TRIALS, SWEEP_BEST,
)  # fmt: skip
"""All of them: `docs/metrics.md` explains each, and the queries in `cluster/grafana` may ask for these."""
