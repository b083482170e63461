"""The report's operations: data health, throughput, and what went wrong and was mended."""

from collections import Counter
from typing import Any

from beats_ray.reporting.charts import Bar, Chart, Line, bar_chart, line_chart, present
from beats_ray.reporting.layout import (
    Grid,
    Row,
    Section,
    duration,
    figure,
    percent,
    stage_title,
    stages_of,
)
from beats_ray.reporting.reading import as_dict, number
from beats_ray.reporting.run_folder import Run, Stage

MAX_REASONS = 12
EXAMPLES_PER_REASON = 3
MAX_SKIPPED_STEPS = 20
ACCOUNTS = {
    "quarantine": "Quarantined: files that cannot be used",
    "skipped": "Skipped: files that the layout does not want",
    "missing": "Missing: recordings that the tables name and the source does not hold",
}


def data_health(run: Run) -> Section:
    """What the data set holds, and which files are not in it and why."""
    section = Section("Data health")
    data = run.dataset
    if not data:
        section.absent = "The data set's dataset.json was not found."
        return section
    clips, seconds = number(data.get("clips")) or 0.0, number(data.get("seconds")) or 0.0
    labels = data.get("label_names") or []
    files, refused = number(data.get("source_files")) or 0.0, number(data.get("quarantined")) or 0.0
    section.notes = [
        f"{data.get('name') or 'data set'}: {clips:,.0f} clips, {seconds / 3600:.2f} hours, {len(labels)} labels.",
        f"Source: {data.get('source') or 'unknown'}.",
        f"{refused:,.0f} of {files:,.0f} source files ({refused / files if files else 0:.2%}) were quarantined.",
        f"Other files skipped: {figure(data.get('skipped'), 0)}; recordings missing: {figure(data.get('missing'), 0)}.",
    ]
    for title, counts in (("clips by fold", data.get("clips_by_fold")), ("clips by split", data.get("clips_by_split"))):
        if isinstance(counts, dict) and len(counts) > 1:
            bars = [
                Bar(str(name), number(count) or 0.0, f"{number(count) or 0:,.0f}") for name, count in counts.items()
            ]
            section.charts += present(bar_chart(title, bars))
    section.tables = [_refusals_grid(title, run.refused[name]) for name, title in ACCOUNTS.items()
                      if run.refused.get(name)]  # fmt: skip
    return section


def _refusals_grid(title: str, rows: list[dict[str, Any]]) -> Grid:
    reasons = Counter(str(row.get("reason") or "no reason given") for row in rows)
    lines = []
    for reason, count in reasons.most_common(MAX_REASONS):
        names = [_file_of(row) for row in rows if str(row.get("reason") or "no reason given") == reason]
        rest = f" and {count - EXAMPLES_PER_REASON} more" if count > EXAMPLES_PER_REASON else ""
        lines.append(Row([reason, str(count), ", ".join(names[:EXAMPLES_PER_REASON]) + rest]))
    if len(reasons) > MAX_REASONS:
        title += f" (the {MAX_REASONS} commonest of {len(reasons)} reasons)"
    return Grid(["reason", "files", "examples"], lines, title, text=("reason", "examples"))


def _file_of(row: dict[str, Any]) -> str:
    return next(
        (str(row[name]).rsplit("/", 1)[-1] for name in ("file", "path", "source", "clip_id") if row.get(name)), "?"
    )


