"""Real sweeps on a local cluster: planted faults, a population, several encoders, several workers, the best again.

Clips are tones in noise and the encoder has one layer: a run of a few dozen steps tells a good learning rate from a bad
one, and what is slow is the start of processes.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from support.tones import write_tones

from beats_ray.config import FinetuneConfig, RaySettings, SweepConfig, UserError, load_config
from beats_ray.console import Console
from beats_ray.errors import find_user_error
from beats_ray.launch import ray_cluster
from beats_ray.models import BeatsEncoder, encoder_config, save_model
from beats_ray.train.jobs import run_finetune
from beats_ray.tune.sweep import run_sweep

pytestmark = pytest.mark.slow

SMALL = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}
OVERRIDES = [
    "data.clip_seconds=1",
    "finetune.augment.mixup=0",
    "finetune.layer_drop=0",
    "finetune.validate_every_steps=8",
    "finetune.train.steps=32",
    "finetune.train.warmup_steps=1",
    "finetune.train.learning_rate=3e-3",
    "finetune.train.layer_decay=1",
    "finetune.train.global_batch_size=4",
    "finetune.train.micro_batch_size=4",
    "finetune.train.loggers=[]",
]
GOOD, USELESS = 3e-3, 1e-7
CHANCE = 1 / 3


LONGER = [
    "finetune.train.steps=400", "finetune.validate_every_steps=100", "finetune.train.checkpoint_every_steps=10",
]  # fmt: skip


STREAMED = [
    "data.cache=never", "data.read_tasks=1", "data.decode_cpus=0.4", "finetune.train.cpus_per_worker=0.5",
]  # fmt: skip
"""Two trials fit on four CPUs, each with a stream to train on and one to validate on."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a data set and two encoders; a private cluster of four CPUs runs beside it."""
    folder = tmp_path_factory.mktemp("sweeps")
    write_tones(folder / "data", clips=9)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_model(BeatsEncoder(encoder_config("tiny", **SMALL)), folder / f"encoder-{seed}")
    with ray_cluster(RaySettings(address="local", num_cpus=4, object_store_mib=256)):
        yield folder


def sweep(work: Path, name: str, *overrides: str, **fields: Any) -> dict[str, Any]:
    """Runs a sweep and returns its leaderboard."""
    fields = {"encoder": str(work / "encoder-0"), "output": str(work / name), **fields}
    config = load_config(SweepConfig, None, [f"data.path={work / 'data'}", *OVERRIDES, *overrides], **fields)
    run_sweep(config, Console())
    board: dict[str, Any] = json.loads((work / name / "leaderboard.json").read_text())
    return board


def grid(*values: Any, **when: Any) -> dict[str, Any]:
    return {"distribution": "grid", "values": list(values), **when}


SPACE = {"train.learning_rate": grid(GOOD, USELESS)}


def test_a_bad_trial_is_stopped_a_crash_ends_nothing_and_the_best_can_be_had_again(work: Path) -> None:
    space = {
        "train.learning_rate": grid(GOOD, 10.0, 1e30),
        "train.weight_decay": grid(1e38, when={"train.learning_rate": [1e30]}),  # the first step makes weights infinite
        "freeze_encoder_steps": grid(0, 1, when={"train.learning_rate": [GOOD]}),
        "freeze_encoder": grid(False, True, when={"freeze_encoder_steps": [1]}),  # for good too: refused beside it
    }
    settings = {"search": "grid", "max_concurrent_trials": 1, "space": space}
    board = sweep(work, "planted", "finetune.train.max_bad_steps=2", sweep=settings)
    rows = {tuple(row["config"].values()): row for row in board["trials"]}
    assert len(rows) == 5
    crash, bad, no_number = rows[GOOD, 1, True], rows[(10.0,)], rows[1e30, 1e38]
    assert (no_number["status"], no_number["failure"]["kind"]) == ("failed", "diverged")
    assert crash["status"] == "failed"
    assert crash["failure"]["kind"] == "settings"
    assert "freeze_encoder=true freezes it for good, freeze_encoder_steps=1" in crash["failure"]["reason"]
    assert (bad["stopped_early"], bad["stopped_by"]) == (True, "scheduler")
    assert bad["steps"] < 32
    assert board["best"]["config"]["train.learning_rate"] == GOOD
    assert board["best"]["validation_accuracy"] > CHANCE

    again = load_config(FinetuneConfig, board["reproduce"]["command"].split()[-1])
    run_finetune(again, Console())
    ours, theirs = (
        load_file(place / "model.safetensors") for place in (work / "planted" / "model", Path(again.output) / "model")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["cached", "workers", "streamed"])
