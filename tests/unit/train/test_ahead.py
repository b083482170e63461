"""The next step's micro-batches are prepared before a step ends, and the host knows how much of each is no padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beats_ray.data.batches import MicroBatch
from beats_ray.data.storage import open_place
from beats_ray.models import compute_fbank
from beats_ray.models.patches import patch_padding
from beats_ray.train.context import single_process_context
from beats_ray.train.loop import Prepared, run_training
from tests.support.tasks import TASKS

pytestmark = pytest.mark.unit

FIELDS = {"steps": 3, "warmup_steps": 0, "global_batch_size": 4, "micro_batch_size": 2, "log_every_steps": 1}


def test_the_next_micro_batches_are_prepared_before_a_step_ends(
    tmp_path: Path, synthetic_batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, settings = TASKS["pretrain"](FIELDS)
    events: list[Any] = []
    real_prepare = task.prepare

    def prepare(batch: MicroBatch, *arguments: Any, **options: Any) -> Prepared:
        events.append(batch.first_position)
        return real_prepare(batch, *arguments, **options)

    monkeypatch.setattr(task, "prepare", prepare)
    monkeypatch.setattr(task, "end_step", lambda moved: events.append("end"))  # noqa: ARG005  # called by its name
    context = single_process_context(lambda _step, _metrics: None)
    run_training(task, synthetic_batches(2, 4), settings.train, context, open_place(str(tmp_path)))
    assert events == [0, 2, 4, 6, "end", 8, 10, "end", "end"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", TASKS)
def test_the_host_knows_how_much_of_a_batch_is_no_padding(synthetic_batches: Any, kind: str, compiled: bool) -> None:
    task, _ = TASKS[kind](FIELDS | {"compile": compiled})
    batch = next(synthetic_batches(4, 4).training(0))
    frames_BTF, num_frames_B = compute_fbank(batch.audio_BS, batch.num_samples_B)
    real = int((~patch_padding(num_frames_B, frames_BTF.shape[1])).sum())
    generator = torch.Generator().manual_seed(0)
    moved = task.prepare(batch.to("cpu"), generator, training=False).inputs
    there = task.prepare(replace(batch, host_num_samples_B=None), generator, training=False).inputs
    mask = moved[2]
    for inputs, known in ((moved, not compiled), (there, False)):
        found = inputs[2].num_real if kind == "pretrain" else inputs[3]
        found = sum(found) if isinstance(found, tuple) else found
        assert found == (real if known else None)
    assert kind != "pretrain" or compiled or mask.num_real[0] == int((mask.visible_BM >= 0).sum())
