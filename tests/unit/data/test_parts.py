"""Parts of a data set: complete, without overlap, the same however shards are cut, and of every label alike."""

import random
from collections import Counter

import numpy as np
import pytest

from beats_ray.data.parts import ClipPart, Draw, draw_clips, rows_of_part
from beats_ray.data.plan import balancing_weights, build_plan
from beats_ray.errors import UserError
from tests.unit.data.test_plan import MANIFEST, clips_between

pytestmark = pytest.mark.unit

LABELS = {f"clip-{number}": [number % 4] if number % 9 else [] for number in range(200)}


def test_a_draw_takes_its_fraction_of_every_label() -> None:
    drawn = draw_clips(Draw(0.1), list(LABELS), list(LABELS.values()))
    assert len(drawn) == 20
    by_label = Counter(LABELS[clip_id][0] for clip_id in drawn if LABELS[clip_id])
    assert all(by_label[label] in (4, 5) for label in range(4))  # 44 or 45 clips each


def test_a_draw_depends_on_ids_labels_and_seed_and_not_on_the_order() -> None:
    drawn = draw_clips(Draw(0.2, seed=3), list(LABELS), list(LABELS.values()))
    shuffled = random.Random(1).sample(list(LABELS), len(LABELS))
    assert draw_clips(Draw(0.2, seed=3), shuffled, [LABELS[clip_id] for clip_id in shuffled]) == drawn
    assert draw_clips(Draw(0.2, seed=4), list(LABELS), list(LABELS.values())) != drawn


def test_pieces_of_a_recording_stay_together() -> None:
    ids = [f"{recording}-part{piece:04d}" for recording in range(40) for piece in range(5)]
    drawn = draw_clips(Draw(0.25), ids, [[0]] * len(ids))
    assert len(drawn) == 50
    assert {name.rsplit("-", 1)[0] for name in drawn}.isdisjoint(
        name.rsplit("-", 1)[0] for name in ids if name not in drawn
    )


def test_of_clips_with_several_labels_the_rarest_counts_and_a_lone_one_is_trained_on() -> None:
    labels = [[0, 1] if number < 10 else [0] for number in range(100)] + [[0, 2]]
    drawn = draw_clips(Draw(0.5), [str(number) for number in range(101)], labels)
    assert sum(int(clip_id) < 10 for clip_id in drawn) == 5
    assert "100" not in draw_clips(Draw(0.99), [str(number) for number in range(101)], labels)


def test_a_fraction_that_comes_to_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"folds.validation_fraction=0.001: of 20 clips this keeps none apart"):
        draw_clips(Draw(0.001), [str(number) for number in range(20)], [[0]] * 20)


def test_both_sides_of_a_draw_make_up_an_epoch_each_and_all_clips_together() -> None:
    def ids_of(groups):
        return [[f"{group.file}/{group.index}/{row}" for row in range(group.clips)] for group in groups]

    def epoch(is_drawn: bool, **options):
        part = ClipPart(folds=(1, 2), draw=Draw(0.15), is_drawn=is_drawn)
        plan = build_plan(
            MANIFEST,
            folds=part.folds,
            choose=lambda groups: rows_of_part(part, ids_of(groups), [[[0]] * group.clips for group in groups]),
            shuffle_window_clips=20,
            **options,
        )
        clips = plan.clips_per_epoch
        first = clips_between(plan, 0, clips)
        assert sorted(first) == sorted(clips_between(plan, clips, 2 * clips))
        assert len(first) == len(set(first)) == clips
        return first

    drawn, rest = epoch(True, shuffled=False), epoch(False, seed=5)
    assert len(drawn) == round(0.15 * (len(drawn) + len(rest)))
    assert sorted(drawn + rest) == sorted(clips_between(build_plan(MANIFEST, folds=(1, 2)), 0, len(drawn + rest)))
    assert drawn == sorted(drawn)  # evaluation goes in the manifest's order


def test_balanced_sampling_counts_and_draws_only_the_clips_of_its_part() -> None:
    labels = [[[0], [0], [1], [1]], [[0], [1], [1], [1]]]
    rows = (np.array([0, 2]), np.array([1, 2, 3]))
    weights = balancing_weights(labels, 2, rows)
    assert [part.tolist() for part in weights.by_group] == [[1.0, 0.25], [0.25, 0.25, 0.25]]
