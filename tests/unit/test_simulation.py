"""The simulation of a spot cluster against formulas, bounds that follow from its settings, and its own sums."""

import json

import pytest

from beats_ray import cli
from beats_ray.capacity.intervals import daly_interval, expected_goodput, mtbf_seconds, young_interval
from beats_ray.capacity.settings import MeasuredSettings, SimulateConfig
from beats_ray.capacity.simulate import compare
from beats_ray.capacity.simulation import Outcome, Scenario, simulate
from beats_ray.config import ConfigError, load_config

pytestmark = pytest.mark.unit

FIXED, ELASTIC = Scenario(), Scenario(join_minutes=1.0)
QUIET = {"hourly_preemption": 0.0, "straggles_per_node_day": 0.0, "throttles_per_day": 0.0}
NODES = 25


def config_of(**fields: object) -> SimulateConfig:
    """200 GPUs for 100 h."""
    return SimulateConfig.model_validate({"workers": 8 * NODES, "hours": 100.0, **fields})


def run(config: SimulateConfig, scenario: Scenario = FIXED, minutes: float = 5.0, seed: int = 0) -> Outcome:
    return simulate(config, scenario, checkpoint_seconds=60.0 * minutes, seed=seed)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pause", "mtbf"), [(2.0, 600.0), (30.0, 3600.0), (120.0, 1800.0)])
def test_goodput_is_highest_at_daly_s_interval(pause: float, mtbf: float) -> None:
    best = max(range(1, 4000), key=lambda seconds: expected_goodput(seconds, pause, mtbf, 60.0))
    assert daly_interval(pause, mtbf) == pytest.approx(best, rel=0.03, abs=1.0)


def test_young_s_interval_is_daly_s_where_faults_are_rare() -> None:
    assert young_interval(1.0, 1e8) == pytest.approx(daly_interval(1.0, 1e8), rel=1e-3)


def test_without_faults_only_the_pauses_are_lost() -> None:
    assert expected_goodput(95.0, 5.0, mtbf_seconds(0.0, 100), 60.0) == pytest.approx(0.95)


def test_one_node_in_twenty_an_hour() -> None:
    survivors = 2.718281828 ** (-3600.0 / mtbf_seconds(0.05, 1))
    assert survivors == pytest.approx(0.95)
    assert mtbf_seconds(0.05, 100) == pytest.approx(mtbf_seconds(0.05, 1) / 100)


# --- the simulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [0.5, 2.0, 10.0, 30.0])
def test_with_losses_of_nodes_alone_it_is_what_the_formula_says(minutes: float) -> None:
    config = config_of(**QUIET | {"hourly_preemption": 0.05}, replacement_minutes=0.0, checkpoint_gib=1e-6, hours=2000)
    measured = config.measured
    mtbf = mtbf_seconds(0.05, NODES)
    expected = expected_goodput(60.0 * minutes, measured.checkpoint_pause_seconds, mtbf, measured.recovery_seconds)
    assert run(config, minutes=minutes).goodput == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("scenario", [FIXED, Scenario(spare_nodes=3), ELASTIC, Scenario(join_minutes=20.0)])
def test_every_second_is_accounted_for(scenario: Scenario) -> None:
    outcome = run(config_of(hourly_preemption=0.2, throttled=0.1, straggles_per_node_day=1.0), scenario)
    assert outcome.goodput + outcome.redone + sum(outcome.lost.values()) == pytest.approx(1.0)
    assert min(outcome.goodput, outcome.redone, *outcome.lost.values()) >= 0.0


def test_undisturbed_it_loses_the_pauses_alone() -> None:
    outcome = run(config_of(**QUIET), minutes=5.0)
    pause = MeasuredSettings().checkpoint_pause_seconds
    assert outcome.goodput == pytest.approx(300.0 / (300.0 + pause), rel=1e-4)
    assert outcome.lost["checkpoints"] == pytest.approx(1.0 - outcome.goodput)
    assert (outcome.interruptions, outcome.paid) == (0, pytest.approx(1.0))


