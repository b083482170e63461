"""A run's metrics, scraped from the port where a real cluster exports them."""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
WANTED = {"train_loss": 2.5, "train_recoveries": 1.0, "step": 20.0, "run_active": 1.0}


def test_the_newest_metrics_of_a_run_are_scraped_from_ray() -> None:
    # In a process of its own: whether Ray collects metrics is settled when a process first starts it, and a private
    # cluster of ours, which an earlier test may have started, does not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def scrape() -> None:
    """Writes two reports in a worker and reads what the node exports, until it is the newer one."""
    import ray

    from beats_ray.train.loggers import PrometheusLogger

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
    found: dict[str, float] = {}
    deadline = time.monotonic() + 120  # workers report every ten seconds
    while found != WANTED and time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        lines = re.findall(r'^ray_beats_ray_(\w+)\{.*run="pretrain-a".*\} (\S+)$', text, re.MULTILINE)
        found = {name: float(value) for name, value in lines}
    assert found == WANTED, found


if __name__ == "__main__":
    import ray

    with tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        scrape()
        ray.shutdown()
