"""Small charts as inline SVG: lines over a numeric axis, and horizontal bars.

Colours are CSS variables of the page (`--series-1` ..., `--muted`, `--ink`, `--grid`), so one drawing serves the light
and the dark page. Drawings are sized for a phone's width and scale up. Hovering a mark shows its value.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
MAX_POINTS = 300  # per line: more cannot be told apart at this width
BAR_HEIGHT, BAR_GAP, VALUE_WIDTH = 16, 10, 96
CHARACTER_WIDTH = 8.0  # of the labels' font, about, as enlarged on a phone


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


def line_chart(
    title: str, lines: Iterable[Line], x_label: str, y_range: tuple[float, float] | None = None, has_legend: bool = True
) -> Markup:
    """Lines, with a legend where there are several; an empty string where no line has two finite points."""
    drawn = [(line, finite) for line in lines if len(finite := _thinned(line.points)) > 1]
    if not drawn:
        return Markup("")
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    y_ticks = nice_ticks(*(y_range or (min(ys), max(ys))))
    x_ticks = nice_ticks(min(xs), max(xs), count=4, inside=True)
    low, high = y_ticks[0], y_ticks[-1]
    first, span = min(xs), (max(xs) - min(xs)) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        height = HEIGHT - TOP - BOTTOM
        y = min(max(y, low), high)
        return LEFT + (x - first) / span * (WIDTH - LEFT - RIGHT), TOP + (high - y) / (high - low) * height

    parts = []
    for tick in y_ticks:
        y = place(first, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = place(tick, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_number(tick)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for line, points in drawn:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        label = f"{line.name}: {_value(points[0][1])} to {_value(points[-1][1])}"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var(--{line.color})" stroke-width="2" '
            f'stroke-linejoin="round"{_dash(line.dashed)}><title>{escape(label)}</title></polyline>'
        )
    legend = [(line.name, line.color, line.dashed) for line, _ in drawn] if has_legend and len(drawn) > 1 else []
    return _figure(title, "".join(parts), HEIGHT, legend)


def bar_chart(title: str, bars: Sequence[Bar], maximum: float | None = None) -> Markup:
    """Horizontal bars from zero, one below the other, each with its text; an empty string for no bars."""
    if not bars:
        return Markup("")
    top = maximum or max(bar.value + bar.error for bar in bars) or 1.0
    label_width = min(max(len(bar.name) for bar in bars) * CHARACTER_WIDTH + 12, WIDTH / 2)
    room = WIDTH - label_width - VALUE_WIDTH
    parts = []
    for index, bar in enumerate(bars):
        y = TOP + index * (BAR_HEIGHT + BAR_GAP)
        middle = y + BAR_HEIGHT / 2
        length = max(0.0, min(bar.value / top, 1.0)) * room
        parts.append(
            f'<text x="{label_width - 8:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.name)}</text>'
        )
        parts.append(
            f'<rect x="{label_width:.1f}" y="{y}" width="{max(length, 1):.1f}" height="{BAR_HEIGHT}" rx="2" '
            f'fill="var(--{bar.color})"><title>{escape(bar.name)}: {escape(bar.text)}</title></rect>'
        )
        if bar.error:
            start, end = (label_width + min((bar.value + side * bar.error) / top, 1.0) * room for side in (-1, 1))
            parts.append(
                f'<path d="M{start:.1f} {middle}H{end:.1f}M{start:.1f} {middle - 4}v8M{end:.1f} {middle - 4}v8" '
                'stroke="var(--ink)" stroke-width="1.5" fill="none"/>'
            )
        end = label_width + min((bar.value + bar.error) / top, 1.0) * room
        parts.append(f'<text class="value" x="{end + 7:.1f}" y="{middle + 4:.1f}">{escape(bar.text)}</text>')
    height = TOP + len(bars) * (BAR_HEIGHT + BAR_GAP)
    return _figure(title, "".join(parts), height, [])


def nice_ticks(low: float, high: float, count: int = 5, inside: bool = False) -> list[float]:
    """Round numbers, about `count`, that enclose [low, high], or lie within it with `inside`; at least two of them."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = low / step, high / step
    start, stop = (math.ceil(first - 1e-9), math.floor(last + 1e-9)) if inside else (math.floor(first), math.ceil(last))
    return [round(index * step, 12) for index in range(start, max(stop, start + 1) + 1)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Finite points, at most MAX_POINTS of them, the last one kept."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    stride = -(-len(finite) // MAX_POINTS)
    return finite if stride <= 1 else finite[::stride] + ([finite[-1]] if (len(finite) - 1) % stride else [])


def _figure(title: str, body: str, height: float, legend: list[tuple[str, str, bool]]) -> Markup:
    keys = "".join(
        f'<li><svg width="18" height="8" aria-hidden="true"><line x2="18" y1="4" y2="4" stroke="var(--{color})" '
        f'stroke-width="2.5"{_dash(dashed)}/></svg>{escape(name)}</li>'
        for name, color, dashed in legend
    )
    caption = f"<figcaption>{escape(title)}{f'<ul>{keys}</ul>' if keys else ''}</figcaption>"
    drawing = f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">{body}</svg>'
    return Markup(f"<figure>{caption}{drawing}</figure>")  # noqa: S704  # every inserted text went through escape()


def _dash(dashed: bool) -> str:
    return ' stroke-dasharray="5 4"' if dashed else ""


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _value(value: float) -> str:
    return f"{value:.4g}"
