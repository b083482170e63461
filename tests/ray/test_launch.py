"""What a cluster's start leaves alone in the process that starts it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.services import JEMALLOC_SO

from beats_ray.launch import allocator_environment

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SLOW_END = """
import signal, sys, time

from beats_ray.cli import _stop
from beats_ray.config import RaySettings
from beats_ray.launch import ray_cluster

signal.signal(signal.SIGTERM, _stop)
with ray_cluster(RaySettings(address="local", num_cpus=1, object_store_mib=100)):
    try:
        print("ready", flush=True)
        time.sleep(120)
    finally:
        time.sleep(5)
        print("the last checkpoint", flush=True)
"""


def test_a_command_that_is_asked_to_end_has_the_time_for_its_last_checkpoint() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_END], env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (143, "the last checkpoint\n", "")


ALLOCATOR = """
import os

import ray

from beats_ray.config import RaySettings
from beats_ray.launch import ray_cluster


@ray.remote(num_cpus=0)
def libraries():
    return "libjemalloc" in open("/proc/self/maps").read(), os.environ.get("MALLOC_CONF")


with ray_cluster(RaySettings(address="local", num_cpus=1, object_store_mib=100)):
    print(ray.get([libraries.remote(), libraries.options(runtime_env={"env_vars": {"A": "1"}}).remote()]))
"""


@pytest.mark.skipif(JEMALLOC_SO is None, reason="Ray brings no jemalloc for this platform")
def test_workers_of_a_private_cluster_allocate_with_jemalloc() -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "LD_PRELOAD", "MALLOC"))
    }
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATOR], env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=180,
    )  # fmt: skip
    assert done.stdout == f"{[(True, allocator_environment()['MALLOC_CONF'])] * 2}\n", done.stderr
