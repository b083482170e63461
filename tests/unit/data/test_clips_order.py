"""Micro-batches are dealt to workers in turn, whatever the size of a block."""

import numpy as np
import pytest

from beats_ray.data.clips import dealt_order
from beats_ray.data.lanes import Dealing

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("rounds", "workers", "micro_batch"), [(1, 1, 4), (3, 2, 4), (2, 3, 1), (8, 2, 8)])
def test_each_worker_gets_its_micro_batches_side_by_side_and_in_order(
    rounds: int, workers: int, micro_batch: int
) -> None:
    order = dealt_order(rounds * workers * micro_batch, micro_batch, workers)
    per_worker = order.reshape(workers, rounds, micro_batch)
    dealing = Dealing(workers * micro_batch, micro_batch, workers)
    for rank in range(workers):
        for index in range(rounds):
            _, start = dealing.micro_batch(0, index, rank)
            assert per_worker[rank, index].tolist() == list(range(start, start + micro_batch))
    assert np.array_equal(np.sort(order), np.arange(rounds * workers * micro_batch))


def test_a_part_of_a_round_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        dealt_order(9, 4, 2)
