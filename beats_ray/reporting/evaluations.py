"""The report's evaluations: what `evaluate` and `cross-validate` wrote into the run's folder, or one or two below it.

    beats-ray evaluate model=... data.path=... output=RUN/evaluations/audioset
    beats-ray report RUN

Macro figures with their errors, classes worst first, and what was taken for what.
"""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from beats_ray.data.storage import Place
from beats_ray.reporting.layout import Grid, Section, figure, spread
from beats_ray.reporting.run_folder import Run, number, read_part

RESULT_FILE, SUMMARY_FILE = "evaluation.json", "cross_validation.json"
DEPTH = 2
SKIPPED = re.compile(r"iteration-\d+.*|fold-\d+|model|data|checkpoints|trials|tune|ray-train|tensorboard|.*\.\w+")
MAX_DETAILED = 6
MAX_CLASSES = 25
MAX_MATRIX = 15
MAX_CONFUSIONS = 20


def evaluations(run: Run) -> Section:
    """Every evaluation and cross-validation of the run's folder."""
    section = Section("Evaluations")
    results: list[tuple[str, Place, dict[str, Any]]] = []
    for name, place in _folders(run.place, run.place.name, DEPTH):
        summary = read_part(place / SUMMARY_FILE, run.problems)
        if summary:
            section.tables += _cross_validation_grids(name, summary)
        result = read_part(place / RESULT_FILE, run.problems)
        if result and "kind" in result:  # that of several data sets only sums up what lies below
            results.append((name, place, result))
    if results:
        section.tables.append(_result_grid(results))
    judged = [(name, place, result) for name, place, result in results if result["kind"] != "encoder"]
    for name, place, _ in judged[:MAX_DETAILED]:
        section.tables += _class_grids(name, place, run.problems)
    if section.tables:
        section.notes = [
            "± is a standard error over clips: binomial for an accuracy, by bootstrap for a mean average precision.",
            "Of a mean over folds it is the standard deviation between folds.",
            "d' is that of the mean area under the ROC curve; ECE is the expected calibration error over 15 bins.",
        ]
        if len(judged) > MAX_DETAILED:
            section.notes.append(f"Classes are shown of the first {MAX_DETAILED} of {len(judged)} evaluations.")
    else:
        section.absent = "No evaluation below this folder: `beats-ray evaluate output=RUN/evaluations/NAME` adds one."
    return section


def _folders(place: Place, name: str, depth: int) -> Iterator[tuple[str, Place]]:
    """The folder itself and what may hold evaluations below it, with names relative to the run."""
    yield name, place
    if depth:
        for entry in place.list():
            if not SKIPPED.fullmatch(entry.name):
                inner = entry.name if depth == DEPTH else f"{name}/{entry.name}"
                yield from _folders(entry, inner, depth - 1)


def _result_grid(results: list[tuple[str, Place, dict[str, Any]]]) -> Grid:
    columns = ["evaluation", "model", "data", "clips", "accuracy", "macro recall", "mAP", "mean AUC", "d'", "ECE"]
    rows = []
    for name, _, result in results:
        models = result.get("models") or [result.get("model")]
        model = str(models[0]) if len(models) == 1 else f"{len(models)} models"
        cells = [name, model, str(result.get("data") or "-"), f"{number(result.get('clips')) or 0:,.0f}"]
        for value, error in (
            ("accuracy", "standard_error"),
            ("macro_recall", "macro_recall_standard_error"),
            ("mean_average_precision", "mean_average_precision_standard_error"),
        ):
            cells.append(spread(number(result.get(value)), number(result.get(error))))
        others = ("mean_roc_auc", "d_prime", "expected_calibration_error")
        rows.append({"cells": [*cells, *(figure(result.get(other)) for other in others)], "kind": ""})
    return Grid(columns, rows, text=("evaluation", "model", "data"))


