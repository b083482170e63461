"""Search spaces: checked against the settings they change, drawn from by Optuna, and changed by population training.

    check_space(sweep, settings)                 # ConfigError before anything runs
    drawn = draw(study.ask(), sweep)             # {"train.learning_rate": 3e-4, ...}

A drawn setting holds the parameters that are searched under its conditions (`when`), and no others. Names stay dotted.
"""

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from beats_ray.config import ConfigError, FinetuneSettings, SearchParameter, SweepSettings, field_names, replace
from beats_ray.tune.settings import DISCRETE, is_among

SAME_FOR_ALL = {
    "validate_every_steps": "it is the unit in which trials are compared",
    "train.steps": "trials are stopped, counted and compared by how far they are from the same end",
    "train.num_workers": "room for trials is counted before they are drawn",
    "train.cpus_per_worker": "room for trials is counted before they are drawn",
    "train.use_gpu": "room for trials is counted before they are drawn",
}
"""Settings that trials cannot differ in, beside all of `folds`, and why."""

CHANGED_IN_MID_RUN = (
    "augment.",
    "dropout",
    "label_smoothing",
    "layer_drop",
    "train.layer_decay",
    "train.learning_rate",
    "train.max_grad_norm",
    "train.weight_decay",
)
"""Settings that a run goes on with other values of, from weights that were trained with these."""


def check_space(sweep: SweepSettings, settings: FinetuneSettings) -> None:
    """ConfigError where a name is no fine-tuning setting, or a value that may be drawn is not allowed for it."""
    for name, parameter in sweep.space.items():
        _check_name(name, sweep)
        for value in _examples(parameter):
            try:
                replace(settings, {name: value})
            except ConfigError as error:
                hint = "; with distribution=integer it is drawn as a whole number" if _is_fraction(value) else ""
                raise ConfigError(f"sweep.space.{name}: may be {value!r}, and {error}{hint}") from None
    for index, point in enumerate(sweep.start):
        _check_point(f"sweep.start.{index}", point, sweep)
        replace(settings, dict(point))
    if sweep.search == "grid" and len(list(combinations(sweep))) > sweep.num_trials:
        raise ConfigError(
            f"sweep.num_trials={sweep.num_trials}: the grid has {len(list(combinations(sweep)))} combinations; use "
            "that many trials, or fewer values"
        )


def _check_name(name: str, sweep: SweepSettings) -> None:
    known = field_names(FinetuneSettings)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise ConfigError(f"sweep.space: {name!r} is no fine-tuning setting; did you mean {near}?")
    why = "trials would be judged by different clips" if name.startswith("folds.") else SAME_FOR_ALL.get(name)
    if why:
        raise ConfigError(f"sweep.space: {name} is the same for all trials, since {why}; take it out of the space")
    if name == "train.seed" and sweep.repeats > 1 and sweep.repeat_over == "seeds":
        raise ConfigError("sweep.space: train.seed is what sweep.repeats differ in; take one of them out")
    if sweep.scheduler == "pbt" and not name.startswith(CHANGED_IN_MID_RUN):
        raise ConfigError(
            f"sweep.space: {name} cannot change within a run, which sweep.scheduler=pbt does; use another scheduler, "
            f"or search {', '.join(CHANGED_IN_MID_RUN)}"
        )


def _check_point(field: str, point: Mapping[str, Any], sweep: SweepSettings) -> None:
    for name, value in point.items():
        if name not in sweep.space:
            raise ConfigError(f"{field}.{name}: is not in sweep.space; use one of {', '.join(sweep.space)}")
        if not contains(sweep.space[name], value):
            raise ConfigError(f"{field}.{name}={value!r}: is outside sweep.space.{name}; widen that, or leave it out")


def _examples(parameter: SearchParameter) -> tuple[Any, ...]:
    """All values of a list; of a range its ends, and a value between them that is no whole number if one can be."""
    if parameter.distribution in DISCRETE:
        return parameter.values
    low, high = ends(parameter)
    if parameter.distribution == "integer":
        return int(low), int(high)
    return (low, high) if parameter.step is not None else (low, low + (high - low) / math.pi, high)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and not value.is_integer()


