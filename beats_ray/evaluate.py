"""`beats-ray evaluate`: how good a published model is, on a prepared data set.

An encoder is judged frozen: a linear classifier on its mean-pooled patch features (padding left out), by k-fold over
the data set's folds. A classifier is judged by its own predictions on `data.folds` (all where none is named).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beats_ray.config import EvaluateConfig, UserError
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import Place, open_place
from beats_ray.inference import ClipWorker, check_published, map_clips, row_group_spans
from beats_ray.models import AudioClassifier, BeatsEncoder
from beats_ray.probe import LabelledClips, binomial_error, probe_accuracy

RESULT_FILE = "evaluation.json"


@dataclass(frozen=True)
class ClipTable:
    """Columns of a `ClipWorker`, one row per clip in the data set's order; `labels` holds each clip's label ids."""

    clip_ids: list[str]
    columns: dict[str, np.ndarray]
    labels: list[list[int]]
    folds: np.ndarray

    def labelled(self, name: str) -> LabelledClips:
        """One column with the single label of each clip; clips without a label are left out. UserError for several."""
        kept = [index for index, labels in enumerate(self.labels) if labels]
        many = next((index for index in kept if len(self.labels[index]) > 1), None)
        if many is not None:
            raise UserError(
                f"clip {self.clip_ids[many]!r} has {len(self.labels[many])} labels; the frozen probe and the baselines "
                "take one label a clip: fine-tune and evaluate the classifier instead"
            )
        return LabelledClips(
            [self.clip_ids[index] for index in kept],
            self.columns[name][kept].astype(np.float64),
            np.array([self.labels[index][0] for index in kept], dtype=np.int64),
            self.folds[kept],
        )


def run_evaluate(config: EvaluateConfig, console: Console) -> list[tuple[str, str]]:
    """Judges `config.model`, writes OUTPUT/evaluation.json, and returns what was written and where."""
    dataset, model, output = open_place(config.data.path), open_place(config.model), open_place(config.output)
    manifest = read_manifest(dataset)
    kind = check_published(model, "model", ("encoder", "classifier"))["kind"]
    pool: dict[str, Any] = {
        "model": model,
        "folds": config.data.folds,
        "splits": config.data.splits,
        "batch_clips": config.batch_clips,
        "num_workers": config.num_workers,
        "use_gpu": config.use_gpu,
        "retry_seconds": config.data.retry_seconds,
        "console": console,
    }
    if kind == "encoder":
        clips = collect_clips(dataset, manifest, PooledFeatures, ("features",), **pool)
        probe = probe_accuracy(clips.labelled("features"), config.probe.c)
        result = asdict(probe)
        console.note(
            f"frozen linear probe {probe.accuracy:.3f} ± {probe.standard_error:.3f} "
            f"({probe.clips} clips, {len(probe.fold_accuracies)} folds)"
        )
    else:
        clips = collect_clips(dataset, manifest, Logits, ("logits",), **pool)
        result = score_classifier(clips, manifest)
        console.note(", ".join(f"{name} {value:.3f}" for name, value in result.items() if isinstance(value, float)))
    (output / RESULT_FILE).write_json({"kind": kind, "model": model.uri, "data": dataset.uri, **result})
    return [("evaluation", (output / RESULT_FILE).uri)]


# --- what the actors do -----------------------------------------------------------------------------------------------


class PooledFeatures:
    """A `ClipWorker`: the mean of an encoder's features over each clip's real patches."""

    def __init__(self, model: BeatsEncoder) -> None:
        self._encoder = model

    def __call__(self, wave_BS: Tensor, num_samples_B: Tensor) -> dict[str, Any]:
        fbank_BTF, num_frames_B = self._encoder.normalised_fbank(wave_BS, num_samples_B)
        output = self._encoder(fbank_BTF, num_frames_B)
        return {"features": mean_over_patches(output.features_BND, output.is_pad_BN).cpu().numpy()}


class Logits:
    """A `ClipWorker`: the logits of a classifier."""

    def __init__(self, model: AudioClassifier) -> None:
        self._classifier = model

    def __call__(self, wave_BS: Tensor, num_samples_B: Tensor) -> dict[str, Any]:
        logits_BC = self._classifier(*self._classifier.encoder.normalised_fbank(wave_BS, num_samples_B))
        return {"logits": logits_BC.float().cpu().numpy()}


def mean_over_patches(features_BND: Tensor, is_pad_BN: Tensor) -> Tensor:
    """The mean over each clip's real patches; zeros for a clip without any."""
    is_real_BN1 = ~is_pad_BN.unsqueeze(-1)
    total_BD = torch.where(is_real_BN1, features_BND.float(), 0.0).sum(1)
    return total_BD / is_real_BN1.sum(1).clamp(min=1)


