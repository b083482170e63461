"""Everything about a training run that can be checked without a cluster: what it starts from, its data, its settings.

    inputs = read_inputs("pretrain", config)
    mistakes = inputs.mistakes + find_mistakes("pretrain", config, inputs)

A run raises the first mistake before it asks for anything; `--dry-run` shows all of them. Both use these functions.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from beats_ray.config import (
    ConfigError,
    DistillConfig,
    DistillSettings,
    FinetuneConfig,
    PretrainConfig,
    StreamSettings,
    TrainSettings,
    UserError,
)
from beats_ray.data.lanes import lanes_fit
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.parts import ClipPart
from beats_ray.data.plan import ClipPlan, build_plan
from beats_ray.data.storage import open_place, with_retries
from beats_ray.identity import content_keys, stage_identity
from beats_ray.inference import TOKENIZER_KINDS, check_published
from beats_ray.models.config import EncoderConfig
from beats_ray.stage import check_output, is_complete, read_stage
from beats_ray.train.flops import RunKind, num_codebooks_of_published
from beats_ray.train.held_out import find_parts, part_mistakes

RunConfig = PretrainConfig | DistillConfig | FinetuneConfig
ConfigT = TypeVar("ConfigT", bound=RunConfig)
ResultT = TypeVar("ResultT")

_STARTS_FROM: dict[str, tuple[str, tuple[str, ...], str]] = {
    "pretrain": ("tokenizer", TOKENIZER_KINDS, "a published tokenizer (see `beats-ray iterate`)"),
    "distill": ("teacher", ("encoder", "classifier"), "a published encoder or fine-tuned model"),
    "finetune": ("encoder", ("encoder",), "a published encoder"),
}
"""Of each kind of run: the field that names the model it starts from, its kinds, and what to give."""

PLACES = ("tokenizer", "labels", "initial", "teacher", "encoder")
"""Fields that name a folder, in one config or another."""
COMPILED_LENGTHS = 8
"""Different shapes for which PyTorch compiles one function, by default."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it starts, as far as it could be read."""

    published: dict[str, Any] | None
    """Description of the model it starts from: the tokenizer, the teacher or the encoder."""
    manifest: DatasetManifest | None
    mistakes: list[UserError]
    initial: dict[str, Any] | None = None
    """Description of the encoder whose weights pre-training goes on from, where it does."""


def read_inputs(kind: RunKind, config: RunConfig) -> Inputs:
    """Reads descriptions, never weights or audio. The data themselves are looked at unless the run is complete."""
    mistakes: list[UserError] = []
    published = attempt(lambda: _read_published(kind, config), mistakes)
    initial = None
    if isinstance(config, PretrainConfig) and config.initial:
        given = open_place(config.initial)
        initial = attempt(lambda: check_published(given, "initial", ("encoder",)), mistakes)
    manifest = attempt(lambda: _read_manifest(config.data), mistakes)
    if manifest is not None and not attempt(lambda: is_complete(open_place(config.output)), mistakes):
        look_at_data(config.data, manifest, mistakes)
        if isinstance(config, PretrainConfig) and config.labels:
            _look_at_labels(config, manifest, mistakes)
    return Inputs(published, manifest, mistakes, initial)


def find_mistakes(
    kind: RunKind, config: RunConfig, inputs: Inputs, keys: Mapping[str, str] | None = None
) -> list[UserError]:
    """What is wrong in the settings as given, beside the inputs that could be read, and with what the output holds.

    keys: of the inputs, by content where not given.
    """
    mistakes = settings_mistakes(kind, config, inputs)
    resolved = resolve_settings(config, inputs)
    output = open_place(config.output)

    def check() -> None:
        if read_stage(output):
            check_output(output, stage_identity(resolved, content_keys(config) if keys is None else keys))

    if not inputs.mistakes:
        attempt(check, mistakes)
    return mistakes


def resolve_settings(config: RunConfig, inputs: Inputs) -> RunConfig:
    """The config with what follows from the model that it starts from."""
    if isinstance(config, DistillConfig) and inputs.published is not None:
        from beats_ray.train.distill import resolve_learning_rate

        return resolve_learning_rate(config, inputs.published["kind"])
    return config


