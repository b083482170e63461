"""What an earlier sweep found, as known evaluations of a new one.

Only finished trials count, and of their settings those parameters that both spaces have. A trial with a value that the
new space cannot draw says nothing about it and is left out.
"""

import math
from typing import Any

from beats_ray.config import ConfigError, SweepSettings
from beats_ray.data.storage import open_place
from beats_ray.tune.comparison import is_finished
from beats_ray.tune.space import contains

Known = tuple[tuple[dict[str, Any], float], ...]
"""(parameters, value of the metric) of each trial."""


def read_known(sweep: SweepSettings, metric: str) -> Known:
    """The trials of `sweep.warm_start`; none where it is empty. ConfigError where they do not fit."""
    if not sweep.warm_start:
        return ()
    field = f"sweep.warm_start={sweep.warm_start}"
    board = _read(field, sweep.warm_start)
    if board.get("metric") != metric:
        raise ConfigError(
            f"{field}: its trials are compared by {board.get('metric')}, those of this sweep by {metric}; give a sweep "
            "of the same metric"
        )
    column = metric.replace("/", "_")
    rows = [row for row in board.get("trials", []) if is_finished(row)]
    rows = [row for row in rows if isinstance(row.get(column), int | float) and math.isfinite(row[column])]
    if not rows:
        raise ConfigError(f"{field}: has no trial that ran to its end; leave it out")
    shared = [name for name in sweep.space if any(name in row["config"] for row in rows)]
    if not shared:
        raise ConfigError(
            f"{field}: its space ({', '.join(sorted(rows[0]['config']))}) has nothing in common with this one "
            f"({', '.join(sweep.space)}); leave it out"
        )
    by_setting: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for row in rows:
        found = {name: row["config"][name] for name in shared if name in row["config"]}
        if found and all(contains(sweep.space[name], value) for name, value in found.items()):
            by_setting.setdefault(repr(found), (found, []))[1].append(float(row[column]))
    if not by_setting:
        raise ConfigError(
            f"{field}: none of its {len(rows)} finished trials lies in this space ({', '.join(shared)}); widen the "
            "space, or leave it out"
        )
    return tuple((found, sum(values) / len(values)) for found, values in by_setting.values())


def _read(field: str, path: str) -> dict[str, Any]:
    place = open_place(path)
    if not path.endswith(".json"):
        place = place / "leaderboard.json"
    try:
        board = place.read_json()
    except FileNotFoundError:
        raise ConfigError(f"{field}: no leaderboard.json there; give the output of a finished sweep") from None
    except ValueError as error:
        raise ConfigError(f"{field}: leaderboard.json is not valid JSON ({error}); give another sweep") from None
    if not isinstance(board, dict) or not isinstance(board.get("trials"), list):
        raise ConfigError(f"{field}: is no leaderboard of a sweep; give its output folder or its leaderboard.json")
    return board
