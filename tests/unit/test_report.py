"""The report: everything a run holds is on the page, in every state of the run, without a network, small."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from support.report_page import read_page
from support.report_runs import CONFIG, build_run, evaluation

from beats_ray.config import UserError
from beats_ray.data.storage import open_place
from beats_ray.judgement import Predictions, judge, write_judgement
from beats_ray.report import leaderboard_rows, write_report
from beats_ray.reporting.charts import MAX_POINTS, Line, line_chart, nice_ticks
from beats_ray.reporting.run_folder import paired_gain
from beats_ray.reporting.svg import LEFT, RIGHT, WIDTH, draw

pytestmark = pytest.mark.unit


def test_a_finished_run_is_wholly_on_the_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    written = write_report(run.uri)
    assert [Path(uri).name for _, uri in written] == ["report.html", "leaderboard.md"]
    html, text = read_page(run)
    for expected in (
        "2 of 2 iterations complete", "0.815 ± 0.019", "untrained", "random forest, MFCC", "0.840 ± 0.018",
        "0.738 ± 0.049", "a1b2c_00000", "stopped early", "41.0%", "96.4", "empty file", "400 clips",
        "3 of 403 source files", "2:51",
        "learning_rate: 0.0005", "clip-band baseline", "beats_ray.load(",
        f"beats-ray predict {run.uri}/iteration-2/sweep/model",
    ):  # fmt: skip
        assert expected in text, expected
    assert html.count("<polyline") > 10


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"teacher": "iteration-1/sweep 0123456789abcdef"}, "iteration 1, fine-tuned model"),
        ({"teacher": "iteration-1/pretrain 0123456789abcdef"}, "iteration 1, pre-trained encoder"),
        ({"teacher": "sha256 0123456789abcdef"}, "a given model"),
        ({"tokenizer": "sha256 0123456789abcdef"}, "none: given"),
        ({}, "none: random projection"),
    ],
)
def test_the_teacher_of_a_tokenizer_shows(inputs: dict[str, str], expected: str, tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    stage = run / "iteration-2" / "tokenizer" / "stage.json"
    stage.write_json(stage.read_json() | {"config": {"inputs": inputs}})
    write_report(run.uri)
    assert expected in read_page(run)[1]


def test_text_of_the_run_never_becomes_markup(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "run.json").write_json({"name": "<script>alert(1)</script>", "config": CONFIG})
    write_report(run.uri)
    html, text = read_page(run)
    assert "<script" not in html
    assert "<b>" not in html
    assert "<script>alert(1)</script>" in text
    assert "<b>x.wav" in text


def test_in_the_middle_of_a_run_the_newest_report_and_what_is_absent_show(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", finished_iterations=0)
    write_report(run.uri)
    _, text = read_page(run)
    assert "0 of 2 iterations complete" in text
    assert "pretrain: running" in text
    assert "No trial of a sweep has reported yet." in text
    assert "230" in text


def test_a_run_that_has_only_begun_gives_a_page(tmp_path: Path) -> None:
    run = open_place(str(tmp_path / "run"))
    (run / "run.json").write_json({"name": "new"})
    write_report(run.uri)
    _, text = read_page(run)
    for absent in (
        "No iteration has started yet.",
        "No training stage has reported yet.",
        "dataset.json was not found",
    ):
        assert absent in text


def test_damaged_files_are_named_and_cost_only_their_own_part(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    (run / "iteration-1" / "probe" / "evaluation.json").write_bytes(b'{"accuracy": 0.7')
    (run / "iteration-1" / "pretrain" / "metrics.jsonl").write_bytes(b"not json\n")
    (run / "iteration-2" / "sweep" / "leaderboard.json").write_json({"trials": "none", "best": 3})
    (run / "data" / "quarantine.parquet").write_bytes(b"PAR1")
    write_report(run.uri)
    _, text = read_page(run)
    for name in ("iteration-1/probe/evaluation.json", "iteration-1/pretrain/metrics.jsonl", "data/quarantine.parquet"):
        assert name in text
    assert "0.815 ± 0.019" in text


def test_evaluations_of_a_run_are_shown_classes_worst_first(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    place = run / "evaluations" / "esc10"
    found = Predictions(
        [f"clip-{index}" for index in range(4)], np.array([1, 1, 2, 2]), [[0], [0], [1], [2]],
        np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.6, 0.3, 0.1]]), ("dog", "cat", "owl"), False,
    )  # fmt: skip
    write_judgement(place, found, {"kind": "classifier", "model": "m", "data": "d", **judge(found)})
    (run / "cv" / "cross_validation.json").write_json(
        {"folds": [1, 2], "seeds": [0], "selection": "none",
         "encoders": {"e0": {"accuracy": 0.5, "standard_error": 0.25, "fold_mean": 0.52}},
         "comparisons": [{"encoder": "e1", "reference": "e0", "difference": 0.125, "standard_error": 0.0625,
                          "interval": [-0.01, 0.26], "over": "clips"}]}
    )  # fmt: skip
    write_report(run.uri)
    _, text = read_page(run)
    assert "0.500 ± 0.250" in text
    assert "esc10: classes, worst first by recall" in text
    classes = text[text.index("worst first") :]
    assert classes.index("owl") < classes.index("dog") < classes.index("cat")
    for expected in ("e1 against e0", "+0.125 ± 0.062", "-0.010 to +0.260"):
        assert expected in text
    matrix = text[text.index("a row for each true class") :]
    assert re.search(r"1 dog\s*1\s*1\s*0\s*2 cat\s*0\s*1\s*0\s*3 owl\s*1\s*0\s*0", matrix)


def test_the_folder_of_an_evaluation_has_a_report_of_its_own(tmp_path: Path) -> None:
    place = open_place(str(tmp_path / "judged"))
    (place / "evaluation.json").write_json({"kind": "classifier", "clips": 9, "mean_average_precision": 0.25})
    (place / "per_class.csv").write_bytes(b"label,clips,average_precision\na,3\n")
    write_report(place.uri)
    _, text = read_page(place)
    assert "0.250" in text
    assert "per_class.csv: rows of different lengths" in text
    assert "iterations complete" not in text


def test_no_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        write_report(str(tmp_path / "absent"))


def test_leaderboard_rows_and_files_agree(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    write_report(run.uri)
    columns, rows = leaderboard_rows(run.uri)
    assert [row[0] for row in rows] == [
        "random forest, MFCC",
        "linear, mean log-mel",
        "untrained",
        "iteration 1",
        "iteration 2",
    ]
    markdown = (run / "leaderboard.md").read_bytes().decode().splitlines()
    assert markdown[0] == f"| {' | '.join(columns)} |"
    assert markdown[-1] == f"| {' | '.join(rows[-1])} |"
    stored = (run / "leaderboard.json").read_json()
    assert [row["probe_accuracy"] for row in stored] == [0.84, 0.655, 0.675, 0.795, 0.815]
    assert stored[-1]["gain"] == pytest.approx(0.14)


def test_a_paired_gain_is_surer_than_an_unpaired_one() -> None:
    """56 clips turn right and none wrong: variance of the differences, by hand."""
    gain, error = paired_gain(evaluation(326), evaluation(270))
    assert gain == pytest.approx(0.14)
    assert error == pytest.approx(math.sqrt((0.14 - 0.14**2) / 400))
    unpaired = paired_gain({**evaluation(326), "correct": None}, evaluation(270))[1]
    assert unpaired is not None
    assert error is not None
    assert unpaired > 1.5 * error


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    chart = str(draw(line_chart("loss", [Line("x", [(step, 1.0 / (1 + step)) for step in range(100_000)])], "step")))
    points = re.findall(r'points="([^"]+)"', chart)[0].split()
    assert MAX_POINTS * 0.9 <= len(points) <= MAX_POINTS + 1
    first, last = (float(point.split(",")[0]) for point in (points[0], points[-1]))
    assert (first, last) == (LEFT, WIDTH - RIGHT)


def test_non_finite_values_are_left_out_of_a_chart() -> None:
    chart = str(draw(line_chart("loss", [Line("x", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])], "step")))
    assert len(re.findall(r'points="([^"]+)"', chart)[0].split()) == 2
    assert "nan" not in chart


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.58, 6.91), (-3e-5, 4e-5), (5.0, 5.0), (0.0, 123456.0)])
def test_ticks_are_few_and_enclose_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high