def _cross_validation_grids(name: str, summary: dict[str, Any]) -> list[Grid]:
    encoders = {key: value for key, value in (summary.get("encoders") or {}).items() if isinstance(value, dict)}
    folds, seeds = len(summary.get("folds") or []), len(summary.get("seeds") or [])
    title = f"{name}: cross-validation over {folds} folds, seeds: {seeds}, selection: {summary.get('selection')}"
    columns = ["encoder", "accuracy, all clips", "± over seeds", "mean and deviation of folds"]
    rows = [
        {
            "cells": [
                encoder,
                spread(number(one.get("accuracy")), number(one.get("standard_error"))),
                figure(one.get("seed_standard_error")),
                spread(number(one.get("fold_mean")), number(one.get("fold_standard_deviation"))),
            ],
            "kind": "",
        }
        for encoder, one in encoders.items()
    ]
    grids = [Grid(columns, rows, text=("encoder",), title=title)]
    compared = [one for one in summary.get("comparisons") or [] if isinstance(one, dict)]
    if compared:
        rows = [
            {"cells": [f"{one.get('encoder')} against {one.get('reference')}", *_difference(one)], "kind": ""}
            for one in compared
        ]
        columns = ["paired", "difference", "95 % interval", "holds for other"]
        grids.append(Grid(columns, rows, text=("paired", "holds for other")))
    return grids


def _difference(one: dict[str, Any]) -> list[str]:
    low, high = (number(value) for value in (one.get("interval") or [None, None]))
    interval = "-" if low is None or high is None else f"{low:+.3f} to {high:+.3f}"
    difference = spread(number(one.get("difference")), number(one.get("standard_error")), signed=True)
    return [difference, interval, str(one.get("over") or "-")]


def _class_grids(name: str, place: Place, problems: list[str]) -> list[Grid]:
    grids = []
    rows = read_part(place / "per_class.csv", problems, _csv_rows) or []
    if rows:
        main = "recall" if "recall" in rows[0] else "average_precision"
        judged = [row for row in rows if _value(row, main) is not None]
        judged.sort(key=lambda row: _value(row, main) or 0.0)
        title = f"{name}: classes, worst first by {main.replace('_', ' ')}"
        if len(judged) > MAX_CLASSES:
            title += f" ({MAX_CLASSES} of {len(judged)})"
        columns = list(rows[0])
        shown = [
            {"cells": [row["label"], row["clips"], *(figure(_value(row, name)) for name in columns[2:])], "kind": ""}
            for row in judged[:MAX_CLASSES]
        ]
        grids.append(Grid([column.replace("_", " ") for column in columns], shown, text=("label",), title=title))
    confusion = read_part(place / "confusion.csv", problems, _csv_rows) or []
    return [*grids, *_confusion_grids(name, confusion)]


def _confusion_grids(name: str, rows: list[dict[str, str]]) -> list[Grid]:
    """The whole matrix of a few classes; of many the pairs that are confused most."""
    if not rows:
        return []
    head, *labels = rows[0]
    if len(labels) <= MAX_MATRIX:
        shown = [{"cells": [row[head], *(row[label] for label in labels)], "kind": ""} for row in rows]
        title = f"{name}: confusion matrix, a row for each true class"
        return [Grid([head, *labels], shown, text=(head,), title=title)]
    pairs = [
        (int(number(float(row[label] or 0)) or 0), row[head], label)
        for row in rows
        for label in labels
        if label != row[head]
    ]
    pairs.sort(key=lambda pair: -pair[0])
    shown = [{"cells": [true, taken, str(count)], "kind": ""} for count, true, taken in pairs[:MAX_CONFUSIONS] if count]
    return [Grid(["class", "taken for", "clips"], shown, text=("class", "taken for"), title=f"{name}: confused most")]


def _value(row: dict[str, str], column: str) -> float | None:
    return number(float(row[column])) if row.get(column) else None


def _csv_rows(place: Place) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(place.read_bytes().decode())))
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("rows of different lengths")
    return rows
