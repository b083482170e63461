"""`beats-ray report RUN`: one self-contained report.html of a run, finished or not, and the leaderboard as data.

    RUN/report.html         opens anywhere without a network; charts are inline SVG
    RUN/leaderboard.json    the same table for programs
    RUN/leaderboard.md      and for a README

What a run has not got (yet) is said to be absent.
"""

from collections.abc import Sequence
from dataclasses import asdict

import jinja2

from beats_ray.data.storage import open_place
from beats_ray.reporting.evaluations import evaluations
from beats_ray.reporting.operations import data_health, loading, settings, throughput
from beats_ray.reporting.pictures import Points, curves_picture
from beats_ray.reporting.results import (
    COLUMNS,
    codebooks,
    headline,
    leaderboard,
    leaderboard_cells,
    learning_curves,
    sweeps,
)
from beats_ray.reporting.run_folder import LeaderboardRow, Run, read_run

SECTIONS = (leaderboard, evaluations, learning_curves, sweeps, codebooks, data_health, throughput, settings, loading)


def write_report(run: str) -> list[tuple[str, str]]:
    """Writes the report of the run at a local path, s3:// or gs:// address; returns what was written and where.

    UserError where there is no run.
    """
    place = open_place(run)
    contents = read_run(place)
    rows = contents.leaderboard()
    (place / "leaderboard.json").write_json([asdict(row) for row in rows])
    (place / "leaderboard.md").write_bytes(leaderboard_markdown(rows).encode())
    (place / "report.html").write_bytes(render(contents).encode())
    return [("report", (place / "report.html").uri), ("leaderboard", (place / "leaderboard.md").uri)]


def write_curves(runs: Sequence[str], folder: str) -> list[tuple[str, str]]:
    """Writes loss.svg and perplexity.svg of runs that differ in their seed to the folder; what a run lacks is left out.

    The curves of an iteration have one colour; dashed is the loss of predicting without a model (`clip_band_loss`).
    """
    contents = [read_run(open_place(run)) for run in runs]
    numbers = sorted({index for run in contents for index in run.iterations if index > 0})

    def series(metric: str) -> dict[str, list[Points]]:
        return {
            f"iteration {index}": [
                run.iterations[index]["pretrain"].series(metric) for run in contents if index in run.iterations
            ]
            for index in numbers
        }

    losses = curves_picture(
        "masked pre-training: loss", series("train/loss"), "nats per masked patch", series("train/clip_band_loss")
    )
    perplexities = curves_picture(
        "masked pre-training: perplexity of the labels", series("labels/perplexity"), "codes", {}
    )
    written = []
    for name, picture in (("loss.svg", losses), ("perplexity.svg", perplexities)):
        place = open_place(folder) / name
        place.write_bytes(picture)
        written.append(("curves", place.uri))
    return written


def render(run: Run) -> str:
    """The report as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("beats_ray"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    subtitle, tiles = headline(run)
    template = environment.get_template("report.html.j2")
    return template.render(run=run, subtitle=subtitle, tiles=tiles, sections=[section(run) for section in SECTIONS])


def leaderboard_rows(run: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the leaderboard of the run at a local path, s3:// or gs:// address, ready to print."""
    return COLUMNS, [leaderboard_cells(row) for row in read_run(open_place(run)).leaderboard()]


def leaderboard_markdown(rows: list[LeaderboardRow]) -> str:
    """The leaderboard as a Markdown table."""
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 2) + ["---"], *map(leaderboard_cells, rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