def test_a_seed_gives_the_same_run_and_another_seed_another() -> None:
    config = config_of()
    assert run(config, ELASTIC) == run(config, ELASTIC)
    assert run(config, ELASTIC) != run(config, ELASTIC, seed=1)


def test_no_step_is_lost_where_every_node_announces_its_end() -> None:
    config = config_of(hourly_preemption=0.2, noticed=1.0)
    assert run(config).redone == 0.0
    assert run(config_of(hourly_preemption=0.2)).redone > 0.05


def test_a_run_of_a_fixed_size_waits_and_an_elastic_one_goes_on_with_fewer() -> None:
    config = config_of(replacement_minutes=30.0)
    fixed, elastic = run(config), run(config, ELASTIC)
    assert fixed.lost["waiting"] > 0.2
    assert elastic.lost["waiting"] == 0.0
    assert 0.0 < elastic.lost["fewer nodes"] < 0.1
    assert elastic.goodput > 1.3 * fixed.goodput
    assert fixed.lost["fewer nodes"] == 0.0


def test_spare_nodes_save_the_wait_and_cost_their_price() -> None:
    config = config_of(replacement_minutes=10.0)
    bare, spared = run(config), run(config, Scenario(spare_nodes=5))
    assert spared.lost["waiting"] < 0.1 * bare.lost["waiting"]
    assert spared.paid - bare.paid == pytest.approx(5 / NODES, abs=0.02)
    assert spared.useful_of_paid == pytest.approx(spared.goodput / spared.paid)


def test_taking_nodes_in_less_often_interrupts_less() -> None:
    config = config_of(replacement_minutes=2.0, hourly_preemption=0.2)
    assert run(config, Scenario(join_minutes=30.0)).interruptions < 0.8 * run(config, ELASTIC).interruptions


def test_a_slow_node_slows_all_of_them() -> None:
    slow = run(config_of(**QUIET | {"straggles_per_node_day": 200.0}, straggler_minutes=600.0, straggler_speed=0.6))
    assert slow.goodput == pytest.approx(0.6, abs=0.02)


def test_throttled_storage_gives_so_much_and_no_more() -> None:
    always = QUIET | {"throttles_per_day": 2000.0, "throttle_minutes": 1e5}
    assert run(config_of(**always, storage_headroom=2.0, throttled=0.25)).goodput == pytest.approx(0.5, abs=0.01)
    assert run(config_of(**always, storage_headroom=4.0, throttled=0.25)).goodput > 0.98


def test_a_checkpoint_counts_only_when_it_is_written() -> None:
    written_at_once = config_of(checkpoint_gib=0.1)
    for_eight_minutes = config_of(checkpoint_gib=8 * 60 * 108.0 * 8 * NODES / 1024)  # as often, its interval is longer
    assert run(for_eight_minutes, minutes=10.0).redone > 1.6 * run(written_at_once, minutes=10.0).redone


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_comparison_names_the_best_interval_of_each_policy() -> None:
    report = compare(config_of(runs=2, hours=40.0, checkpoint_minutes=[0.5, 5.0, 60.0], join_minutes=[2.0]))
    assert [one["name"] for one in report["policies"]] == [
        "fixed size",
        "fixed size, 8 spare nodes",
        "elastic, joined every 2 min",
    ]
    for policy in report["policies"]:
        assert policy["best"]["goodput"] == max(one["goodput"] for one in policy["by_interval"])
        assert policy["best"]["checkpoint_minutes"] < 60.0
    assert report["young_minutes"] == pytest.approx(young_interval(1.6, mtbf_seconds(0.05, NODES)) / 60.0)


def test_the_command_prints_tables_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["workers=16", "hours=10", "runs=1", "checkpoint_minutes=[1, 10]"]
    assert cli.main(["simulate", *small]) == 0
    shown = capsys.readouterr().out
    assert "Where the time goes" in shown
    assert "Young" in shown
    assert cli.main(["simulate", *small, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["workers"] == 16
    assert [one["workers"] for one in report["data_plane"]][-1] == 16


def test_workers_that_make_no_whole_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers=1001 is not divisible by workers_per_node=8; use 1000"):
        load_config(SimulateConfig, None, ["workers=1001"])
