"""What `beats-ray plan` prints: hours and cost of each stage, then what the cluster has to give for it."""

import json
import math
from dataclasses import asdict
from typing import Any

from beats_ray.capacity.plan import Estimate, as_planned, estimate_run, planned_manifest
from beats_ray.capacity.settings import PlanConfig
from beats_ray.capacity.sizing import MIB
from beats_ray.config import ConfigError, read_values, validate
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest
from beats_ray.iterate_plan import inspect, plan_new_run, plan_stages

LIKELY_SLOWER = 0.95
"""Share of the workers' speed below which the plan says what holds them up."""


def show_plan(
    path: str | None, overrides: list[str], cluster: str | None, as_json: bool, console: Console
) -> list[str]:
    """Prints the plan that these arguments mean, or returns a line for every mistake in them.

    path: settings of a run of all iterations. cluster: a second YAML file, put on top of it.
    """
    on_top, lines = read_values(PlanConfig, cluster)
    values, more = read_values(PlanConfig, path, overrides, **on_top)
    config = None
    try:
        config = validate(PlanConfig, values)
    except ConfigError as error:
        more += error.mistakes
    if config is None or lines or more:
        return list(dict.fromkeys(lines + more))
    planned = None
    left_out: tuple[str, ...] = ()
    if config.planned_data.hours is not None:
        planned = planned_manifest(config)
        left_out = tuple(config.tasks)
        config = as_planned(config)
    found = inspect(config, planned)
    if found.mistakes:
        return list(dict.fromkeys(map(str, found.mistakes)))
    rows = plan_stages(found.stages) if planned is None else plan_new_run(found.stages)
    try:
        estimates = estimate_run(config, rows)
    except ConfigError as error:
        return list(error.mistakes)
    if as_json:
        print(json.dumps(_as_json(estimates, config)))
    else:
        _print(estimates, config, found.stages[0].manifest, console)
        if left_out:
            console.note(f"left out: tasks {', '.join(left_out)}, which can be planned once their data are prepared")
    return []


def _as_json(estimates: list[Estimate], config: PlanConfig) -> dict[str, Any]:
    stages = []
    for one in estimates:
        values = asdict(one) | {"label": one.work.label, "audio_hours": one.work.audio_hours}
        if math.isinf(one.hours):  # which JSON has no number for
            values |= {"hours": None, "cost": None}
        del values["work"]
        stages.append(values)
    settings = {name: getattr(config, name).model_dump(mode="json") for name in ("cluster", "planned_data", "measured")}
    return settings | {"stages": stages}


def _print(estimates: list[Estimate], config: PlanConfig, manifest: DatasetManifest, console: Console) -> None:
    _print_hours(estimates, config, manifest, console)
    _print_needs(estimates, console)
    for line in remarks(estimates, config):
        console.note(line)


def _print_hours(estimates: list[Estimate], config: PlanConfig, manifest: DatasetManifest, console: Console) -> None:
    currency = config.cluster.currency
    rows = [
        [
            one.work.label,
            f"{one.work.clips:,}",
            f"{one.work.workers:,} on {one.worker_nodes}",
            f"{one.data_nodes}",
            f"{one.clips_per_s:,.0f}",
            one.limit,
            f"{one.goodput:.1%}",
            _amount(one.hours),
            _amount(one.cost),
            _amount(None if one.cost is None else 1000.0 * one.cost / one.work.audio_hours),
        ]
        for one in estimates
    ]
    hours = sum(one.hours for one in estimates)
    costs = [one.cost for one in estimates if one.cost is not None]
    cost = sum(costs) if costs else None
    audio_hours = sum(one.work.audio_hours for one in estimates)
    per_1000 = None if cost is None or not audio_hours else 1000.0 * cost / audio_hours
    clips = f"{sum(one.work.clips for one in estimates):,}"
    rows.append(["all", clips, "", "", "", "", "", _amount(hours), _amount(cost), _amount(per_1000)])
    columns = ["stage", "clips", "workers on nodes", "data nodes", "clips/s", "limited by", "goodput", "hours",
               f"cost, {currency}", "per 1,000 h of sound"]  # fmt: skip
    title = f"Plan for {manifest.seconds / 3600:,.1f} h of sound, {manifest.clips:,} clips"
    console.table(title, columns, rows)
    if cost is not None:
        console.note(f"prices as of {config.cluster.prices_as_of}; the last column counts sound as often as it is used")


def _print_needs(estimates: list[Estimate], console: Console) -> None:
    rows = [
        [
            one.work.label,
            f"{one.wanted_clips_per_s / one.work.workers:,.0f}",
            f"{one.needs.decode_cores:,.1f}",
            f"{one.needs.storage_mib_per_s * MIB / 1e9:,.2f}",
            f"{one.needs.network_mib_per_s * MIB / 1e9:,.2f}",
            f"{one.needs.object_store_mib / 1024:,.1f}",
            "-" if one.needs.coordinator_busy is None else f"{one.needs.coordinator_busy:.0%}",
        ]
        for one in estimates
    ]
    columns = ["stage", "clips/s a worker", "decode cores", "storage GB/s", "decoded clips GB/s", "object store GiB",
               "coordinator busy"]  # fmt: skip
    console.table("What keeps the workers busy", columns, rows)


def remarks(estimates: list[Estimate], config: PlanConfig) -> list[str]:
    """What the plan shows and its reader may overlook."""
    tflops = f"{config.cluster.tflops_per_worker:g} TFLOP/s a worker"
    lines = [f"at {tflops} (cluster.tflops_per_worker; a run's MFU says what yours sustain); constants: measured.*"]
    for one in estimates:
        name = one.work.label.rpartition(" ")[2]  # without its iteration: they are alike
        share = one.clips_per_s / one.wanted_clips_per_s
        if share < LIKELY_SLOWER:
            lines.append(f"{name}: {one.limit} gives {share:.0%} of what the workers could take{_remedy(one)}")
        every = one.work.train.checkpoint_every_steps if one.work.train else 0
        best = one.best_checkpoint_steps
        if best is not None and not best / 2 <= every <= best * 2:
            setting = one.work.setting.removesuffix("num_workers") + "checkpoint_every_steps"
            lines.append(f"{name}: {setting}={every}; by Daly's formula {best} loses least")
    return list(dict.fromkeys(lines))


def _remedy(estimate: Estimate) -> str:
    section = estimate.work.setting.removesuffix("num_workers")
    return {
        "coordinator": f", in blocks of {estimate.work.clips_per_block} clips; raise {section}micro_batch_size",
        "decoding": "; raise cluster.max_data_nodes",
        "storage": "; spread the shards over more prefixes or buckets, or keep a copy nearer",
    }.get(estimate.limit, "")


def _amount(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isinf(value):
        return "never"
    return f"{value:,.2f}" if value < 10 else f"{value:,.0f}"
