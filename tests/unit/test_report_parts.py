"""Parts of the report: what matters in a sweep, what is confused and heard, other formats, a page for everyone."""

import io
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import soundfile
from support.report_page import MOST_BYTES, read_page
from support.report_runs import (
    CONFIG,
    LABELS,
    SPACE,
    build_full_run,
    build_run,
    confused_predictions,
    correct_string,
    evaluation,
    put_stage,
    swept_trials,
    training_metrics,
    write_audible_dataset,
)

from beats_ray.config import FinetuneConfig, UserError, load_config
from beats_ray.data.storage import open_place
from beats_ray.identity import run_identity
from beats_ray.judgement import write_judgement
from beats_ray.report import build_sections, write_report
from beats_ray.reporting.audio import EXCERPT_SECONDS, loudest, read_excerpts
from beats_ray.reporting.charts import HeatMap, ParallelChart
from beats_ray.reporting.confusions import confusions
from beats_ray.reporting.importance import MIN_TRIALS, Importance, measure_importance
from beats_ray.reporting.layout import Section
from beats_ray.reporting.reading import json_lines
from beats_ray.reporting.run_folder import read_run
from beats_ray.reporting.scales import Scale, scale_of
from beats_ray.reporting.trials import read_board, read_unfinished_sweep

pytestmark = pytest.mark.unit

HZ = 16_000


@dataclass(frozen=True)
class Shown:
    """A run with everything that a report can show, its sections with sounds, and all files of its report."""

    run: Path
    files: Path
    sections: dict[str, Section]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("reports")
    run = build_full_run(folder / "run")
    write_report(run.uri, ("html", "md", "json"), str(folder / "files"))
    return Shown(folder / "run", folder / "files", sections_of(folder / "run", with_audio=True))


def sections_of(folder: Path, with_audio: bool = False) -> dict[str, Section]:
    return {one.title: one for one in build_sections(read_run(open_place(str(folder))), with_audio)}


# --- what matters in a sweep ------------------------------------------------------------------------------------------


def test_the_setting_that_makes_the_difference_has_the_largest_share() -> None:
    trials = [(one["config"], one["validation_accuracy"]) for one in swept_trials(20) if one["validation_accuracy"]]
    found = measure_importance(trials, SPACE)
    assert isinstance(found, Importance)
    assert found.shares[0].name == "train.learning_rate"
    assert found.shares[0].value > 0.6
    assert found.explained > 0.5
    assert sum(share.value for share in found.shares) == pytest.approx(1.0)
    assert all(share.value < 2 * share.standard_error + 0.1 for share in found.shares[1:])


def test_where_settings_make_no_difference_their_shares_are_called_noise() -> None:
    generator = np.random.default_rng(3)
    trials = [(one["config"], float(generator.normal())) for one in swept_trials(20)[:-1]]
    found = measure_importance(trials, SPACE)
    assert isinstance(found, Importance)
    assert found.explained < 0.1
    assert max(share.standard_error for share in found.shares) > 0.05


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([({"a": index}, float(index)) for index in range(MIN_TRIALS - 1)], f"needs at least {MIN_TRIALS} trials"),
        ([({"a": index}, 0.5) for index in range(MIN_TRIALS)], "all trials did equally well"),
        ([({"a": 1}, float(index)) for index in range(MIN_TRIALS)], "no setting differs"),
    ],
)
def test_importance_that_cannot_be_told_says_why(trials: list[tuple[dict[str, Any], float]], expected: str) -> None:
    found = measure_importance(trials, {})
    assert isinstance(found, str)
    assert expected in found


def test_a_setting_that_only_some_trials_have_is_left_out_and_named() -> None:
    trials = [({"a": index, **({"b": index} if index % 2 else {})}, float(index)) for index in range(12)]
    found = measure_importance(trials, {})
    assert isinstance(found, Importance)
    assert found.left_out == ("b",)
    assert [share.name for share in found.shares] == ["a"]


