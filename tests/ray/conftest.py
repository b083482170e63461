"""One cluster, and the object stores that its processes know, for all tests of this folder.

Starting Ray takes ten seconds, and the first task of each kind as long again to import what it needs: the modules share
both. They end with the last test of the folder. Modules keep apart by the buckets and folders that they write to; a
test that needs Ray in another state starts it in a process of its own.
"""

import contextlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.fault_proxy import FaultProxy, FaultRates
from support.gcs_server import GcsServer

from beats_ray.launch import _RAY_ENVIRONMENT
from beats_ray.objectstore import EmbeddedObjectStore

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Shared:
    """What runs for the whole folder; the environment of this process and of the cluster's names it."""

    store: EmbeddedObjectStore
    proxy: FaultProxy
    """What everybody takes for the store's address; a test may let it make mistakes for a while."""
    nodes: Any
    """The `ray.cluster_utils.Cluster`: a head node of 4 CPUs, to which a test may add others for a while."""


SHARED = pytest.StashKey[Shared]()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = request.node.parent
    if SHARED not in folder.stash:
        running = contextlib.ExitStack()
        folder.addfinalizer(running.close)
        folder.stash[SHARED] = running.enter_context(_start(tmp_path_factory.mktemp("store")))
        running.callback(folder.stash.__delitem__, SHARED)
    found: Shared = folder.stash[SHARED]
    return found


@contextlib.contextmanager
def _start(folder: Path) -> Iterator[Shared]:
    with (
        EmbeddedObjectStore(folder) as store,
        FaultProxy(lambda: store.endpoint, FaultRates()) as proxy,
        contextlib.ExitStack() as others,
        pytest.MonkeyPatch.context() as patch,
    ):
        for bucket in ("beats", "clips", "faults"):
            store.make_bucket(bucket)
        environment = {
            name: proxy.endpoint if "ENDPOINT" in name else value for name, value in store.environment().items()
        }
        if importlib.util.find_spec("gcp_storage_emulator"):
            environment |= others.enter_context(GcsServer()).environment()
        for name, value in (_RAY_ENVIRONMENT | environment).items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        with _nodes() as nodes:
            yield Shared(store, proxy, nodes)


@contextlib.contextmanager
def _nodes() -> Iterator[Any]:
    """A private cluster of one node, which ends by its own handle."""
    import ray
    from ray.cluster_utils import Cluster

    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setattr("ray._private.utils.write_ray_address", lambda *_: None)  # for all clusters of this machine
        nodes = Cluster()
        try:
            nodes.add_node(num_cpus=4, object_store_memory=300 * 2**20, include_dashboard=False, temp_dir=folder)
            ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def store(shared: Shared) -> EmbeddedObjectStore:
    return shared.store


@pytest.fixture(scope="module")
def cluster(shared: Shared) -> EmbeddedObjectStore:
    """Ray is initialised, and its processes know the store, which this is."""
    return shared.store
