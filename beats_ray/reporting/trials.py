"""The trials of a sweep: `leaderboard.json`, or, where there is none yet, what the trials have written so far.

SWEEP/leaderboard.json              see `beats_ray.tune`
SWEEP/tune/trials/ID/result.json    every report of a trial with its settings, of a few seconds ago
SWEEP/trials/ID/progress.json       a trial's newest report, at once
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beats_ray.data.storage import Place
from beats_ray.reporting.reading import as_dict, dicts_of, json_lines, number, read_part

METRICS = ("validation/accuracy", "validation/mean_average_precision")
"""What sweeps compare trials by; the first that a trial reports."""
BESIDE_SETTINGS = ("encoder", "setting")
"""What Tune's config of a trial has beside the drawn settings (`beats_ray.tune.trial`, which needs Ray)."""


@dataclass(frozen=True)
class Trial:
    """One row of a leaderboard, as far as it can be read."""

    name: str
    encoder: str
    """Of a sweep over several; empty otherwise."""
    settings: dict[str, Any]
    value: float | None
    """What trials are compared by; None before the first validation."""
    test: float | None
    steps: float
    state: str
    """`running`, `complete`, `stopped early`, `failed`, `ended`."""
    reason: str
    """Why it failed, or who stopped it."""
    history: list[tuple[float, float]]
    """(step, value)."""
    seconds: float | None
    cost: float | None

    @property
    def name_and_encoder(self) -> str:
        return f"{self.name} ({self.encoder})" if self.encoder else self.name


@dataclass(frozen=True)
class SweepBoard:
    """A leaderboard of trials, the best first."""

    metric: str
    is_maximised: bool
    status: str
    trials: list[Trial]
    best: str
    """Name of the best trial that ran to its end; empty where there is none yet."""
    pareto: list[str]
    """Trials that no other one beats in all objectives, where there are several."""
    encoders: dict[str, dict[str, Any]]
    comparisons: list[dict[str, Any]]


def read_board(board: Mapping[str, Any]) -> SweepBoard:
    """The board from the content of leaderboard.json, of whatever age; what is damaged in it is left out."""
    metric = str(board.get("metric") or METRICS[0])
    encoders = {name: as_dict(one) for name, one in as_dict(board.get("encoders")).items()}
    pareto = board.get("pareto")
    return SweepBoard(
        metric,
        as_dict(board.get("objectives")).get(metric) != "min",
        str(board.get("status") or "complete"),
        [_read_trial(row, metric, len(encoders) > 1) for row in dicts_of(board.get("trials"))],
        str(as_dict(board.get("best")).get("trial_id") or ""),
        [str(name) for name in pareto] if isinstance(pareto, list) else [],
        encoders if len(encoders) > 1 else {},
        dicts_of(board.get("comparisons")),
    )


def _read_trial(row: dict[str, Any], metric: str, has_encoders: bool) -> Trial:
    pairs = ((number(one.get("step")), number(one.get(metric))) for one in dicts_of(row.get("history")))
    failure = as_dict(row.get("failure"))
    stopped_by = f"stopped by the {row['stopped_by']}" if row.get("stopped_by") else ""
    return Trial(
        str(row.get("trial_id")),
        str(row.get("encoder") or "") if has_encoders else "",
        as_dict(row.get("config")),
        number(row.get(metric.replace("/", "_"))),
        number(row.get(metric.replace("validation/", "test_"))),
        number(row.get("steps")) or 0.0,
        "stopped early" if row.get("stopped_early") else str(row.get("status") or "-"),
        ": ".join(str(failure[key]) for key in ("kind", "reason") if failure.get(key)) or stopped_by,
        [(step, value) for step, value in pairs if step is not None and value is not None],
        number(row.get("seconds")),
        number(row.get("cost")),
    )


def read_unfinished_sweep(place: Place, problems: list[str]) -> dict[str, Any]:
    """What leaderboard.json will have, as far as the trials tell it; empty where none has begun."""
    histories = {
        entry.name: read_part(entry / "result.json", problems, json_lines) or []
        for entry in _folders(place / "tune" / "trials")
    }
    for entry in _folders(place / "trials"):
        newest = as_dict(read_part(entry / "progress.json", problems))
        known = histories.setdefault(entry.name, [])
        if (number(newest.get("step")) or 0) > (number((known or [{}])[-1].get("step")) or 0):
            known.append(newest)
    histories = {name: records for name, records in histories.items() if records}
    if not histories:
        return {}
    seen = {key for records in histories.values() for record in records for key in record}
    metric = next((name for name in METRICS if name in seen), METRICS[0])
    trials = [_trial(name, records, metric) for name, records in histories.items()]
    key = metric.replace("/", "_")
    trials.sort(key=lambda trial: (-(trial[key] or 0.0), trial["trial_id"]))
    return {"metric": metric, "trials": trials, "best": None, "status": "running"}


def _folders(place: Place) -> list[Place]:
    return [entry for entry in place.list() if "." not in entry.name] if place.is_dir() else []


def _trial(name: str, records: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    values = [value for record in records if (value := number(record.get(metric))) is not None]
    settings: dict[str, Any] = next((one["config"] for one in records if isinstance(one.get("config"), dict)), {})
    test = metric.replace("validation", "test")
    tested = [value for record in records if (value := number(record.get(test))) is not None]
    return {
        "trial_id": name,
        **{key: settings.get(key) for key in BESIDE_SETTINGS},
        "config": {key: value for key, value in settings.items() if key not in BESIDE_SETTINGS},
        metric.replace("/", "_"): values[-1] if values else None,
        test.replace("/", "_"): tested[-1] if tested else None,
        "steps": number(records[-1].get("step")) or 0,
        "status": "ended" if records[-1].get("done") else "running",
        "history": [{key: record.get(key) for key in ("step", metric, "train/loss")} for record in records],
    }
