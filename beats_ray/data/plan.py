"""The order in which training reads clips: a pure function of the manifest, the chosen folds and a seed.

A plan is the concatenation of epochs 0, 1, 2, ...; a *position* counts clips from its start. The global batch of step
g is positions [g * G, (g + 1) * G) whatever the number of workers, and to resume is to start at a position. An epoch
permutes the chosen row groups, cuts them into windows of whole row groups and permutes the clips of each window, so it
holds every clip exactly once, and storage is read one row group at a time.

A plan may leave out single clips of its row groups, as where a fraction of the training clips is kept apart.

With weights an epoch is as long but holds a clip about as often as its weight asks: the expected number of copies,
rounded up or down at random (systematic resampling), so that rare classes are seen as often as frequent ones and
storage is still read one row group at a time.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from beats_ray.errors import UserError

if TYPE_CHECKING:
    from beats_ray.data.manifest import DatasetManifest

SEED_MASK = 2**64 - 1  # numpy takes no negative seeds
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_PATCH_ROW = 2560  # 16 frames of 10 ms at 16 kHz
LABELS_PER_PATCH_ROW = 8  # 128 mel bins in patches of 16


@dataclass(frozen=True)
class RowGroupRef:
    """Where a row group is, and how many clips it holds."""

    file: str
    index: int
    clips: int


@dataclass(frozen=True)
class Window:
    """Clips that are read and shuffled together."""

    first_position: int
    epoch: int
    row_groups: tuple[RowGroupRef, ...]
    slots_P: np.ndarray
    """For each position of the window, the place in `row_groups` of the row group that holds its clip."""
    rows_P: np.ndarray
    """For each position of the window, its clip's row in that row group."""

    @property
    def stop_position(self) -> int:
        return self.first_position + len(self.rows_P)


@dataclass(frozen=True)
class LengthBuckets:
    """Clips of about the same length come together, so that little of a batch is padding."""

    bucket_samples: int
    """Lengths that differ by less count as the same."""
    clip_samples: int
    """What longer clips are cropped to."""
    batch_clips: int
    """Clips of a global batch."""

    def places_of(self, num_samples_P: np.ndarray) -> np.ndarray:
        """The bucket of each clip."""
        return np.minimum(num_samples_P, self.clip_samples) // self.bucket_samples


@dataclass(frozen=True, eq=False)
class ClipWeights:
    """How often clips are to occur, relative to each other: an array for each row group of a plan, all positive."""

    by_group: tuple[np.ndarray, ...]

    @cached_property
    def expected_N(self) -> np.ndarray:
        """Expected copies of each clip in an epoch; their sum is the number of clips."""
        weights_N = np.concatenate(self.by_group).astype(np.float64)
        return weights_N * (len(weights_N) / weights_N.sum())


@lru_cache(maxsize=4)
def _copies(weights: ClipWeights, seed: int, epoch: int) -> np.ndarray:
    """Copies of each clip in one epoch."""
    ends_N = np.cumsum(weights.expected_N)
    ends_N[-1] = len(ends_N)  # what rounding took
    marks_N = np.floor(ends_N + _generator(seed, epoch, 0, 1).random())
    return np.diff(marks_N, prepend=0.0).astype(np.int64)


Rows = tuple[np.ndarray, ...]
"""Of each row group of a plan, in their order, the rows whose clips take part, ascending."""


