"""Search spaces: checked against the settings they change, then turned into Ray Tune's domains."""

import difflib
from typing import Any

from beats_ray.config import ConfigError, FinetuneSettings, SearchParameter, field_names, replace


def check_space(space: dict[str, SearchParameter], settings: FinetuneSettings) -> None:
    """ConfigError when a name is no fine-tuning setting, or an end of its range is not allowed for it."""
    for name, parameter in space.items():
        if name not in field_names(FinetuneSettings):
            near = difflib.get_close_matches(name, field_names(FinetuneSettings), 1, 0.0)[0]
            raise ConfigError(f"sweep.space: {name!r} is no fine-tuning setting; did you mean {near}?")
        for value in parameter.values if parameter.distribution == "choice" else (parameter.low, parameter.high):
            replace(settings, {name: value})


def tune_domains(space: dict[str, SearchParameter]) -> dict[str, Any]:
    """The space in Ray Tune's words; parameter names stay dotted."""
    from ray import tune

    domains: dict[str, Any] = {}
    for name, parameter in space.items():
        if parameter.distribution == "choice":
            domains[name] = tune.choice(list(parameter.values))
            continue
        assert parameter.low is not None, name  # checked by SearchParameter
        assert parameter.high is not None, name
        draw = tune.loguniform if parameter.distribution == "loguniform" else tune.uniform
        domains[name] = draw(parameter.low, parameter.high)
    return domains
