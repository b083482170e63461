"""What the loop knows about the process it runs in: rank, device, and how to report."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from beats_ray.train.leftovers import Holder, current_holder

Report = Callable[[int, dict[str, float]], None]
Notice = Callable[[], bool]


@dataclass(frozen=True)
class WorkerContext:
    """One training process among `world_size`.

    `report(step, metrics)` hands metrics of a logging or validation step to whoever started the run (Ray Train, a Tune
    trial, a test); it may raise to end the run.
    """

    rank: int
    world_size: int
    device: torch.device
    report: Report
    notice: Notice = lambda: False
    """Whether this process or another is about to be taken away; every worker must ask equally often."""
    gpu_share: float = 1.0
    """Of its GPU, where others have the rest."""
    holder: Holder = field(default_factory=dict)
    """What this process is to Ray, where it is a worker of Ray Train."""

    def all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank, on every worker. Also a barrier."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def ray_train_context() -> WorkerContext:
    """The context of a Ray Train worker."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    return WorkerContext(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        report=lambda step, metrics: ray.train.report({"step": step, **metrics}),
        notice=lambda: ray.train.get_preemption_info() is not None,
        holder=current_holder(),
    )


def single_process_context(report: Report, use_gpu: bool = False, gpu_share: float = 1.0) -> WorkerContext:
    """The context of a run that has this process to itself: a Tune trial, a test."""
    if not dist.is_initialized():  # DeepSpeed asks for a process group, even of one
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return WorkerContext(0, 1, torch.device("cuda" if use_gpu else "cpu"), report, gpu_share=gpu_share)
