"""Scores agree with scikit-learn and torchmetrics, on data with ties, absent classes and single positives."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics
from torchmetrics.classification import (
    BinaryCalibrationError,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAUROC,
    MultilabelAveragePrecision,
)

from beats_ray.scoring import (
    CALIBRATION_BINS,
    accuracy,
    average_precision_by_class,
    confusion_matrix,
    d_prime,
    expected_calibration_error,
    mean_average_precision,
    mean_average_precision_error,
    precision_by_class,
    recall_by_class,
    roc_auc_by_class,
)

pytestmark = pytest.mark.unit

CLIPS, CLASSES = 300, 12
ABSENT, SINGLE, FULL = 3, 4, 5  # classes without a positive, with one, without a negative


def multi_label_case(seed: int, decimals: int) -> tuple[np.ndarray, np.ndarray]:
    """Truth and probabilities; with few decimals most scores are ties."""
    rng = np.random.default_rng(seed)
    truth_NC = rng.random((CLIPS, CLASSES)) < rng.uniform(0.02, 0.5, CLASSES)
    truth_NC[:, ABSENT], truth_NC[:, FULL], truth_NC[:, SINGLE] = False, True, False
    truth_NC[7, SINGLE] = True
    score_NC = np.clip(rng.random((CLIPS, CLASSES)) * 0.8 + 0.2 * truth_NC, 0, 1)
    return truth_NC, score_NC.round(decimals)


CASES = [
    pytest.param(seed, decimals, id=f"{decimals}-decimals") for seed, decimals in ((0, 12), (1, 2), (2, 1), (3, 0))
]


@pytest.mark.parametrize(("seed", "decimals"), CASES)
def test_average_precision_is_scikit_learns(seed: int, decimals: int) -> None:
    truth_NC, score_NC = multi_label_case(seed, decimals)
    present = truth_NC.any(0)
    found = average_precision_by_class(truth_NC, score_NC)
    expected = metrics.average_precision_score(truth_NC[:, present], score_NC[:, present], average=None)
    np.testing.assert_allclose(found[present], expected, atol=1e-12)
    assert np.isnan(found[~present]).tolist() == [True]
    macro = metrics.average_precision_score(truth_NC[:, present], score_NC[:, present], average="macro")
    assert mean_average_precision(truth_NC, score_NC) == pytest.approx(macro, abs=1e-12)


@pytest.mark.parametrize(("seed", "decimals"), CASES)
def test_area_under_the_roc_curve_is_scikit_learns(seed: int, decimals: int) -> None:
    truth_NC, score_NC = multi_label_case(seed, decimals)
    defined = truth_NC.any(0) & ~truth_NC.all(0)
    found = roc_auc_by_class(truth_NC, score_NC)
    expected = metrics.roc_auc_score(truth_NC[:, defined], score_NC[:, defined], average=None)
    np.testing.assert_allclose(found[defined], expected, atol=1e-12)
    assert np.isnan(found[~defined]).sum() == 2


@pytest.mark.parametrize(("seed", "decimals"), CASES)
def test_ranking_figures_are_torchmetrics_too(seed: int, decimals: int) -> None:
    truth_NC, score_NC = multi_label_case(seed, decimals)
    score, truth = torch.tensor(score_NC), torch.tensor(truth_NC).long()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the absent class
        precision = MultilabelAveragePrecision(CLASSES, average="none")(score, truth).numpy()
        area = MultilabelAUROC(CLASSES, average="none")(score, truth).numpy()
    found = average_precision_by_class(truth_NC, score_NC)
    np.testing.assert_allclose(np.delete(found, ABSENT), np.delete(precision, ABSENT), atol=1e-5)  # it computes in fp32
    undefined = [ABSENT, FULL]
    np.testing.assert_allclose(
        np.delete(roc_auc_by_class(truth_NC, score_NC), undefined), np.delete(area, undefined), atol=1e-5
    )


def test_a_class_without_positives_leaves_the_mean_and_none_at_all_is_no_number() -> None:
    """Class 0 ranks its two clips 1 and 3: (1/1 + 2/3) / 2; class 1 ranks its one clip first; class 2 never occurs."""
    score_NC = np.array([[3.0, 0.0, 0.0], [2.0, 5.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    truth_NC = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=bool)
    assert mean_average_precision(truth_NC, score_NC) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert math.isnan(mean_average_precision(np.zeros((4, 3), bool), score_NC))


def test_a_weighted_clip_is_that_clip_so_many_times() -> None:
    truth_NC, score_NC = multi_label_case(5, 1)
    weight_N = np.random.default_rng(6).integers(0, 4, CLIPS)
    repeated = average_precision_by_class(truth_NC.repeat(weight_N, 0), score_NC.repeat(weight_N, 0))
    np.testing.assert_allclose(average_precision_by_class(truth_NC, score_NC, weight_N.astype(float)), repeated)


def test_the_error_of_a_macro_figure_shrinks_with_the_root_of_the_clips() -> None:
    def error(clips: int) -> float:
        rng = np.random.default_rng(0)
        truth_NC = rng.random((clips, 4)) < 0.3
        return mean_average_precision_error(truth_NC, rng.normal(size=(clips, 4)) + truth_NC)

    assert 1.5 < error(200) / error(800) < 2.7
    assert error(200) == error(200)


def test_d_prime_is_the_distance_of_two_normals_of_that_area() -> None:
    assert d_prime(0.5) == pytest.approx(0.0)
    assert d_prime(0.959) == pytest.approx(2.46, abs=0.005)  # the pair that AudioSet papers print
    assert d_prime(1.0) == math.inf
    rng = np.random.default_rng(0)
    truth_NC = rng.random((20_000, 1)) < 0.5
    area = roc_auc_by_class(truth_NC, rng.normal(size=(20_000, 1)) + 1.5 * truth_NC)[0]
    assert d_prime(float(area)) == pytest.approx(1.5, abs=0.05)


# --- one label a clip -------------------------------------------------------------------------------------------------


def single_label_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label_N = rng.integers(0, CLASSES - 1, CLIPS)  # the last class never occurs
    logits_NC = rng.normal(size=(CLIPS, CLASSES)) + 2.0 * np.eye(CLASSES)[label_N]
    logits_NC[:, 2] = -9  # nothing is taken for class 2
    return label_N, np.exp(logits_NC) / np.exp(logits_NC).sum(1, keepdims=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_single_label_figures_are_scikit_learns(seed: int) -> None:
    label_N, probability_NC = single_label_case(seed)
    predicted_N = probability_NC.argmax(1)
    confusion_CC = confusion_matrix(label_N, predicted_N, CLASSES)
    classes = list(range(CLASSES))
    assert np.array_equal(confusion_CC, metrics.confusion_matrix(label_N, predicted_N, labels=classes))
    assert accuracy(label_N, probability_NC) == metrics.accuracy_score(label_N, predicted_N)
    kind = {"labels": classes, "average": None, "zero_division": np.nan}
    np.testing.assert_allclose(recall_by_class(confusion_CC), metrics.recall_score(label_N, predicted_N, **kind))
    np.testing.assert_allclose(precision_by_class(confusion_CC), metrics.precision_score(label_N, predicted_N, **kind))
    torch_CC = MulticlassConfusionMatrix(CLASSES)(torch.tensor(predicted_N), torch.tensor(label_N))
    assert np.array_equal(confusion_CC, torch_CC.numpy())


@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_error_is_torchmetrics(seed: int) -> None:
    label_N, probability_NC = single_label_case(seed)
    is_right_N = probability_NC.argmax(1) == label_N
    found = expected_calibration_error(probability_NC.max(1), is_right_N)
    expected = MulticlassCalibrationError(CLASSES, n_bins=CALIBRATION_BINS)(
        torch.tensor(probability_NC), torch.tensor(label_N)
    )
    assert found == pytest.approx(float(expected), abs=1e-6)
    truth_NC, score_NC = multi_label_case(seed, 12)
    binary = BinaryCalibrationError(CALIBRATION_BINS)(
        torch.tensor(score_NC.ravel()), torch.tensor(truth_NC.ravel()).long()
    )
    assert expected_calibration_error(score_NC.ravel(), truth_NC.ravel()) == pytest.approx(float(binary), abs=1e-6)


def test_calibration_by_hand() -> None:
    """Two clips of confidence 1, one right: half. Two of 0.5, one right: nothing. Half of each."""
    assert expected_calibration_error(np.array([1.0, 1.0, 0.5, 0.5]), np.array([1, 0, 1, 0])) == pytest.approx(0.25)
