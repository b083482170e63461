"""What a sweep's leaderboard says does not depend on names that are drawn anew in each run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.prepared import write_dataset

from beats_ray.config import StreamSettings, SweepConfig
from beats_ray.tune.sweep import leaderboard

pytestmark = pytest.mark.unit


def trial(name: str, learning_rate: float, accuracy: float) -> Any:
    metrics = {"validation/accuracy": accuracy, "step": 6000, "trial_id": name}
    config = {"train.learning_rate": learning_rate}
    return SimpleNamespace(metrics=metrics, metrics_dataframe=None, config=config, error=None, path=f"trials/{name}")


@pytest.mark.parametrize("names", ["abc", "cba"])
def test_trials_that_tie_come_in_the_order_of_their_settings(names: str, tmp_path: Path) -> None:
    results = [trial(names[0], 3e-3, 0.5), trial(names[1], 1e-3, 0.5), trial(names[2], 2e-3, 0.4)]
    board = leaderboard(
        SweepConfig(output="o", data=StreamSettings(path=str(tmp_path))), write_dataset(tmp_path, ("x", "y")), results
    )
    assert [row["config"]["train.learning_rate"] for row in board["trials"]] == [1e-3, 3e-3, 2e-3]
    assert board["best"] == board["trials"][0]