@dataclass(frozen=True)
class ClipPlan:
    """The endless order of clips; build it with `build_plan`."""

    row_groups: tuple[RowGroupRef, ...]
    seed: int
    row_groups_per_window: int
    shuffled: bool = True
    """Off: every epoch is in the manifest's order."""
    weights: ClipWeights | None = None
    """How often clips occur; every clip once in an epoch where None."""
    buckets: LengthBuckets | None = None
    """How clips of a window are brought together by length; not at all where None."""
    rows: Rows | None = None
    """Which clips of the row groups take part, at least one of each; all where None."""

    @cached_property
    def clips_per_epoch(self) -> int:
        return int(self._clips_G.sum())

    @property
    def windows_per_epoch(self) -> int:
        return -(-len(self.row_groups) // self.row_groups_per_window)

    def window(self, ordinal: int) -> Window:
        """The window number `ordinal` of the whole plan."""
        epoch, index = divmod(ordinal, self.windows_per_epoch)
        order_G = self._epoch_order(epoch)
        starts_W, clips = self._window_starts(epoch, order_G)
        first = index * self.row_groups_per_window
        places = order_G[first : first + self.row_groups_per_window]
        chosen = tuple(self.row_groups[place] for place in places)
        parts = [self._rows(epoch, place) for place in places]
        slots_P = np.repeat(np.arange(len(chosen)), [len(part) for part in parts])
        rows_P = np.concatenate(parts)
        if self.shuffled:
            shuffle_P = _generator(self.seed, epoch, index + 1).permutation(len(rows_P))
            slots_P, rows_P = slots_P[shuffle_P], rows_P[shuffle_P]
        return Window(epoch * clips + int(starts_W[index]), epoch, chosen, slots_P, rows_P)

    def clips_of_windows(self, epoch: int) -> np.ndarray:
        """Clips of each window of an epoch."""
        starts_W, clips = self._window_starts(epoch, self._epoch_order(epoch))
        return np.diff(starts_W, append=clips)

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions [start, stop)."""
        return np.arange(start, stop)

    def by_length(self, window: Window, num_samples_P: np.ndarray) -> Window:
        """The window in its final order, once the lengths of its clips are known, by its own positions.

        With buckets its clips, sorted by bucket and at random within one, are dealt to the global batches that lie in
        it, whose order is random too.
        """
        if self.buckets is None:
            return window
        sorted_P = np.argsort(self.buckets.places_of(num_samples_P), kind="stable")
        size = self.buckets.batch_clips
        first, clips = window.first_position, len(sorted_P)
        starts = np.array(sorted({0, *range(-first % size, clips, size)}), dtype=np.int64)
        lengths = np.diff(starts, append=clips)
        chosen_P = np.empty_like(sorted_P)
        taken = 0
        for batch in _generator(self.seed, first, clips, 2).permutation(len(starts)):
            chosen_P[starts[batch] : starts[batch] + lengths[batch]] = sorted_P[taken : taken + lengths[batch]]
            taken += lengths[batch]
        return replace(window, slots_P=window.slots_P[chosen_P], rows_P=window.rows_P[chosen_P])

    def window_at(self, position: int) -> int:
        """The ordinal of the window that holds a position."""
        epoch, place = divmod(position, self.clips_per_epoch)
        starts_W, _ = self._window_starts(epoch, self._epoch_order(epoch))
        return epoch * self.windows_per_epoch + int(np.searchsorted(starts_W, place, side="right")) - 1

    def windows_between(self, start: int, stop: int) -> range:
        """The ordinals of the windows that hold positions [start, stop)."""
        return range(self.window_at(start), self.window_at(stop - 1) + 1) if start < stop else range(0)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if not self.shuffled:
            return np.arange(len(self.row_groups))
        return _generator(self.seed, epoch, 0).permutation(len(self.row_groups))

    @cached_property
    def _clips_G(self) -> np.ndarray:
        """Clips of each row group that take part."""
        clips = [group.clips for group in self.row_groups] if self.rows is None else [len(rows) for rows in self.rows]
        return np.array(clips, dtype=np.int64)

    @cached_property
    def _group_starts(self) -> np.ndarray:
        return np.cumsum([0, *self._clips_G])

    def _rows(self, epoch: int, place: int) -> np.ndarray:
        """The rows of one row group that an epoch holds, some of them several times where the plan has weights."""
        rows = np.arange(self.row_groups[place].clips) if self.rows is None else self.rows[place]
        if self.weights is None:
            return rows
        first, stop = self._group_starts[place : place + 2]
        return np.repeat(rows, _copies(self.weights, self.seed, epoch)[first:stop])

    def _window_starts(self, epoch: int, order_G: np.ndarray) -> tuple[np.ndarray, int]:
        clips_G = self._clips_G
        if self.weights is not None:
            clips_G = np.add.reduceat(_copies(self.weights, self.seed, epoch), self._group_starts[:-1])
        clips_G = clips_G[order_G]
        before_G = np.cumsum(clips_G) - clips_G
        return before_G[:: self.row_groups_per_window], int(clips_G.sum())


def build_plan(
    manifest: "DatasetManifest",
    *,
    seed: int = 0,
    folds: Sequence[int] = (),
    splits: Sequence[str] = (),
    shuffle_window_clips: int = 1024,
    shuffled: bool = True,
    choose: Callable[[tuple[RowGroupRef, ...]], Rows] | None = None,
    weigh: Callable[[tuple[RowGroupRef, ...], Rows | None], ClipWeights] | None = None,
    buckets: LengthBuckets | None = None,
) -> ClipPlan:
    """The plan over the clips of the given folds and splits; empty means all. UserError where nothing matches.

    choose: gives the rows of the chosen row groups that take part, where not all do. weigh: gives the weights of these
    clips, for balanced sampling. buckets: see `ClipPlan.by_length`.
    """
    _check_exist("data.folds", folds, {group.fold for shard in manifest.shards for group in shard.row_groups})
    _check_exist("data.splits", splits, {group.split for shard in manifest.shards for group in shard.row_groups})
    chosen = tuple(
        RowGroupRef(shard.file, index, group.clips)
        for shard in manifest.shards
        for index, group in enumerate(shard.row_groups)
        if (not folds or group.fold in folds) and (not splits or group.split in splits) and group.clips
    )
    if not chosen:
        raise UserError(
            f"data.folds={list(folds)}, data.splits={list(splits)}: no clip of {manifest.name!r} is in both; widen them"
        )
    rows = choose(chosen) if choose else None
    if rows is not None:
        chosen, rows = _without_empty(chosen, rows)
    clips = sum(map(len, rows)) if rows is not None else sum(group.clips for group in chosen)
    per_window = max(1, round(shuffle_window_clips * len(chosen) / clips))
    weights = weigh(chosen, rows) if weigh else None
    return ClipPlan(chosen, seed, min(per_window, len(chosen)), shuffled, weights, buckets, rows)


def _without_empty(groups: tuple[RowGroupRef, ...], rows: Rows) -> tuple[tuple[RowGroupRef, ...], Rows]:
    """The row groups of which any clip takes part: the others are never read."""
    kept = [place for place, part in enumerate(rows) if len(part)]
    assert kept, "a choice of no clip at all"
    return tuple(groups[place] for place in kept), tuple(rows[place] for place in kept)


def balancing_weights(
    labels_by_group: Sequence[Sequence[Sequence[int]]], num_labels: int, rows: Rows | None = None
) -> ClipWeights:
    """Weights under which every label is drawn about equally often: the sum of 1 / count over a clip's labels.

    labels_by_group: the label ids of each clip, by row group. rows: those that take part, all where None; the others do
    not count. A clip without labels gets the smallest weight of all. Source: the AudioSet recipe of PSLA and AST.
    """
    if rows is not None:
        labels_by_group = [[group[row] for row in part] for group, part in zip(labels_by_group, rows, strict=True)]
    flat = [label for group in labels_by_group for labels in group for label in labels]
    share_C = 1.0 / np.maximum(np.bincount(np.array(flat, dtype=np.int64), minlength=num_labels), 1)
    by_group = [np.array([share_C[list(labels)].sum() for labels in group]) for group in labels_by_group]
    positive = [float(part[part > 0].min()) for part in by_group if (part > 0).any()]
    least = min(positive, default=1.0)
    return ClipWeights(tuple(np.where(part > 0, part, least) for part in by_group))


def crop_offset(seed: int | None, epoch: int, clip_id: str, num_samples: int, clip_samples: int) -> int:
    """Where to cut a clip that is too long: a whole number of patch rows, so that patch labels can be cut alike.

    Uniform, from (seed, epoch, clip id) alone; with seed None the middle. 0 for a clip that is short enough.
    """
    choices = max(0, num_samples - clip_samples) // SAMPLES_PER_PATCH_ROW + 1
    if seed is None:
        return (choices - 1) // 2 * SAMPLES_PER_PATCH_ROW
    digest = hashlib.blake2b(f"{seed}/{epoch}/{clip_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % choices * SAMPLES_PER_PATCH_ROW


def patch_labels_in(num_samples: int) -> int:
    """Labels of a clip of so many samples, as the models cut it: 8 for each 160 ms, at least 8 from 25 ms on."""
    frames = max(0, 1 + (num_samples - 400) // 160)
    return max(frames // 16, int(frames > 0)) * LABELS_PER_PATCH_ROW


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.default_rng([part & SEED_MASK for part in entropy])


def _check_exist(field: str, wanted: Sequence[int] | Sequence[str], existing: set[int] | set[str]) -> None:
    unknown = [value for value in wanted if value not in existing]
    if unknown:
        raise UserError(f"{field}={list(wanted)}: {unknown[0]!r} is not in the data set; it has {sorted(existing)}")
