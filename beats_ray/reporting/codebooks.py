"""The report's codebooks: how many codes are used, how evenly, and whether one has collapsed."""

from typing import Any

from beats_ray.reporting.charts import Line, line_chart, present
from beats_ray.reporting.layout import Grid, Row, Section, figure, iteration_title, percent
from beats_ray.reporting.reading import number
from beats_ray.reporting.run_folder import Run, Stage

COLUMNS = ["codebook", "teacher", "codes used", "perplexity", "collapsed", "measured on"]


def codebooks(run: Run) -> Section:
    """Used codes and perplexity of each iteration's labels, best from all clips, else from the newest report."""
    section = Section("Codebook usage")
    rows = []
    for index, stages in sorted(run.iterations.items()):
        title, training, pretrain = iteration_title(run, index), stages["tokenizer"], stages["pretrain"]
        labels = stages["labels"].result
        for source, used, perplexity in (
            ("labels of every clip", labels.get("used_code_fraction"), labels.get("perplexity")),
            ("newest report of the tokenizer", *_last(training, "tokenizer")),
            ("newest report of pre-training", *_last(pretrain, "labels")),
        ):
            if number(perplexity) is not None:
                cells = [title, training.teacher, percent(used), figure(perplexity, 1)]
                rows.append(Row([*cells, _collapsed(training, pretrain), source]))
                break
        section.charts += present(
            line_chart(f"{title}: perplexity of the codes", _perplexities(training, pretrain), "step"),
            line_chart(
                f"{title}: part of the patches that the top codes cover",
                [Line("covered", _coverage(labels.get("code_counts")), "series-3")],
                "codes, most frequent first",
                y_range=(0, 1),
            ),
        )
    if rows:
        text = ("codebook", "teacher", "collapsed", "measured on")
        section.tables = [Grid(COLUMNS, rows, "Codebooks", text=text)]
        section.notes = [
            "Used codes alone mislead: perplexity, the number of codes were all used alike, says how evenly they are."
        ]
    else:
        section.absent = "No training has reported its codes yet."
    return section


def _last(stage: Stage, prefix: str) -> tuple[float | None, float | None]:
    return stage.last(f"{prefix}/used_code_fraction"), stage.last(f"{prefix}/perplexity")


def _perplexities(training: Stage, pretrain: Stage) -> list[Line]:
    return [
        Line("while the tokenizer trains", training.series("tokenizer/perplexity"), "series-3"),
        Line("labels in pre-training", pretrain.series("labels/perplexity"), "series-1"),
    ]


def _collapsed(training: Stage, pretrain: Stage) -> str:
    """In which training the codes took almost everything, by its newest report."""
    found = [
        name
        for name, steps in (
            ("tokenizer", training.last("tokenizer/collapsed_steps")),
            ("pre-training", pretrain.last("labels/collapsed_steps")),
        )
        if steps
    ]
    return "yes: " + ", ".join(found) if found else "no"


def _coverage(counts: Any) -> list[tuple[float, float]]:
    values = sorted((number(count) or 0.0 for count in counts), reverse=True) if isinstance(counts, list) else []
    total, covered, points = sum(values), 0.0, []
    for rank, value in enumerate(values, 1):
        covered += value
        points.append((float(rank), covered / total if total else 0.0))
    return points
