"""Which clips of a data set a fine-tuning run trains on, selects by and is tested on.

    parts = find_parts(config, manifest)        # ConfigError where they cannot be told apart
    parts.training, parts.validation, parts.test

`folds.test_*` and `folds.validation_*` say it; what they leave open follows from the data set: its first two folds
where it has folds, else its official splits, else, for validation, a draw among the clips that are left for training.
Nothing is chosen by the test part: a set without a validation part, such as AudioSet, has a draw to choose by, or, with
`folds.validation_fraction=0`, nothing at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from beats_ray.config import ConfigError, FinetuneConfig, FoldSettings
from beats_ray.data.manifest import NO_FOLD, DatasetManifest, RowGroup
from beats_ray.data.parts import ClipPart, Draw

TEST_SPLITS = ("test", "eval", "testing", "evaluation")
VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "development")
DEFAULT_FRACTION = 0.1
NO_SPLIT = "none"

ValueT = TypeVar("ValueT", int, str)


@dataclass(frozen=True)
class Parts:
    """The clips of a run. The three have no clip in common."""

    training: ClipPart
    validation: ClipPart | None
    test: ClipPart | None

    def as_record(self) -> dict[str, Any]:
        """The same as JSON: what a model has seen, and how it was chosen."""
        return {
            "training": self.training.as_record(),
            "validation": self.validation.as_record() if self.validation else None,
            "test": self.test.as_record() if self.test else None,
        }


@dataclass(frozen=True)
class _Choice(Generic[ValueT]):
    """The folds, or the splits, of test and validation; None where there is none of this kind."""

    test: ValueT | None = None
    validation: ValueT | None = None


def find_parts(config: FinetuneConfig, manifest: DatasetManifest) -> Parts:
    """The parts that a run's settings mean; the first mistake in them is raised."""
    for mistake in part_mistakes(config, manifest):
        raise mistake
    parts = _divide(config, *_choose(config, manifest), manifest)
    assert parts is not None
    return parts


def part_mistakes(config: FinetuneConfig, manifest: DatasetManifest) -> list[ConfigError]:
    """Every fold and split that training, validation or test needs and the data set lacks."""
    mistakes = [*_unknown(config, manifest)]
    folds, splits = _choose(config, manifest)
    parts = _divide(config, folds, splits, manifest)
    named = (("test", parts.test), ("validation", parts.validation)) if parts and not mistakes else ()
    for name, part in named:
        if part is not None and not _groups(manifest, part):
            mistakes.append(
                ConfigError(f"{_shown(config, folds, splits, name)} has no clips there; choose another part")
            )
    if parts is None or not _groups(manifest, parts.training):
        held = [_shown(config, folds, splits, name) for name in ("test", "validation")]
        mistakes.append(
            ConfigError(
                f"data.folds={list(config.data.folds)}, data.splits={list(config.data.splits)} leaves no clip to train "
                f"on beside {' and '.join(held)}; widen data.folds or data.splits, or hold out less"
            )
        )
    return mistakes


def clips_in(manifest: DatasetManifest, part: ClipPart) -> int:
    """Clips of a part's folds and splits; of a drawn part those of both sides."""
    return sum(group.clips for group in _groups(manifest, part))


def _choose(config: FinetuneConfig, manifest: DatasetManifest) -> tuple[_Choice[int], _Choice[str]]:
    """What is named, completed by what the data set has; of a part that is a fold the split is None, and vice versa."""
    settings, data = config.folds, config.data
    read = _groups(manifest, ClipPart(data.folds, data.splits))
    known_folds = sorted({group.fold for group in read} - {NO_FOLD})
    known_splits = sorted({group.split for group in read} - {""})
    by_split = settings.test_split is not None or settings.validation_split is not None
    by_fold = settings.test_fold is not None or settings.validation_fold is not None
    uses_folds = len(known_folds) > 1 and (by_fold or not by_split)

    test_fold, test_split = settings.test_fold, settings.test_split
    if test_fold is None and test_split is None:
        if uses_folds:
            test_fold = next(fold for fold in known_folds if fold != settings.validation_fold)
        else:
            test_split = _first(TEST_SPLITS, known_splits, settings.validation_split)
    validation_fold, validation_split = settings.validation_fold, settings.validation_split
    if (validation_fold, validation_split, settings.validation_fraction) == (None, None, None):
        if uses_folds and len(known_folds) > 2:  # of two, one is left to train on, and a draw of it to choose by
            validation_fold = _next(known_folds, test_fold)
        elif not uses_folds:
            validation_split = _first(VALIDATION_SPLITS, known_splits, test_split)
    return (
        _Choice(*(None if fold == NO_FOLD else fold for fold in (test_fold, validation_fold))),
        _Choice(*(None if split == NO_SPLIT else split for split in (test_split, validation_split))),
    )


