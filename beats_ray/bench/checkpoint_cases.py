"""What resume checkpoints cost: fifty steps of masked pre-training under the engine, with saves and without.

A save every ten steps is a hundred times as often as a run's default. The folder is local: the way to object storage
is in the background too, and left out.
"""

import itertools
import tempfile
from functools import partial
from typing import Literal

from beats_ray.bench.cases import Step, int16_batch, training_process
from beats_ray.config import BenchConfig

STEPS = 50
STEPS_A_SAVE = 10

Saving = Literal["none", "beside", "blocking"]
_OPEN: list[object] = []


def _training(saving: Saving, config: BenchConfig) -> Step:
    import torch

    from beats_ray.config import EncoderSettings, PretrainSettings, TrainSettings
    from beats_ray.data.storage import open_place
    from beats_ray.models import RandomProjectionTokenizer
    from beats_ray.train.checkpoint import ResumeCheckpoints
    from beats_ray.train.engine import Engine
    from beats_ray.train.pretrain import PretrainTask

    context = training_process(config)
    train = TrainSettings(
        steps=STEPS, warmup_steps=0, global_batch_size=config.num_clips, micro_batch_size=config.num_clips,
        zero_stage=1, precision=config.precision, use_gpu=config.device == "cuda",
    )  # fmt: skip
    settings = PretrainSettings(encoder=EncoderSettings(preset=config.preset), train=train)
    task = PretrainTask(settings, 1024, RandomProjectionTokenizer())
    engine = Engine(task.module, train)
    prepared = task.prepare(
        int16_batch(config).to(context.device), torch.Generator(context.device).manual_seed(0), True
    )
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


no_checkpoint = partial(_training, "none")
beside_training = partial(_training, "beside")
while_training_waits = partial(_training, "blocking")
