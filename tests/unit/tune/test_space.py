"""Search spaces: what may be drawn is drawn, what may not is refused before anything runs."""

from pathlib import Path
from typing import Any

import optuna
import pytest

from beats_ray.config import (
    ConfigError,
    FinetuneConfig,
    FinetuneSettings,
    SweepConfig,
    SweepSettings,
    load_config,
    replace,
)
from beats_ray.tune.space import check_space, combinations, contains, draw
from beats_ray.tune.sweep import check_search

pytestmark = pytest.mark.unit

JOBS = Path(__file__).parents[3] / "jobs"

RATE = {"distribution": "loguniform", "low": 1e-4, "high": 1e-2}
MIXUP = {"distribution": "choice", "values": [0.0, 0.8]}


def sweep_of(space: dict[str, Any], **settings: Any) -> SweepSettings:
    return load_config(SweepConfig, None, ["output=o"], sweep={"space": space, **settings}).sweep


def draws(sweep: SweepSettings, count: int = 60) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [draw(study.ask(), sweep) for _ in range(count)]


def test_every_kind_of_parameter_draws_what_it_says_up_to_both_ends() -> None:
    sweep = sweep_of(
        {
            "train.learning_rate": RATE,
            "dropout": {"distribution": "uniform", "low": 0.0, "high": 0.35, "step": 0.1},
            "augment.num_time_masks": {"distribution": "integer", "low": 0, "high": 5, "step": 2},
            "augment.mixup": MIXUP,
        }
    )
    found = draws(sweep)
    assert {round(one["dropout"], 6) for one in found} == {0.0, 0.1, 0.2, 0.3}  # .35 is on no step
    assert {one["augment.num_time_masks"] for one in found} == {0, 2, 4}
    assert {type(one["augment.num_time_masks"]) for one in found} == {int}
    assert {one["augment.mixup"] for one in found} == {0.0, 0.8}
    rates = [one["train.learning_rate"] for one in found]
    assert 1e-4 <= min(rates) < 3e-4
    assert 3e-3 < max(rates) <= 1e-2
    for one in found:
        assert all(contains(sweep.space[name], value) for name, value in one.items())
        replace(FinetuneSettings(), one)


def test_a_conditional_parameter_is_drawn_under_its_condition_alone() -> None:
    space = {
        "augment.gain_db": {"distribution": "uniform", "low": 0, "high": 6, "when": {"augment.mixup_of": ["fbank"]}},
        "augment.mixup_of": {
            "distribution": "choice",
            "values": ["fbank", "waveform"],
            "when": {"augment.mixup": [0.8]},
        },
        "augment.mixup": MIXUP,
    }
    found = draws(sweep_of(space))
    assert {(one["augment.mixup"], one.get("augment.mixup_of")) for one in found} == {
        (0.0, None), (0.8, "fbank"), (0.8, "waveform"),
    }  # fmt: skip
    assert all(("augment.gain_db" in one) == (one.get("augment.mixup_of") == "fbank") for one in found)


