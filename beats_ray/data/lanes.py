"""Several streams for one run: the lanes of a plan, and how a step's micro-batches are dealt to lanes and workers.

A stream of Ray Data has one coordinator, which takes some 20 ms for each block, whatever is in it: a run on many GPUs
needs several. The windows of the plan are dealt to as many lanes in turn, each lane has a stream, and every step takes
as many clips from each lane, those of the first lane first. Which clips a step holds depends on the number of lanes and
never on that of workers. Either a lane serves several workers or a worker reads several lanes, in turn.

A lane counts its clips from 0, in *places*; a *position* counts those of the whole run.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from beats_ray.data.plan import ClipPlan, RowGroupRef, Window


def lanes_fit(num_lanes: int, num_workers: int) -> bool:
    """Whether so many lanes can be dealt to so many workers."""
    return num_lanes % num_workers == 0 or num_workers % num_lanes == 0


@dataclass(frozen=True)
class Dealing:
    """Which worker gets which micro-batch of which lane; the global batch must divide into them."""

    global_batch_size: int
    micro_batch_size: int
    num_workers: int
    num_lanes: int = 1

    def __post_init__(self) -> None:
        assert lanes_fit(self.num_lanes, self.num_workers), self
        assert self.global_batch_size % (self.micro_batch_size * max(self.num_workers, self.num_lanes)) == 0, self

    @property
    def lane_clips(self) -> int:
        """Clips of a lane in a step."""
        return self.global_batch_size // self.num_lanes

    @property
    def lane_workers(self) -> int:
        """Workers that a lane serves."""
        return max(1, self.num_workers // self.num_lanes)

    def lanes_of(self, rank: int) -> range:
        """The lanes that a worker reads."""
        count = max(1, self.num_lanes // self.num_workers)
        first = rank // self.lane_workers * count
        return range(first, first + count)

    def num_micro_batches(self, steps: int) -> int:
        """Of each worker, in so many steps."""
        return steps * self.global_batch_size // (self.micro_batch_size * self.num_workers)

    def micro_batch(self, first_step: int, index: int, rank: int) -> tuple[int, int]:
        """(lane, first place) of a worker's micro-batch number `index` since the beginning of a step.

        The micro-batches of a lane are dealt to its workers in turn.
        """
        lanes = self.lanes_of(rank)
        turn, which = divmod(index, len(lanes))
        dealt = turn * self.lane_workers + rank % self.lane_workers
        return lanes[which], first_step * self.lane_clips + dealt * self.micro_batch_size

    def positions(self, lane: int, start: int, stop: int) -> np.ndarray:
        """The positions of places [start, stop) of a lane."""
        step_P, within_P = np.divmod(np.arange(start, stop), self.lane_clips)
        positions_P: np.ndarray = step_P * self.global_batch_size + lane * self.lane_clips + within_P
        return positions_P


@dataclass(frozen=True)
class Lane:
    """What one stream reads of a plan, in windows that are numbered as in the plan and begin at places of the lane."""

    plan: ClipPlan
    index: int
    dealing: Dealing

    @property
    def row_groups(self) -> tuple[RowGroupRef, ...]:
        """Those of the plan: in the course of some epochs a lane reads all of them."""
        return self.plan.row_groups

    def window(self, ordinal: int) -> Window:
        """The window number `ordinal` of the plan, which must be one of the lane's."""
        epoch = ordinal // self.plan.windows_per_epoch
        ordinals, starts_W, _ = self._epoch(epoch)
        return replace(self.plan.window(ordinal), first_position=int(starts_W[ordinals.index(ordinal)]))

    def by_length(self, window: Window, num_samples_P: np.ndarray) -> Window:
        """See `ClipPlan.by_length`."""
        return self.plan.by_length(window, num_samples_P)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """The positions of places [start, stop)."""
        return self.dealing.positions(self.index, start, stop)

    def windows_between(self, start: int, stop: int) -> Sequence[int]:
        """The ordinals of the windows that hold places [start, stop)."""
        found: list[int] = []
        epoch = bisect_right(self._epochs, start, key=lambda known: known[2])
        end = start
        while end < stop:
            ordinals, starts_W, end = self._epoch(epoch)
            stops_W = np.append(starts_W[1:], end) if len(starts_W) else starts_W
            found += [n for n, at, to in zip(ordinals, starts_W, stops_W, strict=True) if start < to and at < stop]
            epoch += 1
        return found

    def _epoch(self, epoch: int) -> tuple[range, np.ndarray, int]:
        """Of one epoch: the ordinals of the lane's windows, the places where they begin, and the place after them."""
        while len(self._epochs) <= epoch:
            number = len(self._epochs)
            before = self._epochs[-1][2] if self._epochs else 0
            first, stop = number * self.plan.windows_per_epoch, (number + 1) * self.plan.windows_per_epoch
            ordinals = range(first + (self.index - first) % self.dealing.num_lanes, stop, self.dealing.num_lanes)
            clips_W = self.plan.clips_of_windows(number)[ordinals.start - first :: self.dealing.num_lanes]
            ends_W = before + np.cumsum(clips_W)
            self._epochs.append((ordinals, ends_W - clips_W, int(ends_W[-1]) if len(ends_W) else before))
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> list[tuple[range, np.ndarray, int]]:
        """As far as they were asked for; a copy that is sent to a task takes them along."""
        return []
