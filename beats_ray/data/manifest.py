"""`dataset.json`: what a prepared data set holds, and where each row group of its shards is.

A prepared data set is `DIR/dataset.json`, `DIR/shards/*.parquet`, and the accounts of its source files:
`DIR/index/*.parquet` (source, clip_id, row_group, num_samples, labels), `DIR/quarantine.parquet` and
`DIR/skipped.parquet` (path, reason, detail, bytes). Shard columns:
`clip_id: string, audio: binary (FLAC, 16 kHz, mono, 16 bit), num_samples: int32, labels: list<int16>, fold: int8,
split: string`. A row group never mixes folds or splits, so choosing folds means choosing row groups: nothing that is
not wanted is read.
"""

import hashlib
import json
from typing import Literal

from pydantic import ValidationError

from beats_ray.config import Section, UserError
from beats_ray.data.storage import Place

FORMAT_VERSION: Literal[1] = 1
NO_FOLD = -1


class RowGroup(Section):
    """Clips that are read together: one range of one shard."""

    clips: int
    fold: int
    """-1 where the source has no folds."""
    split: str
    """Empty where the source has no splits."""


class Shard(Section):
    """One Parquet file of the data set."""

    file: str
    """Name below `shards/`."""
    sha256: str
    bytes: int
    row_groups: tuple[RowGroup, ...]


class DatasetManifest(Section):
    """The content of `dataset.json`."""

    name: str
    format_version: Literal[1] = FORMAT_VERSION
    label_names: tuple[str, ...]
    """Vocabulary: label id = place in this list."""
    multi_label: bool = False
    clips: int
    clips_by_fold: dict[str, int]
    clips_by_split: dict[str, int]
    seconds: float
    """Seconds of audio in all clips."""
    fbank_mean: float
    fbank_std: float
    """Mean and standard deviation of the log-mel filterbank over all frames and bins, before normalisation."""
    source: str
    source_files: int
    quarantined: int
    """Source files listed in quarantine.parquet."""
    skipped: int = 0
    """Source files listed in skipped.parquet: not wanted, and not among `source_files`."""
    missing: int = 0
    """Recordings that the source's tables name and the source does not hold."""
    shards: tuple[Shard, ...]
    settings: dict[str, str | int | float] = {}
    """How `prepare` made it; the same source and settings give the same bytes."""

    @property
    def main_metric(self) -> Literal["accuracy", "mean_average_precision"]:
        """What classifiers of these clips are compared and chosen by: accuracy where a clip has one label."""
        return "mean_average_precision" if self.multi_label else "accuracy"

    @property
    def versions(self) -> dict[str, str]:
        """The checksum of each shard, by file name."""
        return {shard.file: shard.sha256 for shard in self.shards}


def read_manifest(dataset: Place) -> DatasetManifest:
    """The manifest of a prepared data set. UserError where there is none, or it is of another format."""
    try:
        values = (dataset / "dataset.json").read_json()
    except FileNotFoundError:
        raise UserError(
            f"{dataset.uri}: not a prepared data set (no dataset.json); run `beats-ray prepare` first"
        ) from None
    except ValueError as error:
        raise UserError(f"{dataset.uri}/dataset.json: not valid JSON: {error}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{dataset.uri}/dataset.json: format_version={version!r}, this program reads {FORMAT_VERSION}; "
            "prepare the data set again or update beats_ray"
        )
    try:
        return DatasetManifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{dataset.uri}/dataset.json: {field}: {first['msg']}") from None


def shards_fingerprint(manifest: DatasetManifest) -> str:
    """Says which shards these are: labels that were made for other shards carry another one."""
    shards = [[shard.file, shard.sha256] for shard in manifest.shards]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()
