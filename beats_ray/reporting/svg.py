"""Charts drawn as inline SVG, without scripts.

Colours are CSS variables of the page (`--series-1` ..., `--muted`, `--ink`, `--grid`), so one drawing serves the light
and the dark page. Drawings are sized for a phone's width and scale up. Hovering a mark shows its value; a screen reader
hears the title and a summary.
"""

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from beats_ray.reporting.charts import BarChart, Chart, HeatMap, Line, LineChart, ParallelChart, nice_ticks
from beats_ray.reporting.describe import describe

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 12, 40
BAR_HEIGHT, BAR_GAP, VALUE_WIDTH = 16, 10, 96
CHARACTER_WIDTH = 8.0  # of the labels' font, about, as enlarged on a phone
AXIS_GAP = 92  # between parallel axes: below it names run into each other
HEAT_LEFT = 12
LARGEST = 1.4  # times its own size: how far a broad drawing grows with the page


def draw(chart: Chart) -> Markup:
    """The chart as a `<figure>`; every text in it is escaped."""
    if isinstance(chart, LineChart):
        return _lines(chart)
    if isinstance(chart, BarChart):
        return _bars(chart)
    if isinstance(chart, ParallelChart):
        return _parallel(chart)
    return _heat_map(chart)


def _lines(chart: LineChart) -> Markup:
    xs = [x for line in chart.lines for x, _ in line.points]
    ys = [y for line in chart.lines for _, y in line.points]
    y_ticks = nice_ticks(*(chart.y_range or (min(ys), max(ys))))
    x_ticks = _ticks_of_x(xs)
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
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>')
    for line in chart.lines:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line.points))
        label = f"{line.name}: {_value(line.points[0][1])} to {_value(line.points[-1][1])}"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="var(--{line.color})" stroke-width="2" '
            f'stroke-linejoin="round"{_dash(line.dashed)}><title>{escape(label)}</title></polyline>'
        )
    legend = chart.lines if chart.has_legend and len(chart.lines) > 1 else ()
    return _figure(chart, "".join(parts), WIDTH, HEIGHT, legend)


def _ticks_of_x(xs: Sequence[float]) -> list[float]:
    """Steps and iterations have no fractions between them."""
    ticks = nice_ticks(min(xs), max(xs), count=4, inside=True)
    whole = [tick for tick in ticks if tick.is_integer()]
    return whole if all(x.is_integer() for x in map(float, xs)) and len(whole) > 1 else ticks


def _bars(chart: BarChart) -> Markup:
    top = chart.maximum or max(bar.value + bar.error for bar in chart.bars) or 1.0
    label_width = min(max(len(bar.name) for bar in chart.bars) * CHARACTER_WIDTH + 12, WIDTH / 2)
    room = WIDTH - label_width - VALUE_WIDTH
    parts = []
    for index, bar in enumerate(chart.bars):
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
            ends = (max(0.0, min((bar.value + side * bar.error) / top, 1.0)) for side in (-1, 1))
            start, end = (label_width + share * room for share in ends)
            parts.append(
                f'<path d="M{start:.1f} {middle}H{end:.1f}M{start:.1f} {middle - 4}v8M{end:.1f} {middle - 4}v8" '
                'stroke="var(--ink)" stroke-width="1.5" fill="none"/>'
            )
        end = label_width + min((bar.value + bar.error) / top, 1.0) * room
        parts.append(f'<text class="value" x="{end + 7:.1f}" y="{middle + 4:.1f}">{escape(bar.text)}</text>')
    return _figure(chart, "".join(parts), WIDTH, TOP + len(chart.bars) * (BAR_HEIGHT + BAR_GAP), ())


def _parallel(chart: ParallelChart) -> Markup:
    gap = max(AXIS_GAP, (WIDTH - AXIS_GAP) / (len(chart.axes) - 1))
    width = gap * (len(chart.axes) - 1) + AXIS_GAP
    top, bottom = TOP + 36, HEIGHT - 26

    def place(index: int, height: float) -> str:
        return f"{AXIS_GAP / 2 + index * gap:.1f},{bottom - height * (bottom - top):.1f}"

    parts = []
    for index, axis in enumerate(chart.axes):
        x = AXIS_GAP / 2 + index * gap
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        for y, text, style in (
            (TOP + 2, axis.name, ' class="value"'),
            (top - 9, axis.high, ""),
            (bottom + 18, axis.low, ""),
        ):
            parts.append(f'<text{style} x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    for track in sorted(chart.tracks, key=lambda track: (track.is_best, track.quality)):  # the best on top
        points = [place(index, height) for index, height in enumerate(track.heights) if height is not None]
        color, stroke = ("series-2", 3.0) if track.is_best else ("series-1", 1.6)
        parts.append(
            f'<polyline class="track" points="{" ".join(points)}" fill="none" stroke="var(--{color})" '
            f'stroke-width="{stroke}" stroke-opacity="{1.0 if track.is_best else 0.25 + 0.65 * track.quality:.2f}">'
            f"<title>{escape(track.name)}</title></polyline>"
        )
    return _figure(chart, "".join(parts), width, HEIGHT, ())


def _heat_map(chart: HeatMap) -> Markup:
    cell = (WIDTH - 2 * HEAT_LEFT) / len(chart.labels)
    size = cell * len(chart.labels)
    parts = [f'<rect class="frame" x="{HEAT_LEFT}" y="{TOP}" width="{size:.1f}" height="{size:.1f}"/>']
    for row, counts in enumerate(chart.counts):
        total = sum(counts) or 1
        for column, count in enumerate(counts):
            if count:
                label = f"{chart.labels[row]} taken for {chart.labels[column]}: {count} of {total}"
                color = "series-1" if row == column else "series-2"
                parts.append(
                    f'<rect x="{HEAT_LEFT + column * cell:.1f}" y="{TOP + row * cell:.1f}" width="{cell:.1f}" '
                    f'height="{cell:.1f}" fill="var(--{color})" fill-opacity="{0.15 + 0.85 * count / total:.2f}">'
                    f"<title>{escape(label)}</title></rect>"
                )
    return _figure(chart, "".join(parts), WIDTH, TOP + size + HEAT_LEFT, ())


def _figure(chart: Chart, body: str, width: float, height: float, legend: Iterable[Line]) -> Markup:
    keys = "".join(
        f'<li><svg width="18" height="8" aria-hidden="true"><line x2="18" y1="4" y2="4" stroke="var(--{line.color})" '
        f'stroke-width="2.5"{_dash(line.dashed)}/></svg>{escape(line.name)}</li>'
        for line in legend
    )
    caption = f"<figcaption>{escape(chart.title)}{f'<ul>{keys}</ul>' if keys else ''}</figcaption>"
    drawing = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(describe(chart))}">{body}</svg>'
    if width > WIDTH:  # scrolls within itself rather than shrinking beyond what can be read
        drawing = (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(chart.title)}">'
            f'<div style="min-width:{width:g}px;max-width:{LARGEST * width:g}px">{drawing}</div></div>'
        )
    style = ' class="broad"' if width > WIDTH else ""
    return Markup(f"<figure{style}>{caption}{drawing}</figure>")  # noqa: S704  # every inserted text was escaped


def _dash(dashed: bool) -> str:
    return ' stroke-dasharray="5 4"' if dashed else ""


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and value % size == 0):
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _value(value: float) -> str:
    return f"{value:.4g}"
