"""What makes a result: the settings, without where and how they are run, and the content of what it was made from.

    identity = stage_identity(config, content_keys(config))
    key = fingerprint(identity)

Two runs with one identity have one result, so a folder that moved, a larger cluster or another logger are no
difference, and a teacher that was replaced under its old path is one.
"""

from collections.abc import Mapping
from typing import Any

from beats_ray.config import (
    EvaluateConfig,
    InferenceSettings,
    Job,
    PretrainConfig,
    TokenizeConfig,
    UserError,
    fingerprint,
)
from beats_ray.data.manifest import DatasetManifest, read_manifest, shards_fingerprint
from beats_ray.data.storage import open_place
from beats_ray.inference import model_sha256
from beats_ray.train.extras import identity_of_extras

EXECUTION_FIELDS = {
    "global_batch_seconds", "num_workers", "cpus_per_worker", "use_gpu", "micro_batch_size", "zero_stage",
    "activation_checkpointing", "offload_optimizer", "offload_parameters", "compile", "attention",
    "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "storage_retry_seconds", "max_failures",
    "max_bad_steps", "collective_timeout_seconds", "loggers",
}  # fmt: skip
"""Settings of `train` that a run may go on with other values of: its steps do the same to the same global batches.

`global_batch_seconds` is among them because the `global_batch_size` that it comes to is not. Of `deepspeed` see
`identity_of_extras`."""

DATA_EXECUTION_FIELDS = {
    "buffer_mib", "cache", "decode_cpus", "placement", "prefetch_blocks", "read_tasks", "retry_seconds",
}  # fmt: skip
"""The same for `data`: how clips come, not which."""

SWEEP_EXECUTION_FIELDS = {
    "max_concurrent_trials", "max_minutes", "max_cost", "price_per_gpu_hour", "price_per_cpu_hour", "gpus_per_worker",
}  # fmt: skip
"""The same for `sweep`: what it may cost and how many trials run at a time; each trial is the same."""

_DATA_FIELDS: dict[type[Job], set[str]] = {TokenizeConfig: set(), EvaluateConfig: {"folds", "splits"}}
"""Settings of `data` that matter to a job which reads whole clips; to the others all do."""

_ELSEWHERE = {"ray", "output", "inference", *InferenceSettings.model_fields}
_DERIVED = {"supervised_learning_rate"}
"""`resolve_learning_rate` has put it into `train.learning_rate` where it counts."""


def run_identity(config: Job) -> dict[str, Any]:
    """What makes a run the same run, of its settings alone: no paths, nothing of the cluster, nobody who is told."""
    unused = {"random_projection"} if isinstance(config, PretrainConfig) and config.tokenizer else set()
    values = config.model_dump(mode="json", exclude={*_ELSEWHERE, *config.reads, *_DERIVED, *unused})
    kept = _without_execution(values)
    if type(config) in _DATA_FIELDS and "data" in kept:
        kept["data"] = {name: kept["data"][name] for name in sorted(_DATA_FIELDS[type(config)])}
    if kept.get("data", {}).get("streams") == 1:  # as in all runs before there could be several
        del kept["data"]["streams"]
    return kept


def stage_identity(config: Job, keys: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a run with the keys of its inputs, by the names of the fields that give them."""
    return run_identity(config) | {"inputs": dict(keys)}


def content_keys(config: Any) -> dict[str, str]:
    """The key of everything that a job reads: its data set, and each model or labels that its config names.

    Reads the models' files whole. UserError where something is missing.
    """
    keys = {"data": data_key(config.data.path, config.reads_labels)}
    for name in config.reads:
        path = getattr(config, name)
        if isinstance(path, dict):  # several, by names
            keys |= {f"{name}.{key}": model_key(one) for key, one in path.items()}
        elif path:
            keys[name] = labels_key(path) if name == "labels" else model_key(path)
    return keys


def data_key(path: str, reads_labels: bool = False) -> str:
    """Changes with any clip of a prepared data set.

    reads_labels: also with the names of its labels, their order, and whether a clip may have several; see
    `Job.reads_labels`. The shards hold numbers only.
    """
    return manifest_key(read_manifest(open_place(path)), reads_labels)


def manifest_key(manifest: DatasetManifest, reads_labels: bool = False) -> str:
    """The same of a data set whose manifest has been read."""
    key = f"shards {shards_fingerprint(manifest)[:16]}"
    if not reads_labels:
        return key
    labels = {"label_names": list(manifest.label_names), "multi_label": manifest.multi_label}
    return f"{key} labels {fingerprint(labels)}"


def model_key(path: str) -> str:
    """Changes with any byte of a published model or released file."""
    return f"sha256 {model_sha256(open_place(path))[:16]}"


def labels_key(path: str) -> str:
    """Changes with the data set or the tokenizer that labels were made for and by: they follow from these two."""
    try:
        written = (open_place(path) / "labels.json").read_json()
    except FileNotFoundError:
        raise UserError(f"labels={path}: no labels here (no labels.json); run `beats-ray tokenize` first") from None
    return f"labels {fingerprint({name: written.get(name) for name in ('fingerprint', 'tokenizer_sha256')})}"


def _without_execution(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_execution(value) if isinstance(value, dict) else value for name, value in values.items()}
    for section, fields in (
        ("train", EXECUTION_FIELDS),
        ("data", DATA_EXECUTION_FIELDS | {"path"}),
        ("sweep", SWEEP_EXECUTION_FIELDS),
        ("cross_validation", {"max_concurrent_runs"}),
    ):
        if isinstance(kept.get(section), dict):
            kept[section] = {name: value for name, value in kept[section].items() if name not in fields}
            if "deepspeed" in kept[section]:
                kept[section]["deepspeed"] = identity_of_extras(kept[section]["deepspeed"])
    return kept
