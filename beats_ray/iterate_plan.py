"""`beats-ray iterate CONFIG --plan`: every stage, whether it runs and why, and what it costs; or every mistake.

    found = inspect(config)              # mistakes that need no cluster, and the stages
    rows = plan_stages(found.stages)

Reads the manifests and footers of the data sets, the given models, and each stage's `stage.json`. Nothing is written,
and neither a cluster nor a GPU is asked for. FLOPs come from `train/flops.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from beats_ray.aside import find_result
from beats_ray.config import (
    ConfigError,
    DistillConfig,
    EvaluateConfig,
    IterateConfig,
    PretrainConfig,
    StartSettings,
    TokenizeConfig,
    UserError,
    read_values,
    validate,
)
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.stage import differences, read_stage
from beats_ray.stages import Stage, build_stages, fine_tuning_of
from beats_ray.train.checks import Inputs, RunConfig, attempt, look_at_data, settings_mistakes
from beats_ray.train.flops import RunKind

State = Literal["done", "goes on", "runs", "runs again"]
MAX_REASONS = 3
HOUR_SECONDS = 3600.0


@dataclass(frozen=True)
class Inspection:
    """A run before it begins, as far as it could be read."""

    stages: list[Stage] = field(default_factory=list)
    mistakes: list[UserError] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """What a run will do with one stage."""

    stage: Stage
    state: State
    reason: str
    clips: int
    """That go through a model, each as often as it does; none where it is done."""
    flops: float


# --- mistakes ---------------------------------------------------------------------------------------------------------


def inspect(config: IterateConfig, planned: DatasetManifest | None = None) -> Inspection:
    """The stages of a run, and everything that is wrong with it and needs no cluster to be seen.

    planned: of a data set that is still to be prepared; by default `data.path` is looked at.
    """
    from beats_ray.train.engine import deepspeed_config
    from beats_ray.tune.sweep import check_search

    mistakes: list[UserError] = []
    manifest = planned or attempt(lambda: read_manifest(open_place(config.data.path)), mistakes)
    if not config.tasks:
        attempt(lambda: check_search(config.finetune, config.sweep), mistakes)
    for name, task in config.tasks.items():
        if task.protocol == "sweep":
            own: list[UserError] = []
            attempt(lambda task=task: check_search(task.finetune, task.sweep), own)  # type: ignore[misc]
            mistakes += [ConfigError(f"tasks.{name}.{mistake}") for mistake in own]
    if manifest is None:
        for name in ("pretrain", "distill", "finetune"):
            train = getattr(config, name).train
            own = []
            attempt(lambda train=train: deepspeed_config(train, train.max_workers), own)  # type: ignore[misc]
            mistakes += [_in_section(name, one) for one in own]
        return Inspection([], mistakes)
    if planned is None:
        look_at_data(config.data, manifest, mistakes)
    stages = attempt(lambda: build_stages(config, manifest), mistakes)
    # Beside a wrong start, teacher or task, the settings are looked at as if the run had none.
    plain = config.model_copy(update={"start": StartSettings(), "teacher": ("pretrained",), "tasks": {}})
    for stage in build_stages(plain, manifest) if stages is None else stages:
        if stage.task and stage.iteration == 1:
            look_at_data(config.tasks[stage.task].data, stage.manifest, mistakes)
        mistakes += _stage_mistakes(stage)
    distinct = {str(mistake): mistake for mistake in mistakes}
    return Inspection(stages or [], list(distinct.values()))


@dataclass(frozen=True)
class Training:
    """What a stage trains."""

    kind: RunKind
    section: str
    """Of the settings that it comes from."""
    config: RunConfig
    """Of several runs that of the first."""
    runs: int = 1


def training_of(stage: Stage) -> Training | None:
    """The training that a stage does; of a sweep, that of its trials before anything is searched."""
    if isinstance(stage.job, DistillConfig):
        return Training("distill", "distill", stage.job)
    if isinstance(stage.job, PretrainConfig):
        return Training("pretrain", "pretrain", stage.job)
    found = fine_tuning_of(stage)
    section = f"tasks.{stage.task}.finetune" if stage.task else "finetune"
    return None if found is None else Training("finetune", section, *found)


def _stage_mistakes(stage: Stage) -> list[UserError]:
    from beats_ray.inference import check_published

    mistakes: list[UserError] = []
    training = attempt(lambda: training_of(stage), mistakes)
    if training is None:
        return [ConfigError(f"tasks.{stage.task}.{mistake}") for mistake in mistakes]
    published = dict(stage.source) if stage.source is not None else None
    initial = None
    if isinstance(training.config, PretrainConfig) and training.config.initial:
        initial = check_published(open_place(training.config.initial), "start.initial", ("encoder",))
    inputs = Inputs(published, stage.manifest, [], initial)
    found = settings_mistakes(training.kind, training.config, inputs)
    return [_in_section(training.section, mistake, stage.task) for mistake in found]


def _in_section(section: str, mistake: UserError, task: str = "") -> UserError:
    """With the full name of the setting: a stage's own job has it at the top."""
    text = str(mistake)
    if text.startswith("data."):
        return ConfigError(f"tasks.{task}.{text}") if task else mistake
    return mistake if text.startswith(section) else ConfigError(f"{section}.{text}")


# --- what will run ----------------------------------------------------------------------------------------------------


