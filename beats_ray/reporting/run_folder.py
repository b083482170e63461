"""What a RUN folder holds, read without trust: a part that is absent or cannot be read is noted, never fatal.

    run = read_run(open_place("s3://bucket/run"))
    for row in run.leaderboard(): ...

A run is readable at any moment, also while it goes on.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from beats_ray.config import UserError
from beats_ray.data.storage import Place, StorageError, open_place

STAGES = ("tokenizer", "labels", "pretrain", "probe", "sweep")
_RESULT_FILES = {"labels": "labels.json", "probe": "evaluation.json", "sweep": "leaderboard.json"}


@dataclass(frozen=True)
class Stage:
    """One stage of one iteration."""

    name: str
    place: Place
    state: dict[str, Any]
    """`stage.json`: status, seconds, config; empty where it was never started."""
    result: dict[str, Any]
    """The stage's own result file: labels.json, evaluation.json or leaderboard.json."""
    metrics: list[dict[str, Any]]

    @property
    def status(self) -> str:
        return str(self.state.get("status") or ("complete" if self.result else "not started"))

    @property
    def seconds(self) -> float | None:
        value = number(self.state.get("seconds"))
        return value if value is not None else number((self.metrics or [{}])[-1].get("seconds"))

    @property
    def teacher(self) -> str:
        """Of a tokenizer: what it was distilled from, as readers know it; `-` where nothing says so."""
        config = _dict(self.state.get("config"))
        inputs = config.get("inputs")
        if not isinstance(inputs, dict):
            return "-"
        key = str(inputs.get("teacher") or "")
        match = re.match(r"iteration-(\d+)/(\S+) ", key)
        if match:
            what = "fine-tuned model" if match[2].startswith(("sweep", "finetune")) else "pre-trained encoder"
            return f"iteration {match[1]}, {what}"
        return "a given model" if key else "none: given" if "tokenizer" in inputs else "none: random projection"

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, where it was reported."""
        pairs = ((number(record.get("step")), number(record.get(name))) for record in self.metrics)
        return [(step, value) for step, value in pairs if step is not None and value is not None]

    def last(self, name: str) -> float | None:
        points = self.series(name)
        return points[-1][1] if points else None


@dataclass(frozen=True)
class LeaderboardRow:
    """One line of the leaderboard; None where a figure is absent."""

    name: str
    kind: str
    """`baseline`, `untrained` or `iteration`."""
    probe_accuracy: float | None = None
    """k-fold accuracy over all clips."""
    probe_standard_error: float | None = None
    """Binomial, over clips."""
    gain: float | None = None
    """Probe accuracy above the untrained encoder's."""
    gain_standard_error: float | None = None
    """Of `gain`: paired over clips where both have per-clip results, else both errors combined."""
    validation_accuracy: float | None = None
    """Of the sweep's best trial, which was chosen by it; mean average precision where clips have several labels."""
    test_accuracy: float | None = None
    """Of the same trial on the test part."""
    test_standard_error: float | None = None
    """Binomial, over the clips of the test part; none of a mean average precision."""
    status: str = "complete"


@dataclass(frozen=True)
class Run:
    """Everything that a run has written so far."""

    place: Place
    info: dict[str, Any]
    """`run.json`."""
    dataset: dict[str, Any]
    """The data set's manifest without its shards."""
    quarantine: list[dict[str, Any]]
    baselines: dict[str, dict[str, Any]]
    iterations: dict[int, dict[str, Stage]]
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, and why."""

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.place.name)

    @property
    def config(self) -> dict[str, Any]:
        value = self.info.get("config")
        return value if isinstance(value, dict) else {}

    def leaderboard(self) -> list[LeaderboardRow]:
        """Baselines, then the untrained encoder, then the iterations."""
        rows = []
        for key, values in self.baselines.items():
            label = {"random_forest_mfcc": "random forest, MFCC", "mean_log_mel": "linear, mean log-mel"}.get(key, key)
            rows.append(
                LeaderboardRow(label, "baseline", number(values.get("accuracy")), number(values.get("standard_error")))
            )
        untrained = self.iterations[0]["probe"].result if 0 in self.iterations else {}
        for index, stages in sorted(self.iterations.items()):
            rows.append(self._iteration_row(index, stages, untrained))
        return rows

    def _iteration_row(self, index: int, stages: dict[str, Stage], untrained: dict[str, Any]) -> LeaderboardRow:
        probe, board = stages["probe"].result, stages["sweep"].result
        best = _dict(board.get("best"))
        metric = str(board.get("metric", "validation/accuracy")).removeprefix("validation/")
        gain, gain_error = paired_gain(probe, untrained) if index else (None, None)
        test = number(best.get(f"test_{metric}"))
        needed = ("pretrain", "probe") if index == 0 else STAGES[2:]
        started = [stage for stage in stages.values() if stage.status != "not started"]
        is_done = all(stages[name].status in ("complete", "done") for name in needed)
        return LeaderboardRow(
            name="untrained" if index == 0 else f"iteration {index}",
            kind="untrained" if index == 0 else "iteration",
            probe_accuracy=number(probe.get("accuracy")),
            probe_standard_error=number(probe.get("standard_error")),
            gain=gain,
            gain_standard_error=gain_error,
            validation_accuracy=number(best.get(f"validation_{metric}")),
            test_accuracy=test,
            test_standard_error=_binomial_error(test, board.get("test_clips")) if metric == "accuracy" else None,
            status="complete" if is_done else f"{started[-1].name}: {started[-1].status}" if started else "not started",
        )


def _binomial_error(accuracy: float | None, clips: Any) -> float | None:
    return math.sqrt(accuracy * (1 - accuracy) / clips) if accuracy is not None and number(clips) else None


def leaderboard_rows(run: str) -> list[LeaderboardRow]:
    """The leaderboard of the run at a local path, s3:// or gs:// address. UserError where there is no run."""
    return read_run(open_place(run)).leaderboard()


