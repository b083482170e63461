"""The trials of a sweep that has no leaderboard yet, from the files that Ray Tune and the trials write as they go.

    SWEEP/tune/trials/ID/result.json    every report of a trial with its settings, synchronised every few minutes
    SWEEP/trials/ID/progress.json       a trial's newest report, at once

Gives what leaderboard.json will have, as far as it is known: no trial is the best one before the sweep has ended.
"""

from typing import Any

from beats_ray.data.storage import Place
from beats_ray.reporting.reading import as_dict, json_lines, number, read_part

METRICS = ("validation/accuracy", "validation/mean_average_precision")
"""What sweeps compare trials by; the first that a trial reports."""


def read_unfinished_sweep(place: Place, problems: list[str]) -> dict[str, Any]:
    """`{"metric", "trials", "best": None, "unfinished": True}`, the best trial first; empty where none has begun."""
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
    return {"metric": metric, "trials": trials, "best": None, "unfinished": True}


def _folders(place: Place) -> list[Place]:
    return [entry for entry in place.list() if "." not in entry.name] if place.is_dir() else []


def _trial(name: str, records: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    values = [value for record in records if (value := number(record.get(metric))) is not None]
    settings: dict[str, Any] = next((one["config"] for one in records if isinstance(one.get("config"), dict)), {})
    test = metric.replace("validation", "test")
    tested = [value for record in records if (value := number(record.get(test))) is not None]
    return {
        "trial_id": name,
        "config": settings,
        metric.replace("/", "_"): values[-1] if values else None,
        test.replace("/", "_"): tested[-1] if tested else None,
        "steps": number(records[-1].get("step")) or 0,
        "status": "ended" if records[-1].get("done") else "running",
        "history": [{key: record.get(key) for key in ("step", metric, "train/loss")} for record in records],
    }
