"""How the values of a searched setting lie: on a linear or logarithmic range, or as choices side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_DISTINCT = 4
"""Numbers of which trials have no more are taken for choices, where the space is not known."""
LOG_RATIO = 10.0
"""Positive values that span more are taken on a logarithmic scale, where the space is not known."""

Plain = float | str | bool


@dataclass(frozen=True)
class Scale:
    """Of one setting: `choices`, or else a range from `low` to `high`."""

    choices: tuple[Plain, ...] = ()
    low: float = 0.0
    high: float = 0.0
    is_log: bool = False

    def height(self, value: Any) -> float | None:
        """Where a value lies, 0 to 1; None for one that is not on the scale."""
        plain = plain_value(value)
        if self.choices:
            return self.choices.index(plain) / max(1, len(self.choices) - 1) if plain in self.choices else None
        if isinstance(plain, bool | str) or not self.low <= plain <= self.high:
            return None
        if self.low == self.high:
            return 0.5
        return (self._position(plain) - self._position(self.low)) / (
            self._position(self.high) - self._position(self.low)
        )

    @property
    def ends(self) -> tuple[str, str]:
        """What stands at the lower and the upper end."""
        low, high = (self.choices[0], self.choices[-1]) if self.choices else (self.low, self.high)
        return setting_text(low), setting_text(high)

    def _position(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def scale_of(values: Sequence[Any], known: Mapping[str, Any]) -> Scale:
    """The scale that holds all values. known: the setting's entry in `sweep.space`; empty where it is not at hand."""
    plain = [plain_value(value) for value in values]
    numbers = [value for value in plain if isinstance(value, float)]
    kind = known.get("distribution")
    is_range = kind in ("uniform", "loguniform", "integer") or (kind is None and len(set(plain)) > MOST_DISTINCT)
    if not is_range or len(numbers) < len(plain):
        in_order = sorted(set(plain), key=lambda value: (isinstance(value, str), value))
        return Scale(choices=tuple(in_order))
    ends = [float(end) for end in (known.get("low"), known.get("high")) if isinstance(end, int | float)]
    low, high = min(*numbers, *ends), max(*numbers, *ends)
    return Scale((), low, high, low > 0 and (kind == "loguniform" or (kind is None and high / low >= LOG_RATIO)))


def plain_value(value: Any) -> Plain:
    """A setting's value as a number, a truth value or text; 2 and 2.0 are one value."""
    if isinstance(value, bool):
        return value
    return float(value) if isinstance(value, int | float) else str(value)


def setting_text(value: Any) -> str:
    """A setting's value with three digits, or as it stands."""
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)