def ends(parameter: SearchParameter) -> tuple[float, float]:
    """The smallest and the largest value of a range that can be drawn; the largest lies on a step."""
    assert parameter.low is not None  # checked by SearchParameter
    assert parameter.high is not None
    step = parameter.step or (1.0 if parameter.distribution == "integer" else None)
    if step is None:
        return parameter.low, parameter.high
    highest = parameter.low + math.floor((parameter.high - parameter.low) / step + 1e-9) * step
    return parameter.low, round(highest, 12)  # 3 x 0.1 is not 0.3


def contains(parameter: SearchParameter, value: Any) -> bool:
    """Whether the value could be drawn."""
    if parameter.distribution in DISCRETE:
        return is_among(value, parameter.values)
    low, high = ends(parameter)
    if isinstance(value, bool | str) or not low <= value <= high:
        return False
    step = parameter.step or (1.0 if parameter.distribution == "integer" else None)
    return step is None or math.isclose((value - low) / step, round((value - low) / step), abs_tol=1e-6)


def is_searched(parameter: SearchParameter, drawn: Mapping[str, Any]) -> bool:
    """Whether its conditions hold beside what has been drawn."""
    return all(name in drawn and is_among(drawn[name], values) for name, values in parameter.when.items())


def distribution_of(parameter: SearchParameter) -> Any:
    """The parameter in Optuna's words."""
    from optuna import distributions

    if parameter.distribution in DISCRETE:
        return distributions.CategoricalDistribution(parameter.values)
    low, high = ends(parameter)
    if parameter.distribution == "integer":
        return distributions.IntDistribution(int(low), int(high), step=int(parameter.step or 1))
    return distributions.FloatDistribution(low, high, log=parameter.distribution == "loguniform", step=parameter.step)


def draw(trial: Any, sweep: SweepSettings) -> dict[str, Any]:
    """One setting, asked of an Optuna trial parameter by parameter."""
    drawn: dict[str, Any] = {}
    for name, parameter in sweep.in_order().items():
        if not is_searched(parameter, drawn):
            continue
        if parameter.distribution in DISCRETE:
            drawn[name] = trial.suggest_categorical(name, parameter.values)
            continue
        low, high = ends(parameter)
        if parameter.distribution == "integer":
            drawn[name] = trial.suggest_int(name, int(low), int(high), step=int(parameter.step or 1))
        else:
            is_log = parameter.distribution == "loguniform"
            drawn[name] = trial.suggest_float(name, low, high, log=is_log, step=parameter.step)
    return drawn


def combinations(sweep: SweepSettings) -> Iterator[dict[str, Any]]:
    """Each combination of the grid's values once; a parameter whose conditions fail is left out of it."""
    grids = {name: one for name, one in sweep.in_order().items() if one.distribution == "grid"}
    seen = []
    for values in itertools.product(*(one.values for one in grids.values())):
        combination: dict[str, Any] = {}
        for (name, parameter), value in zip(grids.items(), values, strict=True):
            conditions = parameter.model_copy(
                update={"when": {other: wanted for other, wanted in parameter.when.items() if other in grids}}
            )
            if is_searched(conditions, combination):
                combination[name] = value
        if combination not in seen:
            seen.append(combination)
            yield combination


def tune_domains(space: Mapping[str, SearchParameter]) -> dict[str, Any]:
    """The space in Ray Tune's words, for a population's first members."""
    from ray import tune

    domains: dict[str, Any] = {}
    for name, parameter in space.items():
        if parameter.distribution == "choice":
            domains[name] = tune.choice(list(parameter.values))
        else:
            draw_between = tune.loguniform if parameter.distribution == "loguniform" else tune.uniform
            domains[name] = draw_between(*ends(parameter))
    return domains


def clip_to_space(values: dict[str, Any], space: Mapping[str, SearchParameter]) -> dict[str, Any]:
    """A member's changed setting with every range respected: a factor of 1.2 may have led out of one."""
    clipped = dict(values)
    for name, parameter in space.items():
        if parameter.distribution not in DISCRETE:
            low, high = ends(parameter)
            clipped[name] = min(high, max(low, values[name]))
    return clipped
