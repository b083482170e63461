"""Batches made by a thread, one ahead of their consumer."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from beats_ray.data.batches import MicroBatch, read_ahead

pytestmark = pytest.mark.unit

WAIT_SECONDS = 60.0


def batch(position: int) -> MicroBatch:
    one = torch.tensor([position])
    return MicroBatch(torch.zeros(1, 4, dtype=torch.int16), one, one, None, one, (str(position),))


def test_the_next_batch_is_made_while_the_consumer_has_one() -> None:
    made = [threading.Event() for _ in range(3)]
    threads = set()

    def source() -> Iterator[MicroBatch]:
        for position, event in enumerate(made):
            threads.add(threading.current_thread())
            event.set()
            yield batch(position)

    positions = []
    for number, got in enumerate(read_ahead(source())):
        positions.append(got.first_position)
        if number + 1 < len(made):
            assert made[number + 1].wait(WAIT_SECONDS)  # without the consumer's asking for it
    assert positions == [0, 1, 2]
    assert threading.current_thread() not in threads


def test_it_says_how_long_the_consumer_waited() -> None:
    def slow() -> Iterator[MicroBatch]:
        for position in range(2):
            time.sleep(0.3)
            yield batch(position)

    waits = []
    for got in read_ahead(slow()):
        waits.append(got.wait_seconds)
        time.sleep(1.0)
    assert waits[0] >= 0.3
    assert waits[1] < 0.15


def test_a_failure_reaches_the_consumer() -> None:
    def breaks() -> Iterator[MicroBatch]:
        yield batch(0)
        raise ValueError("gone")

    batches = read_ahead(breaks())
    assert next(batches).first_position == 0
    with pytest.raises(ValueError, match="gone"):
        next(batches)


def test_closed_early_it_ends_its_thread() -> None:
    batches = read_ahead(batch(position) for position in range(100))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
