"""Which settings of a sweep matter: functional ANOVA over its trials, with how sure that is.

fANOVA (Hutter et al., 2014; Optuna's implementation) fits a forest to the trials and splits the variance of what it
predicts over the settings. With few trials a forest finds a pattern in anything, so it is fitted again to resamples of
the trials: the spread of the shares is their standard error. And a second forest tells how much of the differences
between trials the settings explain on trials that it was not fitted to (R² out of bag): where that is nothing, the
shares divide up noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beats_ray.reporting.scales import Scale, plain_value, scale_of

MIN_TRIALS = 8
"""Below it no share means anything."""
RESAMPLES = 20
TREES = 16
FOREST_TREES = 200
SEED = 0


@dataclass(frozen=True)
class Share:
    """Part of the variance that one setting accounts for, interactions shared out by the forest."""

    name: str
    value: float
    standard_error: float


@dataclass(frozen=True)
class Importance:
    """Shares, the largest first; they add up to 1."""

    shares: tuple[Share, ...]
    trials: int
    explained: float
    """R² out of bag; zero or less where the settings tell nothing of an unseen trial."""
    left_out: tuple[str, ...]
    """Settings that only some trials have."""


def measure_importance(
    trials: Sequence[tuple[Mapping[str, Any], float]], space: Mapping[str, Mapping[str, Any]]
) -> Importance | str:
    """Shares of the settings in the differences between trials, or a sentence that says why they cannot be told.

    trials: (settings, value) of each that has a value. space: `sweep.space` of the settings, as far as it is known.
    """
    if len(trials) < MIN_TRIALS:
        return f"Importance of settings needs at least {MIN_TRIALS} trials with a value; there are {len(trials)}."
    values = np.array([value for _, value in trials])
    if np.ptp(values) == 0:
        return "Importance of settings: all trials did equally well."
    common = sorted(set.intersection(*(set(settings) for settings, _ in trials)))
    varied = [name for name in common if len({repr(settings[name]) for settings, _ in trials}) > 1]
    left_out = tuple(sorted({name for settings, _ in trials for name in settings} - set(common)))
    if not varied:
        return "Importance of settings: no setting differs between the trials."
    scales = {name: scale_of([one[name] for one, _ in trials], space.get(name, {})) for name in varied}
    settings = [{name: plain_value(one[name]) for name in varied} for one, _ in trials]
    generator = np.random.default_rng(SEED)
    shares = _fanova(settings, values, scales)
    if shares is None:
        return "Importance of settings: no setting tells one trial from another."
    samples = generator.integers(len(values), size=(RESAMPLES, len(values)))
    drawn = [_fanova([settings[i] for i in sample], values[sample], scales) for sample in samples]
    resampled = [one for one in drawn if one is not None]
    found = [Share(name, shares[name], _deviation([one[name] for one in resampled])) for name in varied]
    found.sort(key=lambda share: -share.value)
    return Importance(tuple(found), len(trials), _explained(settings, values, scales), left_out)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation; of too few values 1, the most that a share can be off."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 1.0


def _fanova(settings: list[dict[str, Any]], values: np.ndarray, scales: dict[str, Scale]) -> dict[str, float] | None:
    """The share of each setting; None where no tree can tell one trial from another."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(scale.choices)
        if scale.choices
        else FloatDistribution(scale.low, scale.high, log=scale.is_log)
        for name, scale in scales.items()
    }
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=dict(one), distributions=distributions, value=float(value))
            for one, value in zip(settings, values, strict=True)
        ]
    )
    try:
        shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=SEED))
    except RuntimeError:  # a forest without any variance
        return None
    return {name: float(share) if math.isfinite(share) else 0.0 for name, share in shares.items()}


def _explained(settings: list[dict[str, Any]], values: np.ndarray, scales: dict[str, Scale]) -> float:
    from sklearn.ensemble import RandomForestRegressor

    columns = []
    for name, scale in scales.items():
        column = [one[name] for one in settings]
        if scale.choices:
            columns += [[float(value == choice) for value in column] for choice in scale.choices]
        else:
            columns.append([scale.height(value) or 0.0 for value in column])
    forest = RandomForestRegressor(FOREST_TREES, oob_score=True, random_state=SEED)
    return float(forest.fit(np.array(columns).T, values).oob_score_)
