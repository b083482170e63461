"""`beats-ray evaluate`: how good published models are, on prepared data sets.

An encoder is judged frozen: a linear classifier on its mean-pooled patch features (padding left out), by k-fold over
the data set's folds. A classifier, or several as an ensemble, is judged by its own predictions on `data.folds` and
`data.splits` (all where none is named); its classes are matched with the data set's labels by name.

    OUTPUT/evaluation.json      and the files of `judgement.py`, of an encoder those of its probe and `folds.csv`
    OUTPUT/NAME/...             the same for each of several data sets; all figures in OUTPUT/evaluation.json and .csv

Clips are heard whole, or by windows (`windows.py`).
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor

from beats_ray.clip_table import ClipTable, PooledFeatures, collect_clips
from beats_ray.config import EvaluateConfig, EvaluatedData, UserError
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.plan import SAMPLE_RATE_HZ
from beats_ray.data.storage import Place, open_place
from beats_ray.inference import ClipWorker, check_pool, check_published, row_group_spans
from beats_ray.judgement import RESULT_FILE, Predictions, figure_rows, judge, write_csv, write_judgement
from beats_ray.label_order import ClassOrder, match_classes, read_class_names, translate_ids
from beats_ray.models import AudioClassifier
from beats_ray.probe import ProbeResult, probe_probabilities, summarise_probe
from beats_ray.scoring import binomial_error
from beats_ray.train.provenance import count_overlap
from beats_ray.windows import ByWindows

FOLDS_FILE, TABLE_FILE = "folds.csv", "evaluation.csv"
Written = list[tuple[str, str]]


@dataclass(frozen=True)
class JudgedModel:
    """A published model of the job, described without its weights."""

    place: Place
    description: dict[str, Any]
    class_names: list[str] | None = None
    """Of a classifier, where it tells them."""

    @property
    def kind(self) -> str:
        return str(self.description["kind"])

    @property
    def head(self) -> dict[str, Any]:
        """Settings of a classifier's head."""
        return dict(self.description["config"]["classifier"])


@dataclass(frozen=True)
class JudgedData:
    """A data set of the job, and what is judged of it."""

    place: Place
    manifest: DatasetManifest
    folds: tuple[int, ...]
    splits: tuple[str, ...]
    orders: tuple[ClassOrder, ...]
    """For each classifier, which of its classes is which label."""
    output: Place


def run_evaluate(config: EvaluateConfig, console: Console) -> Written:
    """Judges the models on every data set and returns what was written and where.

    UserError, before anything runs, for models or data sets that cannot be judged, and a cluster that is too small.
    """
    models = _open_models(config)
    judged = open_data(config, models)
    for data in judged:
        check_pool(row_group_spans(data.manifest, data.folds, data.splits), config)
    results: dict[str, Any] = {}
    written: Written = []
    for data in judged:
        if len(judged) > 1:
            console.stage(f"evaluate on {data.place.uri}")
        probes = models[0].kind == "encoder"
        result, files = _probe(config, models[0], data, console) if probes else _score(config, models, data, console)
        results[data.output.name], written = result, written + files
    if len(judged) > 1:
        summary = open_place(config.output) / RESULT_FILE
        summary.write_json({"models": [model.place.uri for model in models], "results": results})
        table = open_place(config.output) / TABLE_FILE
        write_csv(table, figure_rows(results))
        written += [("evaluation", summary.uri), ("evaluation, as a table", table.uri)]
    return written


def _open_models(config: EvaluateConfig) -> list[JudgedModel]:
    kinds = ("classifier",) if config.models else ("encoder", "classifier")
    field = "models" if config.models else "model"
    models = []
    for uri in config.judged_models:
        place = open_place(uri)
        description = check_published(place, field, kinds)
        names = read_class_names(place) if description["kind"] == "classifier" else None
        if names is not None and config.class_table:
            names = translate_ids(names, open_place(config.class_table))
        models.append(JudgedModel(place, description, names))
    for model in models[1:]:
        if model.head["multi_label"] != models[0].head["multi_label"]:
            raise UserError(
                f"models: {models[0].place.uri} and {model.place.uri} differ in multi_label: one gives each class a "
                "probability of its own, the other all classes one; average classifiers of one kind"
            )
    return models