def test_a_bad_member_copies_a_good_one_s_weights_and_is_better_at_once(work: Path, kind: str) -> None:
    overrides = {
        "cached": [],
        "workers": ["finetune.train.num_workers=2", "finetune.train.micro_batch_size=2",
                    "finetune.train.cpus_per_worker=0.5"],
        "streamed": STREAMED,
    }[kind]  # fmt: skip
    name = f"population-{kind}"
    space = {"train.learning_rate": {"distribution": "loguniform", "low": USELESS, "high": GOOD}}
    settings = {
        "search": "random", "scheduler": "pbt", "num_trials": 2, "grace_validations": 2, "space": space,
        "start": [{"train.learning_rate": GOOD}, {"train.learning_rate": USELESS}],
    }  # fmt: skip
    board = sweep(work, name, "finetune.train.steps=64", *overrides, sweep=settings)
    histories = [
        [(record["step"], record["validation/accuracy"]) for record in row["history"]] for row in board["trials"]
    ]
    bad, good = sorted(histories, key=lambda history: max(accuracy for _, accuracy in history[:2]))
    start = bad[0][1]
    copied = next(index for index, (_, accuracy) in enumerate(bad) if accuracy != start)  # nothing is learned by itself
    step, accuracy = bad[copied]
    known = dict(reversed(good))  # of a step that it took twice, the first time
    assert accuracy > start
    assert accuracy >= known[step - 8] - 1 / 9  # within a clip of what the copied weights had, one validation later
    assert all(row["steps"] == 64 for row in board["trials"])
    assert list((work / name).glob("trials/*/followed.json"))


def test_encoders_are_compared_on_the_same_settings_clip_by_clip(work: Path) -> None:
    encoders = {f"e{seed}": str(work / f"encoder-{seed}") for seed in (0, 1)}
    settings = {"num_trials": 2, "scheduler": "none", "repeats": 2, "max_concurrent_trials": None}
    board = sweep(work, "pairs", "finetune.train.steps=16", encoder=None, encoders=encoders, sweep=settings)
    assert len(board["trials"]) == 4
    by_setting: dict[int, list[dict[str, Any]]] = {}
    for row in board["trials"]:
        by_setting.setdefault(row["setting"], []).append(row)
        assert (row["status"], row["stopped_early"], row["steps"]) == ("complete", False, 32)
        assert row["validation_accuracy"] == pytest.approx(sum(row["repeats"]) / 2)
        for repeat in (0, 1):  # what a trial says of its clips is what its loop has measured
            run = work / "pairs" / "trials" / row["trial_id"] / f"repeat-{repeat}"
            judged = json.loads((run / "judged.json").read_text())["validation"]
            assert sum(judged.values()) / len(judged) == pytest.approx(row["repeats"][repeat])
    for pair in by_setting.values():
        assert {row["encoder"] for row in pair} == {"e0", "e1"}
        assert pair[0]["config"] == pair[1]["config"]
    same, best = board["comparisons"]
    assert (same["pairs"], same["over"], best["over"]) == (2, "clips and runs", "clips and runs")
    difference = [row["test_accuracy"] * (1 if row["encoder"] == "e1" else -1) for row in board["trials"]]
    assert same["difference"] == pytest.approx(sum(difference) / 2)
    assert same["is_noise"] == (same["interval"][0] <= 0 <= same["interval"][1])
    assert (work / "pairs" / "model" / "model.safetensors").exists()


def test_trials_of_two_workers_are_ray_train_runs_side_by_side(work: Path) -> None:
    overrides = ["finetune.train.num_workers=2", "finetune.train.micro_batch_size=2", "finetune.train.steps=16"]
    settings = {"search": "grid", "scheduler": "none", "space": SPACE, "max_concurrent_trials": None}
    board = sweep(work, "workers", *overrides, sweep=settings)
    assert [row["status"] for row in board["trials"]] == ["complete"] * 2
    for row in board["trials"]:
        assert [record["step"] for record in row["history"]] == [8, 16]
        assert len(list((work / "workers" / "trials" / row["trial_id"]).glob("ray-train"))) == 1
    assert (work / "workers" / "model" / "model.safetensors").exists()


