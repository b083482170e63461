"""Who is stopped: by each scheduler, among the trials of one encoder, and where a population goes."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from beats_ray.config import SweepConfig, SweepSettings, load_config
from beats_ray.data.storage import Place, open_place
from beats_ray.tune.population import follow
from beats_ray.tune.schedulers import build_scheduler, replay

pytestmark = pytest.mark.unit

METRIC = "validation/accuracy"


def sweep_of(**settings: Any) -> SweepSettings:
    return load_config(SweepConfig, None, ["output=o"], sweep=settings).sweep


@dataclass(frozen=True, eq=False)
class Member:
    """What schedulers look at of a trial."""

    trial_id: str
    config: dict[str, Any]
    status: str = "RUNNING"


class Run:
    """Trials that report in turn to a scheduler; those that it stops report no more."""

    def __init__(self, sweep: SweepSettings, total: int, encoders: tuple[str, ...] = ("encoder",)) -> None:
        self.scheduler = build_scheduler(sweep, total, encoders)
        self.scheduler.set_search_properties(METRIC, "max")
        self.total = total
        self.controller: Any = SimpleNamespace(get_live_trials=list, get_trials=list)

    def play(self, curves: dict[str, float], encoders: dict[str, str] | None = None) -> dict[str, int]:
        """How many validations each trial got; one of accuracy x reports x each time."""
        trials = {
            name: Member(name, {"encoder": (encoders or {}).get(name, "encoder"), "setting": number})
            for number, name in enumerate(curves)
        }
        for trial in trials.values():
            self.scheduler.on_trial_add(self.controller, trial)
        got = dict.fromkeys(curves, 0)
        running = list(curves)
        for validation in range(1, self.total + 1):
            for name in list(running):
                result = {METRIC: curves[name], "validations": validation}
                got[name] = validation
                if self.scheduler.on_trial_result(self.controller, trials[name], result) == "STOP":
                    running.remove(name)
        return got


CURVES = {"best": 0.9, "good": 0.8, "fair": 0.5, "bad": 0.1}


def test_successive_halving_stops_the_worse_half_at_each_rung() -> None:
    assert Run(sweep_of(), 8).play(CURVES) == {"best": 8, "good": 1, "fair": 1, "bad": 1}
    assert Run(sweep_of(grace_validations=4), 8).play(CURVES) == {"best": 8, "good": 4, "fair": 4, "bad": 4}


def test_a_sweep_that_goes_on_stops_trials_by_what_was_reported_before() -> None:
    sweep, past = sweep_of(), Run(sweep_of(), 8)
    reports = [
        {METRIC: 0.6, "validations": validation, "config": {"encoder": "encoder", "setting": 9}}
        for validation in (1, 2)
    ]
    replay(past.scheduler, sweep, {"before": reports})
    assert past.play({"bad": 0.5, "best": 0.9}) == {"bad": 1, "best": 8}
    assert Run(sweep, 8).play({"bad": 0.5, "best": 0.9})["bad"] > 1


def test_a_setting_keeps_its_bracket_in_a_sweep_that_goes_on_and_with_every_encoder() -> None:
    sweep = sweep_of(scheduler="hyperband", brackets=3)
    curves = {f"{number}": 1.0 - number / 40 for number in range(20)}
    first = Run(sweep, 16).play(curves)
    assert len(set(first.values())) > 2  # some brackets have their first rung later
    assert Run(sweep, 16).play(curves) == first
    assert Run(sweep_of(scheduler="hyperband", brackets=3, seed=1), 16).play(curves) != first
    names = {f"{name}-{encoder}": encoder for encoder in ("a", "b") for name in curves}
    both = Run(sweep, 16, encoders=("a", "b"))
    got: dict[str, int] = {}
    for encoder in ("a", "b"):
        of_one = {f"{name}-{encoder}": value for name, value in curves.items()}
        got |= both.play(of_one, names)
    assert list(got.values()) == [*first.values(), *first.values()]


def test_the_median_rule_stops_what_is_below_the_others_means() -> None:
    got = Run(sweep_of(scheduler="median"), 8).play({**CURVES, "worst": 0.05})
    assert got["best"] == got["good"] == 8
    assert max(got["bad"], got["worst"]) < 8


def test_without_a_scheduler_nobody_is_stopped() -> None:
    assert set(Run(sweep_of(scheduler="none"), 8).play(CURVES).values()) == {8}


@pytest.mark.parametrize("total", [1, 2, 8])
def test_every_bracket_of_hyperband_has_a_rung(total: int) -> None:
    sweep = sweep_of(scheduler="hyperband", brackets=5)
    brackets = build_scheduler(sweep, total)._brackets
    assert 1 <= len(brackets) <= 5
    assert all(bracket._rungs for bracket in brackets)


def test_a_weak_encoder_s_trials_are_stopped_for_each_other_alone() -> None:
    encoders = {"best": "strong", "good": "strong", "fair": "weak", "bad": "weak"}
    got = Run(sweep_of(), 8, ("strong", "weak")).play(CURVES, encoders)
    assert got == {"best": 8, "good": 1, "fair": 8, "bad": 1}


def test_a_member_s_changed_setting_stays_within_the_space() -> None:
    space = {
        "train.layer_decay": {"distribution": "uniform", "low": 0.4, "high": 1.0},
        "augment.mixup": {"distribution": "choice", "values": [0.0, 0.8]},
    }
    scheduler: Any = build_scheduler(sweep_of(scheduler="pbt", search="random", space=space), 8)
    for _ in range(30):
        changed, _ = scheduler._get_new_config(
            None, SimpleNamespace(config={"train.layer_decay": 0.95, "augment.mixup": 0.8})
        )
        assert 0.4 <= changed["train.layer_decay"] <= 1.0
        assert changed["augment.mixup"] in (0.0, 0.8)


# --- weights that go from one member to another -----------------------------------------------------------------------


def write_checkpoint(run: Place, step: int, content: bytes) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    (folder / "rank-0.safetensors").write_bytes(content)
    (folder / "commit.json").write_json({"step": step, "files": {"rank-0.safetensors": {"bytes": len(content)}}})


def steps_of(run: Place) -> list[str]:
    return sorted(place.name for place in (run / "checkpoints").list())


def test_a_member_goes_on_from_the_one_it_is_pointed_to(tmp_path: Any) -> None:
    good, bad = (open_place(str(tmp_path / name)) for name in ("good", "bad"))
    for step in (4, 8):
        write_checkpoint(good, step, b"good %d" % step)
        write_checkpoint(bad, step, b"bad")
    write_checkpoint(bad, 12, b"bad")
    assert follow({"run": good.uri, "step": 8}, bad) == 8
    assert steps_of(bad) == ["step-00000008"]
    assert (bad / "checkpoints" / "step-00000008" / "rank-0.safetensors").read_bytes() == b"good 8"
    assert steps_of(good) == ["step-00000004", "step-00000008"]


def test_a_pointer_is_followed_once_and_never_to_oneself(tmp_path: Any) -> None:
    good, bad = (open_place(str(tmp_path / name)) for name in ("good", "bad"))
    write_checkpoint(good, 4, b"good")
    follow({"run": good.uri, "step": 4}, bad)
    write_checkpoint(bad, 8, b"own, since")
    assert follow({"run": good.uri, "step": 4}, bad) is None  # interrupted, and started again
    assert steps_of(bad) == ["step-00000004", "step-00000008"]
    assert follow({"run": bad.uri, "step": 4}, bad) is None


def test_where_the_checkpoint_is_gone_the_next_newer_one_serves(tmp_path: Any) -> None:
    good, bad = (open_place(str(tmp_path / name)) for name in ("good", "bad"))
    write_checkpoint(good, 12, b"newer")
    assert follow({"run": good.uri, "step": 8}, bad) == 12
    with pytest.raises(RuntimeError, match="no checkpoint of step 16 or later"):
        follow({"run": good.uri, "step": 16}, bad)
