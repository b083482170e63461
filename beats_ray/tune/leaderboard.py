"""`leaderboard.json`: every trial of a sweep, the best first, while it runs and when it is done.

metric                "validation/NAME": what trials are compared by, of the objectives the first
objectives            {metric: max or min}
status                running, interrupted, complete
trials                one row for each trial, the best first:
  trial_id, encoder, setting     its folder below trials/, its encoder's name, the number of its drawn setting
  config                         the drawn settings, by their dotted names
  validation_NAME, test_NAME     the metric; over repeats, the mean of those that are done. Beside another metric that
                                 of the data set, accuracy or mean_average_precision, too: what results are told in
  objectives                     {metric: value}, where there are several
  repeats                        the metric of each run that is done, where there are several
  steps, seconds, cost           optimizer steps over all runs, seconds, price (0 without prices)
  stopped_early, stopped_by      whether it did not run to its end; scheduler, budget or interruption
  status                         running, complete (stopped trials too), failed
  failure                        {kind, reason} of a failed trial, else null
  history                        [{step, metric, train/loss}]
best                  the first row that ran to its end, or null
pareto                ids of the trials that no other one beats in all objectives, where there are several
test_clips            clips of the test part
encoders              {name: {path, best, finished}}: the id of each encoder's best trial, how many ran to the end
comparisons           encoders against the first one: see `comparison.py`
budget                {minutes, cost, used_up}: what the sweep took; used_up names the field, or is null
reproduce             {config, command}: fine-tunes the best trial again; null where there is none, and
                          of a population, whose members' settings changed on their way
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from beats_ray.config import FinetuneConfig, SweepConfig
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.storage import Place, open_place
from beats_ray.train.held_out import clips_in, find_parts
from beats_ray.tune.comparison import compare_encoders, is_finished
from beats_ray.tune.failure import failure_of
from beats_ray.tune.trial import (
    ENCODER,
    JUDGED_FILE,
    SETTING,
    drawn_settings,
    run_places,
    trial_config,
    trial_place,
)

LEADERBOARD_FILE = "leaderboard.json"
REPRODUCE_FILE = "reproduce.yaml"


@dataclass(frozen=True)
class Outcome:
    """What Ray Tune knows of a trial."""

    trial_id: str
    parameters: dict[str, Any]
    """The drawn settings, the encoder and the setting's number."""
    metrics: dict[str, Any]
    """Its last report; empty before the first."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Its reports, oldest first."""
    error: BaseException | str | None = None
    is_running: bool = False
    stopped_by: str = "scheduler"
    """Who stopped it, if anybody did."""
    seconds: float = 0.0
    """That it has run, over all starts of the sweep."""


def objectives_of(config: SweepConfig, manifest: DatasetManifest) -> dict[str, str]:
    """max or min for each metric that is searched for; the first one compares trials."""
    return dict(config.sweep.objectives) or {f"validation/{manifest.main_metric}": "max"}


def leaderboard(
    config: SweepConfig,
    manifest: DatasetManifest,
    outcomes: Sequence[Outcome],
    status: str = "complete",
    budget: Mapping[str, Any] | None = None,
    cost_per_second: float = 0.0,
) -> dict[str, Any]:
    """The whole board; see the module."""
    objectives = objectives_of(config, manifest)
    metric = next(iter(objectives))
    budget = budget or {"minutes": None, "cost": None, "used_up": None}
    rows = [_row(config, one, objectives, manifest.main_metric, cost_per_second) for one in outcomes]
    # Trials that do equally well come in the order of their settings: their names are drawn anew in each run.
    sign = -1.0 if objectives[metric] == "max" else 1.0
    rows.sort(
        key=lambda row: (_rank(row[_column(metric)], sign), json.dumps(row["config"], sort_keys=True), row["encoder"])
    )
    finished = [row for row in rows if is_finished(row)]
    best = finished[0] if finished else None
    parts = find_parts(trial_config(config, "check", {}), manifest)
    names = list(config.compared)
    return {
        "metric": metric,
        "objectives": objectives,
        "status": status,
        "trials": rows,
        "best": best,
        "pareto": _pareto(finished, objectives) if len(objectives) > 1 else None,
        "test_clips": clips_in(manifest, parts.test) if parts.test else 0,
        "encoders": {name: _encoder(name, config.compared[name], finished) for name in names},
        "comparisons": compare_encoders(rows, names, metric, _judged(config, finished)) if len(names) > 1 else [],
        "budget": dict(budget),
        "reproduce": _reproduce(config) if best and config.sweep.scheduler != "pbt" else None,
    }


