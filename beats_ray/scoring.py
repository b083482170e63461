"""What a classifier's scores are worth: pure functions on numpy arrays, without Ray, PyTorch or files.

Shapes: N clips, C classes. `truth_NC` is boolean, `score_NC` any number that ranks clips (logits, probabilities);
`label_N` holds one class id a clip. A figure of a class that the clips cannot tell (no positive, no negative) is NaN,
and means over classes leave it out, as AudioSet's evaluation does.

They agree with scikit-learn's and torchmetrics' functions of the same names, ties included. Own code for one reason:
with `weight_N` they also judge a resample of the clips without sorting its scores again, which is what makes the
standard error of a mean average precision affordable.
"""

import math

import numpy as np

CALIBRATION_BINS = 15
"""Equal-width bins of confidence (Guo et al. 2017, "On calibration of modern neural networks")."""
RESAMPLES = 100
"""Bootstrap resamples behind the standard error of a macro figure: the error of that error is about 7 %."""


# --- ranking: several labels a clip -----------------------------------------------------------------------------------


def average_precision_by_class(
    truth_NC: np.ndarray, score_NC: np.ndarray, weight_N: np.ndarray | None = None
) -> np.ndarray:
    """Average precision of each class, NaN where it has no positive: sum over thresholds of precision x gained recall.

    Clips of equal score enter together, so their order has no part in it (Gemmeke et al. 2017 use the same figure).
    """
    return np.array([_average_precision(curve) for curve in _curves(truth_NC, score_NC, weight_N)])


def mean_average_precision(truth_NC: np.ndarray, score_NC: np.ndarray) -> float:
    """The mean of `average_precision_by_class` over the classes that have positives: AudioSet's mAP.

    NaN where no class has any.
    """
    return mean_over_classes(average_precision_by_class(truth_NC, score_NC))


def roc_auc_by_class(truth_NC: np.ndarray, score_NC: np.ndarray) -> np.ndarray:
    """The chance that a positive clip of a class scores above a negative one, ties counting half; NaN without both."""
    return np.array([_roc_auc(curve) for curve in _curves(truth_NC, score_NC, None)])


def d_prime(roc_auc: float) -> float:
    """sqrt(2) times the normal quantile of an area under the ROC curve (Hershey et al. 2017); infinite at 0 and 1."""
    from scipy.special import ndtri

    return math.sqrt(2.0) * float(ndtri(roc_auc))


def mean_average_precision_error(truth_NC: np.ndarray, score_NC: np.ndarray, seed: int = 0) -> float:
    """Standard error of `mean_average_precision` over clips: the deviation over `RESAMPLES` bootstrap resamples."""
    rng = np.random.default_rng(seed)
    clips = len(truth_NC)
    curves = [_Curve(truth_NC[:, index], score_NC[:, index]) for index in range(truth_NC.shape[1])]
    means = []
    for _ in range(RESAMPLES):
        weight_N = np.bincount(rng.integers(0, clips, clips), minlength=clips).astype(np.float64)
        means.append(mean_over_classes(np.array([_average_precision(curve.counts(weight_N)) for curve in curves])))
    return float(np.nanstd(means, ddof=1)) if np.isfinite(means).sum() > 1 else math.nan


def mean_over_classes(value_C: np.ndarray) -> float:
    """The mean of the values that are numbers; NaN where none is."""
    known = value_C[~np.isnan(value_C)]
    return float(known.mean()) if len(known) else math.nan


class _Curve:
    """One class's clips by falling score, in groups of equal score."""

    def __init__(self, truth_N: np.ndarray, score_N: np.ndarray) -> None:
        self._order_N = np.argsort(-score_N, kind="stable")
        self._truth_N = truth_N[self._order_N].astype(np.float64)
        sorted_N = score_N[self._order_N]
        self._last_G = np.append(np.flatnonzero(np.diff(sorted_N)), len(sorted_N) - 1)

    def counts(self, weight_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Positives, and all clips, at or above each distinct score."""
        ones = np.ones(len(self._truth_N)) if weight_N is None else weight_N[self._order_N]
        return np.cumsum(self._truth_N * ones)[self._last_G], np.cumsum(ones)[self._last_G]


def _curves(
    truth_NC: np.ndarray, score_NC: np.ndarray, weight_N: np.ndarray | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [_Curve(truth_NC[:, index], score_NC[:, index]).counts(weight_N) for index in range(truth_NC.shape[1])]


def _average_precision(curve: tuple[np.ndarray, np.ndarray]) -> float:
    positive_G, clips_G = curve
    if not positive_G[-1]:
        return math.nan
    precision_G = positive_G / np.maximum(clips_G, 1e-300)  # no clip of a resample may be at the top
    return float((np.diff(positive_G, prepend=0.0) * precision_G).sum() / positive_G[-1])


def _roc_auc(curve: tuple[np.ndarray, np.ndarray]) -> float:
    positive_G, clips_G = curve
    negative_G = clips_G - positive_G
    if not positive_G[-1] or not negative_G[-1]:
        return math.nan
    gained_G, before_G = np.diff(positive_G, prepend=0.0), negative_G - np.diff(negative_G, prepend=0.0)
    above_G = negative_G[-1] - (before_G + negative_G) / 2  # negatives below the group, half of those in it
    return float((gained_G * above_G).sum() / (positive_G[-1] * negative_G[-1]))


# --- one label a clip -------------------------------------------------------------------------------------------------


def accuracy(label_N: np.ndarray, score_NC: np.ndarray) -> float:
    """The part of the clips whose best-scored class is the right one; of equal scores the first class counts."""
    return float((score_NC.argmax(1) == label_N).mean())


def binomial_error(accuracy: float, clips: int) -> float:
    """Standard error of an accuracy over so many clips: sqrt(accuracy (1 - accuracy) / clips)."""
    return math.sqrt(accuracy * (1.0 - accuracy) / clips)


def confusion_matrix(label_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Clips of each true class (row) that were taken for each class (column); (C, C), int64."""
    pairs = np.bincount(label_N * num_classes + predicted_N, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def recall_by_class(confusion_CC: np.ndarray) -> np.ndarray:
    """The part of each class's clips that was recognised; NaN for a class without clips."""
    return _ratio(np.diag(confusion_CC), confusion_CC.sum(1))


def precision_by_class(confusion_CC: np.ndarray) -> np.ndarray:
    """The part of the clips taken for each class that belong to it; NaN for a class that no clip was taken for."""
    return _ratio(np.diag(confusion_CC), confusion_CC.sum(0))


def _ratio(part_C: np.ndarray, whole_C: np.ndarray) -> np.ndarray:
    return np.where(whole_C > 0, part_C / np.maximum(whole_C, 1), np.nan)


# --- calibration ------------------------------------------------------------------------------------------------------


def expected_calibration_error(confidence_N: np.ndarray, is_right_N: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """The mean distance of confidence and truth over `bins` equal-width bins of [0, 1], weighted by their sizes.

    With one label a clip: the probability of the predicted class, and whether it is right. With several: every class of
    every clip is a case of its own, its probability and whether the clip has the label. A value on the edge between two
    bins belongs to the upper one, 1 to the last.
    """
    place_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    gap_B = np.bincount(place_N, confidence_N - is_right_N, bins)
    return float(np.abs(gap_B).sum() / len(confidence_N))
