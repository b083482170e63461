"""The report's comparison of iterations: is one better than the one before, and than no training at all?

Differences are paired over the clips that both encoders were probed on, so that hard clips cancel.
"""

from beats_ray.reporting.charts import Line, line_chart, present
from beats_ray.reporting.layout import Grid, Row, Section, interval_text, iteration_title, spread
from beats_ray.reporting.reading import as_dict, number
from beats_ray.reporting.run_folder import Run, paired_gain

NORMAL_95 = 1.96
"""Standard errors to each side of a 95 % interval."""


def iterations_compared(run: Run) -> Section:
    """Each iteration's probe against the one before and against the untrained encoder, with 95 % intervals."""
    section = Section("Iterations compared")
    probes = {index: stages["probe"].result for index, stages in sorted(run.iterations.items())}
    probes = {index: probe for index, probe in probes.items() if number(probe.get("accuracy")) is not None}
    rows = []
    for index in probes:
        for reference in sorted({index - 1, 0} & probes.keys() - {index}, reverse=True):
            difference, error = paired_gain(probes[index], probes[reference])
            rows.append(
                Row(
                    [
                        f"{iteration_title(run, index)} against {iteration_title(run, reference)}",
                        spread(difference, error, signed=True),
                        *_verdict(difference, error),
                    ]
                )
            )
    if not rows:
        section.absent = "Nothing to compare before two encoders have been probed."
        return section
    section.notes = [
        "Accuracy of the frozen probe, paired over the same clips. Where the interval holds zero it may be noise.",
        (
            "The interval is for other clips of the same kind; other seeds of the training are not in it, and "
            "`beats-ray convergence` runs them."
        ),
    ]
    columns = ["compared", "difference", "95 % interval", "verdict"]
    section.tables = [Grid(columns, rows, "Paired differences of probe accuracy", text=("compared", "verdict"))]
    section.charts = present(line_chart("accuracy by iteration (0: untrained)", _lines(run), "iteration"))
    folds = sorted({fold for probe in probes.values() for fold in as_dict(probe.get("fold_accuracies"))})
    if folds:
        accuracies = [as_dict(probe.get("fold_accuracies")) for probe in probes.values()]
        by_fold = [
            Row([iteration_title(run, index), *(spread(number(one.get(fold))) for fold in folds)])
            for index, one in zip(probes, accuracies, strict=True)
        ]
        columns = ["encoder", *(f"fold {fold}" for fold in folds)]
        section.tables.append(Grid(columns, by_fold, "Probe accuracy by held-out fold", text=("encoder",)))
    return section


def _verdict(difference: float | None, error: float | None) -> tuple[str, str]:
    if difference is None or error is None:
        return "-", "-"
    low, high = difference - NORMAL_95 * error, difference + NORMAL_95 * error
    return interval_text(low, high), "better" if low > 0 else "worse" if high < 0 else "not told apart"


def _lines(run: Run) -> list[Line]:
    rows = [row for row in run.leaderboard() if row.kind != "baseline"]
    indices = sorted(run.iterations)
    return [
        Line(name, [(index, value) for index, value in zip(indices, values, strict=True) if value is not None], color)
        for name, values, color in (
            ("frozen probe", [row.probe_accuracy for row in rows], "series-1"),
            ("fine-tuned, validation", [row.validation_accuracy for row in rows], "series-3"),
            ("fine-tuned, test", [row.test_accuracy for row in rows], "series-2"),
        )
    ]
