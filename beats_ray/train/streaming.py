"""How the stream of clips reaches the workers of Ray Train, however many there are at the moment.

Ray unpickles this in a process of its own, so it imports no torch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train

from beats_ray.config import StreamSettings, TrainSettings
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.storage import Place, open_place, with_retries
from beats_ray.data.stream import build_stream
from beats_ray.train.committed import newest_sound_step


@dataclass(frozen=True)
class StreamedRun:
    """What the stream of a run depends on, beside the number of workers."""

    data: StreamSettings
    train: TrainSettings
    manifest: DatasetManifest
    labels: str
    """Where patch labels are; empty where the run needs none."""
    checkpoints: Place


class TrainStream(ray.train.DataConfig):
    """Builds the stream at every (re)start of the workers: for as many as there are, from the newest checkpoint on."""

    def __init__(self, run: StreamedRun) -> None:
        super().__init__()
        self._run = run

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any
    ) -> list[dict[str, Any]]:
        """One iterator for each worker, by rank; `datasets` only names them."""
        del worker_handles, worker_node_ids
        run = self._run
        newest = with_retries(partial(newest_sound_step, run.checkpoints), run.train.storage_retry_seconds)
        stream = build_stream(
            open_place(run.data.path),
            run.manifest,
            run.data,
            seed=run.train.seed,
            global_batch_size=run.train.global_batch_size,
            micro_batch_size=run.train.micro_batch_size,
            start_step=min(newest, run.train.steps - 1),  # a run that has only to publish its model reads none of it
            stop_step=run.train.steps,
            num_workers=world_size,
            labels=open_place(run.labels) if run.labels else None,
        )
        (name,) = datasets
        return [{name: share} for share in stream.streaming_split(world_size, equal=True)]
