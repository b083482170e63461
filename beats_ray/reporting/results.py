"""The report's results: headline figures, leaderboard, learning curves, sweeps and codebooks."""

from typing import Any

from beats_ray.reporting.charts import Bar, Line, bar_chart, line_chart
from beats_ray.reporting.layout import Grid, Section, best_trial, figure, present, spread, stages_of
from beats_ray.reporting.run_folder import LeaderboardRow, Run, number

MAX_TRIALS = 50
COLUMNS = ["encoder", "5-fold probe", "above untrained", "fine-tuned, validation", "fine-tuned, test", "state"]


def headline(run: Run) -> tuple[str, list[dict[str, str]]]:
    """The line below the title, and the few figures that matter most."""
    rows = run.leaderboard()
    iterations = [row for row in rows if row.kind == "iteration"]
    planned = number(run.config.get("iterations"))
    finished = sum(row.status == "complete" for row in iterations)
    state = f"{finished} of {planned:g} iterations complete" if planned else f"{finished} iterations complete"
    state = state if planned or iterations or run.info else ""  # the folder of an evaluation
    started = str(run.info.get("started") or "")
    subtitle = " · ".join(part for part in (run.place.uri, f"started {started}" if started else "", state) if part)
    tiles = []
    probed = [row for row in iterations if row.probe_accuracy is not None]
    if probed:
        best = max(probed, key=lambda row: row.probe_accuracy or 0.0)
        note = f"{best.name}; {spread(best.gain, best.gain_standard_error, signed=True)} above untrained"
        tiles.append(
            _tile("frozen probe, all folds", f"{best.probe_accuracy:.1%}", note if best.gain is not None else best.name)
        )
    tuned = [row for row in iterations if row.test_accuracy is not None]
    if tuned:
        best = max(tuned, key=lambda row: row.validation_accuracy or 0.0)
        tiles.append(
            _tile(
                "fine-tuned, test fold",
                f"{best.test_accuracy:.1%}",
                f"{best.name}; ± {best.test_standard_error or 0:.1%}",
            )
        )
    trained = [
        (index, stages["pretrain"])
        for index, stages in sorted(run.iterations.items())
        if stages["pretrain"].last("train/loss")
    ]
    if trained:
        index, stage = trained[-1]
        tiles.append(
            _tile(
                "masked loss, nats",
                f"{stage.last('train/loss'):.2f}",
                f"iteration {index}; clip-band baseline {figure(stage.last('train/clip_band_loss'))}",
            )
        )
    clips = number(run.dataset.get("clips"))
    if clips:
        hours = (number(run.dataset.get("seconds")) or 0) / 3600
        tiles.append(
            _tile(
                "clips",
                f"{clips:,.0f}",
                f"{hours:.2f} h of audio, {number(run.dataset.get('quarantined')) or 0:.0f} files quarantined",
            )
        )
    return subtitle, tiles


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def leaderboard_cells(row: LeaderboardRow) -> list[str]:
    """One line of the leaderboard as text; `-` where a figure is absent."""
    return [
        row.name,
        spread(row.probe_accuracy, row.probe_standard_error),
        spread(row.gain, row.gain_standard_error, signed=True),
        spread(row.validation_accuracy),
        spread(row.test_accuracy, row.test_standard_error),
        row.status,
    ]


def leaderboard(run: Run) -> Section:
    """Every encoder and baseline by its probe, with the best fine-tuned figures beside."""
    section = Section("Leaderboard")
    rows = run.leaderboard()
    if not rows:
        section.absent = "No iteration has started yet."
        return section
    section.notes = [
        "Frozen probe: logistic regression on mean-pooled features, k-fold over all clips.",
        "± is the binomial standard error over clips; that of “above untrained” is paired over the same clips.",
        "Fine-tuned: the sweep's best trial by validation accuracy; no test accuracy has chosen anything.",
        "One fold has few clips: compare encoders by the probe.",
    ]
    section.tables = [
        Grid(
            COLUMNS,
            [{"cells": leaderboard_cells(row), "kind": row.kind} for row in rows],
            text=(COLUMNS[0], COLUMNS[-1]),
        )
    ]
    bars = [
        Bar(row.name, row.probe_accuracy, spread(row.probe_accuracy), row.probe_standard_error or 0.0,
            "series-1" if row.kind == "iteration" else "muted")
        for row in rows if row.probe_accuracy is not None
    ]  # fmt: skip
    section.charts = present(bar_chart("k-fold accuracy", bars, maximum=1.0))
    return section


