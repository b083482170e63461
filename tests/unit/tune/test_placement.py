"""Room for trials, what they may cost, and what several runs of a trial come to."""

from pathlib import Path
from typing import Any

import pytest
from support.prepared import write_dataset

from beats_ray.config import (
    ConfigError,
    FinetuneConfig,
    IterateConfig,
    StreamSettings,
    SweepConfig,
    SweepSettings,
    UserError,
    load_config,
)
from beats_ray.data.storage import open_place
from beats_ray.iterate import check_plan
from beats_ray.tune.budget import Budget, check_budget
from beats_ray.tune.placement import TrialNeeds, cluster_trials, concurrent_trials, node_resources, trial_needs
from beats_ray.tune.trial import Reports, check_trials, trial_config, validations_of

pytestmark = pytest.mark.unit


def needs_of(*overrides: str, is_streamed: bool = False) -> TrialNeeds:
    config = load_config(SweepConfig, None, ["output=o", "finetune.train.micro_batch_size=4", *overrides])
    return trial_needs(config.sweep, config.finetune.train, StreamSettings(), is_streamed)


GPUS = "finetune.train.use_gpu=true"


@pytest.mark.parametrize(
    ("overrides", "nodes", "most", "count"),
    [
        ([], [{"CPU": 4.0}], None, 4),
        ([], [{"CPU": 4.0}], 2, 2),
        (["finetune.train.cpus_per_worker=3"], [{"CPU": 4.0}, {"CPU": 4.0}], None, 2),  # no worker on two nodes
        (["finetune.train.num_workers=2"], [{"CPU": 3.5}, {"CPU": 2.0}], None, 2),  # 3 + 2 workers, 1 is left over
        ([GPUS], [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}], None, 2),
        ([GPUS, "sweep.gpus_per_worker=0.3", "finetune.train.cpus_per_worker=2"], [{"CPU": 16.0, "GPU": 2.0}], None, 6),
        ([GPUS, "finetune.train.num_workers=4"], [{"CPU": 9.0, "GPU": 8.0}], None, 2),
    ],
)
def test_as_many_trials_run_as_fit_whole(overrides: list[str], nodes: list[Any], most: int | None, count: int) -> None:
    assert concurrent_trials(needs_of(*overrides), nodes, most) == count


def test_streams_of_a_trial_are_given_room_beside_its_workers() -> None:
    needs = needs_of("finetune.train.cpus_per_worker=1", is_streamed=True)
    assert needs.uses_ray_train
    assert needs.reading_cpus == 3.0  # two streams, of two readers at a quarter and one decoder
    assert concurrent_trials(needs, [{"CPU": 8.5}], None) == 2
    assert concurrent_trials(needs, [{"CPU": 7.9}], None) == 1


def test_a_trial_that_never_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 x \(1 CPU\).*cluster has 1 CPU and 0 GPU on 1 nodes"):
        concurrent_trials(needs_of("finetune.train.num_workers=2"), [{"CPU": 1.0}], None)


GROUPS = [({"CPU": 0}, 0), ({"CPU": 64, "GPU": 8}, 1), ({"CPU": 64, "GPU": 8}, 2), ({"CPU": 16}, 1)]
"""Of a cluster as we ship them: the head, GPU nodes on demand and spot, data nodes."""


def scale(
    monkeypatch: pytest.MonkeyPatch, living: list[dict[str, float]], groups: list[Any] | None, node_type: str = ""
) -> None:
    """A cluster of these nodes whose autoscaler may start these groups, of which Ray is asked.

    node_type: of the nodes, which an autoscaler gives them.
    """
    from ray._private.state import GlobalState
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, ClusterResourceState, NodeGroupConfig, NodeState

    config = groups and ClusterConfig(
        node_group_configs=[NodeGroupConfig(resources=resources, max_count=most) for resources, most in groups]
    )
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in living])
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    total = {name: sum(node.get(name, 0.0) for node in living) for name in ("CPU", "GPU")}
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    monkeypatch.setattr(GlobalState, "get_cluster_config", lambda _self: config or None)
    found = ClusterResourceState(node_states=[NodeState(ray_node_type_name=node_type)])
    monkeypatch.setattr("ray._private.worker.global_worker.gcs_client", None, raising=False)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_resource_state", lambda _client: found)


