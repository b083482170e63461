"""Parts of a data set: which clips train, which validate, which test; no clip is in two of them.

A part is whole row groups, by fold and split. Where training clips have no validation part of their own, a draw among
them keeps some apart: by recording, so that pieces of one recording stay together, and of every label alike. The draw
depends on clip ids, labels and a seed alone, so it is the same for any number of workers and however shards are cut.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from beats_ray.data.manifest import DatasetManifest
from beats_ray.data.plan import ClipPlan, RowGroupRef, Rows, build_plan
from beats_ray.data.shards import clip_ids_and_labels
from beats_ray.data.storage import Place
from beats_ray.errors import UserError

PIECE = re.compile(r"-part\d{4,}$")  # what `prepare` adds to the id of a recording that it cuts
NO_LABEL = -1


@dataclass(frozen=True)
class Draw:
    """A fraction of the clips that is kept apart."""

    fraction: float
    seed: int = 0


@dataclass(frozen=True)
class ClipPart:
    """Clips of a data set, by fold, split and draw."""

    folds: tuple[int, ...] = ()
    """Empty means all."""
    splits: tuple[str, ...] = ()
    """Empty means all."""
    draw: Draw | None = None
    """Divides the clips of these folds and splits in two; all of them are in the part where None."""
    is_drawn: bool = False
    """Which of the two this part is: the fraction that the draw keeps apart, or the rest."""

    def as_record(self) -> dict[str, Any]:
        """The same as JSON: `folds`, `splits`, and `fraction` and `seed` of the draw where there is one."""
        record: dict[str, Any] = {"folds": list(self.folds), "splits": list(self.splits)}
        if self.draw is not None:
            record |= {"fraction": self.draw.fraction, "seed": self.draw.seed, "is_drawn": self.is_drawn}
        return record


def plan_of_part(
    dataset: Place, manifest: DatasetManifest, part: ClipPart, retry_seconds: float, **options: Any
) -> ClipPlan:
    """The plan of a part's clips; a draw reads their ids and labels, no audio. `options`: of `build_plan`."""

    def choose(groups: tuple[RowGroupRef, ...]) -> Rows:
        ids, labels = clip_ids_and_labels(dataset, groups, manifest.versions, retry_seconds)
        return rows_of_part(part, ids, labels)

    chosen = None if part.draw is None else choose
    return build_plan(manifest, folds=part.folds, splits=part.splits, choose=chosen, **options)


def count_clips(dataset: Place, manifest: DatasetManifest, part: ClipPart, retry_seconds: float) -> int:
    """Clips of a part."""
    return plan_of_part(dataset, manifest, part, retry_seconds).clips_per_epoch


def rows_of_part(
    part: ClipPart, ids_by_group: Sequence[Sequence[str]], labels_by_group: Sequence[Sequence[Sequence[int]]]
) -> Rows:
    """The rows of each row group that are in the part, where its draw divides exactly these clips."""
    assert part.draw is not None
    ids = [clip_id for group in ids_by_group for clip_id in group]
    drawn = draw_clips(part.draw, ids, [labels for group in labels_by_group for labels in group])
    is_member_N = np.array([(clip_id in drawn) == part.is_drawn for clip_id in ids], dtype=bool)
    ends = np.cumsum([len(group) for group in ids_by_group])[:-1]
    return tuple(np.flatnonzero(members) for members in np.split(is_member_N, ends))


def draw_clips(draw: Draw, ids: Sequence[str], labels: Sequence[Sequence[int]]) -> set[str]:
    """The ids of the clips that are kept apart: of each stratum about the fraction, over all strata exactly rounded.

    A stratum is the recordings that share their rarest label; of those with a label one at least stays for training.
    Within one the recordings with the lowest hashes are drawn. UserError where the fraction comes to no clip.
    """
    strata = _strata(ids, labels)
    drawn: set[str] = set()
    wanted, before = 0.0, 0
    for label in sorted(strata):
        recordings = strata[label]
        wanted += draw.fraction * len(recordings)
        count = int(wanted + 0.5) - before
        before += count
        count = min(count, len(recordings) - (label != NO_LABEL))
        ranked = sorted(recordings, key=lambda name: hashlib.sha256(f"{draw.seed}/{name}".encode()).digest())
        drawn.update(clip_id for name in ranked[:count] for clip_id in recordings[name])
    if not drawn:
        raise UserError(
            f"folds.validation_fraction={draw.fraction:g}: of {len(ids)} clips this keeps none apart for validation; "
            "raise it, or set it to 0"
        )
    return drawn


def _strata(ids: Sequence[str], labels: Sequence[Sequence[int]]) -> dict[int, dict[str, list[str]]]:
    """For each label the recordings of which it is the rarest label, with the ids of their clips."""
    counts: dict[int, int] = defaultdict(int)
    for some in labels:
        for label in some:
            counts[label] += 1
    label_of: dict[str, int] = {}
    strata: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for clip_id, some in zip(ids, labels, strict=True):
        recording = PIECE.sub("", clip_id)
        rarest = min(some, key=lambda label: (counts[label], label), default=NO_LABEL)
        label = label_of.setdefault(recording, rarest)
        strata[label][recording].append(clip_id)
    return strata
