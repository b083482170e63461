"""Decoded clips into examples of one length: decode, crop, pad, labels to targets.

This is what the tasks of the stream run, so it imports numpy and pyarrow only: a task starts in well under a second.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pyarrow as pa

from beats_ray.data.columns import binary_views, list_views
from beats_ray.data.flac import decode_flac_into
from beats_ray.data.plan import (
    LABELS_PER_PATCH_ROW,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_PATCH_ROW,
    crop_offset,
    patch_labels_in,
)
from beats_ray.errors import UserError
from beats_ray.telemetry import DECODED_CLIPS, DECODED_SECONDS

NO_PATCH_LABEL = -1


@dataclass(frozen=True)
class Clip:
    """One decoded clip in full length."""

    clip_id: str
    wave_S: np.ndarray
    """int16, 16 kHz."""
    label_ids: np.ndarray
    patch_labels: np.ndarray | None
    """int16, one for each patch of the whole clip; None where the stream has no patch labels."""

    @property
    def num_samples(self) -> int:
        return len(self.wave_S)

    def copy_to(self, row_S: np.ndarray, offset: int) -> None:
        """Fills a row with the samples from `offset` on."""
        row_S[:] = self.wave_S[offset : offset + len(row_S)]


@dataclass(frozen=True)
class StoredClip:
    """One clip as its shard holds it."""

    clip_id: str
    data: memoryview
    """FLAC."""
    num_samples: int
    label_ids: np.ndarray
    patch_labels: np.ndarray | None

    def decode(self) -> Clip:
        """The same, decoded. UserError that names the clip where its audio is not what the shard says."""
        wave_S = np.empty(self.num_samples, np.int16)
        self._decode_into(wave_S)
        return Clip(self.clip_id, wave_S, self.label_ids, self.patch_labels)

    def copy_to(self, row_S: np.ndarray, offset: int) -> None:
        """Fills a row with the samples from `offset` on; a clip of the row's length is decoded in place."""
        if len(row_S) == self.num_samples:
            self._decode_into(row_S)
        else:
            self.decode().copy_to(row_S, offset)

    def _decode_into(self, wave_S: np.ndarray) -> None:
        try:
            found = decode_flac_into(self.data, wave_S)
        except ValueError as error:
            raise UserError(
                f"clip {self.clip_id!r}: its audio in the shard does not decode; prepare the data set again"
            ) from error
        if found != self.num_samples:
            shown = "more" if found > self.num_samples else found
            raise UserError(
                f"clip {self.clip_id!r}: the shard says num_samples={self.num_samples}, its audio has {shown}; "
                "prepare the data set again"
            )


@dataclass(frozen=True)
class ExampleSpec:
    """How clips become examples of `clip_samples` samples."""

    clip_samples: int
    num_classes: int
    clips_per_epoch: int
    crop_seed: int | None
    """Seed of the random crops; None cuts the middle out."""

    @property
    def patch_labels(self) -> int:
        return patch_labels_in(self.clip_samples)

    @property
    def bytes_per_clip(self) -> int:
        return 2 * self.clip_samples + self.num_classes + 2 * self.patch_labels


def clip_samples_of(clip_seconds: float) -> int:
    """Samples of an example, at 16 kHz. UserError where it is too short to hold one patch."""
    samples = round(clip_seconds * SAMPLE_RATE_HZ)
    if not patch_labels_in(samples):
        raise UserError(f"data.clip_seconds={clip_seconds}: shorter than one 25 ms frame; use at least 0.16")
    return samples


def make_examples(
    clips: Sequence[Clip | StoredClip], positions_B: np.ndarray, spec: ExampleSpec
) -> dict[str, np.ndarray]:
    """The columns of a micro-batch: position, clip_id, audio, num_samples, targets and, with labels, patch_labels."""
    batch = len(clips)
    columns = {
        "position": positions_B.astype(np.int64),
        "clip_id": np.array([clip.clip_id for clip in clips], dtype=object),
        "audio": np.empty((batch, spec.clip_samples), np.int16),
        "num_samples": np.zeros(batch, np.int32),
        "targets": np.zeros((batch, spec.num_classes), np.uint8),
    }
    if clips and clips[0].patch_labels is not None:
        columns["patch_labels"] = np.full((batch, spec.patch_labels), NO_PATCH_LABEL, np.int16)
    for row, clip in enumerate(clips):
        epoch = int(positions_B[row]) // spec.clips_per_epoch
        offset = crop_offset(spec.crop_seed, epoch, clip.clip_id, clip.num_samples, spec.clip_samples)
        length = min(clip.num_samples, spec.clip_samples)
        clip.copy_to(columns["audio"][row, :length], offset)
        columns["audio"][row, length:] = 0
        columns["num_samples"][row] = length
        _set_targets(columns["targets"][row], clip)
        if clip.patch_labels is not None:
            _set_patch_labels(columns["patch_labels"][row], clip, offset, length)
    return columns


