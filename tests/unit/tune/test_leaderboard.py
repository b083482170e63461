"""What a sweep's leaderboard says: order, ends, failures, trade-offs, and which encoder is better."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.prepared import write_dataset

from beats_ray.config import FinetuneConfig, SweepConfig, UserError, load_config
from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.storage import open_place
from beats_ray.train.faults import TrainingDiverged
from beats_ray.tune.comparison import compare_encoders
from beats_ray.tune.failure import describe_failure, known_failure, read_failure, record_failure
from beats_ray.tune.leaderboard import Outcome, leaderboard, write_board

pytestmark = pytest.mark.unit

STEPS = 6000


@pytest.fixture
def manifest(tmp_path: Path) -> DatasetManifest:
    return write_dataset(tmp_path / "data", ("x", "y"))


def config_of(folder: Path, *overrides: str, **fields: Any) -> SweepConfig:
    given = [f"output={folder / 'sweep'}", f"data.path={folder / 'data'}", *overrides]
    return load_config(SweepConfig, None, given, **fields)


def trial(name: str, learning_rate: float, accuracy: float, steps: int = STEPS, **more: Any) -> Outcome:
    encoder, setting = more.pop("encoder", "encoder"), more.pop("setting", 0)
    metrics = {"validation/accuracy": accuracy, "test/accuracy": accuracy, "step": steps}
    parameters = {"train.learning_rate": learning_rate, "encoder": encoder, "setting": setting}
    return Outcome(name, parameters, metrics | more.pop("metrics", {}), **{"seconds": 7200.0, **more})


@pytest.mark.parametrize("names", ["abc", "cba"])
def test_trials_that_tie_come_in_the_order_of_their_settings(
    names: str, tmp_path: Path, manifest: DatasetManifest
) -> None:
    outcomes = [trial(names[0], 3e-3, 0.5), trial(names[1], 1e-3, 0.5), trial(names[2], 2e-3, 0.4)]
    board = leaderboard(config_of(tmp_path), manifest, outcomes)
    assert [row["config"]["train.learning_rate"] for row in board["trials"]] == [1e-3, 3e-3, 2e-3]
    assert board["best"] == board["trials"][0]


def test_the_best_ran_to_its_end_and_every_other_row_says_why_not(tmp_path: Path, manifest: DatasetManifest) -> None:
    outcomes = [
        trial("done", 1e-3, 0.5),
        trial("stopped", 2e-3, 0.9, steps=600),
        trial("late", 3e-3, 0.8, steps=600, stopped_by="budget"),
        trial("lost", 4e-3, float("nan"), error=TrainingDiverged("the loss is no number")),
        Outcome("early", {"train.learning_rate": 5e-3, "train.warmup_steps": 10**9}, {}, error="ActorDiedError: gone"),
    ]
    board = leaderboard(config_of(tmp_path), manifest, outcomes, cost_per_second=0.5 / 3600)
    rows = {row["trial_id"]: row for row in board["trials"]}
    assert [row["trial_id"] for row in board["trials"]][:3] == ["stopped", "late", "done"]
    assert board["best"] == rows["done"]
    assert rows["done"]["cost"] == pytest.approx(1.0)
    ends = {name: (row["status"], row["stopped_early"], row["stopped_by"]) for name, row in rows.items()}
    assert ends == {
        "done": ("complete", False, None),
        "stopped": ("complete", True, "scheduler"),
        "late": ("complete", True, "budget"),
        "lost": ("failed", False, None),
        "early": ("failed", False, None),
    }
    assert rows["lost"]["failure"] == {"kind": "diverged", "reason": "the loss is no number"}
    assert rows["early"]["failure"]["kind"] == "process lost"
    assert rows["done"]["failure"] is None


def test_a_metric_that_is_to_be_small_puts_the_smallest_first(tmp_path: Path, manifest: DatasetManifest) -> None:
    config = config_of(tmp_path, "sweep.objectives={validation/loss: min, validation/accuracy: max}")
    outcomes = [
        trial("a", 1e-3, 0.5, metrics={"validation/loss": 0.3}),
        trial("b", 2e-3, 0.9, metrics={"validation/loss": 0.2}),
        trial("c", 3e-3, 0.95, metrics={"validation/loss": 0.4}),
    ]
    board = leaderboard(config, manifest, outcomes)
    assert [row["trial_id"] for row in board["trials"]] == ["b", "a", "c"]
    assert board["best"]["validation_loss"] == 0.2
    assert sorted(board["pareto"]) == ["b", "c"]  # a is beaten by b in both
    assert (board["best"]["validation_accuracy"], board["best"]["test_accuracy"]) == (0.9, 0.9)  # what results are in


def test_the_best_trial_can_be_fine_tuned_again_from_a_file(tmp_path: Path, manifest: DatasetManifest) -> None:
    config = config_of(tmp_path, encoders={"e0": "first", "e1": "second"})
    board = leaderboard(config, manifest, [trial("a", 1.5e-3, 0.5, encoder="e1")])
    write_board(config, manifest, board)
    path = board["reproduce"]["command"].removeprefix("beats-ray finetune ")
    again = load_config(FinetuneConfig, path)
    assert (again.encoder, again.train.learning_rate) == ("second", 1.5e-3)
    assert again.output != config.output
    assert yaml.safe_load(Path(path).read_text())["data"]["path"] == config.data.path


def test_what_diverged_is_not_trained_again_and_what_may_pass_is(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    record_failure(place, TrainingDiverged("lr 10"))
    with pytest.raises(TrainingDiverged, match="lr 10"):
        known_failure(place)
    record_failure(place, UserError("warm-up"))
    with pytest.raises(UserError, match="warm-up"):
        known_failure(place)
    record_failure(place, OSError("the disk is full"))
    assert read_failure(place)["reason"] == "OSError: the disk is full"
    known_failure(place)
    assert read_failure(place) == {}


def test_what_failed_in_this_attempt_is_not_tried_again_in_it(tmp_path: Path) -> None:
    place = open_place(str(tmp_path))
    record_failure(place, OSError("the disk is full"), "first")
    with pytest.raises(RuntimeError, match="the disk is full"):
        known_failure(place, "first")
    known_failure(place, "second")
    assert read_failure(place) == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (UserError("warmup"), "settings"),
        (ValueError("odd\nand more"), "exception"),
        (TrainingDiverged("x"), "diverged"),
    ],
)
def test_a_failure_has_a_kind_and_one_line(error: Exception, kind: str) -> None:
    found = describe_failure(error)
    assert found["kind"] == kind
    assert found["reason"]
    assert "\n" not in found["reason"]


# --- encoders ---------------------------------------------------------------------------------------------------------


def row(name: str, encoder: str, setting: int, accuracy: float, stopped: bool = False) -> dict[str, Any]:
    return {
        "trial_id": name, "encoder": encoder, "setting": setting, "status": "complete", "stopped_early": stopped,
        "validation_accuracy": accuracy, "test_accuracy": accuracy,
    }  # fmt: skip


def judged(right: str) -> list[dict[str, dict[str, bool]]]:
    return [{"test": {f"clip-{index}": mark == "1" for index, mark in enumerate(right)}}]


def test_encoders_are_compared_on_settings_that_both_finished() -> None:
    rows = [
        row("b0", "b", 0, 0.9), row("b1", "b", 1, 0.8), row("b2", "b", 2, 0.99, stopped=True), row("b3", "b", 3, 0.7),
        row("a0", "a", 0, 0.5), row("a1", "a", 1, 0.6), row("a2", "a", 2, 0.2), row("a4", "a", 4, 0.95),
    ]  # fmt: skip
    rows.sort(key=lambda one: -one["validation_accuracy"])
    same, best = compare_encoders(rows, ["a", "b"], "validation/accuracy", {})
    assert (same["of"], same["pairs"], same["over"]) == ("same settings", 2, "settings")
    assert same["difference"] == pytest.approx((0.4 + 0.2) / 2)
    assert same["interval"][0] < 0 < same["interval"][1]  # two settings, so 12.7 standard errors either way
    assert same["is_noise"]
    assert "no more than noise" in same["says"]
    assert (best["of"], best["pairs"]) == ("best trials", 1)
    assert best["difference"] == pytest.approx(0.9 - 0.95)
    assert (best["interval"], best["is_noise"]) == (None, None)


def test_pairs_of_clips_tell_a_difference_from_noise() -> None:
    rows = [row("b0", "b", 0, 0.9), row("a0", "a", 0, 0.5)]
    clear = {"b0": judged("1" * 40), "a0": judged("10" * 20)}
    noise = {"b0": judged("1" * 21 + "0" * 19), "a0": judged("1" * 19 + "0" * 21)}
    same, best = compare_encoders(rows, ["a", "b"], "validation/accuracy", clear)
    assert same["difference"] == pytest.approx(0.5)
    assert not same["is_noise"]
    assert "more than noise" in same["says"]
    assert best["over"] == "clips"
    assert compare_encoders(rows, ["a", "b"], "validation/accuracy", noise)[0]["is_noise"]


def test_without_a_pair_nothing_is_claimed() -> None:
    rows = [row("b0", "b", 0, 0.9), row("a1", "a", 1, 0.5)]
    same, _ = compare_encoders(rows, ["a", "b"], "validation/accuracy", {})
    assert (same["pairs"], same["difference"], same["is_noise"]) == (0, None, None)
