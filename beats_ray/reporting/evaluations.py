"""The report's evaluations: what `evaluate` and `cross-validate` wrote into the run's folder, or one or two below it.

    beats-ray evaluate model=... data.path=... output=RUN/evaluations/audioset
    beats-ray report RUN

Macro figures with their errors, and classes worst first.
"""

from typing import Any

from beats_ray.reporting.judgements import MAX_DETAILED, Judgement
from beats_ray.reporting.layout import Grid, Row, Section, figure, interval_text, spread
from beats_ray.reporting.reading import dicts_of, number
from beats_ray.reporting.run_folder import Run

MAX_CLASSES = 25


def evaluations(run: Run) -> Section:
    """Every evaluation and cross-validation of the run's folder, and the classes of the newest probe."""
    section = Section("Evaluations")
    for one in run.judgements:
        if one.summary:
            section.tables += _cross_validation_grids(one.name, one.summary)
    results = [one for one in run.judgements if one.result and not one.is_probe]
    if results:
        section.tables.append(_result_grid(results))
    section.tables += [_class_grid(one) for one in run.judgements if one.per_class]
    if results or any(one.summary for one in run.judgements):
        section.notes = [
            "± is a standard error over clips: binomial for an accuracy, by bootstrap for a mean average precision.",
            "Of a mean over folds it is the standard deviation between folds.",
            "d' is that of the mean area under the ROC curve; ECE is the expected calibration error over 15 bins.",
        ]
        judged = [one for one in results if one.result.get("kind") != "encoder"]
        if len(judged) > MAX_DETAILED:
            section.notes.append(f"Classes are shown of the first {MAX_DETAILED} of {len(judged)} evaluations.")
    elif not section.tables:
        section.absent = "No evaluation below this folder: `beats-ray evaluate output=RUN/evaluations/NAME` adds one."
    return section


def _result_grid(results: list[Judgement]) -> Grid:
    columns = ["evaluation", "model", "data", "clips", "accuracy", "macro recall", "mAP", "mean AUC", "d'", "ECE"]
    rows = []
    for one in results:
        result = one.result
        models = result.get("models") or [result.get("model")]
        model = str(models[0]) if len(models) == 1 else f"{len(models)} models"
        cells = [one.name, model, str(result.get("data") or "-"), f"{number(result.get('clips')) or 0:,.0f}"]
        for value, error in (
            ("accuracy", "standard_error"),
            ("macro_recall", "macro_recall_standard_error"),
            ("mean_average_precision", "mean_average_precision_standard_error"),
        ):
            cells.append(spread(number(result.get(value)), number(result.get(error))))
        others = ("mean_roc_auc", "d_prime", "expected_calibration_error")
        rows.append(Row([*cells, *(figure(result.get(other)) for other in others)]))
    return Grid(columns, rows, "Evaluated models", text=("evaluation", "model", "data"))


def _cross_validation_grids(name: str, summary: dict[str, Any]) -> list[Grid]:
    encoders = {key: value for key, value in (summary.get("encoders") or {}).items() if isinstance(value, dict)}
    folds, seeds = len(summary.get("folds") or []), len(summary.get("seeds") or [])
    title = f"{name}: cross-validation over {folds} folds, seeds: {seeds}, selection: {summary.get('selection')}"
    columns = ["encoder", "accuracy, all clips", "± over seeds", "mean and deviation of folds"]
    rows = [
        Row(
            [
                encoder,
                spread(number(one.get("accuracy")), number(one.get("standard_error"))),
                figure(one.get("seed_standard_error")),
                spread(number(one.get("fold_mean")), number(one.get("fold_standard_deviation"))),
            ]
        )
        for encoder, one in encoders.items()
    ]
    grids = [Grid(columns, rows, title, text=("encoder",))]
    compared = dicts_of(summary.get("comparisons"))
    if compared:
        rows = [Row([f"{one.get('encoder')} against {one.get('reference')}", *_difference(one)]) for one in compared]
        columns = ["paired", "difference", "95 % interval", "holds for other"]
        grids.append(Grid(columns, rows, f"{name}: paired differences", text=("paired", "holds for other")))
    return grids


def _difference(one: dict[str, Any]) -> list[str]:
    low, high = (number(value) for value in (one.get("interval") or [None, None]))
    difference = spread(number(one.get("difference")), number(one.get("standard_error")), signed=True)
    return [difference, interval_text(low, high), str(one.get("over") or "-")]


def _class_grid(one: Judgement) -> Grid:
    main = "recall" if "recall" in one.per_class[0] else "average_precision"
    judged = [row for row in one.per_class if _value(row, main) is not None]
    judged.sort(key=lambda row: _value(row, main) or 0.0)
    title = f"{one.name}: classes, worst first by {main.replace('_', ' ')}"
    if len(judged) > MAX_CLASSES:
        title += f" ({MAX_CLASSES} of {len(judged)})"
    columns = list(one.per_class[0])
    rows = [
        Row([row["label"], row["clips"], *(figure(_value(row, name)) for name in columns[2:])])
        for row in judged[:MAX_CLASSES]
    ]
    return Grid([column.replace("_", " ") for column in columns], rows, title, text=("label",))


def _value(row: dict[str, str], column: str) -> float | None:
    return number(float(row[column])) if row.get(column) else None