def open_data(config: EvaluateConfig, models: list[JudgedModel]) -> list[JudgedData]:
    """The data sets to judge by, each with a folder for its results that no other has."""
    first = EvaluatedData(path=config.data.path, folds=config.data.folds, splits=config.data.splits)
    chosen = (first, *config.also)
    output, judged, names = open_place(config.output), [], set()
    for data in chosen:
        place = open_place(data.path)
        manifest = read_manifest(place)
        orders = tuple(
            match_classes(model.class_names, model.head["num_classes"], manifest.label_names, model.place.uri)
            for model in models
            if model.kind == "classifier"
        )
        name = next(name for name in _folder_names(place.name) if name not in names)
        names.add(name)
        folder = output / name if len(chosen) > 1 else output
        judged.append(JudgedData(place, manifest, data.folds, data.splits, orders, folder))
    return judged


def _folder_names(name: str) -> Iterator[str]:
    """`esc50`, `esc50-2`, `esc50-3`, ..."""
    return (name if number == 1 else f"{name}-{number}" for number in count(1))


def _probe(
    config: EvaluateConfig, model: JudgedModel, data: JudgedData, console: Console
) -> tuple[dict[str, Any], Written]:
    clips = _collect(config, model, data, PooledFeatures, "features", console).labelled("features").in_folds()
    names = data.manifest.label_names
    probability_NC = probe_probabilities(clips, len(names), config.probe.c)
    probe = summarise_probe(clips, probability_NC.argmax(1))
    console.note(
        f"frozen linear probe {probe.accuracy:.3f} ± {probe.standard_error:.3f} "
        f"({probe.clips} clips, {len(probe.fold_accuracies)} folds)"
    )
    result = {"kind": "encoder", "model": model.place.uri, "data": data.place.uri, **asdict(probe)}
    labels = [[label] for label in clips.labels.tolist()]
    found = Predictions(clips.clip_ids, clips.folds, labels, probability_NC, names, multi_label=False)
    write_csv(data.output / FOLDS_FILE, fold_rows(probe))
    return result, [*write_judgement(data.output, found, result), ("folds", (data.output / FOLDS_FILE).uri)]


def fold_rows(probe: ProbeResult) -> list[list[object]]:
    """Names of the columns, then a row for each fold."""
    rows: list[list[object]] = [["fold", "clips", "accuracy", "standard_error"]]
    for fold, accuracy in probe.fold_accuracies.items():
        clips = probe.fold_clips[fold]
        rows.append([fold, clips, accuracy, binomial_error(accuracy, clips)])
    return rows


def _score(
    config: EvaluateConfig, models: list[JudgedModel], data: JudgedData, console: Console
) -> tuple[dict[str, Any], Written]:
    """Predictions of one classifier, or of several as one, and what they are worth."""
    overlap = _warn_of_known_clips(models, data, console)
    worker = Logits if config.average == "logits" else Probabilities
    total_NC, clips = np.zeros(0), None
    for model, order in zip(models, data.orders, strict=True):
        if order.note:
            console.note(order.note)
        clips = _collect(config, model, data, worker, "scores", console)
        scores_NC = clips.columns["scores"][:, order.class_C].astype(np.float64)
        total_NC = scores_NC if not total_NC.size else total_NC + scores_NC
    assert clips is not None
    mean_NC = total_NC / len(models)
    if config.average == "logits":
        mean_NC = probabilities_of(mean_NC, models[0].head["multi_label"])
    manifest = data.manifest
    predictions = Predictions(
        clips.clip_ids, clips.folds, clips.labels, mean_NC, manifest.label_names, manifest.multi_label
    )
    figures = judge(predictions)
    result = {
        "kind": "classifier",
        "model": models[0].place.uri,
        "models": [model.place.uri for model in models],
        "data": data.place.uri,
        "folds": list(data.folds),
        "splits": list(data.splits),
        "average": config.average,
        "window_seconds": config.window_seconds,
        "hop_seconds": config.hop_seconds or config.window_seconds,
        "known_clips": overlap,
        **figures,
    }
    console.note(describe_figures(figures))
    files = write_judgement(data.output, predictions, result)
    return result, files


