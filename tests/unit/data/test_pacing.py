"""The scheduling loop of a full stream pauses, and only that of a full one."""

from types import SimpleNamespace

import pytest

from beats_ray.data import pacing
from beats_ray.data.pacing import PAUSE_SECONDS, PauseWhileFull

pytestmark = pytest.mark.unit


class Loop:
    """Rounds of Ray's loop over one operator, and the pauses after them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 0.0, 0
        self._counts = SimpleNamespace(num_tasks_submitted=0, num_task_outputs_generated=0, num_tasks_finished=0)
        clock = SimpleNamespace(perf_counter=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(pacing, "time", clock)
        self._callback = PauseWhileFull()

    def round(self, seconds: float, **done: int) -> None:
        self.now += seconds
        for name, count in done.items():
            setattr(self._counts, name, getattr(self._counts, name) + count)
        self._callback.on_execution_step(SimpleNamespace(_topology=[SimpleNamespace(metrics=self._counts)]))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses += 1


@pytest.mark.parametrize("done", ["num_tasks_submitted", "num_task_outputs_generated", "num_tasks_finished"])
def test_a_round_that_did_something_is_followed_by_the_next_at_once(monkeypatch: pytest.MonkeyPatch, done: str) -> None:
    loop = Loop(monkeypatch)
    for _ in range(5):
        loop.round(0.001, **{done: 1})
    assert loop.pauses == 0
    loop.round(0.001)
    assert loop.pauses == 1


def test_a_round_that_waited_for_its_tasks_is_no_busy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    for _ in range(5):
        loop.round(2 * PAUSE_SECONDS)
    assert loop.pauses == 0


def test_a_loop_with_nothing_to_do_turns_at_the_pace_of_its_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch)
    rounds = 0
    while loop.now < 1.0:
        loop.round(0.0005)
        rounds += 1
    assert rounds == pytest.approx(1.0 / PAUSE_SECONDS, rel=0.1)
