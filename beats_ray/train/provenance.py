"""What a fine-tuned classifier was trained, selected and tested on: kept in its model folder, read by `evaluate`.

`config.json` of the published model holds it under `extra.data`: the data set's name and the fingerprint of its shards,
and for training, validation and test the folds and splits, where an empty list means all and null that there was none.
"""

from typing import Any

from beats_ray.config import FinetuneConfig
from beats_ray.data.manifest import DatasetManifest, shards_fingerprint
from beats_ray.train.held_out import find_parts

PARTS = ("training", "validation", "test")


def describe_data(config: FinetuneConfig, manifest: DatasetManifest) -> dict[str, Any]:
    """The record of a fine-tuning run."""
    return {
        "path": config.data.path,
        "name": manifest.name,
        "shards": shards_fingerprint(manifest),
        **find_parts(config, manifest).as_record(),
    }


def count_overlap(
    record: dict[str, Any], manifest: DatasetManifest, folds: tuple[int, ...], splits: tuple[str, ...]
) -> dict[str, int]:
    """How many of the chosen clips belong to the training, validation and test part of a record.

    Zeros for a record of another data set: clips that both hold are not found out.
    """
    counts = dict.fromkeys(PARTS, 0)
    if record.get("shards") != shards_fingerprint(manifest):
        return counts
    for shard in manifest.shards:
        for group in shard.row_groups:
            if (folds and group.fold not in folds) or (splits and group.split not in splits):
                continue
            for name in PARTS:
                if _holds(record.get(name), group.fold, group.split):
                    counts[name] += group.clips
    return counts


def _holds(part: dict[str, Any] | None, fold: int, split: str) -> bool:
    if part is None:
        return False
    return (not part["folds"] or fold in part["folds"]) and (not part["splits"] or split in part["splits"])