def _warn_of_known_clips(models: list[JudgedModel], data: JudgedData, console: Console) -> dict[str, int]:
    """Says which of the judged clips a model has been trained or selected on; the most of any model, by part."""
    most: dict[str, int] = {}
    total = sum(span.clips for span in row_group_spans(data.manifest, data.folds, data.splits))
    for model in models:
        record = (model.description.get("extra") or {}).get("data") or {}
        counts = count_overlap(record, data.manifest, data.folds, data.splits)
        most = {part: max(most.get(part, 0), count) for part, count in counts.items()}
        known = [f"{counts[part]} of its {part} clips" for part in ("training", "validation") if counts[part]]
        if known:
            held_out = (record.get("test") or {}).get("folds")
            remedy = f"choose data.folds={held_out}" if held_out else "choose clips that it has not seen"
            console.note(
                f"warning: among the {total} judged clips are {' and '.join(known)} of {model.place.uri}: the figures "
                f"are too good; {remedy}"
            )
    return most


def describe_figures(figures: dict[str, Any]) -> str:
    """The macro figures of `judge` as one line, the main one with its standard error."""
    parts = []
    for name, error in (("accuracy", "standard_error"), ("macro_recall", "macro_recall_standard_error"),
                        ("mean_average_precision", "mean_average_precision_standard_error")):  # fmt: skip
        if figures.get(name) is not None:
            spread = f" ± {figures[error]:.3f}" if figures.get(error) is not None else ""
            parts.append(f"{name.replace('_', ' ')} {figures[name]:.3f}{spread}")
    others = ("mean_roc_auc", "d_prime", "expected_calibration_error")
    parts += [f"{name.replace('_', ' ')} {figures[name]:.3f}" for name in others if figures.get(name) is not None]
    return f"{', '.join(parts)} ({figures['clips']} clips)"


def _collect(
    config: EvaluateConfig,
    model: JudgedModel,
    data: JudgedData,
    worker: Callable[..., ClipWorker],
    column: str,
    console: Console,
) -> ClipTable:
    """One column of a worker, which hears clips whole or by windows, as the config says."""
    options: dict[str, Any] = {}
    if config.window_seconds is not None:
        window = round(config.window_seconds * SAMPLE_RATE_HZ)
        hop = round((config.hop_seconds or config.window_seconds) * SAMPLE_RATE_HZ)
        worker, options = ByWindows, {"worker": worker, "window_samples": window, "hop_samples": hop}
    return collect_clips(
        data.place,
        data.manifest,
        worker,
        (column,),
        folds=data.folds,
        splits=data.splits,
        console=console,
        model=model.place,
        worker_options=options,
        batch_clips=config.batch_clips,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu,
        retry_seconds=config.data.retry_seconds,
    )


# --- what the actors do -----------------------------------------------------------------------------------------------


class Logits:
    """A `ClipWorker`: the logits of a classifier, as `scores`."""

    def __init__(self, model: AudioClassifier) -> None:
        self._classifier = model

    def __call__(self, wave_BS: Tensor, num_samples_B: Tensor) -> dict[str, Any]:
        return {"scores": self._logits(wave_BS, num_samples_B).float().cpu().numpy()}

    def _logits(self, wave_BS: Tensor, num_samples_B: Tensor) -> Tensor:
        logits_BC: Tensor = self._classifier(*self._classifier.encoder.normalised_fbank(wave_BS, num_samples_B))
        return logits_BC


class Probabilities(Logits):
    """A `ClipWorker`: the probabilities of a classifier, as `scores`."""

    def __call__(self, wave_BS: Tensor, num_samples_B: Tensor) -> dict[str, Any]:
        logits_BC = self._logits(wave_BS, num_samples_B)
        return {"scores": self._classifier.probabilities(logits_BC).cpu().numpy()}


def probabilities_of(logits_NC: np.ndarray, multi_label: bool) -> np.ndarray:
    """float64 probabilities: a sigmoid of each logit where `multi_label`, a softmax over them otherwise."""
    from scipy.special import expit, softmax

    return np.asarray(expit(logits_NC) if multi_label else softmax(logits_NC, axis=1))
