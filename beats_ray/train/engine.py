"""The DeepSpeed engine: the only module that imports DeepSpeed.

The engine owns the module, the optimizer and the precision; the loop owns order, schedule, weighting and checkpoints.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beats_ray.config import ConfigError, TrainSettings
from beats_ray.train.optimizer import build_optimizer, learning_rate

TAG = "state"  # one checkpoint a folder, so the tag never varies


def deepspeed_config(settings: TrainSettings) -> dict[str, Any]:
    """The DeepSpeed configuration that `settings` mean. ConfigError where `deepspeed.*` sets what is derived."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "train_batch_size": settings.global_batch_size,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.precision == "bf16"},
        "fp16": {"enabled": settings.precision == "fp16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return _merge(derived, settings.deepspeed, "train.deepspeed")


class Engine:
    """A module under DeepSpeed ZeRO, with the learning rate set by the step.

    `torch.distributed` must be initialised. The loss that `backward` gets must already be divided by the number of
    targets of the *global* batch (see `loop.py`); the engine undoes DeepSpeed's own averaging.
    """

    def __init__(self, module: nn.Module, settings: TrainSettings, depths: Mapping[str, int] | None = None) -> None:
        import deepspeed

        # Without this DeepSpeed compiles a shared-memory all-reduce for a minute when it first runs on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = settings.use_gpu
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._settings = settings
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, settings, depths),
            config=deepspeed_config(settings),
            dist_init_required=False,
        )

    @property
    def module(self) -> nn.Module:
        """The module itself, with this rank's share of the weights."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of this rank's part of the global mean loss."""
        # DeepSpeed averages over ranks and divides by the accumulation steps; `loss` is a share of a sum.
        self._engine.backward(loss * self._engine.world_size * self._settings.accumulation_steps)

    def step(self, step: int, last_micro_batch: bool) -> None:
        """Ends a micro-batch; after the last one of a step the optimizer moves, at step `step`'s learning rate."""
        if last_micro_batch:
            rate = learning_rate(step, self._settings)
            for group in self._optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
        self._engine.step()

    def grad_norm(self) -> float:
        """Global gradient norm before clipping of the last step; 0 before the first."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Writes this rank's shards; every rank must call it, each with its own folder or all with one."""
        self._engine.save_checkpoint(str(folder), tag=TAG, client_state=state, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores module, optimizer and precision state; returns what `save` was given as `state`."""
        path, state = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint there")
        return dict(state)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Every weight, whole, on the CPU; under ZeRO-3 the shards are gathered, so all ranks must call it."""
        if self._settings.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
                return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}


def _merge(derived: dict[str, Any], extra: Mapping[str, Any], name: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), dict):
            merged[key] = _merge(merged.get(key, {}), value, f"{name}.{key}")
        elif key in derived and derived[key] != value:
            raise ConfigError(
                f"{name}.{key}={value!r} contradicts {derived[key]!r}, which the train section derives; drop it"
            )
        else:
            merged[key] = value
    return merged
