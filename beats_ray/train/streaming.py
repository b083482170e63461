"""How the stream of clips reaches the workers of Ray Train, however many there are at the moment.

Ray unpickles this in a process of its own, so it imports no torch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train

from beats_ray.config import StreamSettings, TrainSettings
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.parts import ClipPart
from beats_ray.data.storage import Place, open_place, with_retries
from beats_ray.data.stream import build_eval_stream, build_stream, leave_cpus, required_cpus
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
    parts: dict[str, ClipPart]
    """By the name of its stream: the clips of `train`, and of `validation` and `test` where the run has them."""


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
        shares = {name: self.shares(name, world_size) for name in datasets}
        return [{name: shares[name][rank] for name in shares} for rank in range(world_size)]

    def shares(self, name: str, world_size: int) -> list[Any]:
        """One iterator for each worker over the stream of this name: the order of training, or each held-out clip."""
        run, part = self._run, self._run.parts[name]
        dataset, micro_batch_size = open_place(run.data.path), run.train.micro_batch_size
        if name == "train":
            newest = with_retries(partial(newest_sound_step, run.checkpoints), run.train.storage_retry_seconds)
            stream = build_stream(
                dataset,
                run.manifest,
                run.data,
                seed=run.train.seed,
                global_batch_size=run.train.global_batch_size,
                micro_batch_size=micro_batch_size,
                start_step=min(newest, run.train.steps - 1),  # of a run that has only to publish none is read
                stop_step=run.train.steps,
                num_workers=world_size,
                labels=open_place(run.labels) if run.labels else None,
                part=part,
            )
            if len(run.parts) > 1:  # held-out clips are decoded while this stream waits
                workers_cpus = world_size * run.train.cpus_per_worker
                leave_cpus(stream, run.data, workers_cpus, to_leave=required_cpus(run.data))
        else:
            stream = build_eval_stream(
                dataset, run.manifest, run.data, micro_batch_size, num_workers=world_size, part=part
            )
        return list(stream.streaming_split(world_size, equal=True))
