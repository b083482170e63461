"""The convergence experiment: settings follow seed and budget, the table is right, pictures are reproducible."""

import json
from pathlib import Path
from typing import Any

import pytest

from beats_ray.cli import cli
from beats_ray.config import ConvergenceConfig, load_config
from beats_ray.convergence import arm_config
from beats_ray.data.storage import open_place
from beats_ray.report import write_curves
from beats_ray.reporting.convergence import read_seed, spread, summary_markdown, summary_rows, tail_mean
from beats_ray.reporting.pictures import curves_picture

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def settings(*overrides: str) -> ConvergenceConfig:
    return load_config(ConvergenceConfig, str(ROOT / "jobs" / "convergence-mini.yaml"), list(overrides))


def arm(config: ConvergenceConfig, seed: int = 0, positions: str = "true", iterations: int = 3):
    return arm_config(config, seed, positions, iterations, open_place("somewhere"))


def test_the_same_budget_gives_the_same_steps_whatever_the_seed_and_the_positions() -> None:
    config = settings("minutes=10", "clips_per_s=32")
    first, other = arm(config), arm(config, seed=2, positions="compact", iterations=1)
    assert first.pretrain.train.steps == 10 * 60 * 32 // 16
    assert first.pretrain.train.warmup_steps == first.pretrain.train.steps // 10
    assert first.distill.train.steps == first.pretrain.train.steps // 4
    assert first.pretrain.encoder.positions == "true"
    assert other.pretrain.encoder.positions == "compact"
    same = {"output", "iterations", "random_projection", "pretrain", "distill"}
    assert first.model_dump(exclude=same) == other.model_dump(exclude=same)
    change = {"seed": 2}
    assert other.pretrain.train == first.pretrain.train.model_copy(update=change)
    assert other.random_projection == first.random_projection.model_copy(update=change)
    assert (
        arm(settings("minutes=null", "pretrain.train.steps=77", "pretrain.train.warmup_steps=7")).pretrain.train.steps
        == 77
    )


def figures(probe: float, **training: float) -> dict[str, float]:
    return {"probe": probe, **training}


def test_gains_are_taken_seed_by_seed_and_errors_are_those_of_the_mean() -> None:
    seeds: Any = {
        0: {"true": {0: figures(0.60), 1: figures(0.70, loss=3.0)}, "compact": {0: figures(0.60), 1: figures(0.65)}},
        1: {"true": {0: figures(0.70), 1: figures(0.82, loss=3.4)}, "compact": {}},
        2: {"true": {0: figures(0.65)}},  # not finished
    }
    rows = {row["name"]: row for row in summary_rows({"random_forest_mfcc": {"accuracy": 0.839}}, seeds)}
    assert list(rows) == ["random forest, MFCC", "untrained", "iteration 1", "iteration 1, compact positions"]
    assert rows["untrained"]["probe"]["seeds"] == 3
    first = rows["iteration 1"]
    assert first["probe"]["mean"] == pytest.approx(0.76)
    assert first["gain"]["mean"] == pytest.approx(0.11)
    assert first["gain"]["standard_error"] == pytest.approx(0.01), "not of probes that differ by seed"
    assert first["training"]["loss"]["mean"] == pytest.approx(3.2)
    assert rows["iteration 1, compact positions"]["gain"]["text"] == "+0.050"
    lines = summary_markdown(rows.values()).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| iteration 1 | 2 | 0.760 ± 0.060 | +0.110 ± 0.010 |" in lines[4]


def test_spread_and_tail_of_little() -> None:
    assert spread([])["text"] == "-"
    assert spread([0.5]) == {"mean": 0.5, "standard_error": None, "seeds": 1, "text": "0.500"}
    assert tail_mean([]) is None
    assert tail_mean([(float(step), float(step)) for step in range(1, 101)]) == pytest.approx(95.5)
    assert tail_mean([(10.0, 3.0)]) == 3.0


def write_arm(folder: Path, judged: tuple[int, ...] = (0, 1)) -> None:
    (folder / "iteration-0" / "pretrain").mkdir(parents=True)
    training = folder / "iteration-1" / "pretrain"
    training.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "config": {}}))
    records = [
        {"step": step, "train/loss": 5 - step / 100, "train/clip_band_loss": 3.5, "labels/perplexity": 40.0}
        for step in range(10, 210, 10)
    ]
    (training / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for index in judged:
        place = folder / f"judged-{index}"
        place.mkdir()
        accuracy = {"accuracy": 0.6 + index / 10, "fold_accuracies": {"1": 0.5, "2": 0.7}}
        (place / "evaluation.json").write_text(json.dumps(accuracy))


def test_a_seed_is_read_from_its_folder_as_far_as_it_was_judged(tmp_path: Path) -> None:
    assert read_seed(open_place(str(tmp_path / "none"))) == {}
    write_arm(tmp_path / "half", judged=(0,))
    assert list(read_seed(open_place(str(tmp_path / "half")))) == [0]
    write_arm(tmp_path / "whole")
    found = read_seed(open_place(str(tmp_path / "whole")))
    assert found[1] == pytest.approx(
        {"probe": 0.7, "fold 1": 0.5, "fold 2": 0.7, "loss": 3.05, "clip-band loss": 3.5, "label perplexity": 40.0}
    )


def test_report_writes_curves_of_a_run_that_hold_every_iteration_and_are_the_same_bytes(tmp_path: Path) -> None:
    write_arm(tmp_path / "run")
    assert (
        cli.main(["report", str(tmp_path / "run"), "--curves", str(tmp_path / "pictures")], standalone_mode=False)
        is None
    )
    picture = (tmp_path / "pictures" / "loss.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    for text in (b"iteration 1", b"iteration 1: without a model", b"nats per masked patch"):
        assert text in picture
    write_curves([str(tmp_path / "run")], str(tmp_path / "again"))
    assert (tmp_path / "again" / "loss.svg").read_bytes() == picture
    assert (tmp_path / "again" / "perplexity.svg").read_bytes() != picture


def test_a_picture_of_many_points_stays_small_and_one_without_any_is_still_a_picture() -> None:
    curve = [(float(step), 3.0) for step in range(100_000)]
    assert len(curves_picture("loss", {"a": [curve, curve]}, "nats", {})) < 60_000
    assert b"</svg>" in curves_picture("loss", {"a": [[]]}, "nats", {})
