"""The report's results: headline figures, leaderboard and learning curves."""

from dataclasses import dataclass

from beats_ray.reporting.charts import Bar, Chart, Line, bar_chart, line_chart, present
from beats_ray.reporting.layout import Grid, Row, Section, figure, iteration_title, spread, stages_of
from beats_ray.reporting.reading import number
from beats_ray.reporting.run_folder import LeaderboardRow, Run

COLUMNS = ["encoder", "5-fold probe", "above untrained", "fine-tuned, validation", "fine-tuned, test", "state"]


@dataclass(frozen=True)
class Tile:
    """One of the few figures that matter most."""

    label: str
    value: str
    note: str


def headline(run: Run) -> tuple[str, list[Tile]]:
    """The line below the title, and the few figures that matter most."""
    rows = run.leaderboard()
    iterations = [row for row in rows if row.kind == "iteration"]
    planned = number(run.config.get("iterations"))
    finished = sum(row.status == "complete" for row in iterations)
    state = f"{finished} of {planned:g} iterations complete" if planned else f"{finished} iterations complete"
    if run.is_single_stage:
        state = next((stage.status for stage in run.iterations[1].values() if stage.status != "not started"), "")
    elif not (planned or iterations or run.info):  # the folder of an evaluation
        state = ""
    started = str(run.info.get("started") or "")
    subtitle = " · ".join(part for part in (run.place.uri, f"started {started}" if started else "", state) if part)
    found = (_probe_tile(iterations), _fine_tuned_tile(iterations), _loss_tile(run), _clips_tile(run))
    return subtitle, [tile for tile in found if tile]


def _probe_tile(iterations: list[LeaderboardRow]) -> Tile | None:
    probed = [row for row in iterations if row.probe_accuracy is not None]
    if not probed:
        return None
    best = max(probed, key=lambda row: row.probe_accuracy or 0.0)
    gain = f"; {spread(best.gain, best.gain_standard_error, signed=True)} above untrained"
    return Tile(
        "frozen probe, all folds", f"{best.probe_accuracy:.1%}", best.name + ("" if best.gain is None else gain)
    )


def _fine_tuned_tile(iterations: list[LeaderboardRow]) -> Tile | None:
    tuned = [row for row in iterations if row.test_accuracy is not None]
    if not tuned:
        return None
    best = max(tuned, key=lambda row: row.validation_accuracy or 0.0)
    error = "" if best.test_standard_error is None else f"; ± {best.test_standard_error:.1%}"
    return Tile("fine-tuned, test part", f"{best.test_accuracy:.1%}", best.name + error)


def _loss_tile(run: Run) -> Tile | None:
    trained = [(index, stage) for index, stage in stages_of(run, "pretrain") if stage.last("train/loss") is not None]
    if not trained:
        return None
    index, stage = trained[-1]
    note = f"{iteration_title(run, index)}; clip-band baseline {figure(stage.last('train/clip_band_loss'))}"
    return Tile("masked loss, nats", f"{stage.last('train/loss'):.2f}", note)


def _clips_tile(run: Run) -> Tile | None:
    clips = number(run.dataset.get("clips"))
    if not clips:
        return None
    hours = (number(run.dataset.get("seconds")) or 0) / 3600
    quarantined = number(run.dataset.get("quarantined")) or 0
    return Tile("clips", f"{clips:,.0f}", f"{hours:.2f} h of audio, {quarantined:.0f} files quarantined")


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
    rows = [] if run.is_single_stage else run.leaderboard()
    if not rows:
        section.absent = (
            "The folder of one stage: no encoders to rank." if run.is_single_stage else "No iteration has started yet."
        )
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
            [Row(leaderboard_cells(row), "baseline" if row.kind == "baseline" else "") for row in rows],
            "Encoders and baselines",
            text=(COLUMNS[0], COLUMNS[-1]),
        )
    ]
    bars = [
        Bar(row.name, row.probe_accuracy, spread(row.probe_accuracy), row.probe_standard_error or 0.0,
            "series-1" if row.kind == "iteration" else "muted")
        for row in rows if row.probe_accuracy is not None
    ]  # fmt: skip
    section.charts = present(bar_chart("k-fold accuracy", bars, maximum=1.0))
    section.tables += _task_grids(run)
    return section


def _task_grids(run: Run) -> list[Grid]:
    """What each encoder reaches on each task, where a run names tasks."""
    found = {(number(one.get("iteration")), str(one.get("task"))): one for one in run.task_results}
    if not found:
        return []
    tasks = list(dict.fromkeys(task for _, task in found))
    rows = []
    for index in sorted({index for index, _ in found if index is not None}):
        results = [found.get((index, task), {}) for task in tasks]
        figures = [spread(number(one.get("value")), number(one.get("standard_error"))) for one in results]
        rows.append(Row([iteration_title(run, int(index)), *figures]))
    heads = {str(one.get("task")): f"{one.get('task')}, {one.get('protocol')}" for one in run.task_results}
    title = "Tasks: accuracy, or mean average precision where a clip has several labels, on held-out clips"
    return [Grid(["encoder", *(heads[task] for task in tasks)], rows, title, text=("encoder",))]


def learning_curves(run: Run) -> Section:
    """Masked prediction against the clip-band baseline, the tokenizers' losses, fine-tunings with their validations."""
    section = Section("Learning curves")
    for index, stage in stages_of(run, "pretrain"):
        title = iteration_title(run, index)
        for shown, metric, baseline in (
            ("masked-prediction loss, nats", "train/loss", "train/clip_band_loss"),
            ("masked accuracy", "train/masked_accuracy", "train/clip_band_accuracy"),
        ):
            lines = [
                Line("encoder", stage.series(metric)),
                Line("clip-band baseline", stage.series(baseline), "muted", dashed=True),
            ]
            section.charts += present(line_chart(f"{title}: {shown}", lines, "step"))
    for index, stage in stages_of(run, "tokenizer"):
        title = f"{iteration_title(run, index)}: tokenizer loss"
        section.charts += present(line_chart(title, [Line("loss", stage.series("train/loss"), "series-3")], "step"))
    if section.charts:
        section.notes = [
            "The clip-band baseline predicts a masked patch from the visible codes of its clip and frequency band.",
            "Losses under different tokenizers are not comparable; probes are.",
        ]
    tuned = _fine_tuning_curves(run)
    if tuned:
        section.charts += tuned
        section.notes.append("Fine-tuning: the loss over training clips is of augmented ones, that over others is not.")
    if not section.charts:
        section.absent = "No training stage has reported yet."
    return section


def _fine_tuning_curves(run: Run) -> list[Chart]:
    """Loss, and accuracy or mean average precision, of each fine-tuning on the clips of its parts."""
    charts: list[Chart] = []
    for index, stage in stages_of(run, "finetune"):
        title = f"{iteration_title(run, index)}, {stage.task}" if stage.task else iteration_title(run, index)
        for shown, metric in (("loss", "loss"), ("accuracy", "accuracy"), ("mAP", "mean_average_precision")):
            lines = [
                Line("training", stage.series(f"train/{metric}")),
                Line("validation", stage.series(f"validation/{metric}"), "series-2"),
            ]
            charts += present(line_chart(f"{title}: fine-tuning {shown}", lines, "step"))
    return charts
