"""What a run takes on a cluster: each figure follows from its formula, each limit can be the one that holds."""

import json
from pathlib import Path
from typing import Any

import pytest

from beats_ray import cli
from beats_ray.capacity.intervals import expected_goodput, mtbf_seconds
from beats_ray.capacity.plan import Estimate, Work, as_planned, estimate, estimate_run, planned_manifest
from beats_ray.capacity.settings import MeasuredSettings, PlanConfig
from beats_ray.capacity.show import remarks
from beats_ray.capacity.sizing import Load, cache_mib, clips_of_a_block, coordinator_limit, data_plane
from beats_ray.config import ConfigError, TrainSettings, load_config
from beats_ray.data.stream import BLOCK_BYTES, BLOCK_CLIPS
from beats_ray.iterate_plan import inspect, plan_new_run
from tests.support.prepared import write_dataset

pytestmark = pytest.mark.unit

JOBS = Path(__file__).parents[2] / "jobs"
PLANNED = ["planned_data.hours=1000", "planned_data.num_classes=527"]
PRICES = ["cluster.worker_node_price=30", "cluster.data_node_price=2", "cluster.head_node_price=1",
          "cluster.prices_as_of=2026-11-24"]  # fmt: skip
NO_TASKS = [f"tasks.{name}=null" for name in ("audioset-2m", "audioset-20k", "esc50")]
FED = ["measured.coordinator_ms_per_block=0.001"]
"""A coordinator that never holds anything up."""


def config_of(*overrides: str) -> PlanConfig:
    return load_config(PlanConfig, str(JOBS / "iterate-base.yaml"), [*PLANNED, *overrides])


TRAIN = TrainSettings(steps=1000, global_batch_size=320, micro_batch_size=20, num_workers=16, warmup_steps=0)
WORK = Work(
    label="iteration 1 pretrain",
    setting="pretrain.train.num_workers",
    clips=320_000,
    clip_seconds=10.0,
    flops=320_000 * 100e9,  # at 100 TFLOP/s a worker: 1,000 clips/s of each, 20 s in all
    workers=16,
    cpus_per_worker=4.0,
    clips_per_block=20,
    train=TRAIN,
    bytes_per_clip=160_000.0,
)


def estimate_of(*overrides: str, work: Work = WORK) -> Estimate:
    return estimate(work, config_of(*overrides))


# --- sizing -----------------------------------------------------------------------------------------------------------


def test_what_a_load_needs() -> None:
    measured = MeasuredSettings(decode_ms_per_second=0.2, coordinator_ms_per_block=20.0)
    load = Load(clips_per_s=1000.0, clip_seconds=5.0, bytes_per_clip=2**20 / 10, workers=4, clips_per_block=100)
    need = data_plane(load, 512, measured)
    assert need.decode_cores == pytest.approx(1.0)  # 5,000 s of sound a second
    assert need.storage_mib_per_s == pytest.approx(100.0)
    assert need.network_mib_per_s * 2**20 == pytest.approx(5000 * 32_000)
    assert need.object_store_mib == 4096.0  # Ray lets a stream fill half of it
    assert need.coordinator_busy == pytest.approx(0.2)  # 10 blocks a second of 20 ms


def test_a_block_is_as_large_as_the_stream_makes_it() -> None:
    assert clips_of_a_block(1, 8, 5.0) == 128
    assert clips_of_a_block(1, 35, 10.0) == 70
    assert clips_of_a_block(16, 35, 10.0) == 35  # a task decodes so much for all workers, and no more
    assert clips_of_a_block(1, 1, 0.1) <= BLOCK_CLIPS
    assert clips_of_a_block(1, 1, 10.0) * 320_000 <= BLOCK_BYTES


def test_the_coordinator_ends_where_the_measured_one_does() -> None:
    """docs/performance.md: near 6,000 clips/s of 5 s, in blocks of 128."""
    assert coordinator_limit(128, MeasuredSettings()) == pytest.approx(6000, rel=0.1)


def test_decoded_clips_take_two_fifths_of_an_object_store() -> None:
    assert cache_mib(3600.0) == pytest.approx(3600 * 32_000 / 0.4 / 2**20)


# --- one stage --------------------------------------------------------------------------------------------------------


