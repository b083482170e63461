"""The DeepSpeed engine: the only module that imports DeepSpeed.

The engine owns the module, the optimizer and the precision; the loop owns order, schedule, weighting and checkpoints.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from beats_ray.config import ConfigError, TrainSettings
from beats_ray.models.attention import GatedSelfAttention
from beats_ray.models.transformer import stacks_of
from beats_ray.train.extras import check_keys, merge_extras
from beats_ray.train.optimizer import build_optimizer, learning_rate

MASTER = "fp32"  # of a trained parameter
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
AVERAGE = "ema"  # of the masters, moving or over the last points; in AdamW's state, where ZeRO finds and divides it
STEP, UNFROZEN_STEP = "optimizer/step", "optimizer/unfrozen_step"
"""AdamW's step, and that of the parameter groups that were frozen at first: the steps in which they moved."""


def deepspeed_config(settings: TrainSettings, num_workers: int) -> dict[str, Any]:
    """The DeepSpeed configuration of so many workers.

    ConfigError where `deepspeed.*` sets what is derived, or what DeepSpeed does not know or take.
    """
    to_host = {"device": "cpu", "pin_memory": settings.use_gpu}
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = to_host
    if settings.offload_parameters:
        zero["offload_param"] = to_host
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps(num_workers),
        "train_batch_size": settings.global_batch_size,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW when offloaded too: theirs compiles for minutes
        "bf16": {"enabled": settings.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": settings.precision == "fp16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    check_keys(settings.deepspeed, derived)
    merged = merge_extras(derived, settings.deepspeed)
    if settings.deepspeed:
        _check_sections(merged)
    return merged


def _check_sections(config: Mapping[str, Any]) -> None:
    """ConfigError for what DeepSpeed's own models of these sections refuse, which in the run would be a traceback."""
    logging.disable(logging.WARNING)  # what its import has to say of this machine is not about the config
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    finally:
        logging.disable(logging.NOTSET)
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, model in models.items():
        try:
            model(**config[name])  # which takes "auto" for "not set"
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(("train.deepspeed", name, *map(str, first["loc"])))
            raise ConfigError(
                f"{field}={first['input']!r}: {first['msg']}; give a value that DeepSpeed takes"
            ) from None


def check_attention(module: nn.Module, settings: TrainSettings) -> None:
    """ConfigError where a stack of the module drops attention weights and the kernel can not."""
    dropouts = [one.dropout for one in module.modules() if isinstance(one, GatedSelfAttention) and one.dropout]
    if settings.attention == "flex" and dropouts:
        raise ConfigError(
            f"train.attention=flex cannot drop attention weights, and the encoder has attention_dropout={dropouts[0]}; "
            "use train.attention=auto, or, for an encoder that is built anew, encoder.overrides.attention_dropout=0"
        )


class Engine:
    """A module under DeepSpeed ZeRO, with the learning rate set by the step.

    `torch.distributed` must be initialised. The loss that `backward` gets must already be divided by the number of
    targets of the *global* batch (see `loop.py`); the engine undoes DeepSpeed's own averaging.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: TrainSettings,
        depths: Mapping[str, int] | None = None,
        frozen_steps: Mapping[str, int] | None = None,
    ) -> None:
        import deepspeed

        # Without this DeepSpeed compiles a shared-memory all-reduce for a minute when it first runs on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = settings.use_gpu
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._settings = settings
        self._accumulation_steps = settings.accumulation_steps(dist.get_world_size())
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, settings, depths, frozen_steps),
            config=deepspeed_config(settings, dist.get_world_size()),
            dist_init_required=False,
        )
        self._norm = 0.0  # without ZeRO, where DeepSpeed computes none
        if settings.precision == "fp16":  # DeepSpeed ends the run there; the loop does, and names the clips
            self._optimizer.loss_scaler.raise_error_at_min_scale = False
        self._state_keys = (*MOMENTS, AVERAGE) if settings.averages_weights else MOMENTS
        self._steps_done = 0
        if settings.averages_weights or frozen_steps:
            self._begin_state(step=0)
        if settings.averages_weights:
            for _, flat in self._flat_parameters():
                self._adamw.state[flat][AVERAGE].copy_(flat.detach())
        check_attention(module, settings)
        if settings.attention != "auto":
            for stack in stacks_of(module):
                stack.use(attention_backend=settings.attention)
        if settings.compile:  # in place: names stay
            self._engine.compile(compile_kwargs={"dynamic": False})

    @property
    def module(self) -> nn.Module:
        """The module itself, with this rank's share of the weights."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def forward_is_collective(self) -> bool:
        """Whether all workers must run a forward pass together: ZeRO 3 gathers the weights in it."""
        return self._settings.zero_stage == 3

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of this rank's part of the global mean loss.

        Of a loss that is no finite number it is none either, so that `step` finds it, on every rank: the derivative of
        such a loss may well be finite.
        """
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        # DeepSpeed averages over ranks and divides by the accumulation steps; `loss` is a share of a sum.
        self._engine.backward(loss * self._engine.world_size * self._accumulation_steps)

    def step(self, step: int, last_micro_batch: bool) -> bool:
        """Ends a micro-batch; after the last one of a step the optimizer moves, at step `step`'s learning rate.

        Returns False, alike on all ranks, where it did not move because a gradient was no finite number.
        """
        if last_micro_batch:
            rate = learning_rate(step, self._settings)
            for group in self._optimizer.param_groups:
                group["lr"] = 0.0 if self._is_frozen(group, step) else rate * group.get("lr_scale", 1.0)
            self._steps_done = step + 1
        if last_micro_batch and not self._settings.zero_stage and not self._gradients_are_finite():
            self._engine.zero_grad()
            self._engine.micro_steps += 1  # all else that `step` does is to move the weights
            moved = False
        else:
            self._engine.step()
            if not last_micro_batch:
                return True
            moved = not getattr(self._optimizer, "overflow", False)
        self._hold_frozen(step)
        self._move_average(moved)
        return moved

    @staticmethod
    def _is_frozen(group: Mapping[str, Any], step: int) -> bool:
        return step < int(group.get("frozen_steps", 0))

    def _hold_frozen(self, step: int) -> None:
        """AdamW counts no step of what did not move, or its bias corrections would be wrong when it does.

        Without a gradient and at rate 0 weights and moments stay as they are by themselves.
        """
        for group, flat in self._flat_parameters():
            if self._is_frozen(group, step):
                self._adamw.state[flat]["step"].zero_()

    def _move_average(self, moved: bool) -> None:
        """Every worker moves its own part of the average: no communication."""
        point = self._settings.average_point(self._steps_done)
        if point:
            move = get_swa_multi_avg_fn()
        elif self._settings.ema_decay and moved:
            move = get_ema_multi_avg_fn(self._settings.ema_decay)
        else:
            return
        weights = [flat for _, flat in self._flat_parameters()]
        move([self._adamw.state[flat][AVERAGE] for flat in weights], weights, point - 1)

    @property
    def _has_average(self) -> bool:
        """Whether there is an average to be used: a moving one always, that of the last points from the first one."""
        return bool(self._settings.ema_decay) or self._settings.first_average_step <= self._steps_done

    def _gradients_are_finite(self) -> bool:
        """Of a run without ZeRO, where all ranks hold the same gradients; ZeRO looks by itself."""
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        self._norm = float(torch.nn.utils.get_total_norm(gradients))
        return math.isfinite(self._norm)

    def grad_norm(self) -> float:
        """Global gradient norm before clipping of the last step; 0 before the first."""
        if not self._settings.zero_stage:
            return self._norm
        return float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def loss_scale_can_fall(self) -> bool:
        """Whether a lower loss scale may mend a gradient that is not finite: in fp16, down to the least scale."""
        return self._settings.precision == "fp16" and can_fall(self._optimizer.loss_scaler)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module is in evaluation mode, averaged and not compiled while the block runs; all ranks must enter it."""
        eager = torch.compiler.set_stance("force_eager") if self._settings.compile else nullcontext()
        self._engine.eval()
        with torch.no_grad(), self.averaged(), eager:  # held-out batches have other shapes
            yield
        self._engine.train()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights are their average while the block runs, if there is one; all ranks must enter it."""
        if not self._has_average:
            yield
            return
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        held = [_to_cpu(self._whole(parameter, "")) for parameter in trained]
        try:
            for parameter in trained:
                self._set_weight(parameter, self._whole(parameter, AVERAGE))
            yield
        finally:
            for parameter, value in zip(trained, held, strict=True):
                self._set_weight(parameter, value)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """This rank's part of the training state, copied to the CPU; every rank must call it.

        All parts together name each trained parameter's fp32 value and moments, whole (`NAME/fp32`, `NAME/exp_avg`,
        `NAME/exp_avg_sq`), its average where there is one (`NAME/ema`), every other parameter and buffer (`NAME`) and
        the optimizer's step: the same state whatever the ZeRO stage, the precision and the number of workers.
        """
        self._link_moments()
        rank, world_size = self._engine.global_rank, self._engine.world_size
        parts: dict[str, torch.Tensor] = {}
        held = [0] * world_size  # bytes by rank, so that each writes about as much
        for name, parameter in self.module.named_parameters():
            owner = held.index(min(held))
            for key in (MASTER, *self._state_keys) if parameter.requires_grad else ("",):
                value = self._whole(parameter, key)
                held[owner] += value.numel() * value.element_size()
                if rank == owner:
                    parts[f"{name}/{key}" if key else name] = _to_cpu(value)
        if rank == 0:
            parts |= {name: _to_cpu(buffer) for name, buffer in self.module.named_buffers()}
            parts[STEP] = torch.tensor(self._optimizer_step(), dtype=torch.float32)
            if any(group.get("frozen_steps") for group in self._adamw.param_groups):
                parts[UNFROZEN_STEP] = torch.tensor(self._optimizer_step(unfrozen=True), dtype=torch.float32)
            parts |= {f"loss_scale/{name}": torch.tensor(value) for name, value in self._loss_scale().items()}
        return parts

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over the union of every rank's `snapshot`, of a run of any ZeRO stage and number of workers.

        RuntimeError where the state is that of another module.
        """
        named = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        expected = set(buffers) | {name for name, value in named.items() if not value.requires_grad}
        for name, value in named.items():
            if value.requires_grad:
                expected |= {f"{name}/{key}" for key in (MASTER, *self._state_keys)}
        found = {name for name in state if not name.startswith(("optimizer/", "loss_scale/"))}
        if found != expected:
            differing = min(expected ^ found)
            raise RuntimeError(f"the checkpoint is of another model: {differing!r} is only in one of the two")
        step = float(state[STEP])
        self._begin_state(step, float(state.get(UNFROZEN_STEP, step)))
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(state[name])
            for name, parameter in named.items():
                if not parameter.requires_grad:
                    self._set_weight(parameter, state[name])
                    continue
                self._set_weight(parameter, state[f"{name}/{MASTER}"])
                for key in (MASTER, *self._state_keys):
                    self._set_whole(parameter, key, state[f"{name}/{key}"])
        for name in self._loss_scale():
            setattr(self._optimizer.loss_scaler, name, state[f"loss_scale/{name}"].item())

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Every weight to be published, whole, on the CPU, trained ones in fp32; all ranks must call it.

        Of a trained one that is its average where there is one. A parameter that several names share (the relative
        bias of all layers) has the same value under each.
        """
        key = AVERAGE if self._has_average else MASTER
        whole: dict[nn.Parameter, torch.Tensor] = {}
        for parameter in self.module.parameters():
            whole[parameter] = _to_cpu(self._whole(parameter, key if parameter.requires_grad else ""))
        named = {name: whole[one] for name, one in self.module.named_parameters(remove_duplicate=False)}
        rest = {name: value for name, value in self.module.state_dict().items() if name not in named}
        return named | {name: _to_cpu(value) for name, value in rest.items()}

    # --- one parameter, whole, under any ZeRO stage -------------------------------------------------------------------

    def _whole(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """A parameter's weight, or with a key its fp32 value or moment, gathered from all ranks."""
        import deepspeed.utils as zero

        if not key:
            with self._gathered(parameter):
                return parameter.detach().clone()
        if key in MOMENTS and not self._adamw.state:  # before its first step
            return torch.zeros(self._shape(parameter))
        value: torch.Tensor
        if self._settings.zero_stage == 0:
            value = parameter if key == MASTER else self._adamw.state[parameter][key]
        elif key == MASTER:
            value = zero.safe_get_full_fp32_param(parameter)
        else:
            value = zero.safe_get_full_optimizer_state(parameter, key)
        return value.view(self._shape(parameter))

    def _set_whole(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        import deepspeed.utils as zero

        value = value.to(self.device)
        if self._settings.zero_stage == 0:
            if key != MASTER:
                self._adamw.state[parameter][key].copy_(value)
        elif self._settings.zero_stage < 3:
            if key == MASTER:
                zero.safe_set_full_fp32_param(parameter, value)
            else:
                zero.safe_set_full_optimizer_state(parameter, value, key)
        else:
            size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]  # the last rank's part is padded
            flat = torch.zeros(size * self._engine.world_size, device=value.device)
            flat[: value.numel()] = value.flatten()
            part = flat[size * self._engine.global_rank :][:size]
            if key == MASTER:
                zero.safe_set_local_fp32_param(parameter, part)
            else:
                zero.safe_set_local_optimizer_state(parameter, part, key)

    def _set_weight(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """What the forward pass reads, which is in the precision of the run."""
        with torch.no_grad(), self._gathered(parameter, modifier_rank=0):
            parameter.copy_(value)

    def _gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=modifier_rank, enabled=self._settings.zero_stage == 3
        )

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape

    # --- AdamW's state, which comes into being at its first step ------------------------------------------------------

    @property
    def _adamw(self) -> torch.optim.AdamW:
        inner: torch.optim.AdamW = getattr(self._optimizer, "optimizer", self._optimizer)
        return inner

    def _flat_parameters(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """What AdamW holds state for, each with its group: parameters, or under ZeRO this rank's flat parts of them."""
        groups = self._adamw.param_groups
        if self._settings.zero_stage == 3:
            for index, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
                yield groups[self._optimizer.sub_group_to_group_id[index]], flat
        elif self._settings.zero_stage:
            yield from zip(groups, self._optimizer.single_partition_of_fp32_groups, strict=True)
        else:
            for group in groups:
                yield from ((group, parameter) for parameter in group["params"])

    def _optimizer_step(self, unfrozen: bool = False) -> float:
        """Steps that AdamW has made; with `unfrozen` those of the groups that were frozen at first."""
        state = self._adamw.state
        steps = [
            float(state[flat]["step"])
            for group, flat in self._flat_parameters()
            if flat in state and (not unfrozen or group.get("frozen_steps"))
        ]
        return max(steps, default=0.0)

    def _begin_state(self, step: float, unfrozen_step: float | None = None) -> None:
        for group, flat in self._flat_parameters():
            state = self._adamw.state[flat]
            one = step if unfrozen_step is None or not group.get("frozen_steps") else unfrozen_step
            state["step"] = torch.tensor(one, dtype=torch.float32, device=flat.device)
            for key in self._state_keys:
                state[key] = torch.zeros_like(flat)
        self._link_moments()

    def _link_moments(self) -> None:
        """Tells ZeRO 1 and 2 which part of AdamW's state is of which parameter.

        DeepSpeed does so by itself, but after the first parameter group has moved, when the others have no state yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._settings.zero_stage in (1, 2) and self._adamw.state:
            zero = self._optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self._adamw.state)

    def _loss_scale(self) -> dict[str, float]:
        """The state of fp16's dynamic loss scale; empty in other precisions."""
        if self._settings.precision != "fp16":
            return {}
        scaler = self._optimizer.loss_scaler
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}


def can_fall(scaler: Any) -> bool:
    """Whether DeepSpeed's loss scaler would answer an overflow with a lower scale, now or when its patience ends."""
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)


def _to_cpu(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True).contiguous()