def paired_gain(probe: dict[str, Any], reference: dict[str, Any]) -> tuple[float | None, float | None]:
    """Difference of two probe accuracies, and its standard error, over the same clips where per-clip results exist."""
    accuracy, base = number(probe.get("accuracy")), number(reference.get("accuracy"))
    if accuracy is None or base is None:
        return None, None
    ours, theirs = probe.get("correct"), reference.get("correct")
    if isinstance(ours, str) and isinstance(theirs, str) and len(ours) == len(theirs) > 0:
        differences = [int(a == "1") - int(b == "1") for a, b in zip(ours, theirs, strict=True)]
        mean = sum(differences) / len(differences)
        variance = sum((difference - mean) ** 2 for difference in differences) / len(differences)
        return accuracy - base, math.sqrt(variance / len(differences))
    errors = number(probe.get("standard_error")), number(reference.get("standard_error"))
    return accuracy - base, None if None in errors else math.hypot(*(e for e in errors if e is not None))


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_run(place: Place) -> Run:
    """Reads what is there. UserError where the folder holds neither run.json, an iteration nor an evaluation."""
    problems: list[str] = []
    info = _dict(_read(place / "run.json", _json, problems))
    found = {}
    for entry in place.list():
        match = re.fullmatch(r"iteration-(\d+)", entry.name)
        if match:
            found[int(match[1])] = {name: _read_stage(entry / name, problems) for name in STAGES}
    judged = any((place / name).exists() for name in ("evaluation.json", "cross_validation.json"))
    if not info and not found and not judged:
        raise UserError(
            f"{place.uri}: not a run (no run.json, no iteration-K folder and no evaluation); give the OUTPUT of "
            "`iterate`, `evaluate` or `cross-validate`"
        )
    dataset_place = open_place(info["data"]) if isinstance(info.get("data"), str) and info["data"] else place / "data"
    try:
        dataset = _dict(_read(dataset_place / "dataset.json", _json, problems))
        quarantine = _read(dataset_place / "quarantine.parquet", _rows, problems) or []
    except StorageError as error:  # a copied run may be far from its data
        problems.append(str(error))
        dataset, quarantine = {}, []
    dataset.pop("shards", None)
    stage = place / "iteration-0" / "baselines" / "baselines.json"
    measured = _read(stage, _json, problems) or _read(place / "baselines.json", _json, problems)  # where it once was
    baselines = {k: v for k, v in _dict(measured).items() if isinstance(v, dict)}
    return Run(place, info, dataset, quarantine, baselines, found, problems)


def _read_stage(place: Place, problems: list[str]) -> Stage:
    state = _dict(_read(place / "stage.json", _json, problems))
    result = _dict(_read(place / _RESULT_FILES[place.name], _json, problems)) if place.name in _RESULT_FILES else {}
    is_training = place.name in ("tokenizer", "pretrain")
    metrics = (_read(place / "metrics.jsonl", _json_lines, problems) or []) if is_training else []
    # While a stage runs, its newest report is here: metrics.jsonl is written at checkpoints only.
    newest = _dict(_read(place / "progress.json", _json, problems)) if is_training else {}
    steps = [number(record.get("step")) or 0 for record in metrics]
    if number(newest.get("step")) is not None and newest["step"] > max(steps, default=-1):
        metrics.append(newest)
    return Stage(place.name, place, state, result, metrics)


def read_part(place: Place, problems: list[str], parse: Callable[[Place], Any] | None = None) -> Any:
    """A file of the run, by default one JSON object; None where it is absent, or is added to the problems."""
    return _read(place, parse or (lambda file: _dict(_json(file))), problems)


def _read(place: Place, parse: Callable[[Place], Any], problems: list[str]) -> Any:
    try:
        return parse(place)
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (ValueError, OSError) as error:
        problems.append(f"{place.uri}: {' '.join(str(error).split())[:200]}")
        return None


def _json(place: Place) -> Any:
    return place.read_json()


def _json_lines(place: Place) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in place.read_bytes().decode().splitlines() if line.strip()]
    return [record for record in records if isinstance(record, dict)]


def _rows(place: Place) -> list[dict[str, Any]]:
    from beats_ray.data.storage import read_table

    return list(read_table(place).to_pylist())


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
