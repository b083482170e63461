"""The next step's micro-batches are prepared before a step ends, and the host knows how much of each is no padding."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beats_ray.config import FinetuneSettings, validate
from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import open_place
from beats_ray.models import BeatsEncoder, encoder_config
from beats_ray.models.patches import patch_padding
from beats_ray.train.committed import sound_steps
from beats_ray.train.context import single_process_context
from beats_ray.train.engine import Engine
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.loop import Prepared, Task, run_training
from tests.support.tasks import SMALL, TASKS
from tests.support.training import wait_for_uploads

pytestmark = pytest.mark.unit

FIELDS = {"steps": 3, "warmup_steps": 0, "global_batch_size": 4, "micro_batch_size": 2, "log_every_steps": 1}


def watch_prepare(monkeypatch: pytest.MonkeyPatch, task: Task, watch: Callable[[MicroBatch, Prepared], None]) -> None:
    """Shows each batch that the task prepares, and what it made of it."""
    real_prepare = task.prepare

    def prepare(batch: MicroBatch, *arguments: Any, **options: Any) -> Prepared:
        prepared = real_prepare(batch, *arguments, **options)
        watch(batch, prepared)
        return prepared

    monkeypatch.setattr(task, "prepare", prepare)


def test_the_next_micro_batches_are_prepared_before_the_engine_waits_for_a_step(
    tmp_path: Path, synthetic_batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, settings = TASKS["pretrain"](FIELDS)
    events: list[Any] = []
    real_backward, real_step = Engine.backward, Engine.step

    def backward(engine: Engine, loss: torch.Tensor) -> None:
        events.append("backward")
        real_backward(engine, loss)

    def step(engine: Engine, number: int, last_micro_batch: bool) -> bool:
        events.extend([f"step {number}"] if last_micro_batch else [])
        return real_step(engine, number, last_micro_batch)

    watch_prepare(monkeypatch, task, lambda batch, _prepared: events.append(batch.first_position))
    monkeypatch.setattr(Engine, "backward", backward)
    monkeypatch.setattr(Engine, "step", step)
    context = single_process_context(lambda _step, _metrics: None)
    run_training(task, synthetic_batches(2, 4), settings.train, context, open_place(str(tmp_path)))
    both = ["backward", "backward"]
    assert events == [0, 2, *both, 4, 6, "step 0", *both, 8, 10, "step 1", *both, "step 2"]


def test_a_batch_that_can_not_be_had_leaves_the_step_before_it_whole(tmp_path: Path, synthetic_batches: Any) -> None:
    task, settings = TASKS["pretrain"](FIELDS | {"checkpoint_every_steps": 1})
    reports: list[int] = []
    context = single_process_context(lambda step, _metrics: reports.append(step))

    class Ending(synthetic_batches):  # type: ignore[misc]
        def training(self, first_step: int) -> Iterator[MicroBatch]:
            yield from itertools.islice(super().training(first_step), 3)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run_training(task, Ending(2, 4), settings.train, context, open_place(str(tmp_path)))
    assert reports == [1]
    wait_for_uploads()
    assert sound_steps(open_place(str(tmp_path / "checkpoints"))) == [1]


def test_waiting_for_data_counts_in_the_report_of_the_time_it_took(tmp_path: Path, synthetic_batches: Any) -> None:
    task, settings = TASKS["pretrain"](FIELDS | {"steps": 4, "micro_batch_size": 4})
    waits: list[float] = []
    context = single_process_context(lambda _step, metrics: waits.append(metrics["data/wait_fraction"]))

    class Slow(synthetic_batches):  # type: ignore[misc]
        def training(self, first_step: int) -> Iterator[MicroBatch]:
            for index, batch in zip(itertools.count(), super().training(first_step), strict=False):
                pause = 1.0 if index == 2 else 0.0
                time.sleep(pause)
                yield replace(batch, wait_seconds=pause)

    run_training(task, Slow(4, 4), settings.train, context, open_place(str(tmp_path)))
    assert waits[0] == waits[2] == waits[3] == 0.0
    assert 0.0 < waits[1] <= 1.0  # step 1 fetches what step 2 trains on


def real_patches(inputs: tuple[Any, ...], patch_size: int) -> int:
    columns = 128 // patch_size
    return int((~patch_padding(inputs[1], inputs[0].shape[1], patch_size, columns)).sum())


@pytest.mark.parametrize("kind", TASKS)
def test_the_host_knows_how_much_of_a_batch_is_no_padding(synthetic_batches: Any, kind: str) -> None:
    task, _ = TASKS[kind](FIELDS)
    batch = next(synthetic_batches(4, 4).training(0))
    generator = torch.Generator().manual_seed(0)
    for one, is_known in ((batch, True), (replace(batch, host_num_samples_B=None), False)):
        inputs = task.prepare(one, generator, training=False).inputs
        if kind == "pretrain":
            mask = inputs[2]
            known = mask.num_visible + mask.num_targets if is_known else mask.num_visible
        else:
            known = inputs[3]
        assert known == (real_patches(inputs, 16) if is_known else None)


@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("mixup_of", ["waveform", "fbank"])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_mixed_clips_of_any_grid_are_counted_with_their_new_lengths(
    synthetic_batches: Any, patch_size: int, mixup_of: str, probability: float
) -> None:
    augment = {"mixup": 0.8, "mixup_probability": probability, "mixup_of": mixup_of}
    settings = validate(FinetuneSettings, {"train": FIELDS, "augment": augment})
    encoder = BeatsEncoder(encoder_config("tiny", **SMALL, patch_size=patch_size))
    manifest: Any = SimpleNamespace(label_names=("a", "b", "c"), multi_label=False)
    task = FinetuneTask(settings, encoder, manifest)
    batch = next(synthetic_batches(8, 8).training(0))
    inputs = task.prepare(batch, torch.Generator().manual_seed(0), training=True).inputs
    assert inputs[3] == real_patches(inputs, patch_size)
    features = task.module.classifier.encoder(inputs[0], inputs[1], num_real=inputs[3]).features_BND
    assert int((features != 0).any(-1).sum()) == inputs[3]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_step_has_one_shape_whatever_is_padding(
    tmp_path: Path, synthetic_batches: Any, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    task, settings = TASKS["pretrain"](FIELDS | {"steps": 1, "compile": compiled})
    monkeypatch.setattr("deepspeed.DeepSpeedEngine.compile", lambda *_arguments, **_options: None)
    counts: list[int | None] = []
    watch_prepare(monkeypatch, task, lambda _batch, prepared: counts.append(prepared.inputs[2].num_targets))
    context = single_process_context(lambda _step, _metrics: None)
    run_training(task, synthetic_batches(2, 4), settings.train, context, open_place(str(tmp_path)))
    assert [count is None for count in counts] == [compiled, compiled]
