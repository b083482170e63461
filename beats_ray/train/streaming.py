"""How the stream of clips reaches the workers of Ray Train, however many there are at the moment.

Ray unpickles this in a process of its own, so it imports no torch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train

from beats_ray.config import StreamSettings, TrainSettings
from beats_ray.data.lanes import Dealing
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.parts import ClipPart
from beats_ray.data.storage import Place, open_place, with_retries
from beats_ray.data.stream import build_eval_stream, build_streams, required_cpus, share_cpus, training_streams
from beats_ray.train.committed import newest_sound_step
from beats_ray.train.jobs import STARTER_CPUS


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
    """The clips of `train`, which come from `training_streams`, and of `validation` and `test` where there are any."""
    side_by_side: int = 1
    """Runs that share the cluster's CPUs at one time."""


class TrainStream(ray.train.DataConfig):
    """Builds the stream at every (re)start of the workers: for as many as there are, from the newest checkpoint on."""

    def __init__(self, run: StreamedRun) -> None:
        super().__init__()
        self._run = run
        self._lanes: dict[str, Any] = {}

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any
    ) -> list[dict[str, Any]]:
        """One iterator for each worker, by rank; `datasets` only names them.

        Ray asks for one stream at a time. Of a lane's stream each worker gets an iterator, those too that read other
        lanes: Ray closes the streams of which the first worker has one.
        """
        del worker_handles, worker_node_ids
        shares = {name: self.shares(name, world_size) for name in datasets}
        return [{name: shares[name][rank % len(shares[name])] for name in shares} for rank in range(world_size)]

    def shares(self, name: str, world_size: int) -> list[Any]:
        """The iterators of one stream: for the workers of its lane of the training clips, or for all of held-out ones.

        The first of the training streams is asked for first: all of them are built then.
        """
        run, lanes = self._run, training_streams(self._run.data.streams)
        if name not in lanes:
            stream = build_eval_stream(
                open_place(run.data.path), run.manifest, run.data, run.train.micro_batch_size, num_workers=world_size,
                part=run.parts[name],
            )  # fmt: skip
            return list(stream.streaming_split(world_size, equal=True))
        train = run.train
        dealing = Dealing(train.global_batch_size, train.micro_batch_size, world_size, run.data.streams)
        if name == lanes[0]:
            self._lanes = dict(zip(lanes, self._training(dealing), strict=True))
        return list(self._lanes[name].streaming_split(dealing.lane_workers, equal=True))

    def _training(self, dealing: Dealing) -> list[Any]:
        """The streams of the training clips, by lane, from the newest checkpoint on."""
        run = self._run
        newest = with_retries(partial(newest_sound_step, run.checkpoints), run.train.storage_retry_seconds)
        streams = build_streams(
            open_place(run.data.path),
            run.manifest,
            run.data,
            dealing=dealing,
            seed=run.train.seed,
            start_step=min(newest, run.train.steps - 1),  # of a run that has only to publish none is read
            stop_step=run.train.steps,
            labels=open_place(run.labels) if run.labels else None,
            part=run.parts["train"],
        )
        has_held_out = len(run.parts) > 1  # their clips are decoded while these streams wait
        if has_held_out or len(streams) > 1 or run.side_by_side > 1:
            share_cpus(
                streams,
                run.data,
                run.side_by_side * (dealing.num_workers * run.train.cpus_per_worker + STARTER_CPUS),
                to_leave=required_cpus(run.data) if has_held_out else 0.0,
                runs=run.side_by_side,
            )
        return streams