def settings_mistakes(kind: RunKind, config: RunConfig, inputs: Inputs) -> list[UserError]:
    """What is wrong in the settings themselves, and beside the inputs that could be read."""
    from beats_ray.data.clips import clip_samples_of
    from beats_ray.train.engine import deepspeed_config
    from beats_ray.train.loggers import check_loggers

    mistakes: list[UserError] = []
    attempt(lambda: deepspeed_config(config.train, config.train.max_workers), mistakes)
    attempt(lambda: check_loggers(config.train.loggers), mistakes)
    attempt(lambda: clip_samples_of(config.data.clip_seconds), mistakes)
    attempt(lambda: _check_streams(config.train, config.data), mistakes)
    attempt(lambda: _check_device(config.train), mistakes)
    attempt(lambda: _check_compiled_lengths(config.train, config.data), mistakes)
    manifest = inputs.manifest
    if isinstance(config, PretrainConfig) and inputs.published is not None:
        tokenizer = inputs.published
        attempt(lambda: _check_codebooks(config, tokenizer), mistakes)
    if isinstance(config, DistillConfig) and inputs.published is not None:
        published = inputs.published
        attempt(lambda: _check_teacher_layer(config, published), mistakes)
        attempt(lambda: _check_learning_rate(config, published), mistakes)
    if isinstance(config, PretrainConfig) and inputs.initial is not None:
        initial = inputs.initial
        attempt(lambda: _check_initial(config, initial), mistakes)
    if manifest is not None:
        attempt(lambda: _check_labelled(kind, config.data, manifest), mistakes)
        if isinstance(config, FinetuneConfig):
            mistakes += part_mistakes(config, manifest)
        attempt(lambda: training_plan(config, manifest), mistakes)
    return mistakes


def _check_device(train: TrainSettings) -> None:
    if train.precision == "fp16" and not train.use_gpu:
        raise ConfigError("train.precision=fp16 needs train.use_gpu=true; use bf16 or fp32 on the CPU")
    if train.attention == "flex" and not train.use_gpu:
        raise ConfigError("train.attention=flex needs train.use_gpu=true; use auto on the CPU")


def _check_compiled_lengths(train: TrainSettings, data: StreamSettings) -> None:
    """ConfigError where clips come in more lengths than are compiled; the others would run uncompiled, in silence."""
    if not train.compile or not data.length_bucket_seconds:
        return
    lengths = math.ceil(data.clip_seconds / data.length_bucket_seconds)
    if lengths > COMPILED_LENGTHS:
        raise ConfigError(
            f"data.length_bucket_seconds={data.length_bucket_seconds:g}: clips of {lengths} lengths, and train.compile="
            f"true compiles {COMPILED_LENGTHS} at most; use {data.clip_seconds / COMPILED_LENGTHS:g} or more, or "
            "train.compile=false"
        )


def _check_streams(train: TrainSettings, data: StreamSettings) -> None:
    """ConfigError where some number of workers cannot take the clips of a step from the streams in equal parts."""
    for workers in range(train.min_workers, train.max_workers + 1):
        if not lanes_fit(data.streams, workers):
            raise ConfigError(
                f"data.streams={data.streams} neither divides train.num_workers={workers} nor is a multiple of it; "
                f"use {math.gcd(data.streams, workers)}"
            )
    clips = math.lcm(train.clips_at_once, train.micro_batch_size * data.streams)
    if train.global_batch_size % clips:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not divisible into micro-batches of "
            f"{train.micro_batch_size} from each of data.streams={data.streams}; use "
            f"{max(1, round(train.global_batch_size / clips)) * clips}, or fewer streams"
        )


def keep_batch(config: ConfigT) -> ConfigT:
    """The config with the clips in a step of the run that its output holds, where it asks for them in seconds.

    How many clips a number of seconds comes to depends on workers and micro-batch, which may change; the run may not.
    ConfigError where the workers cannot share its clips.
    """
    train = config.train
    if train.global_batch_seconds is None:
        return config
    clips = (
        read_stage(open_place(config.output))
        .get("config", {})
        .get("train", {})
        .get("global_batch_size", train.global_batch_size)
    )
    asked = train.global_batch_seconds / config.data.clip_seconds
    if clips == train.global_batch_size or abs(clips - asked) >= clips / 2:  # no rounding makes these clips of it
        return config
    if clips % train.clips_at_once:
        raise ConfigError(
            f"train.global_batch_seconds={train.global_batch_seconds:g}: the run in {config.output} has {clips} clips "
            f"in a step, which is not divisible by {train.clips_at_once_shown()}; use another micro_batch_size, "
            "another num_workers or another output"
        )
    train = train.model_copy(update={"global_batch_size": clips})
    return config.model_copy(update={"train": train})  # type: ignore[return-value]  # of the same class


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


