"""Which clips train, validate and test: what settings say, what follows from the data set, and what is refused."""

from typing import Any

import pytest

from beats_ray.config import ConfigError, FinetuneConfig, load_config
from beats_ray.data.manifest import DatasetManifest, RowGroup, Shard
from beats_ray.data.parts import ClipPart, Draw
from beats_ray.train.held_out import DEFAULT_FRACTION, Parts, clips_in, find_parts, part_mistakes

pytestmark = pytest.mark.unit

ESC = [(fold, "") for fold in (1, 2, 3, 4, 5)]
AUDIOSET = [(-1, "balanced_train"), (-1, "unbalanced_train"), (-1, "eval")]
COMMANDS = [(-1, "train"), (-1, "validation"), (-1, "test")]
PLAIN = [(-1, ""), (-1, "")]


def manifest_of(groups: list[tuple[int, str]]) -> DatasetManifest:
    """Ten clips for each fold and split."""
    rows = tuple(RowGroup(clips=10, fold=fold, split=split) for fold, split in groups)
    return DatasetManifest(
        name="set", label_names=("a", "b"), clips=10 * len(rows), clips_by_fold={}, clips_by_split={}, seconds=1.0,
        fbank_mean=0.0, fbank_std=1.0, source="", source_files=1, quarantined=0,
        shards=(Shard(file="0.parquet", sha256="0", bytes=1, row_groups=rows),),
    )  # fmt: skip


def parts_of(groups: list[tuple[int, str]], *overrides: str) -> Parts:
    config = load_config(FinetuneConfig, None, ["output=o", "data.path=data", *overrides])
    return find_parts(config, manifest_of(groups))


def shown(part: ClipPart | None) -> Any:
    if part is None:
        return None
    return [*part.folds, *part.splits, *([part.draw.fraction, part.is_drawn] if part.draw else [])]


@pytest.mark.parametrize(
    ("groups", "overrides", "training", "validation", "test"),
    [
        (ESC, [], [3, 4, 5], [2], [1]),
        (ESC, ["folds.test_fold=5"], [2, 3, 4], [1], [5]),
        (ESC, ["folds.test_fold=4", "folds.validation_fold=-1"], [1, 2, 3, 5], None, [4]),
        (ESC, ["folds.test_fold=-1"], [2, 3, 4, 5], [1], None),
        (ESC, ["folds.validation_fold=1"], [3, 4, 5], [1], [2]),
        (ESC, ["folds.validation_fraction=0.2"], [2, 3, 4, 5, 0.2, False], [2, 3, 4, 5, 0.2, True], [1]),
        (ESC, ["data.folds=[2,3,4]"], [4], [3], [2]),
        (
            [(fold, split) for fold in (1, 2, 3) for split in ("train", "noisy")],
            ["data.splits=[train]"],
            [3, "train"],
            [2, "train"],
            [1, "train"],
        ),
        (ESC[:2], [], [2, DEFAULT_FRACTION, False], [2, DEFAULT_FRACTION, True], [1]),
        (COMMANDS, [], ["train"], ["validation"], ["test"]),
        (COMMANDS, ["folds.validation_split=test", "folds.test_split=none"], ["train", "validation"], ["test"], None),
        (COMMANDS, ["folds.validation_split=test"], ["train", "validation"], ["test"], None),
        (PLAIN, [], [DEFAULT_FRACTION, False], [DEFAULT_FRACTION, True], None),
        (PLAIN, ["folds.validation_fraction=0"], [], None, None),
        (AUDIOSET, ["folds.validation_split=balanced_train"], ["unbalanced_train"], ["balanced_train"], ["eval"]),
        (AUDIOSET, ["folds.validation_fraction=0"], ["balanced_train", "unbalanced_train"], None, ["eval"]),
        (
            AUDIOSET,
            ["data.splits=[balanced_train,eval]"],
            ["balanced_train", DEFAULT_FRACTION, False],
            ["balanced_train", DEFAULT_FRACTION, True],
            ["eval"],
        ),
    ],
)
def test_parts_follow_from_the_settings_and_else_from_the_data_set(
    groups: list[tuple[int, str]], overrides: list[str], training: Any, validation: Any, test: Any
) -> None:
    parts = parts_of(groups, *overrides)
    assert [shown(parts.training), shown(parts.validation), shown(parts.test)] == [training, validation, test]