def test_a_stage_takes_its_start_and_its_clips() -> None:
    found = estimate_of(*FED, *PRICES, "measured.start_seconds=40", "measured.checkpoint_pause_seconds=0")
    assert found.wanted_clips_per_s == found.clips_per_s == pytest.approx(16_000)
    assert (found.limit, found.worker_nodes, found.data_nodes) == ("GPUs", 2, 0)
    assert found.hours * 3600 == pytest.approx(40 + 20)
    assert found.cost == pytest.approx(found.hours * (2 * 30 + 1))
    assert found.best_checkpoint_steps is None


@pytest.mark.parametrize(
    ("overrides", "limit", "clips_per_s"),
    [
        ((), "coordinator", 20 * 50),
        (("measured.coordinator_ms_per_block=10",), "coordinator", 20 * 100),
        ((*FED, "cluster.storage_mib_per_s=1525.87890625"), "storage", 10_000),
        ((*FED, "cluster.worker_node_cores=36", "cluster.max_data_nodes=0"), "decoding", 8 / 0.0017),
        ((*FED, "cluster.worker_node_cores=32", "cluster.max_data_nodes=0"), "decoding", 0),
        ((*FED, "cluster.tflops_per_worker=50"), "GPUs", 8_000),
    ],
)
def test_the_slowest_part_sets_the_pace(overrides: tuple[str, ...], limit: str, clips_per_s: float) -> None:
    if clips_per_s:
        found = estimate_of(*overrides)
        assert found.limit == limit
        assert found.clips_per_s == pytest.approx(clips_per_s)
    else:
        with pytest.raises(ConfigError, match=r"leaves no core to decode .* raise cluster\.max_data_nodes"):
            estimate_of(*overrides)


def test_data_nodes_come_where_the_workers_leave_too_few_cores() -> None:
    needed = 16_000 * 10 * 0.17 / 1000  # 27.2 cores
    assert estimate_of(*FED, "cluster.worker_node_cores=46").data_nodes == 0  # 2 x 46 less 64 of the workers: 28
    few = estimate_of(*FED, *PRICES, "cluster.worker_node_cores=45", "cluster.data_node_cores=10")
    assert few.needs.decode_cores == pytest.approx(needed)
    assert few.data_nodes == 3
    assert few.limit == "GPUs"
    assert few.cost == pytest.approx(few.hours * (2 * 30 + 3 * 2 + 1))
    capped = estimate_of(*FED, "cluster.worker_node_cores=45", "cluster.data_node_cores=10", "cluster.max_data_nodes=2")
    assert capped.limit == "decoding"
    assert capped.clips_per_s == pytest.approx(16_000 * 20 / needed)


def test_spot_nodes_cost_what_daly_s_formula_says() -> None:
    calm = estimate_of(*FED, "measured.checkpoint_pause_seconds=0")
    spot = estimate_of(*FED, "cluster.hourly_preemption=0.2", "cluster.replacement_minutes=3")
    mtbf = mtbf_seconds(0.2, 2)
    step_seconds = 320 / 16_000
    expected = expected_goodput(1000 * step_seconds, 1.6, mtbf, 51.0 + 180.0)
    assert spot.goodput == pytest.approx(expected)
    assert spot.hours == pytest.approx(calm.hours / expected)
    assert spot.best_checkpoint_steps is not None
    assert spot.best_checkpoint_steps * step_seconds == pytest.approx((2 * 1.6 * mtbf) ** 0.5, rel=0.1)
    train = TRAIN.model_copy(update={"num_workers": (8, 16)})
    elastic = estimate_of(
        *FED, "cluster.hourly_preemption=0.2", work=Work(**{**vars(WORK), "train": train})
    )  # which does not wait for another node
    assert elastic.goodput == pytest.approx(expected_goodput(1000 * step_seconds, 1.6, mtbf, 51.0))


def test_too_few_nodes_are_named_with_what_would_fit() -> None:
    with pytest.raises(ConfigError) as caught:
        estimate_of("cluster.max_worker_nodes=1")
    text = str(caught.value)
    assert "cluster.max_worker_nodes=1 nodes of 8 workers" in text
    assert "16 workers of iteration 1 pretrain" in text
    assert "lower pretrain.train.num_workers so that at most 8 run" in text


# --- a whole run ------------------------------------------------------------------------------------------------------


