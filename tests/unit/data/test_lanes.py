"""Lanes: every clip in one of them, every step from all of them, whatever the number of workers."""

import pickle

import pytest

from beats_ray.data.lanes import Dealing, Lane, lanes_fit
from beats_ray.data.plan import build_plan
from tests.unit.data.test_plan import MANIFEST, ClipKey, all_clips, clips_between

pytestmark = pytest.mark.unit

PLAN = build_plan(MANIFEST, seed=1, shuffle_window_clips=14)  # two or three row groups in a window


def clips_of_steps(dealing: Dealing, first_step: int, stop_step: int) -> dict[int, ClipKey]:
    """What all workers together get, by position."""
    lanes = [Lane(PLAN, index, dealing) for index in range(dealing.num_lanes)]
    found: dict[int, ClipKey] = {}
    for rank in range(dealing.num_workers):
        for index in range(dealing.num_micro_batches(stop_step - first_step)):
            lane, start = dealing.micro_batch(first_step, index, rank)
            assert lane in dealing.lanes_of(rank)
            stop = start + dealing.micro_batch_size
            found |= zip(
                lanes[lane].positions(start, stop).tolist(), clips_between(lanes[lane], start, stop), strict=True
            )
    return found


@pytest.mark.parametrize("num_lanes", [1, 2, 4])
def test_a_step_holds_the_same_clips_for_any_number_of_workers_and_from_any_start(num_lanes: int) -> None:
    whole = clips_of_steps(Dealing(24, 2, 1, num_lanes), 0, 30)
    assert sorted(whole) == list(range(24 * 30))
    for workers in (2, 4, 12):
        assert clips_of_steps(Dealing(24, 2, workers, num_lanes), 0, 30) == whole
    rest = {position: clip for position, clip in whole.items() if position >= 24 * 17}
    assert clips_of_steps(Dealing(24, 1, 2, num_lanes), 17, 30) == rest


def test_one_lane_is_the_plan() -> None:
    found = clips_of_steps(Dealing(24, 2, 2), 0, 20)
    assert [found[position] for position in range(24 * 20)] == clips_between(PLAN, 0, 24 * 20)


@pytest.mark.parametrize("num_lanes", [2, 3, 5])
def test_the_lanes_of_a_plan_hold_each_of_its_windows_once(num_lanes: int) -> None:
    dealing = Dealing(5 * 6 * num_lanes, 5, num_lanes, num_lanes)
    epochs = 4 * num_lanes
    stop = 2 * epochs * MANIFEST.clips  # more than any lane needs for these epochs
    ordinals = [list(Lane(PLAN, index, dealing).windows_between(0, stop)) for index in range(num_lanes)]
    windows = range(epochs * PLAN.windows_per_epoch)
    assert sorted(n for some in ordinals for n in some if n in windows) == list(windows)
    assert all(n % num_lanes == index for index, some in enumerate(ordinals) for n in some)


def test_an_epoch_of_the_lanes_holds_every_clip_about_once() -> None:
    """Lanes are not exactly as long: near the end of an epoch some are ahead of others by a window."""
    steps = -(-3 * MANIFEST.clips // 24)
    found = list(clips_of_steps(Dealing(24, 2, 2, 2), 0, steps).values())
    counts = [found.count(clip) for clip in all_clips(MANIFEST)]
    assert min(counts) >= 2
    assert max(counts) <= 4


def test_a_lane_that_was_sent_to_a_task_knows_where_its_windows_begin() -> None:
    lane = Lane(PLAN, 1, Dealing(24, 2, 2, 2))
    ordinals = lane.windows_between(400, 500)
    copy = pickle.loads(pickle.dumps(lane))  # noqa: S301
    assert len(copy._epochs) == len(lane._epochs) > 1  # not found anew by each task
    assert [copy.window(n).first_position for n in ordinals] == [lane.window(n).first_position for n in ordinals]


def test_lanes_and_workers_divide_one_another() -> None:
    assert [workers for workers in range(1, 9) if lanes_fit(4, workers)] == [1, 2, 4, 8]
    with pytest.raises(AssertionError):
        Dealing(24, 2, 3, 4)
    with pytest.raises(AssertionError):
        Dealing(24, 4, 1, 8)  # 3 clips of each lane in a step, 4 in a micro-batch
