"""A chart in words: for a screen reader, and in place of the drawing where there is only text."""

from beats_ray.reporting.charts import BarChart, Chart, LineChart, ParallelChart

MOST_LINES = 6


def describe(chart: Chart) -> str:
    """The chart's title and its main figures, in one sentence."""
    return f"{chart.title}: {'; '.join(describe_parts(chart))}"


def describe_parts(chart: Chart) -> list[str]:
    """One phrase for each line or bar; of trials and confusions how many there are, since tables have them."""
    if isinstance(chart, LineChart):
        lines = [
            f"{line.name} {line.points[0][1]:.4g} to {line.points[-1][1]:.4g} at {chart.x_label} {line.points[-1][0]:g}"
            for line in chart.lines
        ]
        more = [f"and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
        return lines[:MOST_LINES] + more
    if isinstance(chart, BarChart):
        return [f"{bar.name} {bar.text}" for bar in chart.bars]
    if isinstance(chart, ParallelChart):
        names = ", ".join(axis.name for axis in chart.axes)
        return [f"{len(chart.tracks)} trials over {names}"]
    right = sum(row[index] for index, row in enumerate(chart.counts))
    return [f"{right} of {sum(map(sum, chart.counts))} clips are right, {len(chart.labels)} classes"]