def estimates_of(config: PlanConfig) -> dict[str, Estimate]:
    manifest = planned_manifest(config)
    found = inspect(as_planned(config), manifest)
    assert not found.mistakes
    return {one.work.label: one for one in estimate_run(config, plan_new_run(found.stages))}


def test_a_planned_data_set_has_its_hours_and_bytes() -> None:
    manifest = planned_manifest(config_of("planned_data.clip_seconds=8", "planned_data.bytes_per_second=20000"))
    assert manifest.seconds == 3_600_000
    assert manifest.clips == 450_000
    assert sum(shard.bytes for shard in manifest.shards) == 72_000_000_000


def test_every_stage_that_computes_is_there_with_its_own_workers() -> None:
    config = config_of(*NO_TASKS, "sweep.num_trials=8", "sweep.max_concurrent_trials=3")
    stages = estimates_of(config)
    assert list(stages) == [
        f"iteration {iteration} {name}"
        for iteration in (1, 2, 3)
        for name in (["tokenizer", "labels"] if iteration > 1 else []) + ["pretrain", "sweep"]
    ]
    assert [stages[f"iteration 2 {name}"].work.workers for name in ("tokenizer", "labels", "pretrain", "sweep")] == [
        14, 16, 16, 3,
    ]  # fmt: skip
    labels = stages["iteration 2 labels"].work
    assert labels.audio_hours == pytest.approx(1000)
    assert labels.clips_per_block is None
    sweep = stages["iteration 1 sweep"]
    assert sweep.needs.object_store_mib == pytest.approx(cache_mib(3_600_000))
    assert sweep.needs.decode_cores == 0.0
    train = config.finetune.train
    assert sweep.work.clips == 8 * train.steps * train.global_batch_size


def test_a_plan_says_what_holds_its_stages_up_once() -> None:
    config = config_of("cluster.hourly_preemption=0.05", "pretrain.train.checkpoint_every_steps=100000")
    lines = remarks(list(estimates_of(config).values()), config)
    (held,) = [line for line in lines if line.startswith("pretrain: coordinator gives 32%")]
    assert held.endswith("in blocks of 35 clips; raise pretrain.train.micro_batch_size")
    assert any("pretrain.train.checkpoint_every_steps=100000; by Daly's formula" in line for line in lines)
    fed = config_of(*FED)
    assert len(remarks(list(estimates_of(fed).values()), fed)) == 1


