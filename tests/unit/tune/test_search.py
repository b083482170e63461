"""What a searcher proposes, what it is told, and what it knows from before."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from beats_ray.config import ConfigError, SweepConfig, SweepSettings, load_config
from beats_ray.tune.search import SettingsSearch, num_settings
from beats_ray.tune.warm_start import read_known

pytestmark = pytest.mark.unit

METRIC = "validation/accuracy"
SPACE = {
    "train.learning_rate": {"distribution": "loguniform", "low": 1e-4, "high": 1e-2},
    "augment.mixup": {"distribution": "choice", "values": [0.0, 0.8]},
}


def sweep_of(space: dict[str, Any] | None = None, **settings: Any) -> SweepSettings:
    return load_config(SweepConfig, None, ["output=o"], sweep={"space": space or SPACE, **settings}).sweep


def search_of(sweep: SweepSettings, objectives: dict[str, str] | None = None, **more: Any) -> SettingsSearch:
    return SettingsSearch(sweep, objectives or {METRIC: "max"}, 4, **more)


def finish(search: SettingsSearch, trial: str, value: float, validations: int = 4, error: bool = False) -> None:
    result = {METRIC: value, "validation/loss": 1 - value, "validations": validations}
    search.on_trial_complete(trial, result, error)


def states(search: SettingsSearch) -> list[str]:
    return [trial.state.name for trial in search._study.get_trials()]


def test_the_first_trials_are_the_given_ones_and_what_they_leave_out_is_drawn() -> None:
    search = search_of(sweep_of(start=[{"train.learning_rate": 3e-3, "augment.mixup": 0.8}, {"augment.mixup": 0.0}]))
    first, second = search.suggest("a"), search.suggest("b")
    assert (first["train.learning_rate"], first["augment.mixup"]) == (3e-3, 0.8)
    assert second["augment.mixup"] == 0.0
    assert 1e-4 <= second["train.learning_rate"] <= 1e-2


def test_each_setting_goes_to_every_encoder_and_counts_as_their_mean() -> None:
    search = search_of(sweep_of(), encoders=("e0", "e1"))
    configs = [search.suggest(name) for name in "abcd"]
    assert [config.pop("encoder") for config in configs] == ["e0", "e1", "e0", "e1"]
    assert configs[0] == configs[1]
    assert configs[2] == configs[3]
    assert configs[0] != configs[2]
    finish(search, "a", 0.5)
    assert states(search)[0] == "RUNNING"  # nothing is known before both are done
    finish(search, "b", 0.7)
    assert search._study.get_trials()[0].value == pytest.approx(0.6)


def test_a_stopped_trial_is_told_as_stopped_and_a_failed_or_endless_one_as_failed() -> None:
    search = search_of(sweep_of())
    for name in "abcd":
        search.suggest(name)
    search.on_trial_result("a", {METRIC: 0.2, "validations": 1})
    finish(search, "a", 0.3, validations=2)
    search.on_trial_complete("b", None, error=True)
    finish(search, "c", float("nan"))
    finish(search, "d", 0.9)
    assert states(search) == ["PRUNED", "FAIL", "FAIL", "COMPLETE"]
    assert search._study.get_trials()[0].intermediate_values == {1: 0.2, 2: 0.3}


def test_a_trial_that_fails_and_is_run_again_counts_once() -> None:
    search = search_of(sweep_of(), encoders=("e0", "e1"))
    search.suggest("a")
    search.suggest("b")
    search.on_trial_complete("a", None, error=True)
    finish(search, "a", 0.9)
    assert states(search) == ["RUNNING"]  # of the two encoders one is not done
    finish(search, "b", 0.9)
    assert states(search) == ["FAIL"]


def test_a_restored_searcher_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def tried(search: SettingsSearch, first: int, count: int) -> list[dict[str, Any]]:
        found = []
        for number in range(first, first + count):
            found.append(search.suggest(str(number)))
            finish(search, str(number), 1.0 - found[-1]["train.learning_rate"])
        return found

    undisturbed = tried(search_of(sweep_of()), 0, 6)
    first = search_of(sweep_of())
    found = tried(first, 0, 3)
    first.save(str(tmp_path / "state"))
    second = search_of(sweep_of(seed=7))
    second.restore(str(tmp_path / "state"))
    assert found + tried(second, 3, 3) == undisturbed


def test_tpe_finds_more_than_chance_on_a_peak() -> None:
    def near(search_name: str) -> float:
        close = 0
        for seed in range(5):
            search = search_of(sweep_of(search=search_name, num_trials=24, seed=seed))
            for number in range(24):
                rate = search.suggest(str(number))["train.learning_rate"]
                finish(search, str(number), 1 - abs(rate - 2e-3) * 100)
                close += number >= 12 and 1e-3 < rate < 3e-3
        return close / 60

    assert near("optuna") > near("random") + 0.1


def test_several_objectives_are_all_searched_for() -> None:
    search = search_of(sweep_of(), {METRIC: "max", "validation/loss": "min"})
    search.suggest("a")
    finish(search, "a", 0.7)
    assert search._study.get_trials()[0].values == pytest.approx([0.7, 0.3])
    assert search._study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]


def test_a_grid_is_gone_through_in_its_order_and_again_where_other_parameters_are_drawn() -> None:
    grid = {"augment.mixup": {"distribution": "grid", "values": [0.0, 0.4, 0.8]}}
    both = grid | {"train.learning_rate": SPACE["train.learning_rate"]}
    alone, drawn = (sweep_of(space, search="grid", num_trials=7) for space in (grid, both))
    assert (num_settings(alone), num_settings(drawn)) == (3, 6)
    search = search_of(drawn)
    found = [search.suggest(str(number)) for number in range(6)]
    assert [one["augment.mixup"] for one in found] == [0.0, 0.4, 0.8] * 2
    assert len({one["train.learning_rate"] for one in found}) == 6


def board(folder: Path, *rows: tuple[dict[str, Any], float | None, bool], metric: str = METRIC) -> str:
    trials = [
        {"config": config, "validation_accuracy": value, "stopped_early": stopped, "status": "complete"}
        for config, value, stopped in rows
    ]
    (folder / "leaderboard.json").write_text(json.dumps({"metric": metric, "trials": trials}))
    return str(folder)


def test_an_earlier_sweep_s_finished_trials_are_known_by_the_shared_parameters(tmp_path: Path) -> None:
    path = board(
        tmp_path,
        ({"train.learning_rate": 1e-3, "dropout": 0.1}, 0.8, False),
        ({"train.learning_rate": 1e-3, "dropout": 0.2}, 0.6, False),  # the same in this space: their mean counts
        ({"train.learning_rate": 5.0, "dropout": 0.1}, 0.9, False),  # outside of it
        ({"train.learning_rate": 2e-3, "dropout": 0.1}, 0.1, True),
        ({"train.learning_rate": 3e-3, "dropout": 0.1}, None, False),
    )
    sweep = sweep_of(warm_start=path)
    known = read_known(sweep, METRIC)
    assert known == (({"train.learning_rate": 1e-3}, pytest.approx(0.7)),)
    search = search_of(sweep, known=known)
    assert states(search) == ["COMPLETE"]
    search.suggest("a")
    finish(search, "a", 0.5)
    assert states(search) == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        ([({"train.learning_rate": 1e-3}, 0.5, True)], METRIC, "has no trial that ran to its end"),
        ([({"dropout": 0.1}, 0.5, False)], METRIC, "has nothing in common with this one"),
        ([({"train.learning_rate": 1.0}, 0.5, False)], METRIC, "none of its 1 finished trials lies in this space"),
        ([({"train.learning_rate": 1e-3}, 0.5, False)], "validation/loss", "compared by validation/loss"),
    ],
)
def test_an_earlier_sweep_that_does_not_fit_is_refused(
    rows: list[Any], metric: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.warm_start=") as caught:
        read_known(sweep_of(warm_start=board(tmp_path, *rows, metric=metric)), METRIC)
    assert message in str(caught.value)


def test_a_place_without_a_leaderboard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no leaderboard\.json there"):
        read_known(sweep_of(warm_start=str(tmp_path)), METRIC)
    (tmp_path / "leaderboard.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no leaderboard"):
        read_known(sweep_of(warm_start=f"{tmp_path}/leaderboard.json"), METRIC)
