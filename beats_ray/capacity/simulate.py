"""`beats-ray simulate`: what a spot cluster leaves of a large run, with each policy, and where the data plane ends.

    report = compare(SimulateConfig())
    report["policies"][0]["best"]["goodput"]

Three questions, a table each: how much training counts under which policy, which distance between checkpoints is best
beside the formulas of Young and Daly, and how many GPUs one stream can feed. The last one is reckoned without faults.
"""

import json
import statistics
from dataclasses import asdict
from typing import Any

from beats_ray.capacity.intervals import daly_interval, mtbf_seconds, young_interval
from beats_ray.capacity.settings import SimulateConfig
from beats_ray.capacity.simulation import LOSSES, Outcome, Scenario, simulate
from beats_ray.capacity.sizing import MIB, Load, clips_of_a_block, coordinator_limit, data_plane
from beats_ray.config import StreamSettings
from beats_ray.console import Console

GPUS_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def scenarios_of(config: SimulateConfig) -> list[Scenario]:
    """The policies that are compared."""
    spare = [Scenario(spare_nodes=config.spare_nodes)] if config.spare_nodes else []
    return [Scenario(), *spare, *(Scenario(join_minutes=minutes) for minutes in config.join_minutes)]


def compare(config: SimulateConfig) -> dict[str, Any]:
    """All results: the simulated ones of each policy and distance, the formulas' distances, the data plane."""
    pause = config.measured.checkpoint_pause_seconds
    mtbf = mtbf_seconds(config.hourly_preemption, config.nodes)
    policies: list[dict[str, Any]] = []
    for scenario in scenarios_of(config):
        tried = [_mean(config, scenario, minutes) for minutes in config.checkpoint_minutes]
        best = max(tried, key=lambda one: float(one["goodput"]))
        policies.append({"name": scenario.name, "by_interval": tried, "best": best})
    return {
        "config": config.model_dump(mode="json"),
        "mtbf_minutes": mtbf / 60.0,
        "young_minutes": young_interval(pause, mtbf) / 60.0,
        "daly_minutes": daly_interval(pause, mtbf) / 60.0,
        "policies": policies,
        "data_plane": [_feed(config, workers) for workers in (*GPUS_SHOWN, config.workers)],
    }


def _mean(config: SimulateConfig, scenario: Scenario, minutes: float) -> dict[str, Any]:
    seeds = range(config.seed, config.seed + config.runs)
    outcomes = [simulate(config, scenario, checkpoint_seconds=60.0 * minutes, seed=seed) for seed in seeds]

    def mean(value: str) -> float:
        return statistics.fmean(getattr(one, value) for one in outcomes)

    return {
        "checkpoint_minutes": minutes,
        "goodput": mean("goodput"),
        "goodput_deviation": statistics.pstdev(one.goodput for one in outcomes),
        "useful_of_paid": mean("useful_of_paid"),
        "redone": mean("redone"),
        "lost": {cause: _mean_loss(outcomes, cause) for cause in LOSSES},
        "interruptions_per_hour": mean("interruptions") / config.hours,
    }


def _mean_loss(outcomes: list[Outcome], cause: str) -> float:
    return statistics.fmean(one.lost[cause] for one in outcomes)


def _feed(config: SimulateConfig, workers: int) -> dict[str, Any]:
    """What so many GPUs need where nothing fails, and the share of their speed that the coordinators can feed."""
    streams = 1 if config.workers_per_stream is None else -(-workers // config.workers_per_stream)
    clips_per_s = workers * config.tflops_per_worker * 1000.0 / config.gflop_per_clip
    block = clips_of_a_block(-(-workers // streams), config.micro_batch_size, config.clip_seconds)
    load = Load(
        clips_per_s, config.clip_seconds, config.clip_seconds * config.bytes_per_second, workers, block, streams
    )
    limit = coordinator_limit(block, config.measured, streams)
    needs = asdict(data_plane(load, StreamSettings().buffer_mib, config.measured))
    return {"workers": workers, "clips_per_s": clips_per_s, "coordinator_clips_per_s": limit} | needs


# --- the command ------------------------------------------------------------------------------------------------------


def run_simulate(config: SimulateConfig, console: Console, as_json: bool = False) -> None:
    """Prints the three tables, or one JSON object."""
    report = compare(config)
    if as_json:
        print(json.dumps(report))
        return
    console.note(
        f"{config.workers:,} GPUs on {config.nodes:,} nodes, {config.hourly_preemption:.0%} of them taken away in an "
        f"hour: one every {report['mtbf_minutes']:.1f} min; {config.runs} runs of {config.hours:g} h each"
    )
    _show_policies(report, console)
    _show_intervals(report, console)
    _show_data_plane(report, console)


def _show_policies(report: dict[str, Any], console: Console) -> None:
    rows = []
    for policy in report["policies"]:
        best = policy["best"]
        shares = [best["goodput"], best["useful_of_paid"], best["redone"], *best["lost"].values()]
        rows.append([policy["name"], f"{best['checkpoint_minutes']:g}", *(f"{share:.1%}" for share in shares)])
    columns = ["policy", "checkpoint, min", "goodput", "of what is paid", "redone", *LOSSES]
    console.table("Where the time goes, at the best distance between checkpoints", columns, rows)


def _show_intervals(report: dict[str, Any], console: Console) -> None:
    policies = report["policies"]
    rows = []
    for tried in zip(*(policy["by_interval"] for policy in policies), strict=True):
        shown = [f"{one['goodput']:.3f} ± {one['goodput_deviation']:.3f}" for one in tried]
        rows.append([f"{tried[0]['checkpoint_minutes']:g}", *shown])
    console.table("Goodput", ["checkpoint, min", *(policy["name"] for policy in policies)], rows)
    console.note(
        f"by formula, for losses of nodes alone: Young {report['young_minutes']:.2f} min, "
        f"Daly {report['daly_minutes']:.2f} min"
    )


def _show_data_plane(report: dict[str, Any], console: Console) -> None:
    rows = [
        [
            f"{one['workers']:,}",
            f"{one['clips_per_s']:,.0f}",
            f"{one['decode_cores']:,.0f}",
            f"{one['storage_mib_per_s'] * MIB / 1e9:,.2f}",
            f"{one['network_mib_per_s'] * MIB / 1e9:,.2f}",
            f"{one['object_store_mib'] / 1024:,.0f}",
            f"{one['coordinator_clips_per_s']:,.0f}",
            f"{min(1.0, 1.0 / one['coordinator_busy']):.1%}",
        ]
        for one in report["data_plane"]
    ]
    columns = ["GPUs", "clips/s", "decode cores", "storage GB/s", "network GB/s", "object store GiB",
               "coordinators give, clips/s", "speed that leaves"]  # fmt: skip
    number = report["config"]["workers_per_stream"]
    title = "One stream for all GPUs" if number is None else f"One stream for each {number} GPUs"
    console.table(title, columns, rows)
    ends = [one["workers"] for one in report["data_plane"] if one["coordinator_busy"] > 1.0]
    if ends:
        console.note(
            f"the coordinators no longer feed {min(ends):,} GPUs; set workers_per_stream, see docs/operations.md"
        )