def test_nodes_that_the_autoscaler_may_start_give_room_and_those_that_it_has_started_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = needs_of(GPUS)
    head, gpus = {"object_store_memory": 1e9}, {"CPU": 64.0, "GPU": 8.0, "node:10.0.0.7": 1.0}
    for living in ([head], [head, gpus], [head, gpus, gpus, gpus]):
        scale(monkeypatch, living, GROUPS)
        assert concurrent_trials(needs, node_resources(), None) == 24
    scale(monkeypatch, [head, gpus], None)
    assert node_resources() == [head, gpus]
    scale(monkeypatch, [head, {"CPU": 4.0, "GPU": 1.0}], [({"CPU": 8, "GPU": 1}, -1)])  # an own node, and no limit
    assert concurrent_trials(needs, node_resources(), 50) == 50


def test_on_a_cluster_of_a_head_alone_a_run_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(IterateConfig, None, ["output=o", "inference.use_gpu=true", GPUS])
    scale(monkeypatch, [{}], GROUPS)
    check_plan(config, is_labelled=True)
    scale(monkeypatch, [{}], GROUPS[:1])
    with pytest.raises(UserError, match=r"inference.num_workers=\d+ needs .* CPUs, the cluster has 0"):
        check_plan(config, is_labelled=True)


def test_an_autoscaler_that_says_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(IterateConfig, None, ["output=o", GPUS])
    needs = needs_of(GPUS)
    scale(monkeypatch, [{}], None, node_type="head")
    check_plan(config, is_labelled=True)
    assert "train.num_workers=1 x cpus_per_worker=1 and" in caplog.text
    assert "Waiting: the cluster's autoscaler does not say which nodes it may start" in caplog.text
    assert [cluster_trials(needs, most) for most in (None, 3)] == [1, 3]
    scale(monkeypatch, [{"CPU": 16.0, "GPU": 2.0}], None, node_type="gpu1")
    assert [cluster_trials(needs, most) for most in (None, 3)] == [2, 3]
    scale(monkeypatch, [{}], GROUPS, node_type="head")
    assert cluster_trials(needs, None) == 24
    scale(monkeypatch, [{}], None)  # joined by hand: no more will come
    with pytest.raises(ConfigError, match="a trial needs"):
        cluster_trials(needs, 3)
    with pytest.raises(ConfigError, match="the cluster has 0"):
        check_plan(config, is_labelled=True)


def test_a_sweep_that_will_not_run_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(IterateConfig, None, ["output=o", GPUS])
    scale(monkeypatch, [{"CPU": 100.0}], None)
    check_plan(config, is_labelled=False)
    with pytest.raises(ConfigError, match="a trial needs"):
        check_plan(config, is_labelled=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.gpus_per_worker=0.5"], "trials run on the CPU"),
        (["sweep.gpus_per_worker=0.5", GPUS, "finetune.train.num_workers=2"], "would meet on one GPU"),
        (["finetune.train.num_workers=[1,2]"], "a trial keeps its workers"),
    ],
)
def test_workers_that_cannot_be_placed_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        needs_of(*overrides)


# --- budgets ----------------------------------------------------------------------------------------------------------

ONE_CPU = TrialNeeds(uses_ray_train=False, worker={"CPU": 1.0}, num_workers=1, reading_cpus=0.0)


def test_a_budget_for_less_than_one_trial_is_refused_and_one_that_may_do_is_not() -> None:
    with pytest.raises(ConfigError, match=r"sweep.max_minutes=1: a trial takes at least 83 minutes"):
        check_budget(SweepSettings(max_minutes=1), ONE_CPU, 1e15)
    check_budget(SweepSettings(max_minutes=84), ONE_CPU, 1e15)
    with pytest.raises(ConfigError, match=r"sweep.max_cost=1: a trial costs at least 2.8"):
        check_budget(SweepSettings(max_cost=1, price_per_cpu_hour=2), ONE_CPU, 1e15)