def test_a_task_is_planned_by_its_own_data_and_its_runs_at_one_time(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", ())
    task = {"data": {"path": str(tmp_path / "task"), "clip_seconds": 2}, "protocol": "cross-validate"}
    write_dataset(tmp_path / "task", ("a", "b", "c"))
    overrides = ["iterations=1", f"data.path={tmp_path / 'data'}", "pretrain.encoder.preset=tiny"]
    tasks = {"tasks": {"esc": task}, "output": str(tmp_path / "run")}

    def estimated(*more: str) -> Estimate:
        config = load_config(PlanConfig, None, [*overrides, *more], **tasks)
        found = inspect(config)
        assert not found.mistakes
        return estimate_run(config, plan_new_run(found.stages))[-1]

    found = estimated()
    train = PlanConfig(output="-").finetune.train
    assert found.work.label == "iteration 1 cross-validate-esc"
    assert found.work.setting == "tasks.esc.finetune.train.num_workers"
    assert found.work.clips == 4 * train.steps * train.global_batch_size  # a run for each of four folds
    assert found.work.workers == 4 * train.max_workers
    assert found.needs.object_store_mib == pytest.approx(cache_mib(80.0))
    assert estimated("cluster.max_worker_nodes=1", "cluster.workers_per_node=3").work.parallel_runs == 3


@pytest.mark.parametrize(
    ("overrides", "runs", "workers"),
    [
        ([], 8, 8),  # not 24: the repeats of a trial run one after the other
        (["sweep.max_concurrent_trials=5"], 5, 5),
        (["sweep.gpus_per_worker=0.25"], 8, 2),
        (["sweep.gpus_per_worker=0.25", "cluster.max_worker_nodes=1", "cluster.workers_per_node=1"], 4, 1),
        (["cluster.max_worker_nodes=1", "cluster.workers_per_node=1"], 1, 1),
    ],
)
def test_trials_run_side_by_side_and_may_share_a_gpu_and_their_repeats_follow_each_other(
    overrides: list[str], runs: int, workers: int, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "data", ("a", "b", "c"))
    given = ["iterations=1", f"data.path={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "data.clip_seconds=2"]
    given += [
        "pretrain.encoder.preset=tiny",
        "sweep.num_trials=8",
        "sweep.repeats=3",
        "sweep.max_concurrent_trials=null",
    ]
    given += [f"{part}.num_workers=1" for part in ("finetune.train", "pretrain.train", "inference")]
    config = load_config(PlanConfig, None, [*given, "finetune.train.use_gpu=true", *overrides])
    found = inspect(config)
    assert not found.mistakes
    sweep = estimate_run(config, plan_new_run(found.stages))[-1]
    assert sweep.work.label == "iteration 1 sweep"
    assert (sweep.work.parallel_runs, sweep.work.workers) == (runs, workers)
    assert sweep.work.clips == 8 * 3 * config.finetune.train.steps * config.finetune.train.global_batch_size


# --- the command ------------------------------------------------------------------------------------------------------


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    status = cli.main(["plan", str(JOBS / "iterate-base.yaml"), *arguments])
    out, err = capsys.readouterr()
    return status, out, [line.removeprefix("beats-ray: error: ") for line in err.splitlines()]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    status, out, mistakes = plan(capsys, *arguments, "--json")
    assert (status, mistakes) == (0, [])
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_command_prints_hours_needs_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, mistakes = plan(capsys, *PLANNED, *PRICES)
    assert (status, mistakes) == (0, [])
    assert "Plan for 1,000.0 h of sound, 360,000 clips" in out
    assert "prices as of 2026-11-24" in out
    assert "coordinator gives 32%" in out
    assert "left out: tasks audioset-2m, audioset-20k, esc50" in out


def test_a_cluster_s_file_is_put_on_top_and_overrides_on_top_of_that(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("cluster: {tflops_per_worker: 200, workers_per_node: 4}\n")
    found = as_json(capsys, *PLANNED, "--cluster", str(cluster), "cluster.workers_per_node=2")
    assert found["cluster"]["tflops_per_worker"] == 200
    assert found["cluster"]["workers_per_node"] == 2
    assert found["stages"][0]["worker_nodes"] == 8


def test_a_stage_that_never_ends_has_no_hours(capsys: pytest.CaptureFixture[str]) -> None:
    hopeless = ["cluster.hourly_preemption=0.999", "measured.recovery_seconds=1e9"]
    stage = as_json(capsys, *PLANNED, *PRICES, *hopeless)["stages"][0]
    assert (stage["goodput"], stage["hours"], stage["cost"]) == (0.0, None, None)
    status, out, _ = plan(capsys, *PLANNED, *PRICES, *hopeless)
    assert status == 0
    assert "never" in out


def test_a_prepared_data_set_is_read_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", ("a", "b", "c"))
    before = sorted(tmp_path.rglob("*"))
    places = [f"data.path={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "data.clip_seconds=2", "data.splits=[]"]
    found = as_json(capsys, *places, *NO_TASKS)
    labels = {one["label"]: one["audio_hours"] for one in found["stages"]}
    assert labels["iteration 2 labels"] == pytest.approx(80 / 3600)
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_are_lines_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, mistakes = plan(capsys, *PLANNED, "cluster.worker_node_price=30")
    assert (status, out) == (2, "")
    (mistake,) = mistakes
    assert mistake.startswith("cluster.worker_node_price=30 has no day, and prices change; set cluster.prices_as_of")
    _, _, mistakes = plan(capsys, *PLANNED, "cluster.data_node_price=1", "cluster.prices_as_of=2026-11-24")
    assert mistakes == ["cluster.worker_node_price: missing beside the other prices; set it, 0 for nodes of your own"]
    status, out, mistakes = plan(capsys, *PLANNED, "cluster.gpus=7", "measured.start_seconds=-1")
    assert (status, out, len(mistakes)) == (2, "", 2)
    status, out, mistakes = plan(capsys, f"data.path={tmp_path}", f"output={tmp_path / 'run'}")
    assert (status, out) == (2, "")
    assert "not a prepared data set" in mistakes[0]
    status, out, mistakes = plan(capsys, *PLANNED, "cluster.max_worker_nodes=1")
    assert (status, out, len(mistakes)) == (2, "", 1)