def test_a_fold_to_test_on_and_a_split_to_choose_by_have_no_clip_in_common() -> None:
    groups = [(fold, split) for fold in (1, 2, 3) for split in ("train", "val")]
    parts = parts_of(groups, "folds.test_fold=2", "folds.validation_split=val")
    assert parts.validation == ClipPart(folds=(1, 3), splits=("val",))
    assert parts.training == ClipPart(folds=(1, 3), splits=("train",))
    manifest = manifest_of(groups)
    assert [clips_in(manifest, part) for part in (parts.training, parts.validation, parts.test) if part] == [20, 20, 20]


def test_the_record_of_a_run_says_what_each_part_was() -> None:
    parts = parts_of(COMMANDS, "folds.validation_fraction=0.25", "folds.seed=3")
    assert parts.as_record() == {
        "training": {"folds": [], "splits": ["train", "validation"], "fraction": 0.25, "seed": 3, "is_drawn": False},
        "validation": {"folds": [], "splits": ["train", "validation"], "fraction": 0.25, "seed": 3, "is_drawn": True},
        "test": {"folds": [], "splits": ["test"]},
    }
    assert parts.training.draw == Draw(0.25, 3)


@pytest.mark.parametrize(
    ("groups", "overrides", "message"),
    [
        (ESC, ["folds.test_fold=8"], "folds.test_fold=8 is not a fold of data; it has [1, 2, 3, 4, 5]; choose one"),
        (AUDIOSET, ["folds.test_fold=1"], "folds.test_fold=1 is not a fold of data; it has no folds; leave it out"),
        (ESC, ["folds.test_split=test"], "folds.test_split=test is not a split of data; it has no splits; leave"),
        (AUDIOSET, ["folds.validation_split=val"], "it has ['balanced_train', 'eval', 'unbalanced_train']; choose one"),
        (
            AUDIOSET,
            ["data.splits=[balanced_train]", "folds.test_split=eval"],
            "folds.test_split=eval is not among data.splits=['balanced_train'], the clips that are read; add it there",
        ),
        (
            ESC,
            ["data.folds=[1,2]", "folds.validation_fold=2"],
            "leaves no clip to train on beside folds.test_fold=1 and folds.validation_fold=2; widen data.folds or",
        ),
        (
            COMMANDS,
            ["data.splits=[validation,test]"],
            "data.splits=['validation', 'test'] leaves no clip to train on beside folds.test_split=test and folds.",
        ),
        (
            [(1, "train"), (2, "train"), (3, "val")],
            ["folds.test_fold=3", "folds.validation_split=val"],
            "folds.validation_split=val has no clips there; choose another part",
        ),
        (
            ESC,
            ["folds.test_fold=1", "folds.test_split=x"],
            "folds.test_fold=1 and test_split=x each say what the test part is; set one of them",
        ),
        (
            ESC,
            ["folds.validation_fold=1", "folds.validation_fraction=0.5"],
            "folds.validation_fold=1 and validation_fraction=0.5 each say what the validation part is; set one of them",
        ),
        (COMMANDS, ["folds.test_split=test", "folds.validation_split=test"], "folds.validation_split=test is also the"),
    ],
)
def test_parts_that_cannot_be_are_one_line(groups: list[tuple[int, str]], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parts_of(groups, *overrides)
    assert message in str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    config = load_config(
        FinetuneConfig, None, ["output=o", "data.path=data", "folds.test_fold=8", "folds.validation_split=x"]
    )
    assert [str(one).split("=")[0] for one in part_mistakes(config, manifest_of(ESC))] == [
        "folds.test_fold",
        "folds.validation_split",
    ]