def throughput(run: Run) -> Section:
    """How long each stage took, and how fast training was."""
    section = Section("Throughput and stage times")
    bars, rows = [], []
    for index, stages in sorted(run.iterations.items()):
        for stage in stages.values():
            if stage.status == "not started":
                continue
            seconds = stage.seconds
            if seconds is not None:
                bars.append(Bar(stage_title(run, index, stage), seconds, duration(seconds)))
            cells = [stage_title(run, index, stage), stage.status, "-" if seconds is None else duration(seconds)]
            cells += [figure(stage.last("step"), 0), figure(stage.last("clips"), 0)]
            cells += [figure(stage.last("perf/clips_per_s"), 1), percent(stage.last("data/wait_fraction"))]
            cells += [percent(stage.last("perf/mfu")), figure(stage.last("perf/gpu_memory_gib"), 1)]
            cells += [figure(stage.last("perf/checkpoint_seconds"), 1)]
            rows.append(Row(cells))
    if not rows:
        section.absent = "No stage has started yet."
        return section
    section.charts = present(
        bar_chart("stage times", bars),
        _over_stages(run, "clips a second", "perf/clips_per_s"),
        _over_stages(run, "part of the time that workers waited for data", "data/wait_fraction"),
    )
    columns = ["stage", "state", "time", "steps", "clips", "clips/s", "waiting for data", "MFU", "GPU GiB", "saving, s"]
    section.tables = [Grid(columns, rows, "Stages, by their newest reports", text=("stage", "state"))]
    return section


def _over_stages(run: Run, title: str, metric: str) -> Chart:
    trainings = [(index, stage) for name in ("tokenizer", "pretrain") for index, stage in stages_of(run, name)]
    lines = [
        Line(stage_title(run, index, stage), stage.series(metric), f"series-{place % 4 + 1}", place >= 4)
        for place, (index, stage) in enumerate([one for one in trainings if len(one[1].series(metric)) > 1][:8])
    ]
    return line_chart(title, lines, "step")


def faults(run: Run) -> Section:
    """Restarts, updates that were left out, collapsed codebooks, failed trials."""
    section = Section("Faults")
    trained = [
        (index, stage) for index, stages in sorted(run.iterations.items()) for stage in stages.values() if stage.metrics
    ]
    swept = [(index, stage) for index, stage in stages_of(run, "sweep") if stage.result.get("trials")]
    if not trained and not swept:
        section.absent = "No training stage has reported yet."
        return section
    rows = [_fault_row(run, index, stage) for index, stage in trained]
    rows += [_sweep_row(run, index, stage) for index, stage in swept]
    columns = ["stage", "restarts", "skipped steps", "collapsed codes, steps", "failed trials"]
    section.tables = [Grid(columns, rows, "Faults by stage", text=("stage",))]
    section.notes = [
        "Restarts: how often a training began again, whatever for.",
        "Skipped steps: updates left out since loss or gradient was no finite number.",
    ]
    skipped = [
        Row(
            [
                stage_title(run, index, stage),
                figure(one.get("step"), 0),
                ", ".join(map(str, one.get("clips") or [])),
            ]
        )
        for index, stage in trained
        for one in stage.skipped_steps
    ]
    if skipped:
        title = "Skipped steps and their clips"
        title += f" (the first {MAX_SKIPPED_STEPS} of {len(skipped)})" if len(skipped) > MAX_SKIPPED_STEPS else ""
        section.tables.append(
            Grid(["stage", "step", "clips"], skipped[:MAX_SKIPPED_STEPS], title, text=("stage", "clips"))
        )
    return section


def _fault_row(run: Run, index: int, stage: Stage) -> Row:
    prefix = "tokenizer" if stage.name == "tokenizer" else "labels"
    counts = [
        stage.last("train/recoveries"),
        stage.last("train/skipped_steps"),
        stage.last(f"{prefix}/collapsed_steps"),
    ]
    counts[1] = max(counts[1] or 0, len(stage.skipped_steps))
    cells = [stage_title(run, index, stage), *(figure(count, 0) for count in counts), "-"]
    return Row(cells, "bad" if any(counts) else "")


def _sweep_row(run: Run, index: int, stage: Stage) -> Row:
    trials = [as_dict(trial) for trial in stage.result["trials"]] if isinstance(stage.result["trials"], list) else []
    failed = sum(trial.get("status") == "failed" for trial in trials)
    return Row([stage_title(run, index, stage), "-", "-", "-", f"{failed} of {len(trials)}"], "bad" if failed else "")