def test_what_was_taken_before_an_interruption_counts(tmp_path: Path) -> None:
    sweep, output = SweepSettings(max_cost=3, price_per_cpu_hour=1), open_place(str(tmp_path))
    first = Budget(sweep, ONE_CPU, output)
    first("a", {"time_this_iter_s": 3600, "time_total_s": 3600})
    first("a", {"time_this_iter_s": 3600, "time_total_s": 7200})
    first("a", {"time_this_iter_s": 3600, "time_total_s": 7200, "done": True})  # the last one again, as Tune shows it
    assert (first.cost, first.used_up) == (pytest.approx(2), None)
    first.write()
    second = Budget(sweep, ONE_CPU, output)
    second("a", {"time_this_iter_s": 1800, "time_total_s": 1800})  # which goes on, and Tune counts from 0
    assert second.seconds_of("a") == 9000
    second("b", {"time_this_iter_s": 1800, "time_total_s": 1800})
    assert second.cost == pytest.approx(3)
    assert second.used_up == "sweep.max_cost"


# --- repeats ----------------------------------------------------------------------------------------------------------


def reports(repeat: int, *done: float) -> Reports:
    config = load_config(
        FinetuneConfig, None, ["output=o", "train.steps=25", "train.warmup_steps=1", "validate_every_steps=10"]
    )
    assert validations_of(config) == 3
    return Reports(
        config, "validation/accuracy", 3, repeat,
        tuple({"validation/accuracy": one, "test/accuracy": one - 0.1} for one in done),
    )  # fmt: skip


def test_a_trial_is_compared_by_its_first_run_and_then_by_the_mean_of_those_that_are_done() -> None:
    first = reports(0)
    assert first.of(10, {"validation/accuracy": 0.2})["validation/accuracy"] == 0.2
    ended = first.of(25, {"validation/accuracy": 0.6, "test/accuracy": 0.5})
    assert (ended["validation/accuracy"], ended["validations"], ended["step"], ended["repeats_done"]) == (0.6, 3, 25, 1)
    second = reports(1, 0.6)
    going = second.of(10, {"validation/accuracy": 0.1})  # far from its end: in no mean
    assert (going["validation/accuracy"], going["test/accuracy"]) == (0.6, pytest.approx(0.5))
    assert (going["validations"], going["step"]) == (4, 35)
    last = reports(2, 0.6, 0.8).of(25, {"validation/accuracy": 0.1, "test/accuracy": 0.0})
    assert last["validation/accuracy"] == pytest.approx(0.5)
    assert last["test/accuracy"] == pytest.approx((0.5 + 0.7 + 0.0) / 3)
    assert [last[f"repeat/{index}"] for index in range(3)] == [0.6, 0.8, 0.1]
    assert (last["validations"], last["step"]) == (9, 75)


def test_repeats_differ_in_their_seed_or_go_round_the_folds(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, ("x", "y"))
    given = ["output=o", f"data.path={tmp_path}", "sweep.repeats=4", "finetune.folds.test_fold=3"]
    seeds = load_config(SweepConfig, None, given)
    found = [trial_config(seeds, "t", {}, manifest, repeat) for repeat in range(4)]
    assert [one.train.seed for one in found] == [0, 1, 2, 3]
    assert len({one.output for one in found}) == 4
    folds = load_config(SweepConfig, None, [*given, "sweep.repeat_over=folds"])
    check_trials(folds, manifest)
    found = [trial_config(folds, "t", {}, manifest, repeat) for repeat in range(4)]
    pairs = [(one.folds.test_fold, one.folds.validation_fold) for one in found[1:]]
    assert pairs == [(4, 1), (1, 2), (2, 3)]
    with pytest.raises(ConfigError, match=r"needs a test fold and at least 5 folds; .* has \[1, 2, 3, 4\]"):
        check_trials(load_config(SweepConfig, None, [*given, "sweep.repeat_over=folds", "sweep.repeats=5"]), manifest)
