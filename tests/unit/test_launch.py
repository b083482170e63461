"""What a cluster that does not start says."""

import pytest
import ray

from beats_ray.config import RaySettings, UserError
from beats_ray.launch import ray_cluster

pytestmark = pytest.mark.unit


def test_a_cluster_that_does_not_start_in_time_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits for 30 s and raises a bare Exception, seen on a machine with a load of ten on two cores."""

    def too_slow(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)
    with (
        pytest.raises(UserError, match="Ray did not start within 30 s: the machine is too busy"),
        ray_cluster(RaySettings(address="local")),
    ):
        pass