def attempt(work: Callable[[], ResultT], mistakes: list[UserError]) -> ResultT | None:
    """The result; None, and the mistake noted, where it failed for a mistake of the user's."""
    try:
        return work()
    except UserError as error:
        mistakes.append(error)
        return None


def _read_published(kind: RunKind, config: RunConfig) -> dict[str, Any]:
    field, kinds, what = _STARTS_FROM[kind]
    path = getattr(config, field)
    if isinstance(config, PretrainConfig) and config.labels and not path:
        raise ConfigError(f"labels={config.labels} needs the tokenizer that wrote them; set tokenizer")
    if isinstance(config, PretrainConfig) and not path:
        from beats_ray.models import describe_model
        from beats_ray.train.pretrain import build_random_projection

        return describe_model(build_random_projection(config.random_projection))
    if not path:
        raise ConfigError(f"{field} is empty; give the folder of {what}")
    return check_published(open_place(path), field, kinds)


def _read_manifest(data: StreamSettings) -> DatasetManifest:
    if not data.path:
        raise ConfigError("data.path is empty; give the folder that `beats-ray prepare` wrote")
    return read_manifest(open_place(data.path))


def look_at_data(data: StreamSettings, manifest: DatasetManifest, mistakes: list[UserError]) -> None:
    """Adds what is wrong with the shards: size, columns, clip ids, label ids."""
    from beats_ray.data.shards import check_schema

    dataset = open_place(data.path)
    attempt(lambda: with_retries(lambda: check_schema(dataset, manifest), data.retry_seconds), mistakes)


def _look_at_labels(config: PretrainConfig, manifest: DatasetManifest, mistakes: list[UserError]) -> None:
    from beats_ray.data.shards import check_labels

    def check() -> None:
        check_labels(open_place(config.labels), manifest, open_place(config.data.path))

    attempt(lambda: with_retries(check, config.data.retry_seconds), mistakes)


def _check_labelled(kind: RunKind, data: StreamSettings, manifest: DatasetManifest) -> None:
    if manifest.label_names:
        return
    if kind == "finetune":
        raise ConfigError(f"data.path={data.path}: has no labels to fine-tune on; give a labelled data set")
    if data.sampling == "balanced":
        raise ConfigError(f"data.sampling=balanced: {data.path} has no labels; use uniform")


def _check_codebooks(config: PretrainConfig, published: dict[str, Any]) -> None:
    books = num_codebooks_of_published(published)
    if config.labels and books > 1:
        raise ConfigError(
            f"labels={config.labels}: a labels stage holds one label for each patch, and the tokenizer gives {books}; "
            "leave labels empty, and they are computed on the fly"
        )


_NOT_IN_WEIGHTS = {"dropout", "attention_dropout", "activation_dropout", "layer_drop"}


def _check_initial(config: PretrainConfig, initial: dict[str, Any]) -> None:
    """The settings of the encoder must say what its first weights are those of."""
    wanted = config.encoder.resolve().model_dump()
    found = EncoderConfig.model_validate(initial["config"]["encoder"]).model_dump()
    for name, value in found.items():
        if name not in _NOT_IN_WEIGHTS and value != wanted[name]:
            raise ConfigError(
                f"initial={config.initial}: has {name}={value}, the encoder that is trained {wanted[name]}; set "
                f"encoder.preset, or encoder.overrides.{name}={value}"
            )


def _check_learning_rate(config: DistillConfig, published: dict[str, Any]) -> None:
    """A rate that somebody chose must count; in a stage of `iterate` it has given way to the other one already."""
    given, counts = config.train.learning_rate, config.supervised_learning_rate
    unset = DistillSettings().train.learning_rate
    if published["kind"] == "classifier" and given not in (counts, unset):
        raise ConfigError(
            f"train.learning_rate={given:g}: the teacher is a fine-tuned model, for which supervised_learning_rate="
            f"{counts:g} counts instead; set supervised_learning_rate={given:g}, or leave train.learning_rate out"
        )


def _check_teacher_layer(config: DistillConfig, published: dict[str, Any]) -> None:
    if published["kind"] == "classifier" and config.tokenizer.teacher_layer is not None:
        raise ConfigError(
            f"tokenizer.teacher_layer={config.tokenizer.teacher_layer}: a fine-tuned teacher is distilled by its "
            "logits, not by a layer; leave it out or give an encoder"
        )
    depth = published["config"]["encoder"]["num_layers"]
    layer = config.tokenizer.teacher_layer or 0
    if layer > depth:
        raise ConfigError(f"tokenizer.teacher_layer={layer}: the teacher has {depth} layers; use at most {depth}")
