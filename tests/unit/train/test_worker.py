"""What a training process is given: batches of decoded clips, on its own device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from beats_ray.config import FinetuneConfig, validate
from beats_ray.data.batches import MicroBatch, to_micro_batch
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.storage import open_place
from beats_ray.train.context import WorkerContext
from beats_ray.train.jobs import Run
from beats_ray.train.worker import CachedBatches

pytestmark = pytest.mark.unit


THREE_FOLDS = DatasetManifest(
    name="x", label_names=("a", "b"), clips=3, clips_by_fold={"1": 1, "2": 1, "3": 1}, clips_by_split={"": 3},
    seconds=1, fbank_mean=0, fbank_std=1, source="x", source_files=3, quarantined=0,
    shards=(
        Shard(
            file="0.parquet", sha256="0", bytes=1,
            row_groups=tuple(RowGroup(clips=1, fold=fold, split="") for fold in (1, 2, 3)),
        ),
    ),
)  # fmt: skip


class OneBatch:
    """A cache of one clip, as it lies in host memory."""

    def batches(self, **_: object) -> Iterator[MicroBatch]:
        columns: dict[str, Any] = {"audio": np.ones((1, 160), np.int16), "num_samples": [160], "targets": [[1, 0]]}
        columns |= {"patch_labels": [[3]], "position": [0], "clip_id": ["a"]}
        yield to_micro_batch({name: np.asarray(values) for name, values in columns.items()})

    eval_batches = batches


def test_cached_clips_come_on_the_device_of_their_worker() -> None:
    config = validate(FinetuneConfig, {"output": "runs/x", "train": {"global_batch_size": 1, "micro_batch_size": 1}})
    run = Run("finetune", config, THREE_FOLDS, open_place("runs/x"), {}, OneBatch())
    device = torch.device("meta")  # any that is not where the cache lies
    source = CachedBatches(run, WorkerContext(0, 1, device, lambda _step, _metrics: None))
    parts = [source.training(0), source.held_out("validation"), source.held_out("test")]
    for part in parts:
        assert part is not None
        (batch,) = part
        tensors = (batch.audio_BS, batch.num_samples_B, batch.targets_BC, batch.patch_labels_BN)
        assert [tensor.device for tensor in tensors if tensor is not None] == [device] * 4
        assert batch.positions_B.device.type == "cpu"
