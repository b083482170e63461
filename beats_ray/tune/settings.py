"""The settings of a sweep: what is searched, by whom, who stops trials, and what it may cost.

    sweep:
      num_trials: 16
      search: optuna                 # optuna, random, grid, bohb
      scheduler: asha                # asha, hyperband, median, pbt, none
      space:
        train.learning_rate: {distribution: loguniform, low: 1e-5, high: 3e-4}
        augment.mixup: {distribution: choice, values: [0.0, 0.8]}
        augment.mixup_probability: {distribution: uniform, low: 0.2, high: 1.0, step: 0.2, when: {augment.mixup: [0.8]}}
      start: [{train.learning_rate: 3e-5, augment.mixup: 0.0}]

Rules that need no more than the sweep's own settings are here; `space.py` has those that need what is fine-tuned.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from beats_ray.settings import NonNegativeFloat, PositiveFloat, PositiveInt, Section

Value = float | int | str | bool

DISCRETE = ("choice", "grid")
MAX_STEPS = 100_000  # more values of a quantised range than anybody means


class SearchParameter(Section):
    distribution: Literal["uniform", "loguniform", "integer", "choice", "grid"]
    """How values are drawn: evenly, evenly in the logarithm, whole numbers, from a list, or each of a list in turn."""
    low: float | None = None
    """Smallest value (uniform, loguniform, integer)."""
    high: float | None = None
    """Largest value, which may be drawn too (uniform, loguniform, integer)."""
    step: float | None = None
    """Distance between two values (uniform: any value where not set; integer: 1)."""
    values: tuple[Value, ...] = ()
    """Values to choose from (choice, grid)."""
    when: dict[str, tuple[Value, ...]] = {}
    """Other parameters of the space, choices or grids, with the values under which this one is searched; under others
    it stays as it is in the fine-tuning settings."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.distribution in DISCRETE:
            if not self.values:
                raise ValueError(f"values is empty; list at least one value for a {self.distribution}")
            if len(set(map(repr, self.values))) < len(self.values):
                raise ValueError(f"values={list(self.values)} names one twice; list each once")
            return self
        if self.values:
            raise ValueError(f"values={list(self.values)} is for choice and grid; give low and high, or one of those")
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high} is an empty range; give low < high")
        if self.distribution == "loguniform" and self.low <= 0:
            raise ValueError(f"low={self.low} must be positive for loguniform")
        self._check_step(self.low, self.high)
        return self

    def _check_step(self, low: float, high: float) -> None:
        if self.distribution == "integer" and any(not float(bound).is_integer() for bound in (low, high)):
            raise ValueError(f"low={low:g}, high={high:g} are to be whole numbers for integer; use uniform otherwise")
        if self.step is None:
            return
        if self.distribution == "loguniform":
            raise ValueError(f"step={self.step:g} has no meaning for loguniform; leave it out, or use choice")
        if not 0 < self.step <= high - low or (high - low) / self.step > MAX_STEPS:
            raise ValueError(
                f"step={self.step:g} does not divide low={low:g} to high={high:g}; use a smaller positive one"
            )
        if self.distribution == "integer" and not float(self.step).is_integer():
            raise ValueError(f"step={self.step:g} is to be a whole number for integer; use uniform otherwise")


DEFAULT_SPACE = {
    "train.learning_rate": SearchParameter(distribution="loguniform", low=1e-4, high=3e-3),
    "train.layer_decay": SearchParameter(distribution="choice", values=(0.4, 0.6, 0.8, 1.0)),
    "augment.mixup": SearchParameter(distribution="choice", values=(0.0, 0.4, 0.8)),
}