# --- on the driver ----------------------------------------------------------------------------------------------------


def collect_clips(
    dataset: Place,
    manifest: DatasetManifest,
    worker_class: Callable[..., ClipWorker],
    columns: tuple[str, ...],
    *,
    folds: tuple[int, ...] = (),
    splits: tuple[str, ...] = (),
    console: Console | None = None,
    **pool: Any,
) -> ClipTable:
    """The named columns of a `ClipWorker` for all clips of the folds and splits, in the data set's order.

    `pool` goes to `map_clips`: model, batch_clips, num_workers, use_gpu. UserError where no clip is chosen.
    """
    spans = row_group_spans(manifest, folds, splits)
    total = sum(span.clips for span in spans)
    if not total:
        raise UserError(f"data.folds={list(folds)}, data.splits={list(splits)}: {dataset.uri} has no clips there")
    if console is not None:
        console.progress(0, total)
    rows: list[tuple[Any, ...]] = []
    for table in map_clips(dataset, manifest, worker_class, row_groups=spans, **pool):
        named = [table[name].to_pylist() for name in ("shard", "row", "clip_id", "clip_labels", "fold")]
        values = [np.stack(table[name].to_numpy()) for name in columns]
        rows += zip(*named, zip(*values, strict=True), strict=True)
        if console is not None:
            console.progress(len(rows), total)
    rows.sort(key=lambda row: row[:2])
    stacked = {name: np.stack([row[5][index] for row in rows]) for index, name in enumerate(columns)}
    labels = [row[3] or [] for row in rows]
    return ClipTable([row[2] for row in rows], stacked, labels, np.array([row[4] for row in rows]))


def embed_clips(dataset: Place, model: Place, **pool: Any) -> LabelledClips:
    """Clip ids, mean-pooled frozen features, labels and folds of a data set under a published encoder."""
    return collect_clips(dataset, read_manifest(dataset), PooledFeatures, ("features",), model=model, **pool).labelled(
        "features"
    )


def score_classifier(clips: ClipTable, manifest: DatasetManifest) -> dict[str, Any]:
    """Accuracy (one label a clip) or mean average precision (several) of a classifier's logits.

    UserError where the classifier has another number of classes than the data set has labels.
    """
    logits = clips.columns["logits"]
    classes = len(manifest.label_names)
    if logits.shape[1] != classes:
        raise UserError(
            f"model: has {logits.shape[1]} classes, the data set {classes} labels; give a classifier of this data set"
        )
    if manifest.multi_label:
        from sklearn.metrics import average_precision_score

        truth = np.zeros(logits.shape, dtype=bool)
        for row, labels in enumerate(clips.labels):
            truth[row, labels] = True
        present = truth.any(0)
        precision = average_precision_score(truth[:, present], logits[:, present], average="macro")
        return {"mean_average_precision": float(precision), "classes_present": int(present.sum()), "clips": len(truth)}
    labelled = clips.labelled("logits")
    is_right = labelled.features.argmax(1) == labelled.labels
    accuracy, by_fold = float(is_right.mean()), sorted(set(labelled.folds.tolist()))
    return {
        "accuracy": accuracy,
        "standard_error": binomial_error(accuracy, len(is_right)),
        "fold_accuracies": {str(fold): float(is_right[labelled.folds == fold].mean()) for fold in by_fold},
        "clips": len(is_right),
    }
