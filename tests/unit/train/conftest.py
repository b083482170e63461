"""A process group of one for the engine, and DeepSpeed's traces removed."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.training import Pretraining, SyntheticBatches


@pytest.fixture(scope="session", autouse=True)
def one_thread(process_group: None) -> None:
    torch.set_num_threads(1)


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