def stored_clips(rows: pa.Table) -> list[StoredClip]:
    """The clips of shard rows, as views of their memory."""
    audio = binary_views(rows.column("audio"))
    clip_ids, num_samples = rows.column("clip_id").to_pylist(), rows.column("num_samples").to_pylist()
    labels = list_views(rows.column("labels"))
    patch_labels = list_views(rows.column("patch_labels")) if "patch_labels" in rows.column_names else repeat(None)
    return list(map(StoredClip, clip_ids, audio, num_samples, labels, patch_labels))


def decode_clips(rows: pa.Table) -> list[Clip]:
    """The clips of shard rows. UserError that names the clip where its audio is not what the shard says."""
    clips = [clip.decode() for clip in stored_clips(rows)]
    _count_decoded(rows)
    return clips


def example_decoder(
    spec: ExampleSpec, deal: tuple[int, int] | None = None
) -> Callable[[pa.Table], dict[str, np.ndarray]]:
    """The function of the decode tasks: shard rows with a position to example columns, and what each clip cost.

    deal: (micro_batch_size, num_workers) puts the micro-batches of each worker side by side, those of the first worker
    first; the rows must be whole rounds of micro-batches for all workers.
    """

    def decode(rows: pa.Table) -> dict[str, np.ndarray]:
        begun = time.perf_counter()
        order_B = np.arange(rows.num_rows) if deal is None else dealt_order(rows.num_rows, *deal)
        clips, positions_B = stored_clips(rows), rows.column("position").to_numpy()
        columns = make_examples([clips[row] for row in order_B], positions_B[order_B], spec)
        _count_decoded(rows)
        seconds = (time.perf_counter() - begun) / max(1, rows.num_rows)
        costs = {"decode_seconds": np.full(rows.num_rows, seconds, np.float32)}
        return columns | costs | {"read_seconds": rows.column("read_seconds").to_numpy()[order_B]}

    return decode


def dealt_order(clips: int, micro_batch_size: int, num_workers: int) -> np.ndarray:
    """Clips in the order of the plan, by worker: the micro-batches that each gets when they are dealt in turn."""
    rounds = clips // (micro_batch_size * num_workers)
    assert rounds * micro_batch_size * num_workers == clips, (clips, micro_batch_size, num_workers)
    return np.arange(clips).reshape(rounds, num_workers, micro_batch_size).transpose(1, 0, 2).reshape(-1)


def decode_whole_clips(rows: pa.Table) -> pa.Table:
    """Shard rows with their audio decoded, in full length, as list<int16> `wave` in place of `audio`."""
    waves = [clip.wave_S for clip in decode_clips(rows)]
    ends = np.cumsum([0, *map(len, waves)], dtype=np.int64)
    values = np.concatenate(waves) if waves else np.zeros(0, np.int16)
    wave = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values, pa.int16()))
    return rows.drop_columns(["audio"]).append_column("wave", wave)


def _count_decoded(rows: pa.Table) -> None:
    DECODED_CLIPS.add(rows.num_rows)
    DECODED_SECONDS.add(float(rows.column("num_samples").to_numpy().sum()) / SAMPLE_RATE_HZ)


def _set_targets(targets_C: np.ndarray, clip: Clip | StoredClip) -> None:
    for label in clip.label_ids:
        if not 0 <= label < len(targets_C):
            raise UserError(
                f"clip {clip.clip_id!r}: label id {label} is outside the vocabulary of {len(targets_C)} labels; "
                "prepare the data set again"
            )
    targets_C[clip.label_ids] = 1


def _set_patch_labels(labels_N: np.ndarray, clip: Clip | StoredClip, offset: int, num_samples: int) -> None:
    assert clip.patch_labels is not None
    expected = patch_labels_in(clip.num_samples)
    if len(clip.patch_labels) != expected:
        raise UserError(
            f"clip {clip.clip_id!r}: {len(clip.patch_labels)} patch labels for {clip.num_samples} samples, which have "
            f"{expected} patches; run `beats-ray tokenize` again"
        )
    first = offset // SAMPLES_PER_PATCH_ROW * LABELS_PER_PATCH_ROW
    count = patch_labels_in(num_samples)
    labels_N[:count] = clip.patch_labels[first : first + count]
