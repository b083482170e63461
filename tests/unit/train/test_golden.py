"""A hundred losses of each task, as they were when the files beside this one were written.

A change of the code that should change no result must leave them as they are. One that should is written down by

    PYTHONPATH=. python -m tests.unit.train.test_golden

and the new files say in the review how far the losses moved. Everything is small and synthetic: fp32 on one CPU thread.

The tolerance: another machine's matrix products round otherwise. With two threads instead of one, or without oneDNN,
the losses moved by 2e-6 of their size at most (distill; the others 2e-7). A learning rate that is 1 % off moves them
by 1.2e-3 (finetune), 8e-3 (pretrain) and 0.1 (distill).
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beats_ray.config import DistillSettings, FinetuneSettings, PretrainSettings, Section, validate
from beats_ray.data.storage import open_place
from beats_ray.models import BeatsEncoder, RandomProjectionTokenizer, encoder_config
from beats_ray.train.context import single_process_context
from beats_ray.train.distill import DistillTask
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.loop import Task, run_training
from beats_ray.train.pretrain import PretrainTask
from tests.support.training import SyntheticBatches

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
STEPS, GLOBAL_BATCH, MICRO_BATCH = 100, 4, 2
SMALL: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}


def settings_of(kind: type[Section], learning_rate: float = 1e-3, **sections: object) -> Any:
    train = {
        "steps": STEPS, "warmup_steps": 10, "learning_rate": learning_rate, "epsilon": 1e-8, "zero_stage": 1,
        "global_batch_size": GLOBAL_BATCH, "micro_batch_size": MICRO_BATCH, "log_every_steps": 1,
    }  # fmt: skip
    return validate(kind, {"train": train, **sections})


def pretrain() -> tuple[Task, Any]:
    encoder = {"preset": "tiny", "overrides": SMALL}
    settings = settings_of(PretrainSettings, encoder=encoder, predictor={"num_layers": 1})
    return PretrainTask(settings, 1024, RandomProjectionTokenizer()), settings


def distill() -> tuple[Task, Any]:
    encoder, tokenizer = {"preset": "tiny", "overrides": SMALL}, {"num_codes": 16, "code_dim": 8, "init_batches": 2}
    settings = settings_of(DistillSettings, encoder=encoder, tokenizer=tokenizer)
    return DistillTask(settings, BeatsEncoder(encoder_config("tiny", **SMALL))), settings


def finetune() -> tuple[Task, Any]:
    settings = settings_of(FinetuneSettings, learning_rate=1e-2)
    manifest: Any = SimpleNamespace(label_names=("a", "b", "c"), multi_label=False)
    return FinetuneTask(settings, BeatsEncoder(encoder_config("tiny", **SMALL)), manifest), settings


TASKS: dict[str, Callable[[], tuple[Task, Any]]] = {"pretrain": pretrain, "distill": distill, "finetune": finetune}


def losses_of(name: str, output: Path) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []
    torch.manual_seed(0)
    task, settings = TASKS[name]()
    context = single_process_context(lambda _step, metrics: losses.append(metrics["train/loss"]))
    source = SyntheticBatches(MICRO_BATCH, GLOBAL_BATCH)
    run_training(task, source, settings.train, context, open_place(str(output)))
    return losses


@pytest.mark.parametrize("name", TASKS)
def test_a_hundred_losses_are_the_golden_ones(name: str, tmp_path: Path) -> None:
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    assert len(golden) == STEPS
    losses = losses_of(name, tmp_path)
    assert losses == pytest.approx(golden, rel=TOLERANCE)


def rewrite() -> None:
    """Writes the golden files anew."""
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in TASKS:
        path = FOLDER / f"{name}.json"
        before = json.loads(path.read_text()) if path.exists() else None
        with tempfile.TemporaryDirectory() as output:
            losses = [round(loss, 7) for loss in losses_of(name, Path(output))]
        path.write_text(json.dumps(losses) + "\n")
        moved = max(abs(a / b - 1) for a, b in zip(losses, before, strict=True)) if before else float("nan")
        print(f"{name}: {losses[0]:.4f} to {losses[-1]:.4f}; moved by {moved:.1e} at most")


if __name__ == "__main__":
    rewrite()
