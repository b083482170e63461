"""What counts as a failure of a run, told to the budget as Ray Train does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from beats_ray.config import TrainSettings, UserError
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.train import jobs, worker
from beats_ray.train.failures import FailureBudget, RunFailed

pytestmark = pytest.mark.unit


def store_away() -> StorageError:
    error = StorageError("s3://bucket/x: object store cannot be reached")
    error.passing = True
    return error


def commit(folder: Place, step: int) -> None:
    (folder / f"step-{step:08d}" / "commit.json").write_json({"files": {}})


def test_failures_count_only_since_the_newest_checkpoint(tmp_path: Path) -> None:
    checkpoints = open_place(str(tmp_path))
    budget = FailureBudget(checkpoints, 2, 0.0)
    for step in range(10, 100, 10):
        commit(checkpoints, step)
        for _ in range(2):
            budget.after_exception(None, {0: RuntimeError("worker lost")})
    with pytest.raises(RunFailed, match=r"failed 3 times without a checkpoint newer than that of step 90[\s\S]*lost"):
        budget.after_exception(None, {0: RuntimeError("worker lost")})


def test_a_store_that_was_away_is_a_failure_and_a_mistake_ends_the_run_at_once(tmp_path: Path) -> None:
    budget = FailureBudget(open_place(str(tmp_path)), 1, 0.0)
    budget.after_exception(None, {0: store_away()})
    with pytest.raises(StorageError, match="cannot be reached"):
        budget.after_exception(None, {0: store_away()})
    budget = FailureBudget(open_place(str(tmp_path)), 9, 0.0)
    with pytest.raises(UserError, match="rank 1's mistake"):
        budget.after_exception(None, {0: RuntimeError("connection reset"), 1: UserError("rank 1's mistake")})


def test_a_node_that_was_drained_costs_nothing(tmp_path: Path) -> None:
    from ray.exceptions import RayActorError

    drained = RayActorError(preempted=True)
    budget = FailureBudget(open_place(str(tmp_path)), 0, 0.0)
    for _ in range(5):
        budget.after_exception(None, {0: RuntimeError("connection reset"), 1: drained})


def test_the_look_at_where_to_go_on_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from beats_ray.config import StreamSettings
    from beats_ray.train import streaming

    class Found(Exception):
        pass

    def look(*_: object, start_step: int, **__: object) -> None:
        raise Found(start_step)

    folder = open_place(str(tmp_path))
    commit(folder, 20)
    listing, failures = Place.sizes, [store_away()]

    def fails_once(place: Place, recursive: bool = False) -> dict[str, int]:
        if failures:
            raise failures.pop()
        return listing(place, recursive)

    monkeypatch.setattr(Place, "sizes", fails_once)
    monkeypatch.setattr(streaming, "build_streams", look)
    run = streaming.StreamedRun(StreamSettings(path=str(tmp_path)), TrainSettings(), None, "", folder, {"train": None})  # type: ignore[arg-type]
    with pytest.raises(Found, match="20"):
        streaming.TrainStream(run).configure({"train": None}, 1, None, None)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_store_that_is_away_does_not_keep_the_driver_from_asking_for_a_checkpoint_and_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    listing, looks = Place.sizes, []

    def away(place: Place, recursive: bool = False) -> dict[str, int]:
        looks.append(place)
        if comes_back and len(looks) > 1:
            return listing(place, recursive)
        raise store_away()

    monkeypatch.setattr(jobs, "NOTICE_SECONDS", 2.0)
    monkeypatch.setattr(Place, "sizes", away)
    jobs._checkpoint_before_the_end(open_place(str(tmp_path)))
    assert len(looks) > 1
    assert (tmp_path / "stop-requested.json").exists() is comes_back


def test_the_model_that_a_run_starts_from_is_fetched_again_and_the_weights_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[float] = []

    def build(_run: object) -> float:
        drawn.append(float(torch.rand(())))
        if len(drawn) == 1:
            raise store_away()
        return drawn[-1]

    monkeypatch.setattr(worker, "build_task", build)
    assert worker._build_seeded(SimpleNamespace(train=TrainSettings(seed=3))) == drawn[0]  # type: ignore[arg-type, comparison-overlap]
    assert len(drawn) == 2