def write_board(config: SweepConfig, manifest: DatasetManifest, board: dict[str, Any]) -> None:
    """Writes the board and, where there is a best trial, the config that repeats it."""
    output = open_place(config.output)
    (output / LEADERBOARD_FILE).write_json(board)
    if board["reproduce"] is not None:
        text = yaml.safe_dump(best_config(config, manifest, board["best"]).model_dump(mode="json"), sort_keys=False)
        (output / REPRODUCE_FILE).write_bytes(text.encode())


def best_config(config: SweepConfig, manifest: DatasetManifest, row: Mapping[str, Any]) -> FinetuneConfig:
    """A `finetune` job with a trial's settings: of several repeats the first, whose model is the one published."""
    parameters = {**row["config"], ENCODER: row["encoder"]}
    job = trial_config(config, row["trial_id"], parameters, manifest)
    train = job.train.model_copy(update={"global_batch_seconds": None})  # which comes to the batch size that is set
    return job.model_copy(update={"output": f"{config.output}/reproduced", "train": train})


def _row(
    config: SweepConfig, outcome: Outcome, objectives: Mapping[str, str], main_metric: str, cost_per_second: float
) -> dict[str, Any]:
    metrics, metric = outcome.metrics, next(iter(objectives))
    names = dict.fromkeys((metric.removeprefix("validation/"), main_metric))
    steps, settings = int(metrics.get("step", 0)), drawn_settings(outcome.parameters)
    total = config.finetune.train.steps * config.sweep.repeats
    stopped = outcome.error is None and not outcome.is_running and steps < total
    row: dict[str, Any] = {
        "trial_id": outcome.trial_id,
        "encoder": outcome.parameters.get(ENCODER, next(iter(config.compared))),
        "setting": outcome.parameters.get(SETTING),
        "config": settings,
        **{f"{part}_{name}": metrics.get(f"{part}/{name}") for name in names for part in ("validation", "test")},
        "steps": steps,
        "seconds": outcome.seconds,
        "cost": outcome.seconds * cost_per_second,
        "stopped_early": stopped,
        "stopped_by": outcome.stopped_by if stopped else None,
        "status": "running" if outcome.is_running else "failed" if outcome.error is not None else "complete",
        "failure": None if outcome.error is None else failure_of(trial_place(config, outcome.trial_id), outcome.error),
        "history": [
            {key: record[key] for key in ("step", metric, "train/loss") if key in record} for record in outcome.history
        ],
    }
    if len(objectives) > 1:
        row["objectives"] = {one: metrics.get(one) for one in objectives}
    if config.sweep.repeats > 1:
        row["repeats"] = [
            metrics[key] for key in (f"repeat/{n}" for n in range(config.sweep.repeats)) if key in metrics
        ]
    return row


def _column(metric: str) -> str:
    return metric.replace("/", "_")


def _rank(value: Any, sign: float) -> float:
    return sign * value if isinstance(value, int | float) and math.isfinite(value) else math.inf


def _encoder(name: str, path: str, finished: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [row["trial_id"] for row in finished if row["encoder"] == name]
    return {"path": path, "best": own[0] if own else None, "finished": len(own)}


def _pareto(finished: Sequence[Mapping[str, Any]], objectives: Mapping[str, str]) -> list[str]:
    signs = [1.0 if mode == "max" else -1.0 for mode in objectives.values()]
    points = {
        row["trial_id"]: [sign * (row["objectives"][name] or 0.0) for sign, name in zip(signs, objectives, strict=True)]
        for row in finished
    }
    return [
        one
        for one, values in points.items()
        if not any(
            other != values and all(theirs >= ours for theirs, ours in zip(other, values, strict=True))
            for other in points.values()
        )
    ]


def _judged(config: SweepConfig, finished: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in finished:
        runs = map(_read_judged, run_places(config, row["trial_id"]))
        found[row["trial_id"]] = [one for one in runs if one is not None]
    return found


def _read_judged(run: Place) -> Any:
    try:
        return (run / JUDGED_FILE).read_json()
    except FileNotFoundError:
        return None


def _reproduce(config: SweepConfig) -> dict[str, str]:
    path = f"{config.output}/{REPRODUCE_FILE}"
    return {"config": path, "command": f"beats-ray finetune {path}"}