def learning_curves(run: Run) -> Section:
    """Loss and accuracy of masked prediction against the clip-band baseline, and the tokenizers' losses."""
    section = Section("Learning curves")
    for index, stage in stages_of(run, "pretrain"):
        section.charts += present(
            line_chart(
                f"iteration {index}: masked-prediction loss, nats",
                [
                    Line("encoder", stage.series("train/loss")),
                    Line("clip-band baseline", stage.series("train/clip_band_loss"), "muted", dashed=True),
                ],
                "step",
            ),
            line_chart(
                f"iteration {index}: masked accuracy",
                [
                    Line("encoder", stage.series("train/masked_accuracy")),
                    Line("clip-band baseline", stage.series("train/clip_band_accuracy"), "muted", dashed=True),
                ],
                "step",
            ),
        )
    for index, stage in stages_of(run, "tokenizer"):
        section.charts += present(
            line_chart(
                f"iteration {index}: tokenizer loss", [Line("loss", stage.series("train/loss"), "series-3")], "step"
            )
        )
    if section.charts:
        section.notes = [
            "The clip-band baseline predicts a masked patch from the visible codes of its clip and frequency band.",
            "Losses under different tokenizers are not comparable; probes are.",
        ]
    else:
        section.absent = "No training stage has reported yet."
    return section


def sweeps(run: Run) -> Section:
    """Every trial of every sweep."""
    section = Section("Fine-tuning sweeps")
    for index, stage in stages_of(run, "sweep"):
        trials = [trial for trial in stage.result.get("trials") or [] if isinstance(trial, dict)]
        if not trials:
            continue
        best = best_trial(stage).get("trial_id")
        lines = [
            Line(str(trial.get("trial_id")), _history(trial), "series-1" if trial.get("trial_id") == best else "muted")
            for trial in trials[:MAX_TRIALS]
        ]
        lines.sort(key=lambda line: line.color == "series-1")  # the best is drawn last, on top
        section.charts += present(
            line_chart(f"iteration {index}: validation accuracy of each trial", lines, "step", has_legend=False)
        )
        section.tables.append(_trial_grid(f"iteration {index}", trials, best))
    if not section.tables:
        section.absent = "No sweep has finished yet."
    return section


def _trial_grid(title: str, trials: list[dict[str, Any]], best: Any) -> Grid:
    names = sorted({name for trial in trials for name in trial.get("config") or {}})
    columns = ["trial", "validation", "test", "steps", "state", *(name.rsplit(".", 1)[-1] for name in names)]
    rows = []
    for trial in trials[:MAX_TRIALS]:
        state = "stopped early" if trial.get("stopped_early") else str(trial.get("status") or "-")
        values = trial.get("config") or {}
        cells = [
            str(trial.get("trial_id")),
            figure(_main_metric(trial, "validation_")),
            figure(_main_metric(trial, "test_")),
        ]
        cells += [f"{number(trial.get('steps')) or 0:g}", state, *(_setting(values.get(name)) for name in names)]
        rows.append({"cells": cells, "kind": "best" if trial.get("trial_id") == best else ""})
    if len(trials) > MAX_TRIALS:
        title += f": best {MAX_TRIALS} of {len(trials)} trials"
    return Grid(columns, rows, text=("trial", "state"), title=title)


def _history(trial: dict[str, Any]) -> list[tuple[float, float]]:
    records = [record for record in trial.get("history") or [] if isinstance(record, dict)]
    pairs = ((number(record.get("step")), number(_main_metric(record, "validation/"))) for record in records)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _main_metric(values: dict[str, Any], prefix: str) -> Any:
    """What a sweep compares its trials by, accuracy or mean average precision: the one value of this prefix."""
    return next((value for name, value in values.items() if name.startswith(prefix)), None)


def codebooks(run: Run) -> Section:
    """How much of each codebook is in use."""
    section = Section("Codebook usage")
    rows = []
    for index, stages in sorted(run.iterations.items()):
        training, labels = stages["tokenizer"], stages["labels"].result
        used = labels.get("used_code_fraction", training.last("tokenizer/used_code_fraction"))
        perplexity = labels.get("perplexity", training.last("tokenizer/perplexity"))
        if used is not None or perplexity is not None:
            source = "labels of every clip" if "perplexity" in labels else "last training report"
            rows.append(
                {"cells": [f"iteration {index}", f"{number(used) or 0:.1%}", figure(perplexity, 1), source], "kind": ""}
            )
        section.charts += present(
            line_chart(
                f"iteration {index}: code perplexity while the tokenizer trains",
                [Line("perplexity", training.series("tokenizer/perplexity"), "series-3")],
                "step",
            ),
            line_chart(
                f"iteration {index}: part of the patches that the top codes cover",
                [Line("covered", _coverage(labels.get("code_counts")), "series-3")],
                "codes, most frequent first",
                y_range=(0, 1),
            ),
        )
    if rows:
        section.tables = [
            Grid(["tokenizer", "codes used", "perplexity", "measured on"], rows, text=("tokenizer", "measured on"))
        ]
        section.notes = ["Used codes alone mislead: perplexity says how evenly they are used."]
    else:
        section.absent = "No codebook statistics yet: iteration 1's random projection is computed on the fly."
    return section


def _coverage(counts: Any) -> list[tuple[float, float]]:
    values = sorted((number(count) or 0.0 for count in counts), reverse=True) if isinstance(counts, list) else []
    total, covered, points = sum(values), 0.0, []
    for rank, value in enumerate(values, 1):
        covered += value
        points.append((float(rank), covered / total if total else 0.0))
    return points


def _setting(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
