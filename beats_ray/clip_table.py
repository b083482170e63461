"""What a model says about each clip of a prepared data set, on the driver, beside the clips' labels and folds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beats_ray.config import UserError
from beats_ray.console import Console
from beats_ray.data.manifest import DatasetManifest, read_manifest
from beats_ray.data.storage import Place
from beats_ray.inference import ClipWorker, map_clips, row_group_spans
from beats_ray.models import BeatsEncoder
from beats_ray.probe import LabelledClips


@dataclass(frozen=True)
class ClipTable:
    """Columns of a `ClipWorker`, one row per clip in the data set's order; `labels` holds each clip's label ids."""

    clip_ids: list[str]
    columns: dict[str, np.ndarray]
    labels: list[list[int]]
    folds: np.ndarray

    def labelled(self, name: str) -> LabelledClips:
        """One column with the single label of each clip; clips without a label are left out. UserError for several."""
        kept = [index for index, labels in enumerate(self.labels) if labels]
        many = next((index for index in kept if len(self.labels[index]) > 1), None)
        if many is not None:
            raise UserError(
                f"clip {self.clip_ids[many]!r} has {len(self.labels[many])} labels; the frozen probe and the baselines "
                "take one label a clip: fine-tune and evaluate the classifier instead"
            )
        return LabelledClips(
            [self.clip_ids[index] for index in kept],
            self.columns[name][kept].astype(np.float64),
            np.array([self.labels[index][0] for index in kept], dtype=np.int64),
            self.folds[kept],
        )


def collect_clips(
    dataset: Place,
    manifest: DatasetManifest,
    worker_class: Callable[..., ClipWorker],
    columns: tuple[str, ...],
    *,
    folds: tuple[int, ...] = (),
    splits: tuple[str, ...] = (),
    console: Console | None = None,
    **pool: Any,
) -> ClipTable:
    """The named columns of a `ClipWorker` for all clips of the folds and splits, in the data set's order.

    `pool` goes to `map_clips`: model, batch_clips, num_workers, use_gpu. UserError where no clip is chosen.
    """
    spans = row_group_spans(manifest, folds, splits)
    total = sum(span.clips for span in spans)
    if not total:
        raise UserError(f"data.folds={list(folds)}, data.splits={list(splits)}: {dataset.uri} has no clips there")
    if console is not None:
        console.progress(0, total)
    rows: list[tuple[Any, ...]] = []
    for table in map_clips(dataset, manifest, worker_class, row_groups=spans, **pool):
        named = [table[name].to_pylist() for name in ("shard", "row", "clip_id", "clip_labels", "fold")]
        values = [np.stack(table[name].to_numpy()) for name in columns]
        rows += zip(*named, zip(*values, strict=True), strict=True)
        if console is not None:
            console.progress(len(rows), total)
    rows.sort(key=lambda row: row[:2])
    stacked = {name: np.stack([row[5][index] for row in rows]) for index, name in enumerate(columns)}
    labels = [row[3] or [] for row in rows]
    return ClipTable([row[2] for row in rows], stacked, labels, np.array([row[4] for row in rows]))


def embed_clips(dataset: Place, model: Place, **pool: Any) -> LabelledClips:
    """Clip ids, mean-pooled frozen features, labels and folds of a data set under a published encoder."""
    return collect_clips(dataset, read_manifest(dataset), PooledFeatures, ("features",), model=model, **pool).labelled(
        "features"
    )


class PooledFeatures:
    """A `ClipWorker`: the mean of an encoder's features over each clip's real patches."""

    def __init__(self, model: BeatsEncoder) -> None:
        self._encoder = model

    def __call__(self, wave_BS: Tensor, num_samples_B: Tensor) -> dict[str, Any]:
        fbank_BTF, num_frames_B = self._encoder.normalised_fbank(wave_BS, num_samples_B)
        output = self._encoder(fbank_BTF, num_frames_B)
        return {"features": mean_over_patches(output.features_BND, output.is_pad_BN).cpu().numpy()}


def mean_over_patches(features_BND: Tensor, is_pad_BN: Tensor) -> Tensor:
    """The mean over each clip's real patches; zeros for a clip without any."""
    is_real_BN1 = ~is_pad_BN.unsqueeze(-1)
    total_BD = torch.where(is_real_BN1, features_BND.float(), 0.0).sum(1)
    return total_BD / is_real_BN1.sum(1).clamp(min=1)


# --- on the driver ----------------------------------------------------------------------------------------------------
