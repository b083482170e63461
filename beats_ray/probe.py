"""k-fold evaluation of a small classifier on fixed features: the frozen linear probe, and the classical baselines.

Every fold is judged by a classifier trained on all the others, so every clip is judged once, unseen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from beats_ray.config import UserError
from beats_ray.data.manifest import NO_FOLD
from beats_ray.scoring import binomial_error

SOLVER_ITERATIONS = 3000  # an upper bound: the solver stops by itself long before


@dataclass(frozen=True)
class LabelledClips:
    """Clips in the data set's order, each with one label and one fold."""

    clip_ids: list[str]
    features: np.ndarray
    """(clips, width)"""
    labels: np.ndarray
    folds: np.ndarray
    """-1 where a clip has none: it is neither trained on nor judged."""


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a k-fold evaluation."""

    accuracy: float
    """Part of all clips that were right."""
    standard_error: float
    """Binomial, over clips: sqrt(accuracy (1 - accuracy) / clips)."""
    fold_accuracies: dict[str, float]
    fold_clips: dict[str, int]
    """Judged clips of each fold."""
    fold_standard_error: float
    """Standard deviation of the folds' accuracies, divided by the root of their number."""
    clips: int
    chance: float
    """Accuracy of always naming the most frequent label."""
    correct: str
    """One character per clip in the data set's order, `1` where it was right: for paired comparisons."""


def probe_accuracy(clips: LabelledClips, c: float = 1.0) -> ProbeResult:
    """k-fold accuracy of a logistic regression on standardised features; `c` is its inverse regularisation strength."""
    return cross_validate(clips, lambda: linear_classifier(c))


def linear_classifier(c: float = 1.0) -> Any:
    """Standardisation and logistic regression, not yet fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=SOLVER_ITERATIONS))


def cross_validate(clips: LabelledClips, build_classifier: Callable[[], Any]) -> ProbeResult:
    """Judges each fold by a classifier trained on the others. UserError for fewer than two folds or one label."""
    kept = clips.folds != NO_FOLD
    features, labels, folds = clips.features[kept], clips.labels[kept], clips.folds[kept]
    names = sorted(set(folds.tolist()))
    if len(names) < 2:
        raise UserError(
            f"data: {len(names)} fold(s) with labelled clips; k-fold evaluation needs at least 2: choose more folds"
        )
    if len(set(labels.tolist())) < 2:
        raise UserError("data: all labelled clips have the same label; there is nothing to tell apart")
    is_right = np.zeros(len(labels), dtype=bool)
    for fold in names:
        held_out = folds == fold
        if len(set(labels[~held_out].tolist())) < 2:
            raise UserError(f"data: outside fold {fold} all clips have the same label; choose more folds")
        classifier = build_classifier().fit(features[~held_out], labels[~held_out])
        is_right[held_out] = classifier.predict(features[held_out]) == labels[held_out]
    accuracy = float(is_right.mean())
    per_fold = {str(fold): float(is_right[folds == fold].mean()) for fold in names}
    return ProbeResult(
        accuracy=accuracy,
        standard_error=binomial_error(accuracy, len(labels)),
        fold_accuracies=per_fold,
        fold_clips={str(fold): int((folds == fold).sum()) for fold in names},
        fold_standard_error=float(np.std(list(per_fold.values()), ddof=1)) / math.sqrt(len(names)),
        clips=len(labels),
        chance=float(np.bincount(labels).max()) / len(labels),
        correct="".join("01"[int(right)] for right in is_right),
    )
