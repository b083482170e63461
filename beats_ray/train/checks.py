"""Everything about a training run that can be checked without a cluster: what it starts from, its data, its settings.

    inputs = read_inputs("pretrain", config)
    mistakes = inputs.mistakes + find_mistakes("pretrain", config, inputs)

A run raises the first mistake before it asks for anything; `--dry-run` shows all of them. Both use these functions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from beats_ray.config import (
    ConfigError,
    DistillConfig,
    FinetuneConfig,
    InferenceSettings,
    Job,
    PretrainConfig,
    StreamSettings,
    UserError,
)
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.parts import ClipPart
from beats_ray.data.plan import ClipPlan, build_plan
from beats_ray.data.storage import Place, open_place, with_retries
from beats_ray.inference import TOKENIZER_KINDS, check_published
from beats_ray.stage import check_output, is_complete
from beats_ray.train.flops import RunKind
from beats_ray.train.held_out import find_parts, part_mistakes

RunConfig = PretrainConfig | DistillConfig | FinetuneConfig
ResultT = TypeVar("ResultT")

_STARTS_FROM: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pretrain": ("tokenizer", TOKENIZER_KINDS, "a published tokenizer (see `beats-ray iterate`)"),
    "distill": ("teacher", ("encoder",), "a published encoder"),
    "finetune": ("encoder", ("encoder",), "a published encoder"),
}
"""Of each kind of run: the field that names the model it starts from, its kinds, and what to give."""

PLACES = ("tokenizer", "labels", "teacher", "encoder")
"""Fields that name a folder, in one config or another."""


EXECUTION_FIELDS = {
    "global_batch_seconds", "num_workers", "cpus_per_worker", "use_gpu", "micro_batch_size", "zero_stage",
    "activation_checkpointing", "offload_optimizer", "offload_parameters", "compile", "log_every_steps",
    "checkpoint_every_steps", "keep_checkpoints", "storage_retry_seconds", "max_failures", "max_bad_steps",
    "collective_timeout_seconds", "loggers",
}  # fmt: skip
"""Settings of `train` that a run may go on with other values of: its steps do the same to the same global batches.

`global_batch_seconds` is among them because the `global_batch_size` that it comes to is not."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts, as far as it could be read."""

    published: dict[str, Any] | None
    """Description of the model it starts from: the tokenizer, the teacher or the encoder."""
    manifest: DatasetManifest | None
    mistakes: list[UserError]


def read_inputs(kind: RunKind, config: RunConfig) -> Inputs:
    """Reads descriptions, never weights or audio. The data themselves are looked at unless the run is complete."""
    mistakes: list[UserError] = []
    published = _attempt(lambda: _read_published(kind, config), mistakes)
    manifest = _attempt(lambda: _read_manifest(config.data), mistakes)
    if manifest is not None and not _attempt(lambda: is_complete(open_place(config.output)), mistakes):
        _look_at_data(config, manifest, mistakes)
    return Inputs(published, manifest, mistakes)


def find_mistakes(kind: RunKind, config: RunConfig, inputs: Inputs) -> list[UserError]:
    """What is wrong in the settings themselves, and beside the inputs that could be read."""
    from beats_ray.data.clips import clip_samples_of
    from beats_ray.train.engine import deepspeed_config

    mistakes: list[UserError] = []
    _attempt(lambda: deepspeed_config(config.train, config.train.max_workers), mistakes)
    _attempt(lambda: clip_samples_of(config.data.clip_seconds), mistakes)
    _attempt(lambda: check_output(open_place(config.output), run_identity(config)), mistakes)
    manifest = inputs.manifest
    if isinstance(config, DistillConfig) and inputs.published is not None:
        published = inputs.published
        _attempt(lambda: _check_teacher_layer(config, published), mistakes)
    if manifest is not None:
        _attempt(lambda: _check_labelled(kind, config.data, manifest), mistakes)
        if isinstance(config, FinetuneConfig):
            mistakes += part_mistakes(config, manifest)
        _attempt(lambda: training_plan(config, manifest), mistakes)
    return mistakes


