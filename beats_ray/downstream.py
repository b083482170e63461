"""The table of a BEATs run: what each iteration's encoder reaches on each task (paper, tables 1 and 2).

    write_results(run, stages)         RUN/results.json, results.csv: after every task
    show_results(stages, console)      the same as a table: a line for each encoder, a column for each task

A figure is of held-out clips alone, the task's main metric: accuracy, or mean average precision where a clip has
several labels. Of a sweep it is the best trial's on the test part, which no trial was chosen by; over folds it is over
all clips, each judged by the runs that never heard its fold.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from beats_ray.config import CrossValidateConfig, EvaluateConfig, SweepConfig, TrainingJob
from beats_ray.console import Console
from beats_ray.cross_validate import SUMMARY_FILE
from beats_ray.data.storage import Place
from beats_ray.judgement import RESULT_FILE, write_csv
from beats_ray.scoring import binomial_error
from beats_ray.stage import is_complete
from beats_ray.stages import Stage, fine_tuning_of
from beats_ray.train.held_out import clips_in, find_parts

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class TaskResult:
    """What an encoder reaches on one task."""

    iteration: int
    """0: the untrained encoder."""
    task: str
    protocol: str
    data: str
    """Path of the task's data set."""
    metric: str
    """`accuracy` or `mean_average_precision`."""
    value: float | None
    """None where nothing is held out to test on."""
    standard_error: float | None
    """Of an accuracy over the clips; None for mean average precision, which has no simple one."""
    clips: int
    """That were judged."""


def read_results(stages: Iterable[Stage]) -> list[TaskResult]:
    """Of the tasks that are complete."""
    return [_read(stage) for stage in stages if stage.task and is_complete(stage.folder)]


def write_results(run: Place, stages: Iterable[Stage]) -> None:
    rows = [asdict(result) for result in read_results(stages)]
    (run / RESULTS_FILE).write_json({"results": rows})
    names = [field.name for field in fields(TaskResult)]
    write_csv(run / "results.csv", [names, *([row[name] for name in names] for row in rows)])


def show_results(stages: Iterable[Stage], console: Console) -> None:
    """Nothing is shown of a run without tasks."""
    found = {(result.iteration, result.task): result for result in read_results(stages)}
    if not found:
        return
    tasks = list(dict.fromkeys(task for _, task in found))
    metrics = {result.task: result.metric.replace("_", " ") for result in found.values()}
    lines = []
    for iteration in sorted({iteration for iteration, _ in found}):
        figures = [_text(found.get((iteration, task))) for task in tasks]
        lines.append([f"iteration {iteration}" if iteration else "untrained", *figures])
    console.table("Tasks", ["encoder", *(f"{task}, {metrics[task]}" for task in tasks)], lines)


def _read(stage: Stage) -> TaskResult:
    folder, job, metric = stage.folder, stage.job, stage.manifest.main_metric
    assert isinstance(job, TrainingJob | EvaluateConfig), stage.label
    error: float | None = None
    if isinstance(job, CrossValidateConfig | EvaluateConfig):
        found = _judged(folder, job)
        value, error, clips = found["accuracy"], found["standard_error"], found["clips"]
    else:
        tuned = fine_tuning_of(stage)
        assert tuned is not None, stage.label
        test = find_parts(tuned[0], stage.manifest).test
        clips = clips_in(stage.manifest, test) if test else 0
        value = _tested(folder, job, metric)
        error = binomial_error(value, clips) if value is not None and metric == "accuracy" else None
    protocol = stage.name.removesuffix(f"-{stage.task}")
    return TaskResult(stage.iteration, stage.task, protocol, job.data.path, metric, value, error, clips)


def _judged(folder: Place, job: CrossValidateConfig | EvaluateConfig) -> dict[str, Any]:
    """Over the clips of all folds."""
    if isinstance(job, EvaluateConfig):
        return dict((folder / RESULT_FILE).read_json())
    return dict((folder / SUMMARY_FILE).read_json()["encoders"]["encoder"])


def _tested(folder: Place, job: TrainingJob, metric: str) -> float | None:
    """On the test part; None where the data set has none."""
    if isinstance(job, SweepConfig):
        found = (folder / "leaderboard.json").read_json()["best"].get(f"test_{metric}")
    else:
        found = json.loads((folder / "metrics.jsonl").read_bytes().decode().splitlines()[-1]).get(f"test/{metric}")
    return None if found is None else float(found)


def _text(result: TaskResult | None) -> str:
    if result is None or result.value is None:
        return "-"
    error = "" if result.standard_error is None else f" ± {result.standard_error:.3f}"
    return f"{result.value:.3f}{error}"
