"""The three tasks at a small size, on no files: what the tests of the training plane train."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from beats_ray.config import DistillSettings, FinetuneSettings, PretrainSettings, validate
from beats_ray.models import BeatsEncoder, RandomProjectionTokenizer, encoder_config
from beats_ray.train.distill import DistillTask
from beats_ray.train.finetune import FinetuneTask
from beats_ray.train.loop import Task
from beats_ray.train.pretrain import PretrainTask

SMALL: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "ffn_width": 64}


def pretrain(train: dict[str, object]) -> tuple[Task, PretrainSettings]:
    """Masked pre-training on labels of a random projection, computed on the fly."""
    encoder = {"preset": "tiny", "overrides": SMALL}
    settings = validate(PretrainSettings, {"train": train, "encoder": encoder, "predictor": {"num_layers": 1}})
    return PretrainTask(settings, 1024, RandomProjectionTokenizer()), settings


def distill(train: dict[str, object]) -> tuple[Task, DistillSettings]:
    """Distillation of a random teacher; k-means is fitted on the first two batches."""
    encoder, tokenizer = {"preset": "tiny", "overrides": SMALL}, {"num_codes": 16, "code_dim": 8, "init_batches": 2}
    settings = validate(DistillSettings, {"train": train, "encoder": encoder, "tokenizer": tokenizer})
    return DistillTask(settings, BeatsEncoder(encoder_config("tiny", **SMALL))), settings


def finetune(train: dict[str, object]) -> tuple[Task, FinetuneSettings]:
    """Classification of single labels, from a random encoder."""
    settings = validate(FinetuneSettings, {"train": train})
    manifest: Any = SimpleNamespace(label_names=("a", "b", "c"), multi_label=False)
    return FinetuneTask(settings, BeatsEncoder(encoder_config("tiny", **SMALL)), manifest), settings


TASKS: dict[str, Callable[[dict[str, object]], tuple[Task, Any]]] = {
    "pretrain": pretrain,
    "distill": distill,
    "finetune": finetune,
}
