"""A run's metrics, scraped from the port where a real cluster exports them."""

import re
import time
import urllib.request

import pytest

from beats_ray.objectstore import EmbeddedObjectStore
from beats_ray.train.loggers import PrometheusLogger

pytestmark = pytest.mark.ray


def test_the_newest_metrics_of_a_run_are_scraped_from_ray(cluster: EmbeddedObjectStore) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self) -> None:
            self._logger = PrometheusLogger("pretrain-a")

        def write(self, record: dict[str, float]) -> None:
            self._logger.write(record)

    worker = Worker.remote()
    for step, loss in ((10, 3.5), (20, 2.5)):
        ray.get(worker.write.remote({"step": step, "train/loss": loss, "train/recoveries": 1}))
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {"train_loss": 2.5, "train_recoveries": 1.0, "step": 20.0}
    found: dict[str, float] = {}
    deadline = time.monotonic() + 90  # workers report every ten seconds
    while found != wanted and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        lines = re.findall(r'^ray_beats_ray_(\w+)\{.*run="pretrain-a".*\} (\S+)$', text, re.MULTILINE)
        found = {name: float(value) for name, value in lines}
    assert found == wanted
