"""The presets of `jobs/` that state the paper's settings have them, whatever number of GPUs they are written for."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from beats_ray.config import (
    CrossValidateConfig,
    DistillConfig,
    FinetuneConfig,
    IterateConfig,
    PretrainConfig,
    Section,
    TrainSettings,
    load_config,
)
from beats_ray.cross_validate import plan_runs
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.parts import ClipPart
from beats_ray.models.config import encoder_config
from beats_ray.train.checks import training_part
from beats_ray.train.held_out import find_parts
from beats_ray.train.memory import step_activations, training_state

pytestmark = pytest.mark.unit

JOBS = Path(__file__).parents[2] / "jobs"
GIB = 2**30


class Between(NamedTuple):
    """A range that the paper, or those who repeated it, state."""

    low: float
    high: float


# --- the paper's table of settings (sections 3.2, 4.1, 4.2), with what ESPnet states of it ----------------------------

Settings = dict[str, Any]
OPTIMIZER: Settings = {
    "train.schedule": "linear",
    "train.betas": (0.9, 0.98),
    "train.epsilon": 1e-12,
    "train.weight_decay": 0.01,
    "train.max_grad_norm": 1.0,
    "train.ema_decay": 0.0,
    "train.average_last": 0,
}
PRETRAINING: Settings = OPTIMIZER | {
    "batch_seconds": 5600,
    "train.steps": 400_000,
    "train.warmup_steps": 32_000,
    "train.learning_rate": 5e-4,
    "train.layer_decay": 1.0,
    "masking.ratio": 0.75,
    "masking.block_size": 1,
    "masking.max_targets": None,
    "predictor.num_layers": 3,
    "predictor.mask_vector": "zero",
    "predictor.label_smoothing": 0.0,
    "data.sampling": "uniform",
}
TOKENIZER: Settings = OPTIMIZER | {
    "batch_seconds": 1400,
    "train.steps": 400_000,
    "train.warmup_steps": 32_000,
    "train.learning_rate": 5e-5,
    "train.layer_decay": 1.0,
    "tokenizer.num_codes": 1024,
    "tokenizer.code_dim": 256,
    "tokenizer.ema_decay": 0.99,
    "tokenizer.restart_below": 0.0,
    "tokenizer.teacher_layer": None,
    "data.sampling": "uniform",
}
FINETUNING: Settings = OPTIMIZER | {
    "layer_drop": 0.1,
    "dropout": 0.0,
    "pooling": "mean",
    "freeze_encoder": False,
    "freeze_encoder_steps": 0,
    "augment.gain_db": 0.0,
    "augment.time_mask_fraction": Between(0.0, 0.06),
}
AUDIOSET_2M: Settings = FINETUNING | {
    "batch_clips": 1000,
    "train.steps": 50_000,  # 25 epochs of two million clips
    "train.warmup_steps": 10_000,
    "train.learning_rate": 1e-4,
    "train.layer_decay": 0.6,
    "augment.mixup": 0.8,
    "augment.mixup_probability": 1.0,
    "augment.roll_seconds": Between(0.1, 10.0),
    "data.sampling": "balanced",
    "data.clip_seconds": 10.0,
}
AUDIOSET_20K: Settings = AUDIOSET_2M | {
    "batch_clips": 80,
    "train.steps": 80_000,
    "train.warmup_steps": 8_000,
    "train.learning_rate": 3e-5,
    "train.layer_decay": 0.3,
    "data.sampling": "uniform",
}
ESC50: Settings = FINETUNING | {
    "batch_clips": Between(60, 128),
    "train.steps": Between(6_000, 80_000),
    "warmup_fraction": Between(0.05, 0.1),
    "train.learning_rate": 3e-5,
    "train.layer_decay": 0.2,
    "augment.mixup": 0.0,
    "augment.roll_seconds": 1.0,
    "label_smoothing": 0.1,
    "data.sampling": "uniform",
    "data.clip_seconds": 5.0,
}

PRESETS: list[tuple[str, type[Section], list[str], str, Settings]] = [
    ("pretrain-base", PretrainConfig, [], "", PRETRAINING),
    ("pretrain-base", PretrainConfig, ["train.num_workers=8"], "", PRETRAINING),
    ("pretrain-base-1gpu", PretrainConfig, [], "", PRETRAINING),
    ("pretrain-large", PretrainConfig, [], "", PRETRAINING),
    ("pretrain-large", PretrainConfig, ["train.num_workers=8"], "", PRETRAINING),
    ("tokenizer-base", DistillConfig, [], "", TOKENIZER),
    ("tokenizer-base", DistillConfig, ["train.num_workers=7", "train.micro_batch_size=20"], "", TOKENIZER),
    ("tokenizer-base-1gpu", DistillConfig, [], "", TOKENIZER),
    ("tokenizer-base-supervised", DistillConfig, [], "", TOKENIZER | {"supervised_learning_rate": 5e-4}),
    ("tokenizer-large", DistillConfig, [], "", TOKENIZER),
    ("iterate-base", IterateConfig, [], "pretrain", PRETRAINING),
    ("iterate-base", IterateConfig, [], "distill", TOKENIZER | {"supervised_learning_rate": 5e-4}),
    ("iterate-base", IterateConfig, [], "tasks.audioset-2m.finetune", AUDIOSET_2M),
    ("iterate-base", IterateConfig, [], "tasks.audioset-20k.finetune", AUDIOSET_20K),
    ("iterate-base", IterateConfig, [], "tasks.esc50.finetune", ESC50),
    ("iterate-1gpu", IterateConfig, [], "pretrain", PRETRAINING),
    ("iterate-1gpu", IterateConfig, [], "distill", TOKENIZER),
    ("iterate-1gpu", IterateConfig, [], "tasks.esc50.finetune", ESC50),
    ("finetune-audioset-2m", FinetuneConfig, [], "", AUDIOSET_2M),
    ("finetune-audioset-20k", FinetuneConfig, [], "", AUDIOSET_20K),
    ("finetune-esc50", FinetuneConfig, [], "", ESC50),
    ("cross-validate-esc50", CrossValidateConfig, [], "finetune", ESC50),
]


def training_of(config: Any, section: str) -> tuple[Any, Any]:
    """(what has `data`, the settings of the training) of a job, or of a task of `iterate`."""
    if section.startswith("tasks."):
        _, task, section = section.split(".")
        config = config.tasks[task]
    return config, getattr(config, section) if section else config


def setting(config: Any, part: Any, name: str) -> Any:
    """One setting of a training by the table's name."""
    if name == "batch_clips":
        return part.train.global_batch_size
    if name == "batch_seconds":
        return part.train.global_batch_size * config.data.clip_seconds
    if name == "warmup_fraction":
        return part.train.warmup_steps / part.train.steps
    found = config if name.startswith("data.") else part
    for field in name.split("."):
        found = getattr(found, field)
    return found


