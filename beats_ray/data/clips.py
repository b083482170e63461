"""Decoded clips into examples of one length: decode, crop, pad, labels to targets.

This is what the tasks of the stream run, so it imports numpy and pyarrow only: a task starts in well under a second.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat

import numpy as np
import pyarrow as pa

from beats_ray.data.flac import decode_flac
from beats_ray.data.plan import (
    LABELS_PER_PATCH_ROW,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_PATCH_ROW,
    crop_offset,
    patch_labels_in,
)
from beats_ray.errors import UserError

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


def make_examples(clips: Sequence[Clip], positions_B: np.ndarray, spec: ExampleSpec) -> dict[str, np.ndarray]:
    """The columns of a micro-batch: position, clip_id, audio, num_samples, targets and, with labels, patch_labels."""
    batch = len(clips)
    columns = {
        "position": positions_B.astype(np.int64),
        "clip_id": np.array([clip.clip_id for clip in clips], dtype=object),
        "audio": np.zeros((batch, spec.clip_samples), np.int16),
        "num_samples": np.zeros(batch, np.int32),
        "targets": np.zeros((batch, spec.num_classes), np.uint8),
    }
    if clips and clips[0].patch_labels is not None:
        columns["patch_labels"] = np.full((batch, spec.patch_labels), NO_PATCH_LABEL, np.int16)
    for row, clip in enumerate(clips):
        epoch = int(positions_B[row]) // spec.clips_per_epoch
        offset = crop_offset(spec.crop_seed, epoch, clip.clip_id, len(clip.wave_S), spec.clip_samples)
        piece = clip.wave_S[offset : offset + spec.clip_samples]
        columns["audio"][row, : len(piece)] = piece
        columns["num_samples"][row] = len(piece)
        _set_targets(columns["targets"][row], clip)
        if clip.patch_labels is not None:
            _set_patch_labels(columns["patch_labels"][row], clip, offset, len(piece))
    return columns


def decode_clips(rows: pa.Table) -> list[Clip]:
    """The clips of shard rows. UserError that names the clip where its audio is not what the shard says."""
    audio, clip_ids = rows.column("audio"), rows.column("clip_id").to_pylist()
    num_samples = rows.column("num_samples").to_pylist()
    labels = _lists(rows.column("labels"))
    patch_labels = _lists(rows.column("patch_labels")) if "patch_labels" in rows.column_names else repeat(None)
    waves = (_decode(audio[row].as_buffer(), clip_ids[row], num_samples[row]) for row in range(rows.num_rows))
    return list(map(Clip, clip_ids, waves, labels, patch_labels))


def example_decoder(
    spec: ExampleSpec, deal: tuple[int, int] | None = None
) -> Callable[[pa.Table], dict[str, np.ndarray]]:
    """The function of the decode tasks: shard rows with a position to example columns, and what each clip cost.

    deal: (micro_batch_size, num_workers) puts the micro-batches of each worker side by side, those of the first worker
    first; the rows must be whole rounds of micro-batches for all workers.
    """

    def decode(rows: pa.Table) -> dict[str, np.ndarray]:
        begun = time.perf_counter()
        if deal is not None and rows.num_rows:
            rows = rows.take(pa.array(dealt_order(rows.num_rows, *deal)))
        columns = make_examples(decode_clips(rows), rows.column("position").to_numpy(), spec)
        seconds = (time.perf_counter() - begun) / max(1, rows.num_rows)
        costs = {"decode_seconds": np.full(rows.num_rows, seconds, np.float32)}
        return columns | costs | {"read_seconds": rows.column("read_seconds").to_numpy()}

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


def _decode(data: pa.Buffer, clip_id: str, num_samples: int) -> np.ndarray:
    try:
        wave_S = decode_flac(data, num_samples)
    except ValueError as error:
        raise UserError(
            f"clip {clip_id!r}: its audio in the shard does not decode; prepare the data set again"
        ) from error
    if len(wave_S) != num_samples:
        found = "more" if len(wave_S) > num_samples else len(wave_S)
        raise UserError(
            f"clip {clip_id!r}: the shard says num_samples={num_samples}, its audio has {found}; "
            "prepare the data set again"
        )
    return wave_S


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a column of lists as views of its values; a Python object for each value would cost too much."""
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False)
        offsets = chunk.offsets.to_numpy().tolist()
        arrays += [values[first:last] for first, last in pairwise(offsets)]
    return arrays


def _set_targets(targets_C: np.ndarray, clip: Clip) -> None:
    for label in clip.label_ids:
        if not 0 <= label < len(targets_C):
            raise UserError(
                f"clip {clip.clip_id!r}: label id {label} is outside the vocabulary of {len(targets_C)} labels; "
                "prepare the data set again"
            )
    targets_C[clip.label_ids] = 1


def _set_patch_labels(labels_N: np.ndarray, clip: Clip, offset: int, num_samples: int) -> None:
    assert clip.patch_labels is not None
    expected = patch_labels_in(len(clip.wave_S))
    if len(clip.patch_labels) != expected:
        raise UserError(
            f"clip {clip.clip_id!r}: {len(clip.patch_labels)} patch labels for {len(clip.wave_S)} samples, which have "
            f"{expected} patches; run `beats-ray tokenize` again"
        )
    first = offset // SAMPLES_PER_PATCH_ROW * LABELS_PER_PATCH_ROW
    count = patch_labels_in(num_samples)
    labels_N[:count] = clip.patch_labels[first : first + count]
