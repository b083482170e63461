"""What resume checkpoints cost: fifty steps of masked pre-training under the engine, with saves and without.

A save every ten steps is a hundred times as often as a run's default. The folder is local: the way to object storage
is in the background too, and left out.
"""

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from beats_ray.config import BenchConfig

STEPS = 50
STEPS_A_SAVE = 10

Step = Callable[[], float | None]
Saving = Literal["none", "beside", "blocking"]
_OPEN: list[object] = []


def _training(saving: Saving, config: BenchConfig) -> Step:
    import torch

    from beats_ray.config import EncoderSettings, PretrainSettings, TrainSettings
    from beats_ray.data.storage import open_place
    from beats_ray.models import RandomProjectionTokenizer
    from beats_ray.train.checkpoint import ResumeCheckpoints
    from beats_ray.train.context import single_process_context
    from beats_ray.train.engine import Engine
    from beats_ray.train.pretrain import PretrainTask

    context = single_process_context(lambda _step, _metrics: None, use_gpu=config.device == "cuda")
    train = TrainSettings(
        steps=STEPS, warmup_steps=0, global_batch_size=config.num_clips, micro_batch_size=config.num_clips,
        zero_stage=1, precision=config.precision, use_gpu=config.device == "cuda",
    )  # fmt: skip
    settings = PretrainSettings(encoder=EncoderSettings(preset=config.preset), train=train)
    task = PretrainTask(settings, 1024, RandomProjectionTokenizer())
    engine = Engine(task.module, train)
    prepared = task.prepare(_batch(config, context.device), torch.Generator(context.device).manual_seed(0), True)
    scratch = tempfile.TemporaryDirectory(prefix="beats-ray-bench-")
    _OPEN.append(scratch)  # ends with the process of this case
    checkpoints = ResumeCheckpoints(open_place(scratch.name), context, keep=2)
    numbers = itertools.count(1)

    def step() -> float | None:
        for number in itertools.islice(numbers, STEPS):
            loss_sum, _sums = engine(*prepared.inputs)
            engine.backward(loss_sum / prepared.num_targets)
            engine.step(0, last_micro_batch=True)
            if saving != "none" and number % STEPS_A_SAVE == 0:
                checkpoints.save(engine, number)
                if saving == "blocking":
                    checkpoints.wait()
        checkpoints.wait()
        return None

    return step


def _batch(config: BenchConfig, device: Any) -> Any:
    import numpy as np

    from beats_ray.data.batches import to_micro_batch

    clips, samples = config.num_clips, round(config.seconds * 16_000)
    audio = (np.random.default_rng(config.seed).normal(size=(clips, samples)) * 3000).astype(np.int16)
    columns = {
        "audio": audio,
        "num_samples": np.full(clips, samples),
        "targets": np.zeros((clips, 0), np.uint8),
        "position": np.arange(clips),
        "clip_id": np.array([f"clip-{index}" for index in range(clips)]),
    }
    return to_micro_batch(columns).to(device)


no_checkpoint = partial(_training, "none")
beside_training = partial(_training, "beside")
while_training_waits = partial(_training, "blocking")