@pytest.mark.parametrize(("name", "kind", "overrides", "section", "paper"), PRESETS)
def test_a_preset_has_the_paper_s_settings(
    name: str, kind: type[Section], overrides: list[str], section: str, paper: Settings
) -> None:
    config, part = training_of(load_config(kind, str(JOBS / f"{name}.yaml"), overrides), section)
    found = {field: setting(config, part, field) for field in paper}
    stated = {
        field: found[field] if isinstance(value, Between) and value.low <= found[field] <= value.high else value
        for field, value in paper.items()
    }
    assert found == stated
    train: TrainSettings = part.train
    assert train.accumulation_steps(train.max_workers) * train.max_workers * train.micro_batch_size == (
        train.global_batch_size
    )


def test_presets_of_one_thing_differ_in_how_it_runs_alone() -> None:
    for kind, first, second in (
        (PretrainConfig, "pretrain-base", "pretrain-base-1gpu"),
        (DistillConfig, "tokenizer-base", "tokenizer-base-1gpu"),
    ):
        one, other = (load_config(kind, str(JOBS / f"{name}.yaml")).model_dump() for name in (first, second))
        train, other_train = one.pop("train"), other.pop("train")
        assert one["data"].pop("streams") > other["data"].pop("streams") == 1  # for many GPUs
        assert one == other
        differing = {name for name in train if train[name] != other_train[name]}
        assert differing <= {"num_workers", "micro_batch_size", "cpus_per_worker"}
    alone = load_config(FinetuneConfig, str(JOBS / "finetune-emotion.yaml"))
    folds = load_config(CrossValidateConfig, str(JOBS / "cross-validate-emotion.yaml"))
    for name in ("augment", "train", "label_smoothing", "layer_drop"):
        assert getattr(folds.finetune, name) == getattr(alone, name), name
    assert folds.data == alone.data
    assert alone.data.length_bucket_seconds > 0


# --- which clips ------------------------------------------------------------------------------------------------------

GROUPS: dict[str, list[tuple[int, str]]] = {
    "audioset": [(-1, "balanced_train"), (-1, "unbalanced_train"), (-1, "eval")],
    "speech-commands": [(-1, "train"), (-1, "validation"), (-1, "test")],
    "emotion|esc": [(fold, "") for fold in range(1, 6)],
    "mine": [(-1, "")],
}
"""(fold, split) of the row groups of a data set, by a part of its path."""
HELD_OUT_SPLITS = {"eval", "test"}


def data_of(path: str) -> DatasetManifest:
    (groups,) = (groups for pattern, groups in GROUPS.items() if re.search(pattern, path))
    folds = {str(fold): 4 for fold, _ in groups}
    return DatasetManifest(
        name="x", label_names=("a", "b"), multi_label="audioset" in path, clips=4 * len(groups), clips_by_fold=folds,
        clips_by_split={}, seconds=1, fbank_mean=0, fbank_std=1, source="x", source_files=1, quarantined=0,
        shards=(Shard(file="0.parquet", sha256="0", bytes=1, row_groups=tuple(
            RowGroup(clips=4, fold=fold, split=split) for fold, split in groups)),),
    )  # fmt: skip


def groups_in(part: ClipPart | None, manifest: DatasetManifest) -> set[tuple[int, str]]:
    groups = {(group.fold, group.split) for group in manifest.shards[0].row_groups}
    if part is None:
        return set()
    return {one for one in groups if one[0] in (part.folds or {one[0]}) and one[1] in (part.splits or {one[1]})}


