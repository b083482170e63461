"""Small tokenizer trainings on soundscapes, in one process or several: the codebook learns, or collapses."""

import json
import os
import subprocess
import sys
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from beats_ray.config import DistillSettings, validate
from beats_ray.data.sample import make_clip
from beats_ray.data.storage import open_place
from beats_ray.models import BeatsEncoder, encoder_config
from beats_ray.train.context import WorkerContext
from beats_ray.train.distill import DistillTask
from beats_ray.train.loop import run_training
from tests.support.training import CLIPS, ROOT, SAMPLES, SyntheticBatches

SMALL: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}


class SoundscapeBatches(SyntheticBatches):
    """The same with clips that sound of something: noise alone has few kinds of patches."""

    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments)
        clips = [make_clip(index, 0, 1.0)[:SAMPLES] for index in range(CLIPS)]
        self._audio = np.stack([np.round(clip * 32_767).astype(np.int16) for clip in clips])


def distil(
    output: Path, ranks: tuple[int, int] = (0, 1), tokenizer: dict[str, Any] | None = None, **train: Any
) -> list[dict[str, Any]]:
    """Distils a small untrained encoder and returns the run's reports, oldest first."""
    fields = {"steps": 80, "warmup_steps": 10, "learning_rate": 5e-4, "epsilon": 1e-8, "zero_stage": 1}
    fields |= {"global_batch_size": 16, "micro_batch_size": 16 // ranks[1], "log_every_steps": 10}
    sections = {
        "encoder": {"preset": "tiny", "overrides": SMALL},
        "tokenizer": {"num_codes": 256, "code_dim": 32} | (tokenizer or {}),
        "train": fields | train,
    }
    settings = validate(DistillSettings, sections)
    torch.manual_seed(settings.train.seed)
    task = DistillTask(settings, BeatsEncoder(encoder_config("tiny", **SMALL)))
    batches = SoundscapeBatches(settings.train.micro_batch_size, settings.train.global_batch_size, *ranks)
    context = WorkerContext(*ranks, torch.device("cpu"), lambda _step, _metrics: None)
    run_training(task, batches, settings.train, context, open_place(str(output)))
    if ranks[0]:
        return []
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def distil_in_group(output: Path, world_size: int, **train: Any) -> list[dict[str, Any]]:
    """The same in so many processes of a new group."""
    store = output.parent / f"store-{uuid.uuid4().hex}"
    command = [sys.executable, "-m", "tests.support.distilling", str(store), str(output), json.dumps(train)]
    processes = [
        subprocess.Popen([*command, str(rank), str(world_size)], cwd=ROOT, env=os.environ | {"LOCAL_RANK": "0"})
        for rank in range(world_size)
    ]
    try:
        statuses = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0] * world_size, statuses
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    store, output, train, rank, world_size = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, int(world_size)), rank=int(rank), world_size=int(world_size),
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    distil(Path(output), (int(rank), int(world_size)), **json.loads(train))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort a process that ends while another one still leaves the group