class SweepSettings(Section):
    num_trials: PositiveInt = 8
    """Settings to try; of several encoders each tries them all."""
    max_concurrent_trials: PositiveInt | None = 2
    """Trials at one time, as far as the cluster has room for them; none means as many as it has room for."""
    search: Literal["optuna", "random", "grid", "bohb"] = "optuna"
    """Who proposes the next trial: Optuna's TPE, chance, each combination of the grid in turn, or `bohb`: a TPE of all
    parameters together that learns from stopped trials by how far they came, with HyperBand's brackets."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """Who stops trials: `asha`, successive halving without waiting, `hyperband`, the same in several brackets,
    `median`, the median of the others' means, or `none`. With `pbt` none is stopped, and the worst go on from the best
    ones' weights."""
    objectives: dict[str, Literal["max", "min"]] = {}
    """Metrics of the validation part that are searched for, with their direction; default the data set's main metric.
    The first one stops trials and chooses the best; of several, Optuna looks for all trade-offs."""
    grace_validations: PositiveInt = 1
    """Validations that every trial gets before it may be stopped; with pbt, between two exchanges of weights."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 2.0
    """asha, hyperband: one trial in this many goes on at each rung."""
    brackets: PositiveInt = 3
    """hyperband: brackets, the next of which has a first rung `reduction_factor` times later. Li et al. (2018)."""
    space: dict[str, SearchParameter] = DEFAULT_SPACE
    """What is searched: fields of the fine-tuning settings by their dotted names."""
    start: tuple[dict[str, Value], ...] = ()
    """Settings of the first trials, such as the paper's; what one leaves out is drawn."""
    warm_start: str = ""
    """Earlier sweep of the same metric: its folder, or its leaderboard.json. The searcher knows its trials from the
    beginning, by the parameters that both spaces have."""
    repeats: PositiveInt = 1
    """Runs of each trial, over which its metric is the mean; it is compared by the mean of those that are done."""
    repeat_over: Literal["seeds", "folds"] = "seeds"
    """What differs in them: `train.seed`, or which fold validates and which one tests, in a cycle."""
    max_minutes: PositiveFloat | None = None
    """Minutes after which no trial goes on; the best so far is published."""
    max_cost: PositiveFloat | None = None
    """Cost of all trials, in the prices' currency, after which no trial goes on."""
    price_per_gpu_hour: NonNegativeFloat = 0.0
    """What an hour of one GPU costs."""
    price_per_cpu_hour: NonNegativeFloat = 0.0
    """What an hour of one CPU costs."""
    gpus_per_worker: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of a GPU that a trial of one worker takes where `train.use_gpu` is set: 0.5 puts two trials on each."""
    seed: int = 0
    """Seed of the searcher."""

    @model_validator(mode="after")
    def _conditions(self) -> Self:
        for name, parameter in self.space.items():
            for other, values in parameter.when.items():
                condition = f"space.{name}.when.{other}"
                if other not in self.space:
                    raise ValueError(f"{condition}: is not in the space; use one of {', '.join(self.space)}")
                if self.space[other].distribution not in DISCRETE:
                    raise ValueError(f"{condition}: has no list of values; only a choice or a grid can be a condition")
                missing = [value for value in values if not is_among(value, self.space[other].values)]
                if missing or not values:
                    raise ValueError(
                        f"{condition}={list(values)}: can never hold; use some of {list(self.space[other].values)}"
                    )
        self.in_order()
        return self

    @model_validator(mode="after")
    def _searchers(self) -> Self:
        if not self.space:
            raise ValueError("space is empty; name at least one setting to search, or use `beats-ray finetune`")
        grids = [name for name, parameter in self.space.items() if parameter.distribution == "grid"]
        if grids and self.search != "grid":
            raise ValueError(
                f"space.{grids[0]}.distribution=grid needs search=grid; use choice with search={self.search}"
            )
        if self.search == "grid":
            if not grids:
                raise ValueError("search=grid needs a parameter with distribution=grid in the space; use search=random")
            for name in ("start", "warm_start"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no meaning for search=grid, whose order is fixed; leave it out")
        if self.warm_start and self.search == "random":
            raise ValueError("warm_start: search=random learns from no trial; use search=optuna, or leave it out")
        if self.search == "bohb" and self.scheduler != "hyperband":
            raise ValueError(f"search=bohb needs scheduler=hyperband, and it is {self.scheduler}; set it")
        return self

    @model_validator(mode="after")
    def _schedulers(self) -> Self:
        if self.scheduler == "pbt":
            if self.search != "random":
                raise ValueError(f"scheduler=pbt needs search=random, which draws its population; it is {self.search}")
            if self.num_trials < 2:
                raise ValueError("scheduler=pbt needs a population; use num_trials=2 or more")
            if self.repeats > 1:
                raise ValueError(f"scheduler=pbt changes a run's settings: it has no repeats={self.repeats}; use 1")
            for name, parameter in self.space.items():
                if parameter.when or parameter.distribution == "integer" or parameter.step is not None:
                    raise ValueError(f"space.{name}: pbt changes uniform, loguniform and choice without step or when")
        if len(self.objectives) > 1 and self.search not in ("optuna", "random"):
            raise ValueError(f"objectives: several need search=optuna or random, and it is {self.search}; name one")
        if self.warm_start and len(self.objectives) > 1:
            raise ValueError("warm_start: an earlier leaderboard has one metric, not several objectives; name one")
        return self

    @model_validator(mode="after")
    def _budgets(self) -> Self:
        if self.max_cost is not None and not (self.price_per_gpu_hour or self.price_per_cpu_hour):
            raise ValueError(f"max_cost={self.max_cost:g} needs a price; set price_per_gpu_hour or price_per_cpu_hour")
        return self

    def in_order(self) -> dict[str, SearchParameter]:
        """The space with every condition before what depends on it. ValueError for conditions in a circle."""
        ordered: dict[str, SearchParameter] = {}
        while len(ordered) < len(self.space):
            ready = [
                name
                for name, parameter in self.space.items()
                if name not in ordered and all(other in ordered for other in parameter.when)
            ]
            if not ready:
                left = [name for name in self.space if name not in ordered]
                raise ValueError(f"space: {', '.join(left)} depend on each other in a circle; take one `when` out")
            ordered |= {name: self.space[name] for name in ready}
        return ordered


def is_among(value: Any, values: tuple[Value, ...]) -> bool:
    """Whether a value is in a list, where 1 and 1.0 are one number and True is none."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)