def test_a_grid_has_each_combination_once_and_none_that_its_conditions_exclude() -> None:
    space = {
        "augment.mixup": {"distribution": "grid", "values": [0.0, 0.4, 0.8]},
        "augment.mixup_of": {"distribution": "grid", "values": ["waveform", "fbank"], "when": {"augment.mixup": [0.8]}},
        "dropout": {"distribution": "uniform", "low": 0, "high": 0.5},
    }
    found = list(combinations(sweep_of(space, search="grid")))
    assert found == [
        {"augment.mixup": 0.0},
        {"augment.mixup": 0.4},
        {"augment.mixup": 0.8, "augment.mixup_of": "waveform"},
        {"augment.mixup": 0.8, "augment.mixup_of": "fbank"},
    ]


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        ({"train.learning_rate": RATE | {"low": 1.0}}, {}, "low=1.0, high=0.01 is an empty range"),
        ({"dropout": {"distribution": "uniform", "low": 0, "high": 1, "step": 2}}, {}, "step=2 does not divide"),
        ({"dropout": {"distribution": "integer", "low": 0.5, "high": 1}}, {}, "are to be whole numbers"),
        ({"train.learning_rate": RATE | {"step": 1e-3}}, {}, "step=0.001 has no meaning for loguniform"),
        ({"dropout": {"distribution": "choice", "values": []}}, {}, "values is empty"),
        ({"dropout": {"distribution": "choice", "values": [0, 0]}}, {}, "names one twice"),
        ({"dropout": {"distribution": "uniform", "values": [0, 1]}}, {}, "is for choice and grid"),
        ({}, {}, "space is empty"),
        ({"dropout": MIXUP | {"when": {"pooling": ["mean"]}}}, {}, "space.dropout.when.pooling: is not in the space"),
        ({"dropout": MIXUP | {"when": {"train.learning_rate": [1]}}, "train.learning_rate": RATE}, {}, "has no list"),
        ({"dropout": MIXUP | {"when": {"augment.mixup": [0.4]}}, "augment.mixup": MIXUP}, {}, "can never hold"),
        ({"dropout": MIXUP | {"when": {"dropout": [0.8]}}}, {}, "depend on each other in a circle"),
        ({"dropout": MIXUP | {"distribution": "grid"}}, {}, "distribution=grid needs search=grid"),
        ({"dropout": MIXUP}, {"search": "grid"}, "search=grid needs a parameter with distribution=grid"),
        ({"dropout": MIXUP}, {"search": "bohb"}, "search=bohb needs scheduler=hyperband"),
        ({"dropout": MIXUP}, {"scheduler": "pbt"}, "scheduler=pbt needs search=random"),
        ({"dropout": MIXUP}, {"scheduler": "pbt", "search": "random", "repeats": 2}, "has no repeats=2"),
        ({"dropout": MIXUP}, {"max_cost": 3}, "max_cost=3 needs a price"),
        ({"dropout": MIXUP}, {"num_trials": 0}, "num_trials=0"),
        ({"dropout": MIXUP}, {"warm_start": "x", "search": "random"}, "learns from no trial"),
        ({"dropout": MIXUP}, {"search": "bohb", "scheduler": "hyperband",
                              "objectives": {"validation/loss": "min", "validation/accuracy": "max"}}, "several need"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_sweep_alone_is_named(space: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep_of(space, **settings)
    assert message in str(caught.value)
    assert str(caught.value).startswith("sweep.")


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        ({"train.learning_rat": RATE}, {}, "is no fine-tuning setting; did you mean train.learning_rate?"),
        ({"dropout": {"distribution": "uniform", "low": 0, "high": 2}}, {}, "sweep.space.dropout: may be 2"),
        ({"train.average_every_steps": {"distribution": "uniform", "low": 2, "high": 9}}, {}, "distribution=integer"),
        ({"folds.test_fold": {"distribution": "choice", "values": [1, 2]}}, {}, "judged by different clips"),
        ({"train.steps": {"distribution": "choice", "values": [3000, 6000]}}, {}, "far they are from the same end"),
        ({"train.num_workers": {"distribution": "choice", "values": [1, 2]}}, {}, "room for trials is counted"),
        ({"train.seed": {"distribution": "choice", "values": [1, 2]}}, {"repeats": 3}, "what sweep.repeats differ in"),
        ({"pooling": {"distribution": "choice", "values": ["mean"]}}, {"scheduler": "pbt", "search": "random"},
         "cannot change within a run"),
        ({"dropout": MIXUP}, {"start": [{"pooling": "mean"}]}, "sweep.start.0.pooling: is not in sweep.space"),
        ({"dropout": MIXUP}, {"start": [{"dropout": 0.4}]}, "is outside sweep.space.dropout"),
        ({"dropout": MIXUP | {"distribution": "grid"}}, {"search": "grid", "num_trials": 1}, "the grid has 2"),
    ],
)  # fmt: skip
def test_a_mistake_beside_the_settings_is_named(space: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_space(sweep_of(space, **settings), FinetuneSettings())
    assert message in str(caught.value)


def test_the_default_space_fits_the_default_settings() -> None:
    check_space(SweepSettings(), FinetuneSettings())


@pytest.mark.parametrize("name", ["esc50", "audioset-20k", "audioset-2m", "folder"])
def test_a_preset_s_space_fits_and_its_first_trial_is_that_of_the_fine_tuning_preset(name: str) -> None:
    sweep = load_config(SweepConfig, str(JOBS / f"sweep-{name}.yaml"))
    check_search(sweep.finetune, sweep.sweep)
    job = load_config(FinetuneConfig, str(JOBS / f"finetune-{name}.yaml"))
    first = replace(sweep.finetune, dict(sweep.sweep.start[0]))
    for part, names in (("train", ("learning_rate", "layer_decay", "global_batch_size")), ("augment", ("mixup",))):
        ours, theirs = getattr(first, part), getattr(job, part)
        assert [getattr(ours, one) for one in names] == [getattr(theirs, one) for one in names]
