"""The report's sweeps: trials, what their settings did, and encoders that one sweep has compared.

Reads `leaderboard.json`: `trials` (trial_id, config, validation_NAME, test_NAME, steps, stopped_early, status, history;
of a failed one `error` or `reason`; of several encoders `encoder`), `best`, and `differences` between encoders.
"""

from collections.abc import Mapping
from typing import Any

from beats_ray.reporting.charts import (
    Axis,
    Bar,
    Line,
    ParallelChart,
    Track,
    bar_chart,
    line_chart,
    present,
)
from beats_ray.reporting.importance import RESAMPLES, Importance, measure_importance
from beats_ray.reporting.layout import (
    Grid,
    Row,
    Section,
    best_trial,
    figure,
    interval_text,
    iteration_title,
    spread,
    stages_of,
)
from beats_ray.reporting.reading import as_dict, dicts_of, number
from beats_ray.reporting.run_folder import Run, Stage
from beats_ray.reporting.scales import scale_of, setting_text

MAX_TRIALS = 50
MAX_AXES = 8
LONGEST_REASON = 160


def sweeps(run: Run) -> Section:
    """Every trial of every sweep, also of one that is under way."""
    section = Section("Fine-tuning sweeps")
    for index, stage in stages_of(run, "sweep"):
        trials = dicts_of(stage.result.get("trials"))
        if trials:
            _add_sweep(section, iteration_title(run, index), stage, trials)
    if section.tables:
        section.notes = [
            "Trials are compared by the validation part; the test part has chosen nothing. The best trial stands out.",
            *section.notes,
        ]
    else:
        section.absent = "No trial of a sweep has reported yet."
    return section


def _add_sweep(section: Section, title: str, stage: Stage, trials: list[dict[str, Any]]) -> None:
    best = best_trial(stage).get("trial_id")
    metric = str(stage.result.get("metric") or "validation/accuracy")
    shown = metric.replace("/", " ").replace("_", " ")
    lines = [
        Line(str(trial.get("trial_id")), _history(trial), "series-1" if trial.get("trial_id") == best else "muted")
        for trial in trials[:MAX_TRIALS]
    ]
    lines.sort(key=lambda line: line.color == "series-1")  # the best is drawn last, on top
    space = _space(stage)
    found = measure_importance(
        [(as_dict(trial.get("config")), value) for trial in trials if (value := _value(trial)) is not None], space
    )
    section.charts += present(
        line_chart(f"{title}: {shown} of each trial", lines, "step", has_legend=False),
        *([_importance_chart(title, found)] if isinstance(found, Importance) else []),
        _parallel(f"{title}: settings and {shown}", trials, space, best),
    )
    section.notes += _notes(title, stage, trials, found)
    section.tables.append(_trial_grid(title, trials, best))
    section.tables += _difference_grids(title, stage.result)


def _notes(title: str, stage: Stage, trials: list[dict[str, Any]], found: Importance | str) -> list[str]:
    notes = []
    if stage.result.get("unfinished"):
        running = sum(trial.get("status") == "running" for trial in trials)
        notes.append(f"{title}: under way, {len(trials)} trials so far, {running} of them not ended.")
    failed = sum(trial.get("status") == "failed" for trial in trials)
    if failed:
        notes.append(f"{title}: {failed} of {len(trials)} trials failed; the table gives their reasons.")
    if isinstance(found, str):
        return [*notes, f"{title}: {found}"]
    sure = (
        "Of an unseen trial they tell nothing (R² out of bag {:.2f}): read the shares as noise."
        if found.explained <= 0
        else "Of an unseen trial they explain a part (R² out of bag {:.2f})."
    ).format(found.explained)
    notes.append(
        f"{title}: importance of settings by fANOVA over {found.trials} trials; ± is the standard error over "
        f"{RESAMPLES} resamples of the trials. {sure} Trials that were stopped early count with their last value."
    )
    if found.left_out:
        notes.append(f"{title}: left out, since only some trials have them: {', '.join(found.left_out)}.")
    return notes


def _importance_chart(title: str, found: Importance) -> Any:
    bars = [
        Bar(_short(share.name), share.value, f"{share.value:.0%} ± {share.standard_error:.0%}", share.standard_error)
        for share in found.shares
    ]
    return bar_chart(f"{title}: importance of settings", bars, maximum=1.0)


