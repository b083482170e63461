"""The leaderboard while a sweep runs, when its budget ends it, and when it is interrupted."""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support.prepared import write_dataset

from beats_ray.config import SweepConfig, load_config
from beats_ray.data.storage import open_place
from beats_ray.train.faults import STOP_REQUEST
from beats_ray.tune.budget import Budget, BudgetUsedUp
from beats_ray.tune.live import CHECKPOINT_SECONDS, LiveBoard, read_histories
from beats_ray.tune.placement import TrialNeeds

pytestmark = pytest.mark.unit

ONE_CPU = TrialNeeds(uses_ray_train=False, worker={"CPU": 1.0}, num_workers=1, reading_cpus=0.0)


@dataclass(eq=False)
class Trial:
    """What the board looks at of a trial of Tune's."""

    trial_id: str
    status: str = "RUNNING"
    config: dict[str, Any] = field(default_factory=lambda: {"train.learning_rate": 1e-3, "encoder": "encoder"})
    last_result: dict[str, Any] | None = None


@pytest.fixture
def board(tmp_path: Path) -> LiveBoard:
    manifest = write_dataset(tmp_path / "data", ("x", "y"))
    config = load_config(SweepConfig, None, [f"output={tmp_path / 'sweep'}", f"data.path={tmp_path / 'data'}"])
    return LiveBoard(config, manifest, Budget(config.sweep, ONE_CPU, open_place(config.output)))


def report(board: LiveBoard, trials: list[Trial], trial: Trial, steps: int, accuracy: float) -> None:
    trial.last_result = {"step": steps, "validation/accuracy": accuracy, "train/loss": 1.0}
    board.on_trial_result(0, trials, trial, trial.last_result)


def test_it_says_who_ended_each_trial(board: LiveBoard, tmp_path: Path) -> None:
    before, stopped, late, running = trials = [
        Trial("before", "TERMINATED"), Trial("stopped"), Trial("late"), Trial("running"),
    ]  # fmt: skip
    before.last_result = {"step": 100, "validation/accuracy": 0.1}
    board.on_step_begin(1, trials)
    for trial, accuracy in ((stopped, 0.2), (late, 0.3), (running, 0.4)):
        report(board, trials, trial, 100, accuracy)
    stopped.status = "TERMINATED"
    board.on_trial_complete(1, trials, stopped)
    late.status = "TERMINATED"  # which is all that Tune does when a stopper ends the sweep
    board.on_step_begin(2, trials)
    board.write("running")
    written = json.loads((tmp_path / "sweep" / "leaderboard.json").read_text())
    assert written["status"] == "running"
    ends = {row["trial_id"]: (row["status"], row["stopped_by"]) for row in written["trials"]}
    assert ends == {
        "before": ("complete", "scheduler"),
        "stopped": ("complete", "scheduler"),
        "late": ("complete", "budget"),
        "running": ("running", None),
    }
    interrupted = board.write("interrupted")
    assert {row["stopped_by"] for row in interrupted["trials"]} == {"scheduler", "budget", "interruption"}
    assert written["trials"][0]["history"] == [{"step": 100, "validation/accuracy": 0.4, "train/loss": 1.0}]


