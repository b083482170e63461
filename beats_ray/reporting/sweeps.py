"""The report's sweeps: trials, what their settings did, and encoders that one sweep has compared."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from beats_ray.reporting.charts import Axis, Bar, BarChart, Line, ParallelChart, Track, bar_chart, line_chart, present
from beats_ray.reporting.importance import RESAMPLES, Importance, measure_importance
from beats_ray.reporting.layout import (
    Grid,
    Row,
    Section,
    duration,
    figure,
    interval_text,
    iteration_title,
    spread,
    stages_of,
)
from beats_ray.reporting.reading import as_dict, number
from beats_ray.reporting.run_folder import Run, Stage
from beats_ray.reporting.scales import scale_of, setting_text
from beats_ray.reporting.trials import SweepBoard, Trial, read_board

MAX_TRIALS = 50
MAX_AXES = 8
LONGEST_REASON = 160
EXPLANATION = (
    f"Importance of settings: shares of the variance between trials by fANOVA, ± over {RESAMPLES} resamples of them. "
    "Trials that were stopped early count with their last value."
)
LITTLE = 0.1
"""R² under which shares are told to be noise."""


def sweeps(run: Run) -> Section:
    """Every trial of every sweep, also of one that is under way."""
    section = Section("Fine-tuning sweeps")
    for index, stage in stages_of(run, "sweep"):
        board = read_board(stage.result)
        if board.trials:
            title = iteration_title(run, index)
            _add_sweep(section, f"{title}, {stage.task}" if stage.task else title, board, _space(stage))
    if section.tables:
        section.notes = [
            "Trials are compared by the validation part; the test part has chosen nothing. The best trial stands out.",
            *section.notes,
        ]
    else:
        section.absent = "No trial of a sweep has reported yet."
    return section


def _add_sweep(section: Section, title: str, board: SweepBoard, space: Mapping[str, Any]) -> None:
    shown = board.metric.replace("/", " ").replace("_", " ")
    lines = [
        Line(trial.name_and_encoder, trial.history, "series-1" if trial.name == board.best else "muted")
        for trial in board.trials[:MAX_TRIALS]
    ]
    lines.sort(key=lambda line: line.color == "series-1")  # the best is drawn last, on top
    valued = [(_settings(trial), trial.value) for trial in board.trials if trial.value is not None]
    found = measure_importance(valued, space)
    # The weightiest setting stands beside the result.
    order = [share.name for share in reversed(found.shares)] if isinstance(found, Importance) else []
    section.charts += present(
        line_chart(f"{title}: {shown} of each trial", lines, "step", has_legend=False),
        *([_importance_chart(title, found)] if isinstance(found, Importance) else []),
        _parallel(f"{title}: settings and {shown}", board, space, order),
    )
    if isinstance(found, Importance) and EXPLANATION not in section.notes:
        section.notes.append(EXPLANATION)
    section.notes += [f"{title}: {note}" for note in _notes(board, found)]
    section.tables += _encoder_grids(title, board)
    section.tables.append(_trial_grid(title, board))


def _notes(board: SweepBoard, found: Importance | str) -> list[str]:
    notes = []
    states = [trial.state for trial in board.trials]
    if board.status != "complete":
        notes.append(f"{board.status}; {len(states)} trials so far, {states.count('running')} of them not ended.")
    if "failed" in states:
        notes.append(f"{states.count('failed')} of {len(states)} trials failed; the table gives their reasons.")
    if board.pareto:
        notes.append(f"no other trial is better in all objectives than {', '.join(board.pareto)}.")
    if isinstance(found, str):
        return [*notes, found]
    verdict = "" if found.explained > LITTLE else ": too little, read their shares as noise"
    notes.append(
        f"{found.trials} trials; the settings explain {max(0.0, found.explained):.0%} of the variance of trials that "
        f"they were not fitted to (R² out of bag){verdict}."
    )
    if found.left_out:
        notes.append(f"left out of it, since only some trials have them: {', '.join(found.left_out)}.")
    return notes


def _importance_chart(title: str, found: Importance) -> BarChart:
    labels = _short_names([share.name for share in found.shares])
    bars = [
        Bar(labels[share.name], share.value, f"{share.value:.0%} ± {share.standard_error:.0%}", share.standard_error)
        for share in found.shares
    ]
    return bar_chart(f"{title}: importance of settings", bars, maximum=1.0)


def _parallel(title: str, board: SweepBoard, space: Mapping[str, Any], order: list[str]) -> ParallelChart:
    """A line for each trial that has a value, over the settings that differ, the result on the last axis."""
    valued = [(_settings(trial), trial.value, trial) for trial in board.trials if trial.value is not None]
    names = sorted({name for settings, _, _ in valued for name in settings})
    names = [name for name in names if len({repr(settings.get(name)) for settings, _, _ in valued}) > 1]
    names = sorted(names, key=lambda name: order.index(name) if name in order else -1)[-MAX_AXES:]
    if not names:
        return ParallelChart(title, (), ())
    scales = {
        name: scale_of([one[name] for one, _, _ in valued if name in one], as_dict(space.get(name))) for name in names
    }
    labels = _short_names(names)
    low, high = min(value for _, value, _ in valued), max(value for _, value, _ in valued)
    tracks = []
    for settings, value, trial in valued[:MAX_TRIALS]:
        height = (value - low) / (high - low) if high > low else 0.5
        heights = [scale.height(settings[name]) if name in settings else None for name, scale in scales.items()]
        label = ", ".join(f"{labels[name]} {setting_text(settings.get(name))}" for name in names)
        quality = height if board.is_maximised else 1.0 - height
        tracks.append(
            Track(f"{trial.name}: {value:.3f}; {label}", (*heights, height), quality, trial.name == board.best)
        )
    axes = [Axis(labels[name], *scale.ends) for name, scale in scales.items()]
    return ParallelChart(title, (*axes, Axis("result", f"{low:.3f}", f"{high:.3f}")), tuple(tracks))


def _trial_grid(title: str, board: SweepBoard) -> Grid:
    trials = board.trials[:MAX_TRIALS]
    settings = sorted({name for trial in board.trials for name in trial.settings})
    columns: dict[str, list[str]] = {"trial": [trial.name for trial in trials]}
    if board.encoders:
        columns["encoder"] = [trial.encoder or "-" for trial in trials]
    columns["validation"] = [figure(trial.value) for trial in trials]
    columns["test"] = [figure(trial.test) for trial in trials]
    columns["steps"] = [f"{trial.steps:g}" for trial in trials]
    columns["state"] = [trial.state for trial in trials]
    if any(trial.reason for trial in trials):
        columns["reason"] = [_shortened(trial.reason) or "-" for trial in trials]
    for name, label in _short_names(settings, taken=(*columns, "time", "cost")).items():
        columns[label] = [setting_text(trial.settings.get(name)) for trial in trials]
    if any(trial.seconds for trial in trials):
        columns["time"] = [duration(trial.seconds or 0.0) for trial in trials]
    if any(trial.cost for trial in trials):
        columns["cost"] = [figure(trial.cost, 2) for trial in trials]
    kinds = ["best" if one.name == board.best else "bad" if one.state == "failed" else "" for one in trials]
    rows = [Row(cells, kind) for cells, kind in zip(zip(*columns.values(), strict=True), kinds, strict=True)]
    shown = "trials" if len(board.trials) <= MAX_TRIALS else f"best {MAX_TRIALS} of {len(board.trials)} trials"
    return Grid(list(columns), rows, f"{title}: {shown}", text=("trial", "encoder", "state", "reason"))


def _encoder_grids(title: str, board: SweepBoard) -> list[Grid]:
    """Encoders that one sweep has compared, and the paired differences between them."""
    if not board.encoders:
        return []
    by_name = {trial.name: trial for trial in board.trials}
    rows = []
    for name, one in board.encoders.items():
        best = by_name.get(str(one.get("best")))
        rows.append(
            Row(
                [
                    name,
                    figure(best and best.value),
                    figure(best and best.test),
                    best.name if best else "-",
                    figure(one.get("finished"), 0),
                    str(one.get("path") or "-"),
                ]
            )
        )
    columns = ["encoder", "best, validation", "best, test", "trial", "trials run to the end", "path"]
    grids = [Grid(columns, rows, f"{title}: encoders", text=("encoder", "trial", "path"))]
    rows = []
    for one in board.comparisons:
        low, high = (number(end) for end in (one.get("interval") or [None, None]))
        is_noise = one.get("is_noise")
        rows.append(
            Row(
                [
                    f"{one.get('encoder')} against {one.get('reference')}",
                    f"{one.get('of') or '-'}, {one.get('part') or '-'}",
                    figure(one.get("pairs"), 0),
                    spread(number(one.get("difference")), number(one.get("standard_error")), signed=True),
                    interval_text(low, high),
                    "-" if is_noise is None else "no more than noise" if is_noise else "more than noise",
                    str(one.get("over") or "-"),
                ]
            )
        )
    if rows:
        columns = ["compared", "on", "pairs", "difference", "95 % interval", "verdict", "interval holds for other"]
        text = ("compared", "on", "verdict", "interval holds for other")
        grids.append(Grid(columns, rows, f"{title}: encoders in pairs", text=text))
    return grids


def _settings(trial: Trial) -> dict[str, Any]:
    """What differs between trials: the drawn settings, and the encoder where there are several."""
    return trial.settings | ({"encoder": trial.encoder} if trial.encoder else {})


def _space(stage: Stage) -> dict[str, Any]:
    return as_dict(as_dict(as_dict(stage.state.get("config")).get("sweep")).get("space"))


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def _short_names(names: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """Each setting without its section, where that is its alone and no column of another kind has it."""
    counts = Counter([*taken, *(name.rsplit(".", 1)[-1] for name in names)])
    return {name: short if counts[short := name.rsplit(".", 1)[-1]] == 1 else name for name in names}
