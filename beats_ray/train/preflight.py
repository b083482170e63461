"""Before a run: what it will compute, hold and write, from its config and the data set's manifest.

    beats-ray pretrain CONFIG.yaml --dry-run

Neither a GPU nor a cluster is needed, and no audio is read. Parameters are counted on the module itself, built without
memory on PyTorch's `meta` device; FLOPs and memory come from the formulas of `flops.py` and `memory.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from beats_ray.config import (
    ConfigError,
    DistillConfig,
    FinetuneConfig,
    PretrainConfig,
    TrainSettings,
    read_values,
    validate,
)
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.parts import count_clips
from beats_ray.data.plan import ClipPlan, build_plan
from beats_ray.data.storage import open_place
from beats_ray.models.config import EncoderConfig
from beats_ray.train.checks import (
    PLACES,
    ConfigT,
    RunConfig,
    find_mistakes,
    keep_batch,
    read_inputs,
    resolve_settings,
    training_part,
)
from beats_ray.train.engine import check_attention
from beats_ray.train.flops import (
    RunKind,
    num_codebooks_of_published,
    num_codes_of_published,
    step_flops_per_clip,
)
from beats_ray.train.memory import FP32_BYTES, TrainingState, step_activations, training_state, value_bytes

CHECKPOINT_VALUES = 3  # fp32, of a trained parameter: its master weight and AdamW's two moments
KINDS: dict[type, RunKind] = {PretrainConfig: "pretrain", DistillConfig: "distill", FinetuneConfig: "finetune"}


@dataclass(frozen=True)
class ModelSize:
    """Parameters of what a run trains and of what it only runs."""

    trained: int
    frozen: int
    """Parameters of the teacher, of a tokenizer that labels on the fly, or of an encoder that is not trained."""
    frozen_bytes: int
    """The same, of models beside the trained one in fp32 and with a random projection's matrices, no parameters."""
    buffer_bytes: int
    """State of the trained module that no optimizer moves: a codebook, a frozen encoder."""
    published_bytes: int
    """The weights of the model that the run publishes."""