def test_resamples_in_which_nothing_differs_are_no_failure() -> None:
    """One trial of nine has another setting: a third of the resamples lack it."""
    found = measure_importance([({"a": index == 0}, float(index == 0)) for index in range(9)], {})
    assert isinstance(found, Importance)
    assert found.shares[0].value == pytest.approx(1.0)


def test_scales_follow_the_space_and_else_the_values() -> None:
    rate = scale_of([1e-3], {"distribution": "loguniform", "low": 1e-4, "high": 1e-2})
    assert rate.height(1e-3) == pytest.approx(0.5)
    assert rate.ends == ("0.0001", "0.01")
    assert scale_of([0.4, 0.8], {"distribution": "choice"}) == Scale(choices=(0.4, 0.8))
    assert scale_of([True, False], {}).choices == (False, True)
    assert scale_of([1e-5, 1e-4, 1e-3, 2e-3, 1e-2], {}).is_log
    assert not scale_of([1.0, 2.0, 3.0, 4.0, 5.0], {}).is_log
    assert scale_of([10.0], {"distribution": "uniform", "low": 0.0, "high": 1.0}).height(10.0) == 1.0
    assert scale_of(["mean", 2, "attention"], {}).height("mean") == 1.0
    assert scale_of(["mean"], {}).height("unknown") is None


def test_parallel_coordinates_have_every_trial_the_weightiest_setting_beside_the_result(full: Shown) -> None:
    charts = [one for one in full.sections["Fine-tuning sweeps"].charts if isinstance(one, ParallelChart)]
    assert len(charts) == 2
    chart = charts[1]
    names = [axis.name for axis in chart.axes]
    assert names[-2:] == ["learning_rate", "result"]
    assert set(names) == {"learning_rate", "layer_decay", "mixup", "freeze_encoder", "result"}
    assert len(chart.tracks) == 24
    assert sum(track.is_best for track in chart.tracks) == 1
    assert all(height is not None and 0 <= height <= 1 for track in chart.tracks for height in track.heights)


def test_failed_trials_and_encoders_compared_by_a_sweep_are_shown(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    trials = [{**trial, "encoder": f"e{index % 2}"} for index, trial in enumerate(swept_trials(6))]
    trials[0]["config"]["train.steps"] = 77
    compared = {"encoder": "e1", "reference": "e0", "of": "same settings", "pairs": 6, "difference": -0.0125,
                "standard_error": 0.02, "interval": [-0.06, 0.035], "over": "clips", "part": "test",
                "is_noise": True}  # fmt: skip
    encoders = {
        f"e{index}": {"path": f"models/e{index}", "best": trials[index]["trial_id"], "finished": 3} for index in (0, 1)
    }
    board = {"metric": "validation/accuracy", "objectives": {"validation/accuracy": "max"}, "status": "running",
             "trials": trials, "best": trials[0], "encoders": encoders, "comparisons": [compared]}  # fmt: skip
    (run / "iteration-2" / "sweep" / "leaderboard.json").write_json(board)
    write_report(run.uri)
    _, text = read_page(run)
    for expected in ("diverged: no number", "1 of 7 trials failed", "running; 7 trials so far", "e1 against e0",
                     "-0.013 ± 0.020", "-0.060 to +0.035", "no more than noise", "models/e1"):  # fmt: skip
        assert expected in text, expected
    grid = next(one for one in sections_of(tmp_path / "run")["Fine-tuning sweeps"].tables if "2: trials" in one.title)
    row = dict(zip(grid.columns, grid.rows[0].cells, strict=True))
    assert (row["steps"], row["train.steps"], row["encoder"]) == ("40", "77", "e0")


def test_a_metric_that_is_minimised_puts_its_best_trial_on_top() -> None:
    rows = [{"trial_id": f"t{index}", "config": {"a": index}, "validation_loss": index / 10,
             "history": [{"step": 1, "validation/loss": 9.0}]} for index in range(3)]  # fmt: skip
    board = read_board({"metric": "validation/loss", "objectives": {"validation/loss": "min"}, "trials": rows})
    assert not board.is_maximised
    assert [trial.value for trial in board.trials] == [0.0, 0.1, 0.2]
    assert board.trials[0].history == [(1.0, 9.0)]


def test_the_overview_shows_accuracies_of_a_sweep_that_compares_by_loss(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    best = swept_trials(1)[0] | {
        "validation_loss": 0.4,
        "test_loss": 0.5,
        "validation_accuracy": 0.8,
        "test_accuracy": 0.7,
    }
    board = {"metric": "validation/loss", "objectives": {"validation/loss": "min"}, "trials": [best], "best": best}
    (run / "iteration-2" / "sweep" / "leaderboard.json").write_json({**board, "test_clips": 80})
    row = read_run(run).leaderboard()[-1]
    assert (row.validation_accuracy, row.test_accuracy) == (0.8, 0.7)
    assert row.test_standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 80))