def run_identity(config: Job) -> dict[str, Any]:
    """What makes a run the same run: its config without where it runs, on how much of a cluster and who is told."""
    values = config.model_dump(mode="json", exclude={"ray", "output", "inference", *InferenceSettings.model_fields})
    return _without_execution(values)


def _without_execution(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: _without_execution(value) if isinstance(value, dict) else value for name, value in values.items()}
    for section, fields in (("train", EXECUTION_FIELDS), ("data", DATA_EXECUTION_FIELDS)):
        if isinstance(kept.get(section), dict):
            kept[section] = {name: value for name, value in kept[section].items() if name not in fields}
    return kept


DATA_EXECUTION_FIELDS = {
    "buffer_mib", "cache", "decode_cpus", "placement", "prefetch_blocks", "read_tasks", "retry_seconds",
}  # fmt: skip
"""The same for `data`: how clips come, not which."""


def training_plan(config: RunConfig, manifest: DatasetManifest) -> ClipPlan:
    """The order of the clips that weights are fitted on, without `data.sampling`'s weights. UserError where none is.

    Of a part that a draw divides the plan has both sides: which clips are drawn is not in the manifest.
    """
    part = training_part(config, manifest)
    return build_plan(
        manifest,
        seed=config.train.seed,
        folds=part.folds,
        splits=part.splits,
        shuffle_window_clips=config.data.shuffle_window_clips,
    )


def training_part(config: RunConfig, manifest: DatasetManifest) -> ClipPart:
    """The clips that weights are fitted on."""
    if isinstance(config, FinetuneConfig):
        return find_parts(config, manifest).training
    return ClipPart(config.data.folds, config.data.splits)


def check_folds(config: FinetuneConfig, manifest: DatasetManifest) -> None:
    """ConfigError when the data set lacks a fold or split that training, validation or test needs."""
    find_parts(config, manifest)


def _attempt(work: Callable[[], ResultT], mistakes: list[UserError]) -> ResultT | None:
    """The result; None, and the mistake noted, where it failed for a mistake of the user's."""
    try:
        return work()
    except UserError as error:
        mistakes.append(error)
        return None


def _read_published(kind: RunKind, config: RunConfig) -> dict[str, Any]:
    field, kinds, what = _STARTS_FROM[kind]
    path = getattr(config, field)
    if not path:
        raise ConfigError(f"{field} is empty; give the folder of {what}")
    return check_published(open_place(path), field, kinds)


def _read_manifest(data: StreamSettings) -> DatasetManifest:
    if not data.path:
        raise ConfigError("data.path is empty; give the folder that `beats-ray prepare` wrote")
    return read_manifest(open_place(data.path))


def _look_at_data(config: RunConfig, manifest: DatasetManifest, mistakes: list[UserError]) -> None:
    from beats_ray.data.shards import check_labels, check_schema

    dataset = open_place(config.data.path)

    def check_shards() -> None:
        with_retries(lambda: check_schema(dataset, manifest), config.data.retry_seconds)

    def check_patch_labels(place: Place) -> None:
        with_retries(lambda: check_labels(place, manifest, dataset), config.data.retry_seconds)

    _attempt(check_shards, mistakes)
    if isinstance(config, PretrainConfig) and config.labels:
        labels = config.labels
        _attempt(lambda: check_patch_labels(open_place(labels)), mistakes)


def _check_labelled(kind: RunKind, data: StreamSettings, manifest: DatasetManifest) -> None:
    if manifest.label_names:
        return
    if kind == "finetune":
        raise ConfigError(f"data.path={data.path}: has no labels to fine-tune on; give a labelled data set")
    if data.sampling == "balanced":
        raise ConfigError(f"data.sampling=balanced: {data.path} has no labels; use uniform")


def _check_teacher_layer(config: DistillConfig, published: dict[str, Any]) -> None:
    depth = published["config"]["encoder"]["num_layers"]
    layer = config.tokenizer.teacher_layer or 0
    if layer > depth:
        raise ConfigError(f"tokenizer.teacher_layer={layer}: the teacher has {depth} layers; use at most {depth}")