KINDS: dict[str, type[Section]] = {
    "pretrain-": PretrainConfig,
    "tokenizer-": DistillConfig,
    "finetune-": FinetuneConfig,
    "cross-validate-": CrossValidateConfig,
}
TRAINING = sorted((path.stem, prefix) for prefix in KINDS for path in JOBS.glob(f"{prefix}*.yaml"))


@pytest.mark.parametrize(("name", "prefix"), TRAINING)
def test_what_judges_is_never_trained_on(name: str, prefix: str) -> None:
    config: Any = load_config(KINDS[prefix], str(JOBS / f"{name}.yaml"))
    manifest = data_of(config.data.path)
    runs = [run.config for run in plan_runs(config, manifest)] if prefix == "cross-validate-" else [config]
    judging = {one for one in groups_in(ClipPart(), manifest) if one[1] in HELD_OUT_SPLITS}
    for run in runs:
        trained = groups_in(training_part(run, manifest), manifest)
        assert trained
        tested = groups_in(find_parts(run, manifest).test, manifest) if isinstance(run, FinetuneConfig) else set()
        tested |= {(1, "")} & groups_in(ClipPart(), manifest) if not isinstance(run, FinetuneConfig) else set()
        assert not trained & (judging | tested)
        assert tested or "mine" in config.data.path or prefix in ("pretrain-", "tokenizer-")


def test_no_clip_that_judges_is_pre_trained_on_by_iterate() -> None:
    config = load_config(IterateConfig, str(JOBS / "iterate-base.yaml"))
    assert config.data.splits == ("balanced_train", "unbalanced_train")
    assert {name: task.data.splits for name, task in config.tasks.items()} == {
        "audioset-2m": (), "audioset-20k": ("balanced_train", "eval"), "esc50": (),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "trained", "tested"),
    [
        ("finetune-audioset-20k", {(-1, "balanced_train")}, {(-1, "eval")}),
        ("finetune-audioset-2m", {(-1, "balanced_train"), (-1, "unbalanced_train")}, {(-1, "eval")}),
        ("finetune-esc50", {(fold, "") for fold in (2, 3, 4, 5)}, {(1, "")}),
        ("finetune-emotion", {(fold, "") for fold in (2, 3, 4, 5)}, {(1, "")}),
    ],
)
def test_all_that_does_not_judge_is_trained_on(name: str, trained: set[Any], tested: set[Any]) -> None:
    config = load_config(FinetuneConfig, str(JOBS / f"{name}.yaml"))
    manifest = data_of(config.data.path)
    parts = find_parts(config, manifest)
    assert groups_in(parts.training, manifest) == trained
    assert parts.training.draw is None, "a part of the clips is kept from training"
    assert parts.validation is None
    assert groups_in(parts.test, manifest) == tested


def test_what_the_comments_of_presets_tell_to_override_works() -> None:
    def parts(name: str, *overrides: str) -> Any:
        config = load_config(FinetuneConfig, str(JOBS / f"{name}.yaml"), list(overrides))
        return find_parts(config, data_of(config.data.path))

    for fold in (2, 5):
        assert parts("finetune-esc50", f"folds.test_fold={fold}").test.folds == (fold,)
    watched = ["folds.validation_fraction=null", "folds.validation_split=balanced_train", "validate_every_steps=2000"]
    text = (JOBS / "finetune-audioset-2m.yaml").read_text()
    assert all(override in text for override in watched)
    assert parts("finetune-audioset-2m", *watched).training.splits == ("unbalanced_train",)
    assert parts("finetune-audioset-20k", "folds.validation_fraction=0.1").validation.draw.fraction == 0.1


def published(preset: str, kind: str = "encoder") -> dict[str, Any]:
    if kind == "tokenizer":
        tokenizer = {"patch_size": 16, "num_codes": 1024, "code_dim": 256}
        return {"kind": "random_projection_tokenizer", "config": {"tokenizer": tokenizer}}
    return {"kind": kind, "config": {"encoder": encoder_config(preset).model_dump()}}


@pytest.mark.parametrize(
    ("name", "kind", "run", "starts_from", "parameters"),
    [
        ("pretrain-base-1gpu", PretrainConfig, "pretrain", published("base", "tokenizer"), 113_000_000),
        ("tokenizer-base-1gpu", DistillConfig, "distill", published("base"), 115_000_000),
        ("finetune-audioset-20k", FinetuneConfig, "finetune", published("base"), 91_000_000),
    ],
)
def test_what_is_said_to_fit_24_gb_does_so_by_the_formula(
    name: str, kind: type[Section], run: Any, starts_from: dict[str, Any], parameters: int
) -> None:
    config: Any = load_config(kind, str(JOBS / f"{name}.yaml"))
    state = training_state(config.train.zero_stage, config.train, parameters, 0)
    peak = step_activations(run, config, starts_from, 527).peak_bytes
    assert state.total_bytes + peak < 20 * GIB  # the CUDA context and fragments come on top