def plan_stages(stages: list[Stage]) -> list[Row]:
    """What a run started now does with each stage, in order."""
    rows: dict[str, Row] = {}
    for stage in stages:
        place = find_result(stage.folder, stage.key)
        status = read_stage(place).get("status") if place is not None else None
        state, reason = _state(stage, rows) if place is None else ("goes on", "")
        if place is not None and place.path != stage.folder.path:
            reason = f"kept in {place.name}"
        if status == "complete":
            rows[stage.reference] = Row(stage, "done", reason, 0, 0.0)
            continue
        clips, flops = _cost(stage, place)
        rows[stage.reference] = Row(stage, state, reason, clips, flops)
    return list(rows.values())


def plan_new_run(stages: list[Stage]) -> list[Row]:
    """The same of a run whose folder is empty; nothing is read."""
    return [Row(stage, "runs", "new", *_cost(stage, None)) for stage in stages]


def _state(stage: Stage, rows: Mapping[str, Row]) -> tuple[State, str]:
    found = read_stage(stage.folder)
    if not found:
        return "runs", "new"
    reasons = []
    for name, old, new in differences(found.get("config", {}), stage.identity):
        source, _, read = name.partition(".")
        is_input = source == "inputs" and bool(read)
        reasons.append(_input_reason(stage, read, old, rows) if is_input else f"{name}: {old} -> {new}")
    return "runs again", "; ".join(reasons[:MAX_REASONS]) + ("; ..." if len(reasons) > MAX_REASONS else "")


def _input_reason(stage: Stage, name: str, old: str | None, rows: Mapping[str, Row]) -> str:
    model, before = stage.models.get(name), _what(old)
    if name == "data":
        return "the data set is another"
    if before != (now := _what(stage.inputs.get(name))):
        return f"{name}: {before} -> {now}"
    if not isinstance(model, Stage):
        return f"the {name} is another"
    what = {"runs": "runs", "runs again": "runs again"}.get(rows[model.reference].state, "is another")
    return f"because {model.label} {what}"


def _what(key: str | None) -> str:
    """What an input's key is that of, without its digits."""
    source = (key or "none").partition(" ")[0]
    return "a given model" if source == "sha256" else source


def _cost(stage: Stage, place: Place | None) -> tuple[int, float]:
    """(clips, model FLOPs) that are left to do."""
    from beats_ray.inference import missing_shards
    from beats_ray.train.committed import newest_sound_step
    from beats_ray.train.flops import inference_flops, step_flops_per_clip

    job, manifest, training = stage.job, stage.manifest, training_of(stage)
    if training is not None:
        train = training.config.train
        done = newest_sound_step(place / "checkpoints") if place is not None else 0
        clips = (train.steps - done) * train.global_batch_size * training.runs
        assert stage.source is not None, stage.label
        per_clip = step_flops_per_clip(training.kind, training.config, stage.source, len(manifest.label_names))
        return clips, float(clips * per_clip)
    if isinstance(job, TokenizeConfig | EvaluateConfig):
        clips = manifest.clips
        if place is not None and isinstance(job, TokenizeConfig):
            left = missing_shards(manifest, place)
            clips = sum(group.clips for index in left for group in manifest.shards[index].row_groups)
        assert stage.source is not None, stage.label
        mean_seconds = manifest.seconds / max(manifest.clips, 1)
        return clips, float(clips * inference_flops(stage.source, mean_seconds))
    return (manifest.clips, 0.0) if stage.name == "baselines" else (0, 0.0)


# --- the command ------------------------------------------------------------------------------------------------------


def show_plan(path: str | None, overrides: list[str], tflops: float, console: Console) -> list[str]:
    """Prints the plan of the run that these arguments mean, or returns a line for every mistake in them."""
    values, lines = read_values(IterateConfig, path, overrides)
    config = None
    try:
        config = validate(IterateConfig, values)
    except ConfigError as error:
        lines += error.mistakes
    if config is None or lines:
        return list(dict.fromkeys(lines))
    found = inspect(config)
    if found.mistakes:
        return list(dict.fromkeys(map(str, found.mistakes)))
    _print_rows(plan_stages(found.stages), config, tflops, console)
    return []


def _print_rows(rows: list[Row], config: IterateConfig, tflops: float, console: Console) -> None:
    columns = ["stage", "what", "state", "why", "clips", "PFLOP", "GPU-hours"]
    lines: list[list[Any]] = [
        [row.stage.label, row.stage.title, row.state, row.reason, *_figures(row.clips, row.flops, tflops)]
        for row in rows
    ]
    runs = sum(row.state != "done" for row in rows)
    clips, flops = sum(row.clips for row in rows), sum(row.flops for row in rows)
    lines.append(["all", "", f"{runs} of {len(rows)} stages", "", *_figures(clips, flops, tflops)])
    console.table(f"Plan of {config.output}", columns, lines)
    console.note(
        f"GPU-hours at {tflops:g} TFLOP/s sustained on a GPU (--tflops; a run's MFU says what yours sustain). Counted "
        "are the models' FLOPs, and sweeps as if no trial were stopped early."
    )


def _figures(clips: int, flops: float, tflops: float) -> list[str]:
    hours = flops / (tflops * 1e12) / HOUR_SECONDS
    return [
        f"{clips:,}",
        f"{flops / 1e15:,.3g}" if flops < 1e18 else f"{flops / 1e15:,.0f}",
        f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}",
    ]
