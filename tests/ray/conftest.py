"""A cluster and an object store that the tests of a module share."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from beats_ray.objectstore import EmbeddedObjectStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedObjectStore]:
    with EmbeddedObjectStore(tmp_path_factory.mktemp("store")) as store, pytest.MonkeyPatch.context() as patch:
        for bucket in ("beats", "clips"):
            store.make_bucket(bucket)
        for name, value in store.environment().items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="module")
def cluster(store: EmbeddedObjectStore) -> Iterator[EmbeddedObjectStore]:
    """A private cluster whose processes know the store; yields the store."""
    import ray

    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="br-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=300 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        yield store
        ray.shutdown()
