"""Curves of training runs as SVG files, for pages that show no HTML: README files and docs.

    curves_picture("masked loss", {"iteration 1": [seed_0, seed_1]}, "nats", baselines={"iteration 1": [...]})

The same points give the same bytes, so that a picture in version control changes with its figures only.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]
"""(step, value), in the order of steps."""

WIDTH_INCHES, HEIGHT_INCHES = 6.0, 3.6
MOST_POINTS = 250  # of a curve: more cannot be told apart at this width
HASH_SALT = "beats_ray"  # matplotlib names the parts of an SVG at random without one


def curves_picture(
    title: str, curves: Mapping[str, Sequence[Points]], y_label: str, baselines: Mapping[str, Sequence[Points]]
) -> bytes:
    """An SVG of curves over steps: one colour for each name, one line for each of its runs; baselines are dashed.

    Names without points are left out. Returns the file's bytes.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": HASH_SALT, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure((WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, runs) in enumerate(curves.items()):
            _draw(axes, name, runs, f"C{index}", "-")
            _draw(axes, f"{name}: without a model", baselines.get(name, ()), f"C{index}", "--")
        axes.set(title=title, xlabel="step", ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
        file = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _draw(axes: Any, name: str, runs: Sequence[Points], color: str, style: str) -> None:
    drawn = [points for points in runs if points]
    for index, points in enumerate(drawn):
        stride = -(-len(points) // MOST_POINTS)
        kept = [*points[::stride], *([points[-1]] if (len(points) - 1) % stride else [])]
        label = name if index == 0 else None
        axes.plot(*zip(*kept, strict=True), style, color=color, label=label, linewidth=1.2, alpha=0.9)