def _divide(
    config: FinetuneConfig, folds: _Choice[int], splits: _Choice[str], manifest: DatasetManifest
) -> Parts | None:
    """The parts; None where no fold or no split is left to train on."""
    data, groups = config.data, _all_groups(manifest)
    known_folds, known_splits = {group.fold for group in groups}, {group.split for group in groups}
    no_test = ClipPart(_without(data.folds, folds.test, known_folds), _without(data.splits, splits.test, known_splits))
    rest = ClipPart(
        _without(no_test.folds, folds.validation, known_folds),
        _without(no_test.splits, splits.validation, known_splits),
    )
    held_folds, held_splits = (folds.test, folds.validation), (splits.test, splits.validation)
    if (held_folds != (None, None) and not rest.folds) or (held_splits != (None, None) and not rest.splits):
        return None
    test = None
    if folds.test is not None:
        test = ClipPart((folds.test,), data.splits)
    elif splits.test is not None:
        test = ClipPart(data.folds, (splits.test,))
    if folds.validation is not None:
        return Parts(rest, replace(no_test, folds=(folds.validation,)), test)
    if splits.validation is not None:
        return Parts(rest, replace(no_test, splits=(splits.validation,)), test)
    if not config.folds.has_validation:
        return Parts(rest, None, test)
    draw = Draw(_fraction(config.folds), config.folds.seed)
    return Parts(replace(rest, draw=draw), replace(rest, draw=draw, is_drawn=True), test)


def _fraction(settings: FoldSettings) -> float:
    """What is drawn where validation is neither a fold nor a split."""
    return DEFAULT_FRACTION if settings.validation_fraction is None else settings.validation_fraction


def _unknown(config: FinetuneConfig, manifest: DatasetManifest) -> Iterator[ConfigError]:
    """A line for each fold and split that is named and not among the clips that are read."""
    groups = _all_groups(manifest)
    known: dict[str, list[Any]] = {
        "fold": sorted({group.fold for group in groups} - {NO_FOLD}),
        "split": sorted({group.split for group in groups} - {""}),
    }
    for kind, read in (("fold", list(config.data.folds)), ("split", list(config.data.splits))):
        for part in ("validation", "test"):
            name, value = f"folds.{part}_{kind}", getattr(config.folds, f"{part}_{kind}")
            if value in (None, NO_FOLD, NO_SPLIT):
                continue
            if value not in known[kind]:
                has = f"it has {known[kind]}; choose one of them" if known[kind] else f"it has no {kind}s; leave it out"
                yield ConfigError(f"{name}={value} is not a {kind} of {config.data.path}; {has}")
            elif read and value not in read:
                yield ConfigError(
                    f"{name}={value} is not among data.{kind}s={read}, the clips that are read; add it there"
                )


def _shown(config: FinetuneConfig, folds: _Choice[int], splits: _Choice[str], part: str) -> str:
    for kind, choice in (("fold", folds), ("split", splits)):
        value = getattr(choice, part)
        if value is not None:
            return f"folds.{part}_{kind}={value}"
    drawn = part == "validation" and config.folds.has_validation
    return f"folds.validation_fraction={_fraction(config.folds):g}" if drawn else f"no {part} part"


def _without(read: tuple[ValueT, ...], held_out: ValueT | None, known: set[ValueT]) -> tuple[ValueT, ...]:
    """The values that stay, where empty means all, unless one was taken out: then none is left."""
    if held_out is None:
        return read
    return tuple(value for value in read or sorted(known) if value != held_out)


def _first(names: tuple[str, ...], known: list[str], taken: str | None) -> str | None:
    return next((name for name in names if name in known and name != taken), None)


def _next(folds: list[int], test_fold: int | None) -> int:
    """The fold after the test fold, in a cycle."""
    return folds[(folds.index(test_fold) + 1) % len(folds)] if test_fold in folds else folds[0]


def _all_groups(manifest: DatasetManifest) -> list[RowGroup]:
    return [group for shard in manifest.shards for group in shard.row_groups if group.clips]


def _groups(manifest: DatasetManifest, part: ClipPart) -> list[RowGroup]:
    return [
        group
        for group in _all_groups(manifest)
        if (not part.folds or group.fold in part.folds) and (not part.splits or group.split in part.splits)
    ]
