"""A process group of one for the engine, and DeepSpeed's traces removed."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from beats_ray.train.context import single_process_context
from tests.support.training import Pretraining, SyntheticBatches


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    """What DeepSpeed needs: a process group, here of one."""
    torch.set_num_threads(1)
    single_process_context(lambda _step, _metrics: None)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 puts a function of its own in the place of torch's `linear`, for the whole process."""
    monkeypatch.setattr(F, "linear", F.linear)


@pytest.fixture
def pretraining() -> Pretraining:
    return Pretraining()


@pytest.fixture
def synthetic_batches() -> type[SyntheticBatches]:
    return SyntheticBatches
