"""What a fine-tuned classifier was trained, selected and tested on: kept in its model folder, read by `evaluate`.

`config.json` of the published model holds it under `extra.data`: the data set's name and the fingerprint of its shards,
and for training, validation and test the folds and splits, where an empty list means all and null that there was none,
and the draw that divided them, where there was one.
"""

from typing import Any

from beats_ray.config import FinetuneConfig
from beats_ray.data.manifest import DatasetManifest, RowGroup, shards_fingerprint
from beats_ray.train.held_out import find_parts

PARTS = ("training", "validation", "test")


def describe_data(config: FinetuneConfig, manifest: DatasetManifest) -> dict[str, Any]:
    """The record of a fine-tuning run."""
    seen = find_parts(config, manifest).as_record()
    return {"path": config.data.path, "name": manifest.name, "shards": shards_fingerprint(manifest)} | seen


def count_overlap(
    record: dict[str, Any], manifest: DatasetManifest, folds: tuple[int, ...], splits: tuple[str, ...]
) -> dict[str, int]:
    """How many of the chosen clips belong to the training, validation and test part of a record.

    Zeros for a record of another data set: clips that both hold are not found out.
    """
    counts = dict.fromkeys(PARTS, 0.0)
    if record.get("shards") != shards_fingerprint(manifest):
        return dict.fromkeys(PARTS, 0)
    for shard in manifest.shards:
        for group in shard.row_groups:
            if (folds and group.fold not in folds) or (splits and group.split not in splits):
                continue
            for name in PARTS:
                counts[name] += _held(record.get(name), group)
    return {name: round(count) for name, count in counts.items()}


def _held(part: dict[str, Any] | None, group: RowGroup) -> float:
    """Clips of a row group that are in a part; of one that a draw divides, as many as are to be expected."""
    if part is None or (part["folds"] and group.fold not in part["folds"]):
        return 0.0
    if part["splits"] and group.split not in part["splits"]:
        return 0.0
    fraction = part.get("fraction")
    if fraction is None:
        return float(group.clips)
    return group.clips * (fraction if part["is_drawn"] else 1.0 - fraction)
