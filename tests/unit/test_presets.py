"""The presets of `jobs/` that state the paper's settings have them, whatever number of GPUs they are written for."""

from pathlib import Path
from typing import Any

import pytest

from beats_ray.config import (
    DistillConfig,
    FinetuneConfig,
    IterateConfig,
    PretrainConfig,
    Section,
    TrainSettings,
    load_config,
)
from beats_ray.models.config import encoder_config
from beats_ray.train.checks import Inputs, resolve_settings, settings_mistakes
from beats_ray.train.memory import step_activations, training_state

pytestmark = pytest.mark.unit

JOBS = Path(__file__).parents[2] / "jobs"
GIB = 2**30

Figures = tuple[float, int, int, float, float]
"""Seconds of sound in a step, steps, warm-up steps, peak rate, layer decay."""

PRETRAINING: Figures = (5600, 400_000, 32_000, 5e-4, 1.0)
TOKENIZER: Figures = (1400, 400_000, 32_000, 5e-5, 1.0)
AUDIOSET_2M: Figures = (10_000, 50_000, 10_000, 1e-4, 0.6)
ESC50: Figures = (64 * 5, 6_000, 600, 3e-5, 0.2)
SUPERVISED_TOKENIZER: Figures = (1400, 400_000, 32_000, 5e-4, 1.0)
AUDIOSET_20K: Figures = (800, 80_000, 8_000, 3e-5, 0.3)
PAPER: list[tuple[str, type[Section], list[str], str, Figures]] = [
    ("pretrain-base", PretrainConfig, [], "", PRETRAINING),
    ("pretrain-base", PretrainConfig, ["train.num_workers=8"], "", PRETRAINING),
    ("pretrain-base-1gpu", PretrainConfig, [], "", PRETRAINING),
    ("pretrain-large", PretrainConfig, [], "", PRETRAINING),
    ("pretrain-large", PretrainConfig, ["train.num_workers=8"], "", PRETRAINING),
    ("tokenizer-base", DistillConfig, [], "", TOKENIZER),
    ("tokenizer-base", DistillConfig, ["train.num_workers=7", "train.micro_batch_size=20"], "", TOKENIZER),
    ("tokenizer-base-1gpu", DistillConfig, [], "", TOKENIZER),
    ("tokenizer-base-supervised", DistillConfig, [], "", SUPERVISED_TOKENIZER),
    ("tokenizer-large", DistillConfig, [], "", TOKENIZER),
    ("iterate-base", IterateConfig, [], "pretrain", PRETRAINING),
    ("iterate-base", IterateConfig, [], "distill", TOKENIZER),
    ("iterate-base", IterateConfig, [], "tasks.audioset-2m.finetune", AUDIOSET_2M),
    ("iterate-base", IterateConfig, [], "tasks.audioset-20k.finetune", AUDIOSET_20K),
    ("iterate-base", IterateConfig, [], "tasks.esc50.finetune", ESC50),
    ("iterate-1gpu", IterateConfig, [], "pretrain", PRETRAINING),
    ("iterate-1gpu", IterateConfig, [], "distill", TOKENIZER),
    ("iterate-1gpu", IterateConfig, [], "tasks.esc50.finetune", ESC50),
    ("finetune-audioset-2m", FinetuneConfig, [], "", AUDIOSET_2M),
    ("finetune-audioset-20k", FinetuneConfig, [], "", AUDIOSET_20K),
    ("finetune-esc50", FinetuneConfig, [], "", ESC50),
]


@pytest.mark.parametrize(("name", "kind", "overrides", "section", "figures"), PAPER)
def test_a_preset_has_the_paper_s_figures(
    name: str, kind: type[Section], overrides: list[str], section: str, figures: Figures
) -> None:
    config: Any = load_config(kind, str(JOBS / f"{name}.yaml"), overrides)
    clip_seconds = config.data.clip_seconds
    *task, section = section.rsplit(".", 1)
    if task:
        config = config.tasks[task[0].removeprefix("tasks.")]
        clip_seconds = config.data.clip_seconds
    if figures is SUPERVISED_TOKENIZER:  # a teacher that is refused where the preset's rate would be of no effect
        inputs = Inputs(published("base", "classifier"), None, [])
        assert settings_mistakes("distill", config, inputs) == []
        config = resolve_settings(config, inputs)
    train: TrainSettings = (getattr(config, section) if section else config).train
    seconds, steps, warmup, rate, decay = figures
    assert train.global_batch_size * clip_seconds == pytest.approx(seconds, rel=0.02)
    assert train.accumulation_steps(train.max_workers) * train.max_workers * train.micro_batch_size == (
        train.global_batch_size
    )
    assert (train.steps, train.warmup_steps, train.learning_rate, train.layer_decay) == (steps, warmup, rate, decay)
    assert train.betas == (0.9, 0.98)
    assert (train.epsilon, train.weight_decay, train.max_grad_norm) == (1e-12, 0.01, 1.0)


def test_presets_of_one_thing_differ_in_how_it_runs_alone() -> None:
    for kind, first, second in (
        (PretrainConfig, "pretrain-base", "pretrain-base-1gpu"),
        (DistillConfig, "tokenizer-base", "tokenizer-base-1gpu"),
    ):
        one, other = (load_config(kind, str(JOBS / f"{name}.yaml")).model_dump() for name in (first, second))
        train, other_train = one.pop("train"), other.pop("train")
        assert one == other
        differing = {name for name in train if train[name] != other_train[name]}
        assert differing <= {"num_workers", "micro_batch_size", "cpus_per_worker"}
    for name in ("pretrain-base", "pretrain-base-1gpu", "pretrain-large"):
        config = load_config(PretrainConfig, str(JOBS / f"{name}.yaml"))
        assert (config.masking.ratio, config.predictor.num_layers, config.predictor.mask_vector) == (0.75, 3, "zero")
        assert config.data.splits == ("balanced_train", "unbalanced_train")  # never the clips that judge


def test_no_clip_that_judges_is_pre_trained_on() -> None:
    config = load_config(IterateConfig, str(JOBS / "iterate-base.yaml"))
    assert config.data.splits == ("balanced_train", "unbalanced_train")
    tasks = config.tasks.items()
    assert {name: task.data.splits for name, task in tasks} == {
        "audioset-2m": (), "audioset-20k": ("balanced_train", "eval"), "esc50": (),
    }  # fmt: skip
    assert config.tasks["esc50"].finetune.augment.mixup == 0


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
