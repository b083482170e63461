"""`beats-ray report RUN`: a run, finished or not, as one page, as Markdown or as data.

    RUN/report.html         opens anywhere without a network: charts are inline SVG, sounds inline MP3
    RUN/report.md           with --format md: for a merge request or a terminal
    RUN/report.json         with --format json: for programs
    RUN/leaderboard.json    the leaderboard alone, always
    RUN/leaderboard.md

RUN is what `iterate` writes, or the folder of one `sweep`, training, `evaluate` or `cross-validate`. What a run has not
got (yet) is said to be absent.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Literal

from beats_ray.data.storage import open_place
from beats_ray.reporting.codebooks import codebooks
from beats_ray.reporting.comparison import iterations_compared
from beats_ray.reporting.confusions import confusions
from beats_ray.reporting.evaluations import evaluations
from beats_ray.reporting.handover import loading, settings
from beats_ray.reporting.layout import Grid, Row, Section
from beats_ray.reporting.operations import data_health, faults, throughput
from beats_ray.reporting.pages import as_html, as_json, as_markdown, markdown_table
from beats_ray.reporting.pictures import Points, curves_picture
from beats_ray.reporting.results import COLUMNS, headline, leaderboard, leaderboard_cells, learning_curves
from beats_ray.reporting.run_folder import LeaderboardRow, Run, read_run
from beats_ray.reporting.sweeps import sweeps

Format = Literal["html", "md", "json"]


def write_report(
    run: str, formats: Sequence[Format] = ("html",), output: str | None = None, with_audio: bool = True
) -> list[tuple[str, str]]:
    """Writes the report of the run at a local path, s3:// or gs:// address; returns what was written and where.

    output: a folder to write to instead of the run's. with_audio: whether short excerpts of confused clips become part
    of the page. UserError where there is no run.
    """
    contents = read_run(open_place(run))
    target = open_place(run if output is None else output)
    rows = [] if contents.is_single_stage else contents.leaderboard()
    sections = build_sections(contents, with_audio and "html" in formats)
    subtitle, tiles = headline(contents)
    written = []
    for name in dict.fromkeys(formats):
        text = (
            as_html(contents, subtitle, tiles, sections)
            if name == "html"
            else as_markdown(contents, subtitle, tiles, sections)
            if name == "md"
            else as_json(contents, tiles, sections)
        )
        place = target / f"report.{name}"
        place.write_bytes(text.encode())
        written.append(("report", place.uri))
    if rows:
        (target / "leaderboard.json").write_json([asdict(row) for row in rows])
        (target / "leaderboard.md").write_bytes(leaderboard_markdown(rows).encode())
        written.append(("leaderboard", (target / "leaderboard.md").uri))
    return written


def build_sections(run: Run, with_audio: bool) -> list[Section]:
    """All sections of the report, in the order of the page; damaged files are added to the run's problems.

    Of one stage's folder those alone that have something to show.
    """
    builders = (
        leaderboard, iterations_compared, learning_curves, sweeps, evaluations,
        partial(confusions, with_audio=with_audio), codebooks, data_health, throughput, faults, settings, loading,
    )  # fmt: skip
    sections = [build(run) for build in builders]
    return [section for section in sections if not (run.is_single_stage and section.absent)]


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


def leaderboard_rows(run: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the leaderboard of the run at a local path, s3:// or gs:// address, ready to print."""
    return COLUMNS, [leaderboard_cells(row) for row in read_run(open_place(run)).leaderboard()]


def leaderboard_markdown(rows: list[LeaderboardRow]) -> str:
    """The leaderboard as a Markdown table."""
    text = (COLUMNS[0], COLUMNS[-1])
    return markdown_table(Grid(COLUMNS, [Row(leaderboard_cells(row)) for row in rows], "Leaderboard", text=text))
