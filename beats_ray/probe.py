"""k-fold evaluation of a small classifier on fixed features: the frozen linear probe, and the classical baselines.

Every fold is judged by a classifier trained on all the others, so every clip is judged once, unseen.
"""

import math
from collections.abc import Callable, Iterator
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

    def in_folds(self) -> "LabelledClips":
        """Those of them that have a fold."""
        kept = self.folds != NO_FOLD
        ids = [name for name, is_kept in zip(self.clip_ids, kept, strict=True) if is_kept]
        return LabelledClips(ids, self.features[kept], self.labels[kept], self.folds[kept])


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
    clips = clips.in_folds()
    predicted = np.zeros_like(clips.labels)
    for held_out, classifier in fit_folds(clips, build_classifier):
        predicted[held_out] = classifier.predict(clips.features[held_out])
    return summarise_probe(clips, predicted)


def probe_probabilities(clips: LabelledClips, num_labels: int, c: float = 1.0) -> np.ndarray:
    """What the probe says of each clip while its fold is held out: float64 (clips, labels), 0 for a label not trained.

    All clips must have a fold (`in_folds`). UserError as `cross_validate`.
    """
    probability_NC = np.zeros((len(clips.labels), num_labels))
    for held_out, classifier in fit_folds(clips, lambda: linear_classifier(c)):
        probability_NC[np.ix_(held_out, classifier.classes_)] = classifier.predict_proba(clips.features[held_out])
    return probability_NC


def fit_folds(clips: LabelledClips, build_classifier: Callable[[], Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """For each fold which clips are in it, and a classifier trained on the others."""
    features, labels, folds = clips.features, clips.labels, clips.folds
    names = sorted(set(folds.tolist()))
    if len(names) < 2:
        raise UserError(
            f"data: {len(names)} fold(s) with labelled clips; k-fold evaluation needs at least 2: choose more folds"
        )
    if len(set(labels.tolist())) < 2:
        raise UserError("data: all labelled clips have the same label; there is nothing to tell apart")
    for fold in names:
        held_out = folds == fold
        if len(set(labels[~held_out].tolist())) < 2:
            raise UserError(f"data: outside fold {fold} all clips have the same label; choose more folds")
        yield held_out, build_classifier().fit(features[~held_out], labels[~held_out])


def summarise_probe(clips: LabelledClips, predicted: np.ndarray) -> ProbeResult:
    """Accuracy of predictions that were made fold by fold."""
    labels, is_right = clips.labels, predicted == clips.labels
    accuracy = float(is_right.mean())
    names = sorted(set(clips.folds.tolist()))
    per_fold = {str(fold): float(is_right[clips.folds == fold].mean()) for fold in names}
    return ProbeResult(
        accuracy=accuracy,
        standard_error=binomial_error(accuracy, len(labels)),
        fold_accuracies=per_fold,
        fold_clips={str(fold): int((clips.folds == fold).sum()) for fold in names},
        fold_standard_error=float(np.std(list(per_fold.values()), ddof=1)) / math.sqrt(len(names)),
        clips=len(labels),
        chance=float(np.bincount(labels).max()) / len(labels),
        correct="".join("01"[int(right)] for right in is_right),
    )
