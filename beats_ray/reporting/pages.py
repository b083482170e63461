"""The report as a file: one page of HTML, Markdown, or JSON for programs, all from the same sections."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jinja2
from markupsafe import Markup, escape

from beats_ray.reporting.charts import Chart
from beats_ray.reporting.describe import describe_parts
from beats_ray.reporting.layout import Grid, Section
from beats_ray.reporting.results import Tile
from beats_ray.reporting.run_folder import Run
from beats_ray.reporting.svg import draw

FORMAT_VERSION = 1
"""Of report.json: raised when a key changes its meaning."""


def as_html(run: Run, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """One page that loads nothing: styles, drawings and sounds are inside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("beats_ray"), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"draw": draw, "data_uri": _mp3_uri, "prose": _prose}
    template = environment.get_template("report.html.j2")
    return template.render(run=run, subtitle=subtitle, tiles=tiles, sections=sections)


def as_markdown(run: Run, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The same in Markdown: charts by their main figures, sounds by their names."""
    lines = [f"# {_plain(run.name)}", "", subtitle, ""]
    lines += [f"- {tile.label}: **{tile.value}** ({_plain(tile.note)})" for tile in tiles]
    if run.problems:
        lines += ["", "## Could not be read", "", *(f"- {_plain(problem)}" for problem in run.problems)]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        lines += [f"{_plain(note)}\n" for note in section.notes]
        for chart in section.charts:
            lines += [f"- {_plain(chart.title)}: {_plain('; '.join(describe_parts(chart)))}"]
        for grid in section.tables:
            lines += ["", f"### {_plain(grid.title)}", "", markdown_table(grid)]
        lines += [f"- {_plain(clip.caption)}: `{clip.clip_id}`" for clip in section.clips]
        for block in section.code:
            lines += [f"### {_plain(block.title)}", "", "```", block.text.rstrip(), "```", ""]
        lines += [section.absent] if section.absent else []
    return "\n".join(lines) + "\n"


def as_json(run: Run, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The same for programs: the leaderboard's rows and the charts' points are numbers, tables are text as shown."""
    return json.dumps(
        {
            "format_version": FORMAT_VERSION,
            "name": run.name,
            "path": run.place.uri,
            "info": {key: value for key, value in run.info.items() if key != "config"},
            "problems": run.problems,
            "headline": [asdict(tile) for tile in tiles],
            "leaderboard": [] if run.is_single_stage else [asdict(row) for row in run.leaderboard()],
            "sections": {section.anchor: _section(section) for section in sections},
        },
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
        default=str,
    )


def markdown_table(grid: Grid) -> str:
    """A table in Markdown, numbers to the right."""
    rule = ["---" if name in grid.text else "---:" for name in grid.columns]
    rows = [grid.columns, rule, *(row.cells for row in grid.rows)]
    return "".join(f"| {' | '.join(_plain(cell).replace('|', '/') for cell in row)} |\n" for row in rows)


def _section(section: Section) -> dict[str, Any]:
    return {
        "title": section.title,
        "notes": section.notes,
        "charts": [{"kind": type(chart).__name__, **_chart(chart)} for chart in section.charts],
        "tables": [
            {"title": grid.title, "columns": grid.columns, "rows": [list(row.cells) for row in grid.rows]}
            for grid in section.tables
        ],
        "clips": [{"clip_id": clip.clip_id, "caption": clip.caption} for clip in section.clips],
        "code": [{"title": block.title, "text": block.text} for block in section.code],
        "absent": section.absent,
    }


def _chart(chart: Chart) -> dict[str, Any]:
    styling = {"color", "dashed", "has_legend", "y_range", "maximum"}
    return asdict(chart, dict_factory=lambda pairs: {name: value for name, value in pairs if name not in styling})


def _plain(text: str) -> str:
    """Text of the run on one line, without Markdown's or HTML's own signs taking effect."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _prose(text: str) -> Markup:
    """Escaped text in which `commands` stand as code."""
    parts = [escape(part) for part in text.split("`")]
    if len(parts) % 2 == 0:  # a lone backtick is one of the run's own
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _mp3_uri(data: bytes) -> str:
    return "data:audio/mpeg;base64," + base64.b64encode(data).decode()