def test_what_was_reported_before_an_interruption_is_read_again(board: LiveBoard, tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "tune" / "trials"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    records = [{"step": step, "validation/accuracy": step / 100, "config": {}} for step in (10, 20)]
    (folder / "a" / "result.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    with (folder / "a" / "result.json").open("a") as file:
        file.write('{"step": 3')  # where the driver was killed
    (folder / "b" / "result.json").write_text("")
    assert read_histories(open_place(str(tmp_path / "sweep"))) == {"a": records}
    trial = Trial("a")
    report(board, [trial], trial, 30, 0.5)
    assert [record["step"] for record in board.write("running")["trials"][0]["history"]] == [10, 20, 30]


def test_an_interruption_before_the_first_report_finds_the_trials_and_keeps_their_rows(board: LiveBoard) -> None:
    ended = Trial("ended", "TERMINATED", last_result={"step": 100, "validation/accuracy": 0.1})
    trials = [ended, Trial("running")]
    board.on_step_begin(1, trials)
    assert {row["trial_id"] for row in board.write("interrupted")["trials"]} == {"ended", "running"}


def test_a_budget_that_is_used_up_ends_the_sweep_once_the_trials_that_run_have_made_a_checkpoint(
    board: LiveBoard, tmp_path: Path
) -> None:
    trials = [Trial("ended", "TERMINATED"), Trial("running"), Trial("done"), Trial("waits", "PENDING")]
    runs = {trial.trial_id: open_place(str(tmp_path / "sweep" / "trials" / trial.trial_id)) for trial in trials}
    for name, run in runs.items():
        (run / "stage.json").write_json({"status": "complete" if name == "done" else "running"})
    board.on_step_begin(1, trials)
    board._budget._sweep = board._config.sweep.model_copy(update={"max_minutes": 1e-9})

    def commit_when_asked() -> None:
        while not (runs["running"] / STOP_REQUEST).exists():
            time.sleep(0.01)
        (runs["running"] / "checkpoints" / "step-00000010" / "commit.json").write_json({"files": {}})

    trial = threading.Thread(target=commit_when_asked)
    trial.start()
    begun = time.monotonic()
    with pytest.raises(BudgetUsedUp, match=re.escape("sweep.max_minutes")):
        board.on_step_begin(2, trials)
    trial.join()
    assert time.monotonic() - begun < CHECKPOINT_SECONDS
    assert [name for name, run in runs.items() if (run / STOP_REQUEST).exists()] == ["running"]
    trials[1].status, trials[3].last_result = "TERMINATED", {"step": 3}  # what Tune makes of them, not of the others
    ends = {row["trial_id"]: row["stopped_by"] for row in board.write("complete")["trials"]}
    assert ends == {"ended": "scheduler", "running": "budget", "done": "budget", "waits": "budget"}


def test_a_trial_s_time_and_cost_are_those_of_all_starts(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "data", ("x", "y"))
    given = [f"output={tmp_path / 'sweep'}", f"data.path={tmp_path / 'data'}", "sweep.price_per_cpu_hour=2"]
    config, trial = load_config(SweepConfig, None, given), Trial("a")
    for _ in range(2):
        budget = Budget(config.sweep, ONE_CPU, open_place(config.output))
        board = LiveBoard(config, manifest, budget)
        trial.last_result = {
            "step": 10,
            "time_this_iter_s": 1800.0,
            "time_total_s": 1800.0,
        }  # Tune's total is the start's
        budget("a", trial.last_result)
        board.on_trial_result(0, [trial], trial, trial.last_result)
        budget.write()
    row = board.write("running")["trials"][0]
    assert (row["seconds"], row["cost"]) == (3600.0, pytest.approx(2.0))


def test_a_trial_that_fails_before_its_next_report_has_taken_time_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_dataset(tmp_path / "data", ("x", "y"))
    config = load_config(SweepConfig, None, [f"output={tmp_path / 'sweep'}", f"data.path={tmp_path / 'data'}"])
    budget, trial = Budget(config.sweep, ONE_CPU, open_place(config.output)), Trial("a")
    board = LiveBoard(config, manifest, budget)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def after(seconds: float) -> None:
        now[0] += seconds

    board.on_trial_start(0, [trial], trial)
    after(5.0)
    trial.last_result = {"step": 10, "time_this_iter_s": 5.0}
    budget("a", trial.last_result)
    board.on_trial_result(1, [trial], trial, trial.last_result)
    after(3.0)
    board.on_trial_recover(2, [trial], trial)  # its node is lost, and it is tried again
    after(100.0)  # while it waits for room
    board.on_trial_start(3, [trial], trial)
    after(7.0)
    board.on_trial_error(4, [trial], trial)
    assert budget.seconds_of("a") == pytest.approx(15.0)
