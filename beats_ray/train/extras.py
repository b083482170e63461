"""What `train.deepspeed` may hold beside the settings that the train section derives: pure rules, without DeepSpeed.

    check_keys(settings.deepspeed, derived)           # before a run
    config = merge_extras(derived, settings.deepspeed)
    identity_of_extras(settings.deepspeed)            # what of it makes a run another one

DeepSpeed 0.19 ignores top-level keys that it does not know, so that a slip of the pen there passes unseen; it knows the
keys of its sections itself (see `engine.py`).
"""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from beats_ray.config import ConfigError

OWN = "beats_ray does this itself"
REFUSED = {
    "optimizer": "AdamW is the run's own; use train.learning_rate, betas, epsilon and weight_decay",
    "scheduler": "the learning rate follows train.schedule and train.warmup_steps; use those",
    "bfloat16": "use train.precision=bf16",
    "amp": "use train.precision=bf16 or fp16",
    "torch_autocast": "use train.precision=bf16 or fp16",
    "activation_checkpointing": "use train.activation_checkpointing=true",
    "compile": "use train.compile=true",
    "prescale_gradients": f"{OWN}: gradients are those of the mean over the global batch; drop it",
    "gradient_predivide_factor": f"{OWN}: gradients are those of the mean over the global batch; drop it",
    "gradient_allreduce_op": f"{OWN}: gradients are those of the mean over the global batch; drop it",
    "checkpoint": f"{OWN}; drop it",
    "tensorboard": "use train.loggers",
    "wandb": "use train.loggers",
    "csv_monitor": "use train.loggers",
    "comet": "use train.loggers",
    "tensor_parallel": "workers are data parallel here; drop it",
    "sequence_parallel_size": "workers are data parallel here; drop it",
    "expert_parallel": "workers are data parallel here; drop it",
    "pipeline": "workers are data parallel here; drop it",
    "elasticity": "use train.num_workers=[fewest, most]",
}
"""Top-level keys that contradict what the train section does, and what to do instead."""

WATCHING = {
    "aio", "comms_logger", "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "log_level",
    "memory_breakdown", "timers",
}  # fmt: skip
"""Top-level keys that move and measure: a run may go on with other values of them."""

NUMERICS = {"communication_data_type", "data_types"}
"""Top-level keys that change what a step computes."""

MOVING = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "enable_sanity_checks",
    "ignore_unused_parameters", "log_trace_cache_warnings", "memory_efficient_linear", "offload_optimizer",
    "offload_param", "overlap_comm", "parameter_alignment", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "stage3_allgather_sequential", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
    "stage3_module_granularity_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
    "stage3_use_all_reduce_for_fetch_params", "sub_group_size", "use_multi_rank_bucket_allreduce",
    "zero_hpz_partition_size",
}  # fmt: skip
"""Keys of `zero_optimization` that say where values lie and how they travel, not what they are."""


def check_keys(extras: Mapping[str, Any], derived: Collection[str]) -> None:
    """ConfigError for the first top-level key that contradicts the train section or that DeepSpeed does not know.

    derived: the keys that the train section sets itself; below these there may be more.
    """
    known = sorted({*derived, *WATCHING, *NUMERICS})
    for key in extras:
        if key in REFUSED:
            raise ConfigError(f"train.deepspeed.{key}: {REFUSED[key]}")
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.6)
            raise ConfigError(
                f"train.deepspeed.{key}: unknown DeepSpeed key; "
                + (f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(known)}")
            )


def merge_extras(derived: Mapping[str, Any], extra: Mapping[str, Any], name: str = "train.deepspeed") -> dict[str, Any]:
    """Both, merged deep. ConfigError, with the field's name, where they have different values of one key."""
    merged = dict(derived)
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), dict):
            merged[key] = merge_extras(merged.get(key, {}), value, f"{name}.{key}")
        elif key in derived and derived[key] != value:
            raise ConfigError(
                f"{name}.{key}={value!r} contradicts {derived[key]!r}, which the train section derives; drop it"
            )
        else:
            merged[key] = value
    return merged


def identity_of_extras(extras: Mapping[str, Any]) -> dict[str, Any]:
    """What of the extra settings makes a run another run: all that is not known to move or measure only."""
    kept = {key: value for key, value in extras.items() if key not in WATCHING}
    zero = kept.get("zero_optimization")
    if isinstance(zero, Mapping):
        kept["zero_optimization"] = {key: value for key, value in zero.items() if key not in MOVING}
        if not kept["zero_optimization"]:
            del kept["zero_optimization"]
    return kept
