"""What a RUN folder holds, read without trust: a part that is absent or cannot be read is noted, never fatal.

    run = read_run(open_place("s3://bucket/run"))
    for row in run.leaderboard(): ...

A run is readable at any moment, also while it goes on.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from beats_ray.config import UserError
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.reporting.judgements import Judgement, read_judgements
from beats_ray.reporting.reading import as_dict, dicts_of, json_lines, json_list, number, parquet_rows, read_part
from beats_ray.reporting.trials import read_unfinished_sweep

STAGES = ("tokenizer", "labels", "pretrain", "probe", "sweep")
REFUSALS = ("quarantine", "skipped", "missing")
_MARKS = {"sweep": "sweep", "pretrain": "masking", "tokenizer": "tokenizer", "finetune": "validate_every_steps"}
"""Settings that a stage alone has: what its own folder is told by."""
_RESULT_FILES = {
    "labels": "labels.json",
    "probe": "evaluation.json",
    "sweep": "leaderboard.json",
    "cross-validate": "cross_validation.json",
}
_TASK_STAGE = re.compile(r"(sweep|finetune|cross-validate|probe)-(.+)")
_TRAININGS = ("tokenizer", "pretrain", "finetune")


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
    skipped_steps: list[dict[str, Any]] = field(default_factory=list)
    """Of a training: {"step", "clips"} of each update that was left out."""

    @property
    def kind(self) -> str:
        """What it does: one of STAGES, or the protocol of a task."""
        match = _TASK_STAGE.fullmatch(self.name)
        return match[1] if match else self.name

    @property
    def task(self) -> str:
        """The task of the run's `tasks` that it is for; empty for a stage that every run has."""
        match = _TASK_STAGE.fullmatch(self.name)
        return match[2] if match else ""

    @property
    def status(self) -> str:
        default = "complete" if self.result else "running" if self.metrics else "not started"
        return str(self.state.get("status") or self.result.get("status") or default)

    @property
    def seconds(self) -> float | None:
        value = number(self.state.get("seconds"))
        return value if value is not None else number((self.metrics or [{}])[-1].get("seconds"))

    @property
    def teacher(self) -> str:
        """Of a tokenizer: what it was distilled from, as readers know it; `-` where nothing says so."""
        config = as_dict(self.state.get("config"))
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
    refused: dict[str, list[dict[str, Any]]]
    """Source files that are not in the data set, by account: `quarantine`, `skipped`, `missing`."""
    baselines: dict[str, dict[str, Any]]
    iterations: dict[int, dict[str, Stage]]
    """Of each iteration its STAGES, started or not, then those of tasks, by name."""
    task_results: list[dict[str, Any]] = field(default_factory=list)
    """Rows of results.json: what each encoder reaches on each task."""
    problems: list[str] = field(default_factory=list)
    """Files that could not be read, and why."""
    is_single_stage: bool = False
    """The folder of one command, `sweep` or a training, and not of `iterate`: it is iteration 1 here."""

    @cached_property
    def judgements(self) -> list[Judgement]:
        """Everything below the folder that `evaluate` and `cross-validate` wrote; of probes and tasks the newest."""
        probes: dict[str, list[tuple[str, Place]]] = {}
        for index, stages in sorted(self.iterations.items(), reverse=True):
            for stage in stages.values():
                if stage.kind in ("probe", "cross-validate"):
                    what = f"{stage.task}, {stage.kind}" if stage.task else "frozen probe"
                    named = f"iteration {index}, {what}" if index else f"untrained, {what}"
                    probes.setdefault(stage.name, []).append((named, stage.place))
        return read_judgements(self.place, probes.values(), self.problems)

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

    def _judges(self, index: int) -> set[str]:
        """The stages that judge an iteration's encoder, as far as the config and the data set tell."""
        tasks = {name: as_dict(one).get("protocol") for name, one in as_dict(self.config.get("tasks")).items()}
        found = {f"{protocol}-{name}" for name, protocol in tasks.items() if index or protocol == "probe"}
        is_labelled = bool(self.dataset.get("label_names", True))
        if index and not tasks and is_labelled:
            found.add("sweep")
        if not index and is_labelled and not self.dataset.get("multi_label"):
            found.add("probe")
        return found

    def _iteration_row(self, index: int, stages: dict[str, Stage], untrained: dict[str, Any]) -> LeaderboardRow:
        probe, board = stages["probe"].result, stages["sweep"].result
        best = as_dict(board.get("best"))
        metric = "mean_average_precision" if "validation_mean_average_precision" in best else "accuracy"
        gain, gain_error = paired_gain(probe, untrained) if index else (None, None)
        test = number(best.get(f"test_{metric}"))
        started = [stage for stage in stages.values() if stage.status != "not started"]
        ended = {stage.name for stage in started if stage.status in ("complete", "done")}
        is_done = ended.issuperset(self._judges(index) | {"pretrain"} | {stage.name for stage in started})
        return LeaderboardRow(
            name=self.name if self.is_single_stage else f"iteration {index}" if index else "untrained",
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


# --- reading ----------------------------------------------------------------------------------------------------------


def read_run(place: Place) -> Run:
    """Reads what is there. UserError where the folder holds no run, no stage and no evaluation."""
    problems: list[str] = []
    info = as_dict(read_part(place / "run.json", problems))
    found = {}
    for entry in place.list():
        match = re.fullmatch(r"iteration-(\d+)", entry.name)
        if match:
            tasks = sorted(folder.name for folder in entry.list() if _TASK_STAGE.fullmatch(folder.name))
            found[int(match[1])] = {name: _read_stage(entry / name, name, problems) for name in (*STAGES, *tasks)}
    single = "" if info or found else _kind_of_stage(place)
    if single:
        names = dict.fromkeys((*STAGES, single))
        found[1] = {name: _read_stage(place if name == single else place / name, name, problems) for name in names}
    judged = any((place / name).exists() for name in ("evaluation.json", "cross_validation.json"))
    if not info and not found and not judged:
        raise UserError(
            f"{place.uri}: not a run (no run.json, no iteration-K folder, no stage and no evaluation); give the OUTPUT "
            "of `iterate`, `sweep`, a training, `evaluate` or `cross-validate`"
        )
    dataset, refused = _read_data(place, info, problems)
    measured = read_part(place / "iteration-0" / "baselines" / "baselines.json", problems)
    measured = measured or read_part(place / "baselines.json", problems)  # where it once was
    baselines = {key: value for key, value in as_dict(measured).items() if isinstance(value, dict)}
    results = dicts_of(as_dict(read_part(place / "results.json", problems)).get("results"))
    return Run(place, info, dataset, refused, baselines, found, results, problems, bool(single))


def _read_data(
    place: Place, info: dict[str, Any], problems: list[str]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The data set's manifest, and its accounts of source files that are not in it."""
    data = open_place(info["data"]) if isinstance(info.get("data"), str) and info["data"] else place / "data"
    try:
        dataset = as_dict(read_part(data / "dataset.json", problems))
        refused = {name: read_part(data / f"{name}.parquet", problems, parquet_rows) or [] for name in REFUSALS}
    except StorageError as error:  # a copied run may be far from its data
        problems.append(str(error))
        return {}, {}
    dataset.pop("shards", None)
    return dataset, refused


def _kind_of_stage(place: Place) -> str:
    """Which stage a folder is that one command wrote; empty where it is none."""
    settings = as_dict(as_dict(read_part(place / "stage.json", [])).get("config"))
    for name, field_name in _MARKS.items():
        if field_name in settings:
            return name
    return ""


def _read_stage(place: Place, name: str, problems: list[str]) -> Stage:
    state = as_dict(read_part(place / "stage.json", problems))
    match = _TASK_STAGE.fullmatch(name)
    kind = match[1] if match else name
    result = as_dict(read_part(place / _RESULT_FILES[kind], problems)) if kind in _RESULT_FILES else {}
    if kind == "sweep" and not result:
        result = read_unfinished_sweep(place, problems)
    if kind not in _TRAININGS:
        return Stage(name, place, state, result, [])
    metrics = read_part(place / "metrics.jsonl", problems, json_lines) or []
    # While a stage runs, its newest report is here: metrics.jsonl is written at checkpoints only.
    newest = as_dict(read_part(place / "progress.json", problems))
    steps = [number(record.get("step")) or 0 for record in metrics]
    if number(newest.get("step")) is not None and newest["step"] > max(steps, default=-1):
        metrics.append(newest)
    skipped = read_part(place / "skipped-steps.json", problems, json_list) or []
    return Stage(name, place, state, result, metrics, [one for one in skipped if isinstance(one, dict)])
