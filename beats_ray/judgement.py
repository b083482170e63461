"""What a classifier's predictions are worth, and the files that say so.

FOLDER/evaluation.json       macro figures with their errors
FOLDER/per_class.csv         each class's figures, in the order of the vocabulary
FOLDER/confusion.csv         clips of each true class (row) taken for each class (column); one label a clip only
FOLDER/predictions.csv       each clip's labels and best classes, the surest mistakes first
FOLDER/predictions.parquet   clip_id, fold, labels, probabilities (all classes), in the data set's order
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from beats_ray.config import UserError
from beats_ray.data.storage import Place, write_table
from beats_ray.scoring import (
    accuracy,
    average_precision_by_class,
    binomial_error,
    confusion_matrix,
    d_prime,
    expected_calibration_error,
    mean_average_precision_error,
    mean_over_classes,
    precision_by_class,
    recall_by_class,
    roc_auc_by_class,
)

RESULT_FILE = "evaluation.json"
SHOWN_CLASSES = 3
SETTINGS = {"window_seconds", "hop_seconds"}
"""Of a result, numbers that are no figures."""


@dataclass(frozen=True)
class Predictions:
    """A classifier's probabilities of clips whose labels are known, in the data set's order."""

    clip_ids: list[str]
    folds: np.ndarray
    labels: list[list[int]]
    probability_NC: np.ndarray
    """float64; classes in the order of `label_names`."""
    label_names: tuple[str, ...]
    multi_label: bool
    """Whether a clip of this data set may have several labels, or none."""

    @property
    def truth_NC(self) -> np.ndarray:
        truth = np.zeros(self.probability_NC.shape, dtype=bool)
        for row, labels in enumerate(self.labels):
            truth[row, labels] = True
        return truth

    @property
    def label_N(self) -> np.ndarray:
        """The single label of each clip."""
        return np.array([labels[0] for labels in self.labels], dtype=np.int64)

    def judgeable(self) -> "Predictions":
        """The clips that count: with one label a clip, those that have it. UserError where there is none."""
        if self.multi_label:
            kept = list(range(len(self.labels)))
        else:
            kept = [index for index, labels in enumerate(self.labels) if labels]
        if not kept:
            raise UserError("data: none of the chosen clips has a label; choose other folds or splits")
        return Predictions(
            [self.clip_ids[index] for index in kept],
            self.folds[kept],
            [self.labels[index] for index in kept],
            self.probability_NC[kept],
            self.label_names,
            self.multi_label,
        )


def judge(predictions: Predictions) -> dict[str, Any]:
    """Macro figures of predictions: with one label a clip accuracy first, with several mean average precision.

    A figure that the clips cannot tell is None. Unlabelled clips count only where a clip may have several labels.
    """
    found = predictions.judgeable()
    truth_NC, probability_NC = found.truth_NC, found.probability_NC
    roc_auc = mean_over_classes(roc_auc_by_class(truth_NC, probability_NC))
    precision_C = average_precision_by_class(truth_NC, probability_NC)
    ranking = {
        "mean_average_precision": mean_over_classes(precision_C),
        "mean_average_precision_standard_error": mean_average_precision_error(truth_NC, probability_NC),
        "mean_roc_auc": roc_auc,
        "d_prime": math.nan if math.isnan(roc_auc) else d_prime(roc_auc),
        "classes_present": int(truth_NC.any(0).sum()),
        "clips": len(truth_NC),
    }
    if found.multi_label:
        calibration = expected_calibration_error(probability_NC.ravel(), truth_NC.ravel())
        return _finite(ranking | {"expected_calibration_error": calibration})
    return _finite(_single_label_figures(found) | ranking)


def _single_label_figures(found: Predictions) -> dict[str, Any]:
    label_N, probability_NC = found.label_N, found.probability_NC
    predicted_N = probability_NC.argmax(1)
    is_right_N = predicted_N == label_N
    right = accuracy(label_N, probability_NC)
    confusion_CC = confusion_matrix(label_N, predicted_N, len(found.label_names))
    recall_C, clips_C = recall_by_class(confusion_CC), confusion_CC.sum(1)
    variances = recall_C * (1 - recall_C) / np.maximum(clips_C, 1)
    return {
        "accuracy": right,
        "standard_error": binomial_error(right, len(label_N)),
        "macro_recall": mean_over_classes(recall_C),
        "macro_recall_standard_error": math.sqrt(float(np.nansum(variances))) / max(1, int((clips_C > 0).sum())),
        "expected_calibration_error": expected_calibration_error(probability_NC.max(1), is_right_N),
        "fold_accuracies": {
            str(fold): float(is_right_N[found.folds == fold].mean()) for fold in np.unique(found.folds)
        },
        "correct": "".join("01"[int(right)] for right in is_right_N),
    }


def write_judgement(folder: Place, predictions: Predictions, result: dict[str, Any]) -> list[tuple[str, str]]:
    """Writes all files of a judgement, `result` as evaluation.json last; returns (label, uri) of each."""
    found = predictions.judgeable()
    tables: dict[str, Iterable[Sequence[object]]] = {
        "per_class.csv": per_class_rows(found),
        "predictions.csv": _clip_rows(found),
    }
    if not found.multi_label:
        tables["confusion.csv"] = _confusion_rows(found)
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    columns = {
        "clip_id": pa.array(found.clip_ids),
        "fold": pa.array(found.folds.astype(np.int16)),
        "labels": pa.array([[found.label_names[label] for label in labels] for labels in found.labels]),
        "probabilities": pa.array(list(found.probability_NC)),
    }
    write_table(folder / "predictions.parquet", pa.table(columns))
    (folder / RESULT_FILE).write_json(result)
    names = [RESULT_FILE, *sorted(tables), "predictions.parquet"]
    return [(name.split(".")[0] if name != "predictions.parquet" else name, (folder / name).uri) for name in names]


def write_csv(place: Place, rows: Iterable[Sequence[object]]) -> None:
    """One CSV file, its first row the names of the columns; floats with six decimals, NaN and None empty."""
    text = io.StringIO()
    csv.writer(text).writerows([[_cell(value) for value in row] for row in rows])
    place.write_bytes(text.getvalue().encode())


def figure_rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[object]]:
    """Names of the columns, then a row for each of several results by name: what was judged, and every figure.

    Data with one label a clip and with several have different figures: what a result has not is None.
    """
    figures = dict.fromkeys(
        name for result in results.values() for name, value in result.items()
        if name not in SETTINGS and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    )  # fmt: skip
    rows: list[list[object]] = [["name", "kind", "model", "data", *figures]]
    for name, result in results.items():
        models = ";".join(result.get("models") or [result["model"]])
        rows.append([name, result["kind"], models, result["data"], *(result.get(figure) for figure in figures)])
    return rows


def per_class_rows(found: Predictions) -> list[list[object]]:
    """Names of the columns, then one row for each class in the order of the vocabulary."""
    truth_NC, probability_NC = found.truth_NC, found.probability_NC
    columns: dict[str, Sequence[object]] = {"label": found.label_names, "clips": truth_NC.sum(0).tolist()}
    if not found.multi_label:
        confusion_CC = confusion_matrix(found.label_N, probability_NC.argmax(1), len(found.label_names))
        columns |= {
            "recall": recall_by_class(confusion_CC).tolist(),
            "precision": precision_by_class(confusion_CC).tolist(),
        }
    auc_C = roc_auc_by_class(truth_NC, probability_NC).tolist()
    columns |= {
        "average_precision": average_precision_by_class(truth_NC, probability_NC).tolist(),
        "roc_auc": auc_C,
        "d_prime": [math.nan if math.isnan(value) else d_prime(value) for value in auc_C],
    }
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def _confusion_rows(found: Predictions) -> list[list[object]]:
    confusion_CC = confusion_matrix(found.label_N, found.probability_NC.argmax(1), len(found.label_names))
    rows = [[name, *counts] for name, counts in zip(found.label_names, confusion_CC.tolist(), strict=True)]
    return [["true \\ predicted", *found.label_names], *rows]


def _clip_rows(found: Predictions) -> list[list[object]]:
    shown = min(SHOWN_CLASSES, len(found.label_names))
    best_NK = np.argsort(-found.probability_NC, axis=1, kind="stable")[:, :shown]
    rows: list[list[object]] = []
    for index, labels in enumerate(found.labels):
        best = best_NK[index].tolist()
        named = ";".join(found.label_names[label] for label in labels)
        row = [found.clip_ids[index], int(found.folds[index]), named, int(best[0] in labels)]
        pairs = [(found.label_names[place], float(found.probability_NC[index, place])) for place in best]
        rows.append([*row, *(value for pair in pairs for value in pair)])
    rows.sort(key=lambda row: (row[3], -float(str(row[5]))))  # mistakes first, the surest on top
    places = range(1, shown + 1)
    heads = [name for place in places for name in (f"predicted_{place}", f"probability_{place}")]
    return [["clip_id", "fold", "labels", "first_is_right", *heads], *rows]


def _cell(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else value


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """The same with None where a figure is no finite number: JSON has no other word for it."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
