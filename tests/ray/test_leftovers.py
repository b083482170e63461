"""What a Ray Train run leaves behind when the process that has started it is gone, on a cluster without a dashboard.

A real run: its starter is an actor, as a trial's process is, and it is killed in mid-training.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from beats_ray.data.storage import open_place
from beats_ray.train.leftovers import ATTEMPTS_FILE, current_holder, is_released, wait_until_released

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def test_a_run_whose_starter_is_killed_gives_its_cpus_back(tmp_path: Path) -> None:
    import ray
    from ray._private.state import actors

    def train(config: dict[str, Any]) -> None:
        import ray.train

        if ray.train.get_context().get_world_rank() == 0:
            (open_place(config["output"]) / ATTEMPTS_FILE).write_json(
                {"attempts": 1, "workers": [current_holder(), {}]}
            )
        time.sleep(1000)

    @ray.remote(num_cpus=0)
    class Starter:
        def start(self, output: str) -> None:
            from ray.train import RunConfig, ScalingConfig
            from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

            scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
            DataParallelTrainer(
                train, train_loop_config={"output": output}, scaling_config=scaling,
                run_config=RunConfig(name="run", storage_path=output),
            ).fit()  # fmt: skip

    output = open_place(str(tmp_path))
    before = reservations()
    assert is_released(output)  # nothing has begun
    starter = Starter.remote()
    starter.start.remote(output.uri)
    wait_for((tmp_path / ATTEMPTS_FILE).exists)
    assert not is_released(output)
    assert len(reservations() - before) == 1  # asking gave nothing back
    ray.kill(starter)
    wait_until_released(output)
    wait_for(lambda: reservations() <= before)
    (holder, _) = (output / ATTEMPTS_FILE).read_json()["workers"]
    assert actors(holder["actor"])["State"] == "DEAD"
    assert is_released(output)


def reservations() -> set[str]:
    """The placement groups that hold or await CPUs, by their ids; other tests' may go at any time."""
    from ray.util import placement_group_table

    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


def wait_for(has_come: Any) -> None:
    deadline = time.monotonic() + 240
    while not has_come():
        assert time.monotonic() < deadline
        time.sleep(0.1)
