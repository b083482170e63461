"""Micro-batches on the worker's side: from a worker's share of the stream to tensors, with the order checked.

Shapes: B clips, S samples, C classes, N patches. torch is imported by the functions, not by the module: the data tasks
import this package and need no torch.
"""

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from beats_ray.data.lanes import Dealing
from beats_ray.data.plan import patch_labels_in

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass gets."""

    audio_BS: "torch.Tensor"
    """int16, 16 kHz; zero past a clip's end."""
    num_samples_B: "torch.Tensor"
    """int64, samples of each clip before its padding."""
    targets_BC: "torch.Tensor"
    """uint8, 1 where the clip has the label."""
    patch_labels_BN: "torch.Tensor | None"
    """int16, -1 past a clip's end; None where the stream has no patch labels."""
    positions_B: "torch.Tensor"
    """int64, always on the CPU: where each clip stands in the plan."""
    clip_ids: tuple[str, ...]
    wait_seconds: float = 0.0
    """How long the worker stood still for this batch."""
    read_seconds: float = 0.0
    """How long the tasks of the stream waited for storage, over all clips of the batch."""
    decode_seconds: float = 0.0
    """How long they decoded."""
    host_num_samples_B: "torch.Tensor | None" = None
    """num_samples_B on the CPU, always, where a stream made the batch: to look at them costs no wait."""

    @property
    def first_position(self) -> int:
        return int(self.positions_B[0])

    def to(self, device: "torch.device | str") -> "MicroBatch":
        """The same on a device; the copy runs beside the host where the memory is pinned."""
        labels_BN = self.patch_labels_BN
        beside = str(device) != "cpu"  # what comes back must be there
        return replace(
            self,
            audio_BS=self.audio_BS.to(device, non_blocking=beside),
            num_samples_B=self.num_samples_B.to(device, non_blocking=beside),
            targets_BC=self.targets_BC.to(device, non_blocking=beside),
            patch_labels_BN=None if labels_BN is None else labels_BN.to(device, non_blocking=beside),
        )

    def first(self, clips: int) -> "MicroBatch":
        """The first so many clips of it."""
        labels_BN = self.patch_labels_BN
        return replace(
            self,
            audio_BS=self.audio_BS[:clips],
            num_samples_B=self.num_samples_B[:clips],
            host_num_samples_B=None if self.host_num_samples_B is None else self.host_num_samples_B[:clips],
            targets_BC=self.targets_BC[:clips],
            patch_labels_BN=None if labels_BN is None else labels_BN[:clips],
            positions_B=self.positions_B[:clips],
            clip_ids=self.clip_ids[:clips],
        )


