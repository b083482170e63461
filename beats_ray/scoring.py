"""What a classifier's scores are worth: pure functions on numpy arrays, without Ray, PyTorch or files.

Shapes: N clips, C classes. `truth_NC` is boolean, `score_NC` any number that ranks clips (logits, probabilities);
`label_N` holds one class id a clip. A figure of a class that the clips cannot tell (no positive, no negative) is NaN,
and means over classes leave it out, as AudioSet's evaluation does.

They agree with scikit-learn's and torchmetrics' functions of the same names, ties included. Own code for one reason:
with `weight_N` they also judge a resample of the clips without sorting its scores again, which is what makes the
standard error of a mean average precision affordable.
"""

import math
from collections.abc import Iterator

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
    return np.array([ranking.average_precision(weight_N) for ranking in _rankings(truth_NC, score_NC)])


def mean_average_precision(truth_NC: np.ndarray, score_NC: np.ndarray) -> float:
    """The mean of `average_precision_by_class` over the classes that have positives: AudioSet's mAP.

    NaN where no class has any.
    """
    return mean_over_classes(average_precision_by_class(truth_NC, score_NC))


def roc_auc_by_class(truth_NC: np.ndarray, score_NC: np.ndarray) -> np.ndarray:
    """The chance that a positive clip of a class scores above a negative one, ties counting half; NaN without both."""
    return np.array([ranking.roc_auc() for ranking in _rankings(truth_NC, score_NC)])


def d_prime(roc_auc: float) -> float:
    """sqrt(2) times the normal quantile of an area under the ROC curve (Hershey et al. 2017); infinite at 0 and 1."""
    from scipy.special import ndtri

    return math.sqrt(2.0) * float(ndtri(roc_auc))


def mean_average_precision_error(truth_NC: np.ndarray, score_NC: np.ndarray, seed: int = 0) -> float:
    """Standard error of `mean_average_precision` over clips: the deviation over `RESAMPLES` bootstrap resamples."""
    rng = np.random.default_rng(seed)
    clips = len(truth_NC)
    rankings = list(_rankings(truth_NC, score_NC))
    means = []
    for _ in range(RESAMPLES):
        weight_N = np.bincount(rng.integers(0, clips, clips), minlength=clips).astype(np.float64)
        means.append(mean_over_classes(np.array([ranking.average_precision(weight_N) for ranking in rankings])))
    return float(np.nanstd(means, ddof=1)) if np.isfinite(means).sum() > 1 else math.nan


def mean_over_classes(value_C: np.ndarray) -> float:
    """The mean of the values that are numbers; NaN where none is."""
    known = value_C[~np.isnan(value_C)]
    return float(known.mean()) if len(known) else math.nan


class _Ranking:
    """One class's clips by falling score; of each positive (P of them) where it stands among clips of equal score.

    Both figures are sums over positives: of a rare class nearly nothing is computed, however many clips there are.
    """

    def __init__(self, truth_N: np.ndarray, score_N: np.ndarray) -> None:
        self._order_N = np.argsort(-score_N, kind="stable")
        sorted_N = score_N[self._order_N]
        last_G = np.append(np.flatnonzero(np.diff(sorted_N)), len(sorted_N) - 1)  # of each group of equal scores
        first_G = np.append(0, last_G[:-1] + 1)
        self._place_P = np.flatnonzero(truth_N[self._order_N])
        group_P = np.searchsorted(last_G, self._place_P)
        self._first_P, self._last_P = first_G[group_P], last_G[group_P]  # clips of the positive's group
        self._above_P = np.searchsorted(group_P, group_P)  # positives above the group
        self._until_P = np.searchsorted(group_P, group_P, side="right")  # and with those in it

    def average_precision(self, weight_N: np.ndarray | None = None) -> float:
        """NaN without a positive; with weights as if each clip were there so many times."""
        if weight_N is None:
            weight_P, clips_P = np.ones(len(self._place_P)), self._last_P + 1.0
        else:
            sorted_N = weight_N[self._order_N]
            weight_P, clips_P = sorted_N[self._place_P], np.cumsum(sorted_N)[self._last_P]
        positives_P = np.cumsum(weight_P)
        if not len(positives_P) or not positives_P[-1]:
            return math.nan
        precision_P = positives_P[self._until_P - 1] / np.maximum(clips_P, 1e-300)  # a group may have no weight
        return float((weight_P * precision_P).sum() / positives_P[-1])

    def roc_auc(self) -> float:
        """NaN without a positive or without a negative."""
        positives = len(self._place_P)
        negatives = len(self._order_N) - positives
        if not positives or not negatives:
            return math.nan
        until_P = self._last_P + 1 - self._until_P  # negatives in the group and above it
        above_P = self._first_P - self._above_P
        return float((negatives - (until_P + above_P) / 2).mean() / negatives)


def _rankings(truth_NC: np.ndarray, score_NC: np.ndarray) -> Iterator[_Ranking]:
    return (_Ranking(truth_NC[:, index], score_NC[:, index]) for index in range(truth_NC.shape[1]))


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
