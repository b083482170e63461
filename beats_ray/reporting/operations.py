"""The rest of the report: data, throughput, settings, and how to use the models."""

from collections import Counter
from typing import Any

import yaml

from beats_ray.reporting.charts import Bar, bar_chart
from beats_ray.reporting.layout import (
    TITLES,
    Grid,
    Section,
    best_trial,
    duration,
    figure,
    present,
    stage_title,
    stages_of,
)
from beats_ray.reporting.run_folder import STAGES, Run, number

MAX_REASONS = 12
EXAMPLES_PER_REASON = 3


def data_health(run: Run) -> Section:
    """What the data set holds, and which files were refused."""
    section = Section("Data")
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
    ]
    for title, counts in (("clips by fold", data.get("clips_by_fold")), ("clips by split", data.get("clips_by_split"))):
        if isinstance(counts, dict) and len(counts) > 1:
            bars = [
                Bar(str(name), number(count) or 0.0, f"{number(count) or 0:,.0f}") for name, count in counts.items()
            ]
            section.charts += present(bar_chart(title, bars))
    if run.quarantine:
        section.tables = [_quarantine_grid(run.quarantine)]
    return section


def _quarantine_grid(rows: list[dict[str, Any]]) -> Grid:
    reasons = Counter(str(row.get("reason") or "no reason given") for row in rows)
    lines = []
    for reason, count in reasons.most_common(MAX_REASONS):
        names = [_file_of(row) for row in rows if str(row.get("reason") or "no reason given") == reason]
        rest = f" and {count - EXAMPLES_PER_REASON} more" if count > EXAMPLES_PER_REASON else ""
        lines.append({"cells": [reason, str(count), ", ".join(names[:EXAMPLES_PER_REASON]) + rest], "kind": ""})
    title = (
        "Quarantined files"
        if len(reasons) <= MAX_REASONS
        else f"Quarantined files: the {MAX_REASONS} commonest of {len(reasons)} reasons"
    )
    return Grid(["reason", "files", "examples"], lines, text=("reason", "examples"), title=title)


def _file_of(row: dict[str, Any]) -> str:
    return next(
        (str(row[name]).rsplit("/", 1)[-1] for name in ("file", "path", "source", "clip_id") if row.get(name)), "?"
    )


def throughput(run: Run) -> Section:
    """How long each stage took, and how fast training was."""
    section = Section("Throughput and stage times")
    bars, rows = [], []
    for index, stages in sorted(run.iterations.items()):
        for name in STAGES:
            stage = stages[name]
            if stage.status == "not started":
                continue
            seconds = stage.seconds
            if seconds is not None:
                bars.append(Bar(stage_title(index, name), seconds, duration(seconds)))
            last = {key: stage.last(key) for key in ("perf/clips_per_s", "data/wait_fraction", "step", "clips")}
            cells = [stage_title(index, name), stage.status, "-" if seconds is None else duration(seconds)]
            cells += [figure(last["step"], 0), figure(last["clips"], 0), figure(last["perf/clips_per_s"], 1)]
            cells.append("-" if last["data/wait_fraction"] is None else f"{last['data/wait_fraction']:.1%}")
            rows.append({"cells": cells, "kind": ""})
    if not rows:
        section.absent = "No stage has started yet."
        return section
    section.charts = present(bar_chart("stage times", bars))
    columns = ["stage", "state", "time", "steps", "clips", "clips/s", "waiting for data"]
    section.tables = [Grid(columns, rows, text=("stage", "state"))]
    return section


def settings(run: Run) -> Section:
    """The resolved settings of the run and of each stage."""
    section = Section("Settings")
    if run.config:
        section.code.append(_code("The run's resolved config", _yaml(run.config), folded=True))
    for index, stages in sorted(run.iterations.items()):
        for stage in stages.values():
            own = stage.state.get("config")
            if isinstance(own, dict) and own and own != run.config:
                section.code.append(
                    _code(
                        f"iteration {index}: {TITLES[stage.name]}" if index else stage_title(0, stage.name),
                        _yaml(own),
                        folded=True,
                    )
                )
    if not section.code:
        section.absent = "No config was found."
    return section


def loading(run: Run) -> Section:
    """How to use the newest models."""
    section = Section("Use the models")
    newest = max((index for index, _ in stages_of(run, "pretrain", complete=True)), default=None)
    if newest is None:
        section.absent = "No encoder has been published yet."
        return section
    folder = f"{run.place.uri}/iteration-{newest}"
    remote = run.place.is_remote
    copy = "gcloud storage cp --recursive" if run.place.uri.startswith("gs://") else "aws s3 cp --recursive"
    where = "encoder" if remote else f"{folder}/pretrain/model"
    python = (
        "from beats_ray.models import compute_fbank, load_model, normalise_fbank\n\n"
        + (f"# first: {copy} {folder}/pretrain/model encoder\n" if remote else "")
        + f'encoder = load_model("{where}")\n'
        "fbank, frames = compute_fbank(wave)              # (clips, samples) at 16 kHz, int16 or float in [-1, 1]\n"
        "fbank = normalise_fbank(fbank, encoder.config.fbank_mean, encoder.config.fbank_std, frames)\n"
        "features = encoder(fbank, frames).features_BND   # (clips, patches, width)"
    )
    section.code.append(_code("The newest encoder, in Python", python))
    tuned = max((index for index, stage in stages_of(run, "sweep", complete=True) if best_trial(stage)), default=None)
    if tuned is not None:
        section.code.append(
            _code(
                "The best classifier, on the command line",
                f"beats-ray predict {run.place.uri}/iteration-{tuned}/sweep/model FILE...",
            )
        )
    return section


def _code(title: str, text: str, folded: bool = False) -> dict[str, Any]:
    return {"title": title, "text": text, "folded": folded}


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