@dataclass(frozen=True)
class RunPlan:
    """What a training run amounts to."""

    kind: RunKind
    train: TrainSettings
    clip_seconds: float
    clips_per_epoch: int
    shard_bytes: int
    """Bytes of the row groups that the run reads: in each epoch, or once where fine-tuning keeps them decoded."""
    size: ModelSize
    flops_per_clip: int
    activation_bytes: int
    """Peak of a micro-batch, without activation checkpointing."""
    checkpointed_activation_bytes: int
    keeps_best: bool
    """Whether a checkpoint has a validation result, so that the one with the best is kept beside the newest."""
    states: tuple[TrainingState, ...]
    """Weights, gradients and optimizer on one worker, for each ZeRO stage that the settings allow."""

    @property
    def steps_per_epoch(self) -> float:
        return self.clips_per_epoch / self.train.global_batch_size

    @property
    def clips(self) -> int:
        """Clips of the whole run, each as often as it occurs."""
        return self.train.steps * self.train.global_batch_size

    @property
    def epochs(self) -> float:
        return self.clips / self.clips_per_epoch

    @property
    def audio_hours(self) -> float:
        """Hours of sound of the whole run, every clip with its full length."""
        return self.clips * self.clip_seconds / 3600

    @property
    def flops_per_step(self) -> int:
        return self.flops_per_clip * self.train.global_batch_size

    @property
    def flops(self) -> int:
        return self.flops_per_step * self.train.steps

    @property
    def checkpoint_bytes(self) -> int:
        """One resume checkpoint: fp32 masters, two moments, the moving average where there is one, buffers."""
        values = CHECKPOINT_VALUES + self.train.averages_weights
        return values * FP32_BYTES * self.size.trained + self.size.buffer_bytes

    @property
    def checkpoints_written(self) -> int:
        """Resume checkpoints over the whole run, that of the last step among them where there are any."""
        longer = self.train.steps > self.train.checkpoint_every_steps
        return -(-self.train.steps // self.train.checkpoint_every_steps) if longer else 0

    @property
    def checkpoints_kept(self) -> int:
        return min(self.checkpoints_written, self.train.keep_checkpoints + self.keeps_best)


def plan_run(kind: RunKind, config: RunConfig, manifest: DatasetManifest, published: Mapping[str, Any]) -> RunPlan:
    """The plan of a run whose config, data set and published model have been checked."""
    part, retry_seconds = training_part(config, manifest), config.data.retry_seconds
    clips_per_epoch = count_clips(open_place(config.data.path), manifest, part, retry_seconds)
    classes = len(manifest.label_names)
    size = measure_model(config, manifest, published)
    stages = [stage for stage in range(4) if stage or config.train.precision == "fp32"]  # as `TrainSettings` demands
    peaks = [
        step_activations(kind, config, published, classes, checkpointed=checkpointed).peak_bytes
        for checkpointed in (False, True)
    ]
    return RunPlan(
        kind=kind,
        train=config.train,
        clip_seconds=config.data.clip_seconds,
        clips_per_epoch=clips_per_epoch,
        shard_bytes=_shard_bytes(_clips_read(config, manifest), manifest),
        size=size,
        flops_per_clip=step_flops_per_clip(kind, config, published, classes),
        activation_bytes=peaks[0],
        checkpointed_activation_bytes=peaks[1],
        keeps_best=_keeps_best(config),
        states=tuple(training_state(stage, config.train, size.trained, size.frozen_bytes) for stage in stages),
    )


def _keeps_best(config: RunConfig) -> bool:
    if not isinstance(config, FinetuneConfig) or not config.folds.has_validation:
        return False
    return math.lcm(config.train.checkpoint_every_steps, config.validate_every_steps) < config.train.steps


def measure_model(config: RunConfig, manifest: DatasetManifest, published: Mapping[str, Any]) -> ModelSize:
    """Counts the parameters of the run's own module, which is built without memory."""
    with torch.device("meta"):
        module, product, frozen = _build(config, manifest, published)
    check_attention(module, config.train)
    frozen_values = sum(one.numel() for one in frozen.state_dict().values()) if frozen is not None else 0
    if isinstance(config, PretrainConfig) and not config.labels and frozen is None:
        one = _random_projection_values(published["config"]["tokenizer"])
        frozen_values = num_codebooks_of_published(published) * one
    held = sum(one.numel() for one in module.parameters() if not one.requires_grad)
    held_bytes = value_bytes(config.train.precision) * held
    return ModelSize(
        trained=sum(one.numel() for one in module.parameters() if one.requires_grad),
        frozen=held + (sum(one.numel() for one in frozen.parameters()) if frozen is not None else 0),
        frozen_bytes=held_bytes + FP32_BYTES * frozen_values,
        buffer_bytes=held_bytes + sum(one.nbytes for one in module.buffers()),
        published_bytes=sum(one.nbytes for one in product.state_dict().values()),
    )


def _build(
    config: RunConfig, manifest: DatasetManifest, published: Mapping[str, Any]
) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """(what the engine trains, what the run publishes, what it runs beside it)."""
    from beats_ray.models import BeatsEncoder, SelfDistilledTokenizer, TokenizerConfig

    if isinstance(config, PretrainConfig):
        from beats_ray.train.pretrain import PretrainTask

        codes, codebooks = num_codes_of_published(published), num_codebooks_of_published(published)
        pretraining = PretrainTask(config, codes, None, num_codebooks=codebooks).module
        frozen: nn.Module | None = None
        if not config.labels and published["kind"] == "self_distilled_tokenizer":
            frozen = SelfDistilledTokenizer(TokenizerConfig.model_validate(published["config"]["tokenizer"]))
        return pretraining, pretraining.predictor.encoder, frozen
    source = BeatsEncoder(EncoderConfig.model_validate(published["config"]["encoder"]))
    if isinstance(config, DistillConfig):
        from beats_ray.models import AudioClassifier, ClassifierConfig
        from beats_ray.train.distill import DistillTask

        teacher: BeatsEncoder | AudioClassifier = source
        if published["kind"] == "classifier":
            teacher = AudioClassifier(source, ClassifierConfig.model_validate(published["config"]["classifier"]))
        distillation = DistillTask(config, teacher).module
        return distillation, distillation.model.tokenizer, teacher
    from beats_ray.train.finetune import FinetuneTask

    finetuning = FinetuneTask(config, source, manifest).module
    return finetuning, finetuning.classifier, None


def _random_projection_values(settings: Mapping[str, Any]) -> int:
    return int((settings["patch_size"] ** 2 + settings["num_codes"]) * settings["code_dim"])


def _clips_read(config: RunConfig, manifest: DatasetManifest) -> ClipPlan:
    return build_plan(manifest, folds=config.data.folds, splits=config.data.splits)


def _shard_bytes(plan: ClipPlan, manifest: DatasetManifest) -> int:
    wanted: dict[str, int] = {}
    for group in plan.row_groups:
        wanted[group.file] = wanted.get(group.file, 0) + group.clips
    total = 0.0
    for shard in manifest.shards:
        clips = sum(group.clips for group in shard.row_groups)
        total += shard.bytes * wanted.get(shard.file, 0) / max(clips, 1)
    return round(total)


# --- the command ------------------------------------------------------------------------------------------------------


def dry_run(job: type[ConfigT], path: str | None, overrides: list[str], console: Console) -> list[str]:
    """Shows the plan of the run that these arguments mean, or returns a line for every mistake in them."""
    kind = KINDS[job]
    values, lines = read_values(job, path, overrides)
    config = None
    try:
        config = keep_batch(validate(job, values))
    except ConfigError as error:
        lines += error.mistakes
    if config is None or lines:  # beside wrong settings, what can be looked at is what the run starts from
        return _distinct([*lines, *map(str, read_inputs(kind, _places_only(job, values)).mistakes)])
    inputs = read_inputs(kind, config)
    mistakes = inputs.mistakes + find_mistakes(kind, config, inputs)
    if not mistakes and inputs.manifest is not None and inputs.published is not None:
        show_plan(plan_run(kind, resolve_settings(config, inputs), inputs.manifest, inputs.published), console)
    return _distinct([str(mistake) for mistake in mistakes])


def _places_only(job: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    data = values.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    places = {name: values.get(name) for name in PLACES if name in job.model_fields}
    given = {name: place for name, place in places.items() if isinstance(place, str)}
    output = values.get("output")
    where = output if isinstance(output, str) and output else "."
    return job(output=where, data={"path": path if isinstance(path, str) else ""}, **given)


def _distinct(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def show_plan(plan: RunPlan, console: Console) -> None:
    """Prints the plan as two tables."""
    train, size = plan.train, plan.size
    accumulated = train.accumulation_steps(train.max_workers)
    batch = f"{train.micro_batch_size} x {train.max_workers} workers x {accumulated} accumulated"
    if train.global_batch_seconds is not None:
        sound = train.global_batch_size * plan.clip_seconds
        batch += f"; {sound:,.0f} s of sound for the {train.global_batch_seconds:,.0f} s asked for"
    flops = [f"{_si(one)}FLOP a {what}" for one, what in ((plan.flops_per_clip, "clip"), (plan.flops_per_step, "step"))]
    kept = f"{plan.checkpoints_kept} kept: {_binary(plan.checkpoints_kept * plan.checkpoint_bytes)}"
    hours = f"{plan.audio_hours:,.1f} h"
    shards_read = "once, or, streamed, in each epoch" if plan.kind == "finetune" else "per epoch"
    rows = [
        ("global batch", f"{train.global_batch_size} clips = {batch}"),
        ("epoch", f"{plan.clips_per_epoch:,} clips of {plan.clip_seconds:g} s, {plan.steps_per_epoch:,.1f} steps"),
        (
            "run",
            f"{train.steps:,} steps, {plan.epochs:,.1f} epochs, {plan.clips:,} clips, {hours} of sound",
        ),
        ("computed", _execution(train)),
        ("parameters", f"{size.trained:,} trained, {size.frozen:,} frozen"),
        ("model FLOPs", f"{', '.join(flops)}, {_si(plan.flops)}FLOP in all"),
        ("shards read", f"{_binary(plan.shard_bytes)} {shards_read}"),
        ("checkpoints", f"{plan.checkpoints_written:,} of {_binary(plan.checkpoint_bytes)}, {kept}"),
        ("published", _binary(size.published_bytes)),
    ]
    console.table(f"Plan of the run ({plan.kind})", ["", "what"], rows)
    _show_memory(plan, console)


def _execution(train: TrainSettings) -> str:
    """How the steps are computed; the estimates of memory are the same for either kernel, compiled or not."""
    compiled = ["compiled"] * train.compile
    return ", ".join([f"{train.precision}, ZeRO {train.zero_stage}, attention={train.attention}", *compiled])


def _show_memory(plan: RunPlan, console: Console) -> None:
    parts = ["weights", "masters", "gradients", "moments", *["average"] * plan.train.averages_weights, "buckets"]
    columns = ["ZeRO", *parts, "activations", "total"]
    rows = []
    for checkpointed in (False, True):
        activations = plan.checkpointed_activation_bytes if checkpointed else plan.activation_bytes
        for state in plan.states:
            chosen = (plan.train.zero_stage, plan.train.activation_checkpointing) == (state.zero_stage, checkpointed)
            sizes = [*(getattr(state, part) for part in parts), activations, state.total_bytes + activations]
            name = f"{state.zero_stage}{', checkpointing' if checkpointed else ''}{' (this run)' if chosen else ''}"
            rows.append([name, *map(_binary, sizes)])
    few, most = plan.train.worker_range
    one = "one worker" if few == most else f"one of {few} workers, the fewest"
    title = f"Memory of {one}, {plan.train.precision}, micro-batch of {plan.train.micro_batch_size} (estimated)"
    if any(state.host for state in plan.states):
        rows = [[*row, _binary(state.host)] for row, state in zip(rows, 2 * plan.states, strict=True)]
        columns.append("host memory")
    console.table(title, columns, rows)


def _si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if value < 1000:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} Z"


def _binary(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} GiB"