def to_micro_batch(columns: dict[str, np.ndarray], pin_memory: bool = False, bucket_samples: int = 0) -> MicroBatch:
    """The columns of `make_examples` as tensors of their own memory (the object store's is read-only).

    bucket_samples: what is padding in all clips is left out beyond a multiple of this; 0 keeps everything.
    """
    import torch

    if bucket_samples:
        samples = -(-int(columns["num_samples"].max()) // bucket_samples) * bucket_samples
        columns = columns | {"audio": columns["audio"][:, :samples]}
        if "patch_labels" in columns:
            columns |= {"patch_labels": columns["patch_labels"][:, : patch_labels_in(columns["audio"].shape[1])]}

    def tensor(name: str, dtype: "torch.dtype") -> "torch.Tensor":
        copy = torch.empty(columns[name].shape, dtype=dtype, pin_memory=pin_memory)
        copy.numpy()[...] = columns[name]
        return copy

    num_samples_B = tensor("num_samples", torch.int64)
    return MicroBatch(
        audio_BS=tensor("audio", torch.int16),
        num_samples_B=num_samples_B,
        host_num_samples_B=num_samples_B,
        targets_BC=tensor("targets", torch.uint8),
        patch_labels_BN=tensor("patch_labels", torch.int16) if "patch_labels" in columns else None,
        positions_B=torch.tensor(columns["position"], dtype=torch.int64),
        clip_ids=tuple(str(clip_id) for clip_id in columns["clip_id"]),
        read_seconds=float(columns["read_seconds"].sum()) if "read_seconds" in columns else 0.0,
        decode_seconds=float(columns["decode_seconds"].sum()) if "decode_seconds" in columns else 0.0,
    )


def read_ahead(batches: Iterator[MicroBatch]) -> Generator[MicroBatch]:
    """The same batches, each made by a thread while its consumer, which has a GPU to do its work, is at the one before.

    What `wait_seconds` says is how long the consumer waited.
    """

    def ahead() -> Generator[MicroBatch]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as thread:
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch

    yield from _timed(ahead())


def iterate_micro_batches(
    iterators: Sequence[Any],
    dealing: Dealing,
    rank: int,
    prefetch_blocks: int,
    *,
    first_step: int,
    stop_step: int,
    bucket_samples: int = 0,
    device: "torch.device | str" = "cpu",
) -> Generator[MicroBatch]:
    """A rank's micro-batches of steps [first_step, stop_step), from its shares of `build_streams` of these steps.

    iterators: of each lane that the rank reads, `dealing.lanes_of(rank)`, its share.

    Raises RuntimeError when a batch is not the one that the plan puts here: a mistake in the order never passes
    silently. Closing the iterator early ends the stream's tasks.
    """
    assert len(iterators) == len(dealing.lanes_of(rank)), (len(iterators), dealing, rank)
    size, who = dealing.micro_batch_size, f"rank {rank} of {dealing.num_workers}"
    count = dealing.num_micro_batches(stop_step - first_step)
    source = _in_turn([_tensor_batches(iterator, size, prefetch_blocks, bucket_samples) for iterator in iterators])
    for index, batch in enumerate(_timed(source, count)):
        lane, start = dealing.micro_batch(first_step, index, rank)
        expected_B = dealing.positions(lane, start, start + size)
        positions_B = batch.positions_B.numpy()
        if not np.array_equal(positions_B, expected_B):
            raise RuntimeError(
                f"data order: micro-batch {index} of {who} must hold positions {expected_B[0]} to {expected_B[-1]}, "
                f"but holds {positions_B.tolist()}"
            )
        yield batch.to(device)
        count -= 1
    if count:
        raise RuntimeError(f"data order: the stream of {who} ended {count} micro-batches early")


def _in_turn(sources: Sequence[Generator[MicroBatch]]) -> Generator[MicroBatch]:
    """One batch of each source after the other, until one has no more; closing it closes all."""
    with ExitStack() as closing_all:
        for source in sources:
            closing_all.enter_context(closing(source))
        for source in cycle(sources):
            batch = next(source, None)
            if batch is None:
                return
            yield batch


def iterate_eval_batches(
    iterator: Any,
    micro_batch_size: int,
    prefetch_blocks: int,
    *,
    num_clips: int,
    bucket_samples: int = 0,
    device: "torch.device | str" = "cpu",
) -> Iterator[MicroBatch]:
    """A rank's share of `build_eval_stream`: over all ranks each clip once, the repetitions at the end dropped."""
    for batch in _timed(_tensor_batches(iterator, micro_batch_size, prefetch_blocks, bucket_samples)):
        real = int((batch.positions_B < num_clips).sum())
        if real:
            yield batch.first(real).to(device)


def _tensor_batches(
    iterator: Any, micro_batch_size: int, prefetch_blocks: int, bucket_samples: int = 0
) -> Generator[MicroBatch]:
    """The micro-batches of a worker's blocks, which hold whole ones; the last of all may be smaller."""
    import torch
    from ray.data.collate_fn import NumpyBatchCollateFn

    pin_memory = torch.cuda.is_available()

    class ToMicroBatches(NumpyBatchCollateFn):
        def __call__(self, block: dict[str, np.ndarray]) -> Any:  # Ray's type allows tensors only, Ray does not
            starts = range(0, len(block["position"]), micro_batch_size)
            parts = ({name: rows[at : at + micro_batch_size] for name, rows in block.items()} for at in starts)
            return [to_micro_batch(part, pin_memory, bucket_samples) for part in parts]

    # In blocks: Ray spends as long on each batch that it cuts as a copy of its audio takes.
    blocks = iterator.iter_torch_batches(
        batch_size=None, prefetch_batches=prefetch_blocks, collate_fn=ToMicroBatches(), device="cpu"
    )
    try:
        for block in blocks:
            yield from block
    finally:
        close = getattr(blocks, "close", None)
        if close is not None:  # ends the data tasks at once when the loop stops early
            close()


def _timed(batches: Generator[MicroBatch], count: int | None = None) -> Iterator[MicroBatch]:
    """The same batches, at most `count`, each with the seconds that its consumer waited for it."""
    with closing(batches):
        for _ in range(sys.maxsize if count is None else count):
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield replace(batch, wait_seconds=time.perf_counter() - started)
