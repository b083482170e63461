"""What k-fold runs of several seeds say about an encoder, and about two encoders on the same folds and seeds.

Shapes: S seeds, N clips, each judged once for each seed by the run that held its fold out. `right_SN` is boolean.
Pure functions on numpy arrays.

Three spreads answer three questions, and none stands in for another:
- over clips (binomial): how far the accuracy would move with other clips of the same kind;
- over seeds: how far with another seed of the same training;
- over folds (standard deviation): what the literature prints; folds differ in difficulty, so it is no error of a mean.
"""

import math
from typing import Any

import numpy as np

from beats_ray.scoring import binomial_error

CONFIDENCE = 0.95


def summarise(right_SN: np.ndarray, fold_N: np.ndarray) -> dict[str, Any]:
    """Accuracy over all clips and seeds with its spreads; None where one fold or one seed cannot tell a spread.

    The mean over folds weighs folds alike, the accuracy weighs clips alike: they differ where folds do in size.
    """
    accuracy = float(right_SN.mean())
    seeds_S = right_SN.mean(1)
    folds = {int(fold): float(right_SN[:, fold_N == fold].mean()) for fold in np.unique(fold_N)}
    return {
        "accuracy": accuracy,
        "standard_error": binomial_error(accuracy, right_SN.shape[1]),
        "clips": int(right_SN.shape[1]),
        "seed_accuracies": seeds_S.tolist(),
        "seed_standard_error": error_of_mean(seeds_S),
        "fold_accuracies": {str(fold): value for fold, value in folds.items()},
        "fold_mean": float(np.mean(list(folds.values()))),
        "fold_standard_deviation": float(np.std(list(folds.values()), ddof=1)) if len(folds) > 1 else None,
    }


def compare(right_SN: np.ndarray, reference_SN: np.ndarray, fold_N: np.ndarray) -> dict[str, Any]:
    """The paired difference of two encoders' accuracies, and its 95 % confidence interval.

    Paired by clip and by seed: what makes a clip hard, or a fold, is in both and cancels. The squared standard errors
    of the mean difference over clips and over seeds are added: an interval that holds for other clips *and* other
    seeds, and somewhat too wide, since the differences over clips hold a part of the seeds' noise already. Student's t
    with the degrees of freedom of Welch and Satterthwaite; with one seed, nothing is known of seeds and `over` says so.
    """
    from scipy.stats import t as student

    difference_SN = right_SN.astype(np.float64) - reference_SN
    difference_N, difference_S = difference_SN.mean(0), difference_SN.mean(1)
    parts = [(error_of_mean(values), len(values) - 1) for values in (difference_N, difference_S)]
    known = [(error, freedom) for error, freedom in parts if error is not None]
    variance = sum(error**2 for error, _ in known)
    spread = sum(error**4 / freedom for error, freedom in known)
    freedom = variance**2 / spread if spread else math.inf
    mean = float(difference_SN.mean())
    half = float(student.ppf(0.5 + CONFIDENCE / 2, freedom)) * math.sqrt(variance)
    return {
        "difference": mean,
        "standard_error": math.sqrt(variance),
        "interval": [mean - half, mean + half],
        "over": "clips and seeds" if len(known) == 2 else "clips",
        "seed_differences": difference_S.tolist(),
        "fold_differences": {
            str(int(fold)): float(difference_SN[:, fold_N == fold].mean()) for fold in np.unique(fold_N)
        },
    }


def error_of_mean(values: np.ndarray) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