def test_each_task_s_classifier_is_shown_by_its_name_swept_or_fine_tuned(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    best = swept_trials(1)[0]
    for index in (1, 2):
        place = run / f"iteration-{index}"
        board = {"trials": [best], "best": best, "reproduce": {"command": f"beats-ray finetune again-{index}"}}
        put_stage(place / "sweep-birds", "complete", leaderboard=board)
        put_stage(place / "finetune-engines", "complete", training_metrics(4, 1.0, 0.5))
    put_stage(run / "iteration-2" / "sweep-doors", "running", leaderboard={"trials": [best], "best": best})
    shown = {code.title: code.text for code in sections_of(tmp_path / "run")["Use the models"].code}
    for name, stage in (("birds", "sweep-birds"), ("engines", "finetune-engines")):
        for title in (f"The classifier of {name}, in Python", f"The classifier of {name}, on the command line"):
            assert f"iteration-2/{stage}/model" in shown[title]
    assert shown["The best trial of birds again"] == "beats-ray finetune again-2"
    assert "iteration-2/sweep/model" in shown["The classifier, in Python"]
    assert not any("doors" in title for title in shown)


def test_a_sweep_under_way_is_read_from_what_its_trials_have_written(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for name, last in (("aa", 0.3), ("bb", 0.6)):
        (sweep / "tune" / "trials" / name).mkdir(parents=True)
        record = {"step": 10, "validation/accuracy": last, "done": name == "aa",
                  "config": {"train.learning_rate": 0.1, "encoder": "encoder", "setting": 3}}  # fmt: skip
        (sweep / "tune" / "trials" / name / "result.json").write_text(json.dumps(record) + '\n{"step": 20, "valid')
    (sweep / "trials" / "bb").mkdir(parents=True)
    (sweep / "trials" / "bb" / "progress.json").write_text('{"step": 15, "validation/accuracy": 0.7}')
    (sweep / "trials" / "cc").mkdir(parents=True)
    (sweep / "trials" / "cc" / "progress.json").write_text('{"step": 5, "train/loss": 2.0}')
    problems: list[str] = []
    board = read_board(read_unfinished_sweep(open_place(str(sweep)), problems))
    assert problems == []
    assert [(one.name, one.value, one.steps, one.state) for one in board.trials] == [
        ("bb", 0.7, 15.0, "running"), ("aa", 0.3, 10.0, "ended"), ("cc", None, 5.0, "running")
    ]  # fmt: skip
    assert board.best == ""
    assert board.trials[0].settings == {"train.learning_rate": 0.1}
    assert read_unfinished_sweep(open_place(str(tmp_path / "none")), problems) == {}


def test_only_a_last_line_may_be_unfinished(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}')
    assert json_lines(open_place(str(file))) == [{"step": 1}, {"step": 2}]
    file.write_text('{"step": 1}\n{"st')
    assert json_lines(open_place(str(file))) == [{"step": 1}]
    file.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="Unterminated"):
        json_lines(open_place(str(file)))


# --- what is confused, and how it sounds ------------------------------------------------------------------------------


def test_an_excerpt_is_the_loudest_part() -> None:
    wave = np.zeros(10 * HZ, np.int16)
    wave[6 * HZ : 8 * HZ] = 1000
    part = loudest(wave, 3.0)
    assert len(part) == 3 * HZ
    assert int((part == 1000).sum()) == 2 * HZ
    assert loudest(wave[:100], 3.0).size == 100


def test_excerpts_are_mp3_of_the_clips_that_were_asked_for(tmp_path: Path) -> None:
    write_audible_dataset(tmp_path / "data", LABELS, clip_seconds=6.0)
    found = read_excerpts(open_place(str(tmp_path / "data")), ["2-007", "5-001", "absent"])
    assert set(found) == {"2-007", "5-001"}
    for name, label in (("2-007", 7), ("5-001", 1)):
        wave, rate = soundfile.read(io.BytesIO(found[name]))
        assert rate == HZ
        assert len(wave) == pytest.approx(EXCERPT_SECONDS * HZ, rel=0.05)
        pitch = np.abs(np.fft.rfft(wave)).argmax() * HZ / len(wave)
        assert pitch == pytest.approx(200 + 40 * label, abs=5)
        assert len(found[name]) < 25_000
    assert set(read_excerpts(open_place(str(tmp_path / "data")), ["2-007"], folds=[1, 3])) == set()


def test_the_clips_are_the_surest_mistakes_of_the_worst_confusion(full: Shown) -> None:
    section = full.sections["Confusions"]
    pairs = next(grid for grid in section.tables if "frozen probe: confused most" in grid.title)
    true, taken, _ = pairs.rows[0].cells
    assert section.clips[0].caption.startswith(f"{true} taken for {taken} (")
    sure = [float(match[1]) for clip in section.clips[:2] if (match := re.search(r"\((\d+)% sure\)", clip.caption))]
    assert sure == sorted(sure, reverse=True)
    assert sure[0] > 50
    assert len({clip.clip_id for clip in section.clips[:8]}) == 8
    assert all(clip.data for clip in section.clips)
    assert 8 < len(section.clips) <= 12


def test_sounds_can_be_left_out_and_may_be_out_of_reach(full: Shown, tmp_path: Path) -> None:
    silent = confusions(read_run(open_place(str(full.run))), with_audio=False)
    assert silent.tables == full.sections["Confusions"].tables
    assert (silent.clips, bool(full.sections["Confusions"].clips)) == ([], True)
    run = build_run(tmp_path / "run")
    found = confused_predictions(write_audible_dataset(tmp_path / "damaged", LABELS))
    shard = tmp_path / "damaged" / "shards" / "00000.parquet"
    shard.write_bytes(shard.read_bytes().replace(b"fLaC", b"fLaX"))
    for data, reason in (("nowhere", "not a prepared data set"), ("damaged", "not a mono FLAC stream")):
        write_judgement(run / "iteration-2" / "probe", found, {**evaluation(326), "data": str(tmp_path / data)})
        write_report(run.uri)
        html, text = read_page(run)
        assert "its clips cannot be heard here" in text
        assert reason in text
        assert "confusion matrix" in text
        assert "<audio" not in html


def test_a_large_matrix_is_drawn_and_a_very_large_one_is_listed(tmp_path: Path) -> None:
    for classes, kinds in ((40, [HeatMap]), (90, [])):
        run = build_run(tmp_path / f"run-{classes}")
        names = [f"class {index}" for index in range(classes)]
        manifest = write_audible_dataset(tmp_path / f"data-{classes}", names, clip_seconds=0.1)
        write_judgement(run / "iteration-2" / "probe", confused_predictions(manifest), evaluation(326))
        section = sections_of(tmp_path / f"run-{classes}")["Confusions"]
        assert [type(chart) for chart in section.charts] == kinds
        assert [grid.title for grid in section.tables] == ["iteration 2, frozen probe: confused most"]


# --- iterations, faults, states ---------------------------------------------------------------------------------------


def test_iterations_are_told_apart_only_where_the_interval_leaves_out_zero(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    near = {**evaluation(320), "correct": correct_string(320, shift=11)}  # 2 clips more than 318, but other ones
    (run / "iteration-2" / "probe" / "evaluation.json").write_json(near)
    grid = sections_of(tmp_path / "run")["Iterations compared"].tables[0]
    verdicts = {str(row.cells[0]): row.cells[-1] for row in grid.rows}
    assert verdicts == {
        "iteration 1 against untrained": "better",
        "iteration 2 against iteration 1": "not told apart",
        "iteration 2 against untrained": "better",
    }


def test_faults_name_restarts_skipped_steps_and_their_clips(full: Shown) -> None:
    section = full.sections["Faults"]
    rows = {str(row.cells[0]): row for row in section.tables[0].rows}
    assert list(rows["2 pre-training"].cells[1:4]) == ["2", "1", "0"]
    assert rows["2 pre-training"].kind == "bad"
    assert rows["1 pre-training"].kind == ""
    assert rows["1 fine-tuning sweep"].cells[-1] == "1 of 7"
    assert section.tables[1].rows[0].cells == ["2 pre-training", "311", "1-003, 4-007"]


def test_the_codes_of_the_first_iteration_are_shown_from_pre_training(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    records = [record | {"labels/perplexity": 33.25, "labels/used_code_fraction": 0.5, "labels/collapsed_steps": 60}
               for record in training_metrics(5, 6.0, 5.0)]  # fmt: skip
    put_stage(run / "iteration-1" / "pretrain", "running", records)
    rows = sections_of(tmp_path / "run")["Codebook usage"].tables[0].rows
    assert list(rows[0].cells[2:]) == ["50.0%", "33.2", "yes: pre-training", "newest report of pre-training"]
    assert rows[1].cells[-1] == "labels of every clip"


def test_the_folder_of_one_sweep_has_a_report_and_keeps_its_leaderboard(tmp_path: Path) -> None:
    place = open_place(str(tmp_path / "my-sweep"))
    board = {"metric": "validation/accuracy", "trials": swept_trials(6), "best": swept_trials(6)[0]}
    (place / "leaderboard.json").write_json(board)
    (place / "stage.json").write_json({"status": "complete", "config": {"sweep": {"space": SPACE}}})
    assert write_report(place.uri) == [("report", f"{place.uri}/report.html")]
    assert (place / "leaderboard.json").read_json() == board
    html, text = read_page(place)
    assert "my-sweep: settings and validation accuracy" in html
    assert "iterations complete" not in text
    assert "Codebook usage" not in text


def test_the_folder_of_one_fine_tuning_has_a_report(tmp_path: Path) -> None:
    place = open_place(str(tmp_path / "my-model"))
    metrics = training_metrics(5, 2.0, 1.0)
    for record in metrics[1::2]:
        record |= {"validation/loss": 1.5, "validation/accuracy": 0.01 * record["step"]}
    put_stage(place, "complete", metrics)
    identity = run_identity(load_config(FinetuneConfig, None, ["output=o", "encoder=e"]))
    (place / "stage.json").write_json((place / "stage.json").read_json() | {"config": identity})
    stage = read_run(place).iterations[1]["finetune"]
    assert stage.series("train/loss")
    write_report(place.uri, ("html", "json"))
    _, text = read_page(place)
    charts = json.loads((place / "report.json").read_bytes())["sections"]["learning-curves"]["charts"]
    drawn = {
        chart["title"].split(": ")[-1]: {line["name"]: line["points"] for line in chart["lines"]} for chart in charts
    }
    assert list(drawn) == ["fine-tuning loss", "fine-tuning accuracy"]
    assert set(drawn["fine-tuning loss"]) == {"training", "validation"}
    assert drawn["fine-tuning accuracy"] == {"validation": [[20.0, 0.2], [40.0, 0.4]]}
    assert "complete" in text
    assert "iterations complete" not in text


# --- formats ----------------------------------------------------------------------------------------------------------


def test_all_formats_have_the_same_sections_and_figures(full: Shown) -> None:
    files = {"report.html", "report.md", "report.json", "leaderboard.md", "leaderboard.json"}
    assert {file.name for file in full.files.iterdir()} == files
    titles = list(full.sections)
    assert len(titles) == 12
    html, _ = read_page(open_place(str(full.files)))
    markdown = (full.files / "report.md").read_text()
    values = json.loads((full.files / "report.json").read_text())
    assert re.findall(r"<h2 id=.*?>(.*?)</h2>", html) == titles
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == titles
    assert [section["title"] for section in values["sections"].values()] == titles
    assert values["leaderboard"][-1]["probe_accuracy"] == 0.815
    for text in (html, markdown):
        assert "+0.140 ± 0.017" in text
    loss = values["sections"]["learning-curves"]["charts"][0]["lines"][0]
    assert loss["name"] == "encoder"
    assert loss["points"][0] == [10.0, pytest.approx(6.76, abs=0.1)]
    rows = [line for line in markdown.splitlines() if line.startswith("| iteration 2 ")]
    assert rows[0].count("|") == 7


def test_text_of_the_run_cannot_break_a_markdown_table_or_page(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    trials = swept_trials(3)
    trials[0]["config"]["a|b\n<script>`"] = "x|y\nz"
    (run / "iteration-2" / "sweep" / "leaderboard.json").write_json({"trials": trials, "best": trials[0]})
    write_report(run.uri, ("html", "md"))
    html, _ = read_page(run)
    assert "<script" not in html
    table = (run / "report.md").read_bytes().decode().split("### iteration 2: trials")[1].split("\n\n")[1]
    assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    assert "<script" not in table


def test_a_long_run_of_many_trials_and_classes_stays_far_under_five_megabytes(tmp_path: Path) -> None:
    run = build_full_run(tmp_path / "run", num_labels=200, num_trials=52)
    put_stage(run / "iteration-2" / "pretrain", "complete", training_metrics(20_000, 6.9, 2.6))
    write_report(run.uri)
    html, _ = read_page(run)
    assert len(html) < MOST_BYTES / 4
    assert html.count("<audio") == 12


# --- a page for everyone ----------------------------------------------------------------------------------------------


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`, WCAG 2."""
    parts = [int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_both_schemes() -> None:
    source, _, _ = jinja2.PackageLoader("beats_ray").get_source(jinja2.Environment(autoescape=True), "report.html.j2")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    ]
    assert len(schemes) == 2
    for colors in schemes:
        for ground in (colors["page"], colors["card"]):
            for text in ("ink", "soft", "bad", "series-1"):
                assert contrast(colors[text], ground) >= 4.5, (text, ground)
            for mark in ("series-1", "series-2", "series-3", "series-4", "muted"):
                assert contrast(colors[mark], ground) >= 3.0, (mark, ground)


def test_tables_have_captions_headers_and_names_and_headings_skip_no_level(full: Shown) -> None:
    html, _ = read_page(open_place(str(full.files)))
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    assert len(tables) > 10
    for table in tables:
        assert re.search(r"<caption><span>[^<]+</span></caption>", table)
        assert table.count('<th scope="col"') == len(re.findall(r"<th [^>]*>", table.split("</thead>")[0]))
        assert table.count('<th scope="row"') == table.count("<tr") - 1
    levels = [int(level) for level in re.findall(r"<h([1-6])", html)]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    anchors = re.findall(r' id="([^"]+)"', html)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(anchors)
    assert len(re.findall(r"<audio [^>]*aria-label=\"[^\"]+\"", html)) == html.count("<audio") > 0
    assert len(re.findall(r'<svg viewBox[^>]*role="img" aria-label="[^"]+"', html)) == html.count("<svg viewBox")


def test_a_folder_that_is_no_run_is_told_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "stage.json").write_text(json.dumps({"config": {"unknown": 1}}))
    with pytest.raises(UserError, match="give the OUTPUT of `iterate`, `sweep`"):
        write_report(str(tmp_path))
    assert not (tmp_path / "report.html").exists()


def test_values_that_are_no_numbers_are_left_out_of_json(tmp_path: Path) -> None:
    run = open_place(str(tmp_path / "run"))
    (run / "run.json").write_json({"name": "n", "config": CONFIG})
    records = [{"step": step, "train/loss": math.nan if step == 2 else 1.0} for step in range(5)]
    put_stage(run / "iteration-1" / "pretrain", "running", records)
    put_stage(run / "iteration-1" / "probe", "complete", evaluation={"accuracy": math.nan})
    write_report(run.uri, ("json",))
    values = json.loads((run / "report.json").read_bytes().decode())
    assert values["leaderboard"][0]["probe_accuracy"] is None
    points = values["sections"]["learning-curves"]["charts"][0]["lines"][0]["points"]
    assert [step for step, _ in points] == [0.0, 1.0, 3.0, 4.0]


def test_a_run_judged_by_tasks_shows_them_all(tmp_path: Path) -> None:
    """An unlabelled corpus: no probe and no sweep of its own, but a cross-validation and a sweep of other data sets."""
    run = open_place(str(tmp_path / "run"))
    tasks = {"esc50": {"protocol": "cross-validate"}, "words": {"protocol": "sweep"}}
    (run / "run.json").write_json({"name": "corpus", "config": {"iterations": 1, "tasks": tasks}})
    (run / "data" / "dataset.json").write_json({"name": "corpus", "clips": 9, "seconds": 9.0, "label_names": []})
    put_stage(run / "iteration-1" / "pretrain", "complete", training_metrics(5, 6.0, 5.0))
    trials = swept_trials(6)
    place = run / "iteration-1" / "sweep-words"
    put_stage(place, "complete", leaderboard={"metric": "validation/accuracy", "trials": trials, "best": trials[0]})
    place = run / "iteration-1" / "cross-validate-esc50"
    summary = {"folds": [1, 2], "seeds": [0], "encoders": {"encoder": {"accuracy": 0.625, "standard_error": 0.125}}}
    put_stage(place, "running", cross_validation=summary)
    found = confused_predictions(write_audible_dataset(tmp_path / "esc50", LABELS))
    write_judgement(place / "encoder" / "seed-0", found, {"kind": "cross-validation", "data": str(tmp_path / "esc50")})
    row = {"iteration": 1, "task": "esc50", "protocol": "cross-validate", "metric": "accuracy", "value": 0.8125,
           "standard_error": 0.0625}  # fmt: skip
    (run / "results.json").write_json({"results": [row]})
    write_report(run.uri)
    html, text = read_page(run)
    for expected in (
        "esc50, cross-validate",
        "0.812 ± 0.062",
        "iteration 1, words: trials",
        "0 of 1 iterations complete",
        "1 esc50: cross-validation",
        "iteration 1, esc50, cross-validate/encoder/seed-0: confused most",
        "0.625 ± 0.125",
    ):
        assert expected in text, expected
    assert "<audio" in html
    put_stage(place, "complete", cross_validation=summary)
    write_report(run.uri)
    assert "1 of 1 iterations complete" in read_page(run)[1]