def test_trials_of_two_workers_that_are_stopped_give_their_workers_back(work: Path) -> None:
    overrides = ["finetune.train.num_workers=2", "finetune.train.micro_batch_size=2"]
    space = {"train.learning_rate": grid(GOOD, USELESS, 2 * USELESS, 3 * USELESS)}
    settings = {"search": "grid", "grace_validations": 1, "space": space, "max_concurrent_trials": 1}
    board = sweep(work, "given-back", *overrides, sweep=settings)
    assert sorted(row["steps"] for row in board["trials"]) == [8, 8, 8, 32]
    assert ray.available_resources()["CPU"] == 4.0


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(work: Path) -> None:
    settings = {"search": "grid", "scheduler": "none", "max_concurrent_trials": 1, "space": SPACE}
    with killed_in_mid_trial(work / "killed") as killed:
        board = sweep(work, "killed", *LONGER, sweep=settings)
    assert len(killed) == 1
    assert [(row["status"], row["steps"]) for row in board["trials"]] == [("complete", 400)] * 2
    assert sorted(recoveries(work / "killed", row["trial_id"]) for row in board["trials"]) == [0, 1]


def test_a_trial_whose_process_is_killed_too_often_fails_and_the_others_go_on(work: Path) -> None:
    settings = {"search": "grid", "scheduler": "none", "max_concurrent_trials": 1, "space": SPACE}
    with killed_in_mid_trial(work / "lost") as killed:
        board = sweep(work, "lost", *LONGER, "finetune.train.max_failures=0", sweep=settings)
    assert len(killed) == 1
    assert sorted((row["status"], (row["failure"] or {}).get("kind")) for row in board["trials"]) == [
        ("complete", None), ("failed", "process lost"),
    ]  # fmt: skip


def test_a_clip_that_cannot_be_decoded_is_named_before_a_trial_starts(work: Path) -> None:
    write_tones(work / "bad", clips=6, bad=("3-4",))
    with pytest.raises(Exception, match="3-4") as caught:  # of Ray's, from its task
        sweep(work, "undecodable", f"data.path={work / 'bad'}", sweep={"num_trials": 2})
    assert "clip '3-4': its audio in the shard does not decode" in str(find_user_error(caught.value))
    assert not list((work / "undecodable").glob("trials/*"))


def test_a_sweep_whose_budget_is_used_up_goes_on_with_a_larger_one(work: Path) -> None:
    settings = {"search": "grid", "scheduler": "none", "max_concurrent_trials": 1, "space": SPACE}
    ended_by_budget, too_early, written, board = 0, list[str](), dict[Path, int](), dict[str, Any]()
    for minutes in (0.4 * number for number in range(1, 20)):
        try:
            board = sweep(work, "budget", *LONGER, sweep={**settings, "max_minutes": minutes})
        except UserError as error:
            too_early.append(str(error))
            continue
        models = {path: path.stat().st_mtime_ns for path in (work / "budget").glob("trials/*/model/model.safetensors")}
        assert written.items() <= models.items()  # nothing that is done is done again
        written = models
        if not any(row["stopped_early"] for row in board["trials"]) and len(board["trials"]) == 2:
            break
        ended_by_budget += 1
        assert {row["stopped_by"] for row in board["trials"]} <= {None, "budget"}
    assert too_early or ended_by_budget
    assert all("used up before any trial of" in error for error in too_early)
    assert [(row["status"], row["steps"]) for row in board["trials"]] == [("complete", 400)] * 2
    assert sum(recoveries(work / "budget", row["trial_id"]) for row in board["trials"]) >= 1
    assert (work / "budget" / "model" / "model.safetensors").exists()


def test_trials_that_stream_their_clips_side_by_side_leave_cpus_to_each_other(work: Path) -> None:
    write_tones(work / "longer", clips=30)
    overrides = [*STREAMED, f"data.path={work / 'longer'}", "data.buffer_mib=1", "data.shuffle_window_clips=8"]
    settings = {"search": "grid", "scheduler": "none", "max_concurrent_trials": 2, "space": SPACE}
    board = sweep(work, "streams", *overrides, sweep=settings)
    assert [(row["status"], row["steps"]) for row in board["trials"]] == [("complete", 32)] * 2


@contextmanager
def killed_in_mid_trial(output: Path) -> Iterator[list[int]]:
    """Kills the process of the first trial that has a checkpoint, as a machine without memory would; its pid."""
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        while not is_over.wait(0.02):
            if next(output.glob("trials/*/checkpoints/*/commit.json"), None) is not None:
                (process,) = [one for one in psutil.Process().children(recursive=True) if is_trial(one)]
                process.kill()
                killed.append(process.pid)
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


def is_trial(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "ImplicitFunc" in " ".join(process.cmdline())
    return False


def recoveries(output: Path, trial_id: str) -> int:
    """How often a trial that went on from a checkpoint of its own had to."""
    last = json.loads((output / "trials" / trial_id / "metrics.jsonl").read_text().splitlines()[-1])
    return int(last["train/recoveries"])
