"""The loop: exact resumption, exact weighting, and what it leaves behind."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from beats_ray.config import TrainSettings
from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import Place, StorageError, open_place
from beats_ray.models import load_model
from beats_ray.train.committed import sound_steps
from beats_ray.train.context import single_process_context
from beats_ray.train.faults import THREAD_NAME, SkippedSteps, TrainingDiverged
from beats_ray.train.loop import Prepared, run_training
from beats_ray.train.metrics import read_metrics
from tests.support.tasks import TASKS

pytestmark = pytest.mark.unit


class Interrupted(Exception):
    """Stands for a killed worker."""


def interrupt_at(stop: int):
    def report(step: int, _metrics: dict[str, float]) -> None:
        if step == stop:
            raise Interrupted

    return report


@pytest.mark.parametrize("kind", TASKS)
def test_ten_steps_equal_five_a_restore_and_five_bit_for_bit(tmp_path: Path, pretraining, kind: str) -> None:
    whole = pretraining.run(tmp_path / "whole", kind=kind, checkpoint_every_steps=5)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt_at(7), kind=kind, checkpoint_every_steps=5)
    rest = pretraining.run(tmp_path / "broken", kind=kind, checkpoint_every_steps=5)
    assert rest == whole[5:]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [record["step"] for record in read_metrics(open_place(str(tmp_path / "broken")))]
    assert steps == list(range(1, 11))


class Regression:
    """A task without chance: every real sample is a target, so clips of other lengths count for more or less."""

    def __init__(self) -> None:
        self.module = RegressionModule()

    def depths(self) -> dict[str, int]:
        return {}

    def frozen_steps(self) -> dict[str, int]:
        return {}

    def begin_step(self, step: int) -> None:
        pass

    def end_step(self, moved: bool) -> None:
        pass

    @property
    def can_resume(self) -> bool:
        return True

    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        is_real_BS = torch.arange(batch.audio_BS.shape[1]) < batch.num_samples_B.unsqueeze(1)
        return Prepared((batch.audio_BS.float() / 3000, is_real_BS), is_real_BS.sum())

    def publish(self, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
        folder.mkdir()
        save_file(state_dict, folder / "model.safetensors")


class RegressionModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(
        self, wave_BS: torch.Tensor, is_real_BS: torch.Tensor, constant: float = 0.0
    ) -> tuple[torch.Tensor, dict[str, object]]:
        error_BS = (self.linear(wave_BS.unsqueeze(-1)).squeeze(-1) - wave_BS.abs()).square()
        return (error_BS * is_real_BS).sum() + constant, {}


def test_accumulated_micro_batches_train_exactly_as_one_batch_of_unequal_clips(
    tmp_path: Path, synthetic_batches
) -> None:
    losses: dict[int, list[float]] = {}
    for size in (8, 2):
        settings = TrainSettings(
            steps=5, warmup_steps=0, learning_rate=0.1, global_batch_size=8, micro_batch_size=size, log_every_steps=1
        )
        seen = losses.setdefault(size, [])
        context = single_process_context(lambda _step, metrics, seen=seen: seen.append(metrics["train/loss"]))
        torch.manual_seed(0)
        source = synthetic_batches(size, 8)
        run_training(Regression(), source, settings, context, open_place(str(tmp_path / str(size))))
    assert losses[2] == pytest.approx(losses[8], rel=1e-5)
    assert losses[8][-1] < losses[8][0]


class ConstantNoNumber(Regression):
    """In one step the loss is no number, and its derivative is finite all the same."""

    def prepare(self, batch: MicroBatch, generator: torch.Generator, training: bool) -> Prepared:
        prepared = super().prepare(batch, generator, training)
        constant = torch.tensor(math.nan if batch.first_position == 8 else 0.0)
        return Prepared((*prepared.inputs, constant), prepared.num_targets)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loss_that_is_no_number_is_left_out_though_its_gradient_is_finite(
    tmp_path: Path, synthetic_batches, zero_stage: int
) -> None:
    settings = TrainSettings(
        steps=4, warmup_steps=0, learning_rate=0.1, global_batch_size=4, micro_batch_size=2, log_every_steps=1,
        zero_stage=zero_stage,
    )  # fmt: skip
    seen: list[tuple[float, float]] = []
    context = single_process_context(
        lambda _step, metrics: seen.append((metrics.get("train/loss", math.nan), metrics["train/skipped_steps"]))
    )
    run_training(ConstantNoNumber(), synthetic_batches(2, 4), settings, context, open_place(str(tmp_path)))
    assert [math.isnan(loss) for loss, _ in seen] == [False, False, True, False]
    assert [skipped for _, skipped in seen] == [0, 0, 1, 1]


def test_the_gradient_norm_is_that_of_every_zero_stage(tmp_path: Path, pretraining) -> None:
    norms: dict[int, list[float]] = {}
    for stage in range(4):
        seen = norms.setdefault(stage, [])
        pretraining.run(
            tmp_path / str(stage),
            lambda _step, metrics, seen=seen: seen.append(metrics["train/grad_norm"]),
            zero_stage=stage, steps=3, micro_batch_size=2,
        )  # fmt: skip
        assert seen == pytest.approx(norms[0], rel=1e-4), stage
    assert len(norms[0]) == 3
    assert min(norms[0]) > 0


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, pretraining, damage: Callable[[bytes], bytes]
) -> None:
    whole = pretraining.run(tmp_path / "whole", checkpoint_every_steps=3)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt_at(8), checkpoint_every_steps=3)
    checkpoints = open_place(str(tmp_path / "broken" / "checkpoints"))
    assert sound_steps(checkpoints) == [3, 6]
    (newest,) = (tmp_path / "broken" / "checkpoints" / "step-00000006").glob("*.safetensors")
    newest.write_bytes(damage(newest.read_bytes()))
    assert pretraining.run(tmp_path / "broken", checkpoint_every_steps=3) == whole[3:]


def test_a_checkpoint_without_commit_is_never_used(tmp_path: Path, pretraining) -> None:
    whole = pretraining.run(tmp_path / "whole", checkpoint_every_steps=5)
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path / "broken", interrupt_at(7), checkpoint_every_steps=5)
    (tmp_path / "broken" / "checkpoints" / "step-00000005" / "commit.json").unlink()
    assert pretraining.run(tmp_path / "broken", checkpoint_every_steps=5) == whole


def test_only_the_wanted_number_of_checkpoints_is_kept(tmp_path: Path, pretraining) -> None:
    pretraining.run(tmp_path, checkpoint_every_steps=2, keep_checkpoints=2)
    assert sound_steps(open_place(str(tmp_path / "checkpoints"))) == [8, 10]


def test_published_encoder_has_learned_and_loads(tmp_path: Path, pretraining) -> None:
    losses = pretraining.run(tmp_path, steps=30)
    assert losses[-1] < losses[0] - 0.5
    encoder = load_model(tmp_path / "model")
    assert encoder.config.width == 32


def test_another_seed_gives_another_run_and_the_same_seed_the_same(tmp_path: Path, pretraining) -> None:
    first = pretraining.run(tmp_path / "a", steps=4)
    assert pretraining.run(tmp_path / "b", steps=4) == first
    assert pretraining.run(tmp_path / "c", steps=4, seed=1) != first


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(tmp_path: Path, pretraining) -> None:
    with pytest.raises(TrainingDiverged, match=r"max_bad_steps=3.*3 steps in a row.*clip-\d+.*learning_rate"):
        pretraining.run(tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_bad_steps=3)
    skipped = json.loads((tmp_path / "skipped-steps.json").read_text())
    assert len(skipped) == 3
    assert len(skipped[0]["clips"]) == 4


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_poisoned_batch_is_left_out_counted_and_named(
    tmp_path: Path, pretraining, kind: str, zero_stage: int
) -> None:
    clean = pretraining.run(tmp_path / "clean", kind=kind, zero_stage=zero_stage, steps=6)
    seen: list[float] = []
    losses = pretraining.run(
        tmp_path / "poisoned",
        lambda _step, metrics: seen.append(metrics["train/skipped_steps"]),
        kind=kind,
        zero_stage=zero_stage,
        steps=6,
        poisoned_step=2,
    )
    assert losses[:2] == clean[:2]
    assert math.isnan(losses[2])  # nothing was reported of it
    assert all(math.isfinite(loss) for loss in losses[3:])
    weights = load_file(tmp_path / "poisoned" / "model" / "model.safetensors")  # a codebook among them
    assert all(value.isfinite().all() for value in weights.values())
    if kind != "finetune":  # whose mixed clips make the loss jump
        assert losses[-1] < losses[0]
    assert seen == [0, 0, 1, 1, 1, 1]
    assert json.loads((tmp_path / "poisoned" / "skipped-steps.json").read_text()) == [
        {"step": 3, "clips": ["clip-10", "clip-11", "clip-8", "clip-9"]}
    ]


def test_what_was_skipped_is_known_to_the_attempt_that_goes_on(tmp_path: Path, pretraining) -> None:
    settings = {"steps": 8, "checkpoint_every_steps": 4, "poisoned_step": 2}
    seen: list[float] = []
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path, interrupt_at(6), **settings)
    pretraining.run(tmp_path, lambda _step, metrics: seen.append(metrics["train/skipped_steps"]), **settings)
    assert seen == [1, 1, 1, 1]
    assert [record["step"] for record in json.loads((tmp_path / "skipped-steps.json").read_text())] == [3]


def test_steps_skipped_in_a_row_are_counted_over_a_restart_and_those_beyond_it_forgotten(tmp_path: Path) -> None:
    context = single_process_context(lambda _step, _metrics: None)
    output, settings = open_place(str(tmp_path)), TrainSettings(max_bad_steps=4)
    first = SkippedSteps(output, settings, context)
    for step in (3, 8, 9, 10):
        first.count = 0
        first.record(step, [("clip",)])
    again = SkippedSteps(output, settings, context, first_step=10)  # its checkpoint is older than step 11
    assert (again.total, again.count) == (3, 2)
    assert [record["step"] for record in json.loads((tmp_path / "skipped-steps.json").read_text())] == [4, 9, 10]
    assert SkippedSteps(output, settings, context, first_step=11).count == 0


def test_a_model_that_could_not_be_published_is_all_that_is_left_to_do(
    tmp_path: Path, pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(Place, "upload", fail_with(StorageError("the bucket is gone"), "model"))
        with pytest.raises(StorageError, match="gone"):
            pretraining.run(tmp_path, checkpoint_every_steps=4)
    assert not (tmp_path / "model").exists()
    reports: list[tuple[int, dict[str, float]]] = []
    record = lambda step, metrics: reports.append((step, metrics))  # noqa: E731
    assert pretraining.run(tmp_path, record, checkpoint_every_steps=4) == pytest.approx([reports[0][1]["train/loss"]])
    ((step, metrics),) = reports
    assert step == metrics["step"] == 10  # no step was done again, and the last report is still what it was
    assert [record["step"] for record in read_metrics(open_place(str(tmp_path)))] == list(range(1, 11))
    assert load_model(tmp_path / "model").config.width == 32


def fail_with(error: Exception, name: str) -> Callable[..., None]:
    """A method of Place that fails for places of a name and does nothing for others."""

    def fails(place: Place, *_: object) -> None:
        if place.name == name:
            raise error

    return fails


@pytest.mark.parametrize("name", ["model", "skipped-steps.json", "metrics.jsonl"])
def test_whatever_a_run_reads_and_writes_is_tried_again(
    tmp_path: Path, pretraining, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings = {"steps": 4, "poisoned_step": 1, "checkpoint_every_steps": 2}
    with pytest.raises(Interrupted):
        pretraining.run(tmp_path, interrupt_at(3), **settings)
    failed: set[str] = set()

    def once(method: str) -> Callable[..., Any]:
        original = getattr(Place, method)

        def fails_once(place: Place, *arguments: Any) -> Any:
            if place.name == name and method not in failed:
                failed.add(method)
                error = StorageError("503 slow down")
                error.passing = True
                raise error
            return original(place, *arguments)

        return fails_once

    for method in ("upload", "read_bytes", "write_bytes"):
        monkeypatch.setattr(Place, method, once(method))
    pretraining.run(tmp_path, **settings)
    assert failed == {"upload"} if name == "model" else failed >= {"read_bytes"}
    assert (tmp_path / "model").exists()


def test_a_run_that_fails_closes_what_it_opened(tmp_path: Path, synthetic_batches) -> None:
    closed: list[bool] = []

    class Closes(synthetic_batches):
        def training(self, first_step: int) -> Iterator[MicroBatch]:
            try:
                yield from super().training(first_step)
            finally:
                closed.append(True)

    class Recorder:
        def write(self, record: dict[str, Any]) -> None: ...

        def flush(self) -> None: ...

        def close(self, complete: bool = True) -> None:
            closed.append(complete)
            raise OSError("the server is away too")

    settings = TrainSettings(steps=5, warmup_steps=0, global_batch_size=4, micro_batch_size=4, log_every_steps=1)
    context = single_process_context(interrupt_at(2))
    place = open_place(str(tmp_path))
    with pytest.raises(Interrupted) as caught:
        run_training(Regression(), Closes(4, 4), settings, context, place, build_loggers=lambda _step: [Recorder()])
    assert closed == [False, True]  # though the exception, and with it the run's frame, is still here
    del caught
    deadline = time.monotonic() + 10
    while any(thread.name == THREAD_NAME for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the look at storage goes on"
        time.sleep(0.05)
