"""Charts as data: what a section of the report shows, before it is drawn (`svg.py`), listed or written as JSON.

    chart = line_chart("loss", [Line("encoder", [(10, 6.1), (20, 5.3)])], "step")

Points are finite and few enough to be told apart, so that a long run makes no larger page than a short one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_POINTS = 300
"""Of a line: more cannot be told apart at a phone's width."""


@dataclass(frozen=True)
class Line:
    """One series: points in the order of x. `color` is a CSS variable without its dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str = "series-1"
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """One horizontal bar; `error` draws a whisker of that length to both sides."""

    name: str
    value: float
    text: str
    error: float = 0.0
    color: str = "series-1"


@dataclass(frozen=True)
class LineChart:
    """Lines over a numeric axis."""

    title: str
    lines: tuple[Line, ...]
    x_label: str
    y_range: tuple[float, float] | None = None
    has_legend: bool = True

    @property
    def is_empty(self) -> bool:
        return not self.lines


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars from zero, one below the other."""

    title: str
    bars: tuple[Bar, ...]
    maximum: float | None = None
    """Value of a bar of full length; the longest one's where None."""

    @property
    def is_empty(self) -> bool:
        return not self.bars


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: `low` and `high` are what stands at its ends."""

    name: str
    low: str
    high: str


@dataclass(frozen=True)
class Track:
    """One trial in parallel coordinates: its height on each axis, 0 to 1, None where it has no value there."""

    name: str
    heights: tuple[float | None, ...]
    quality: float
    """0 to 1: how good it is among all."""
    is_best: bool = False


@dataclass(frozen=True)
class ParallelChart:
    """Parallel coordinates: settings side by side, a line for each trial."""

    title: str
    axes: tuple[Axis, ...]
    tracks: tuple[Track, ...]

    @property
    def is_empty(self) -> bool:
        return len(self.axes) < 2 or len(self.tracks) < 2


@dataclass(frozen=True)
class HeatMap:
    """A confusion matrix as shaded squares: `counts[true][taken for]`."""

    title: str
    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def is_empty(self) -> bool:
        return not self.labels


Chart = LineChart | BarChart | ParallelChart | HeatMap


def line_chart(
    title: str, lines: Iterable[Line], x_label: str, y_range: tuple[float, float] | None = None, has_legend: bool = True
) -> LineChart:
    """A chart of the lines that have two finite points at least."""
    thinned = [Line(line.name, _thinned(line.points), line.color, line.dashed) for line in lines]
    return LineChart(title, tuple(line for line in thinned if len(line.points) > 1), x_label, y_range, has_legend)


def bar_chart(title: str, bars: Sequence[Bar], maximum: float | None = None) -> BarChart:
    """A chart of the bars with a finite value."""
    return BarChart(title, tuple(bar for bar in bars if math.isfinite(bar.value)), maximum)


def present(*charts: Chart) -> list[Chart]:
    """The charts that have something to show."""
    return [chart for chart in charts if not chart.is_empty]


def nice_ticks(low: float, high: float, count: int = 5, inside: bool = False) -> list[float]:
    """Round numbers, about `count`, that enclose [low, high], or lie within it with `inside`; at least two of them."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = low / step, high / step
    start, stop = (math.ceil(first - 1e-9), math.floor(last + 1e-9)) if inside else (math.floor(first), math.ceil(last))
    return [float(round(index * step, 12)) for index in range(start, max(stop, start + 1) + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Finite points, at most MAX_POINTS of them, the last one kept."""
    finite = tuple((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    stride = -(-len(finite) // MAX_POINTS)
    return finite if stride <= 1 else finite[::stride] + ((finite[-1],) if (len(finite) - 1) % stride else ())
