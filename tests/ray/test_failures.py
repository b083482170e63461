"""Workers of Ray Train that fail: a mistake on one of them ends the run, and progress gives the failure budget back."""

import time
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from beats_ray.config import TrainSettings, UserError
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.train.failures import RunFailed, ended_in_its_own_words, failure_rules

pytestmark = pytest.mark.ray


def fit(folder: Path, worker: Any, num_workers: int, **settings: Any) -> None:
    """Runs `worker` under the rules that training runs have."""
    place = open_place(str(folder))
    rules = failure_rules(place / "checkpoints", TrainSettings(storage_retry_seconds=1.0, **settings))
    trainer = DataParallelTrainer(
        worker,
        train_loop_config={"place": place},
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="run", storage_path=str(folder / "ray-train"), **rules),
    )
    with ended_in_its_own_words():
        trainer.fit()


def begun(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "begun").iterdir())


def note_beginning(place: Place, name: str) -> None:
    (place / "begun" / name).write_json({})


def test_a_mistake_of_one_worker_ends_the_run_in_its_words_though_the_other_waits_for_it(
    tmp_path: Path, cluster: object
) -> None:
    def worker(payload: dict[str, Any]) -> None:  # here, so that it travels by value
        place: Place = payload["place"]
        rank = ray.train.get_context().get_world_rank()
        note_beginning(place, f"{rank}-{time.time_ns()}")
        if rank == 0:
            time.sleep(10_000)  # as in a collective operation
        if payload["place"].name.endswith("store"):
            open_place("/proc/version/rank-1.json").write_json({})
        raise UserError("out of memory with train.micro_batch_size=8: use 4")

    for name, kind, words in (("memory", UserError, "micro_batch_size=8: use 4"), ("store", StorageError, "/proc/")):
        with pytest.raises(kind, match=words):
            fit(tmp_path / name, worker, 2)
        assert [mark[0] for mark in begun(tmp_path / name)] == ["0", "1"]  # no second attempt was made


@pytest.mark.slow
def test_a_new_checkpoint_gives_the_failures_back(tmp_path: Path, cluster: object) -> None:
    def worker(payload: dict[str, Any]) -> None:
        place: Place = payload["place"]
        attempt = len((place / "begun").list()) + 1
        note_beginning(place, str(attempt))
        if attempt <= 3:  # no more progress after the third attempt
            (place / "checkpoints" / f"step-{attempt:08d}" / "commit.json").write_json({"files": {}})
        raise RuntimeError(f"lost at attempt {attempt}")

    with pytest.raises(RunFailed, match=r"max_failures=1: .* failed 2 times .* step 3;[\s\S]*lost at attempt 4"):
        fit(tmp_path, worker, 1, max_failures=1)
    assert begun(tmp_path) == ["1", "2", "3", "4"]