def _parallel(title: str, trials: list[dict[str, Any]], space: Mapping[str, Any], best: Any) -> ParallelChart:
    """A line for each trial that has a value, over the settings that differ, the result on the last axis."""
    valued = [(as_dict(trial.get("config")), value, trial) for trial in trials if (value := _value(trial)) is not None]
    names = sorted({name for settings, _, _ in valued for name in settings})
    names = [name for name in names if len({repr(settings.get(name)) for settings, _, _ in valued}) > 1][:MAX_AXES]
    if not names:
        return ParallelChart(title, (), ())
    scales = {
        name: scale_of([one[name] for one, _, _ in valued if name in one], as_dict(space.get(name))) for name in names
    }
    low, high = min(value for _, value, _ in valued), max(value for _, value, _ in valued)
    tracks = []
    for settings, value, trial in valued[:MAX_TRIALS]:
        quality = (value - low) / (high - low) if high > low else 0.5
        heights = [scale.height(settings[name]) if name in settings else None for name, scale in scales.items()]
        label = ", ".join(f"{_short(name)} {setting_text(settings.get(name))}" for name in names)
        is_best = trial.get("trial_id") == best
        tracks.append(Track(f"{trial.get('trial_id')}: {value:.3f}; {label}", (*heights, quality), quality, is_best))
    axes = [Axis(_short(name), *scale.ends) for name, scale in scales.items()]
    return ParallelChart(title, (*axes, Axis("result", f"{low:.3f}", f"{high:.3f}")), tuple(tracks))


def _trial_grid(title: str, trials: list[dict[str, Any]], best: Any) -> Grid:
    names = sorted({name for trial in trials for name in as_dict(trial.get("config"))})
    has_encoders = any(trial.get("encoder") for trial in trials)
    has_reasons = any(_reason(trial) for trial in trials)
    columns = ["trial", *(["encoder"] if has_encoders else []), "validation", "test", "steps", "state"]
    columns += [*(_short(name) for name in names), *(["reason"] if has_reasons else [])]
    rows = []
    for trial in trials[:MAX_TRIALS]:
        state = "stopped early" if trial.get("stopped_early") else str(trial.get("status") or "-")
        values = as_dict(trial.get("config"))
        cells = [str(trial.get("trial_id")), *([str(trial.get("encoder") or "-")] if has_encoders else [])]
        cells += [figure(_value(trial)), figure(_main_metric(trial, "test_")), f"{number(trial.get('steps')) or 0:g}"]
        cells += [state, *(setting_text(values.get(name)) for name in names)]
        cells += [_reason(trial) or "-"] if has_reasons else []
        kind = "best" if trial.get("trial_id") == best else "bad" if trial.get("status") == "failed" else ""
        rows.append(Row(cells, kind))
    title += ": trials" if len(trials) <= MAX_TRIALS else f": best {MAX_TRIALS} of {len(trials)} trials"
    return Grid(columns, rows, title, text=("trial", "encoder", "state", "reason"))


def _difference_grids(title: str, board: dict[str, Any]) -> list[Grid]:
    """Encoders that one sweep has compared, and the paired differences between them."""
    grids = []
    encoders = {name: one for name, one in as_dict(board.get("encoders")).items() if isinstance(one, dict)}
    measured = [name for name in sorted({key for one in encoders.values() for key in one})
                if any(number(one.get(name)) is not None for one in encoders.values())]  # fmt: skip
    if measured:
        rows = [Row([name, *(figure(one.get(key)) for key in measured)]) for name, one in encoders.items()]
        columns = ["encoder", *(name.replace("_", " ") for name in measured)]
        grids.append(Grid(columns, rows, f"{title}: encoders", text=("encoder",)))
    compared = dicts_of(board.get("differences")) or dicts_of(board.get("comparisons"))
    rows = []
    for one in compared:
        low, high = (number(end) for end in (one.get("interval") or [None, None]))
        difference = spread(number(one.get("difference")), number(one.get("standard_error")), signed=True)
        told = "-" if low is None or high is None else "not told apart" if low <= 0 <= high else "differ"
        rows.append(Row([f"{one.get('encoder')} against {one.get('reference')}", difference,
                         interval_text(low, high), told]))  # fmt: skip
    if rows:
        columns = ["compared", "difference", "95 % interval", "verdict"]
        grids.append(Grid(columns, rows, f"{title}: encoders on the same trials", text=("compared", "verdict")))
    return grids


def _space(stage: Stage) -> dict[str, Any]:
    return as_dict(as_dict(as_dict(stage.state.get("config")).get("sweep")).get("space"))


def _reason(trial: dict[str, Any]) -> str:
    text = " ".join(str(trial.get("reason") or trial.get("error") or "").split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _history(trial: dict[str, Any]) -> list[tuple[float, float]]:
    records = dicts_of(trial.get("history"))
    pairs = ((number(record.get("step")), number(_main_metric(record, "validation/"))) for record in records)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _value(trial: dict[str, Any]) -> float | None:
    return number(_main_metric(trial, "validation_"))


def _main_metric(values: dict[str, Any], prefix: str) -> Any:
    """What a sweep compares its trials by, accuracy or mean average precision: the first value of this prefix."""
    return next((value for name, value in values.items() if name.startswith(prefix)), None)
