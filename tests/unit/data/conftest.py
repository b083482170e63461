"""Real object stores for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.gcs_server import BUCKET, GcsServer

from beats_ray.objectstore import EmbeddedObjectStore


@pytest.fixture(scope="module")
def running_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedObjectStore]:
    with EmbeddedObjectStore(tmp_path_factory.mktemp("store")) as store:
        store.make_bucket("beats")
        yield store


@pytest.fixture
def store(running_store: EmbeddedObjectStore, monkeypatch: pytest.MonkeyPatch) -> EmbeddedObjectStore:
    """The store, with the environment that lets this process use it."""
    set_environment(running_store, monkeypatch)
    return running_store


@pytest.fixture(scope="module")
def running_gcs_server() -> Iterator[GcsServer]:
    with GcsServer() as server:
        yield server


@pytest.fixture
def gcs_server(running_gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> GcsServer:
    """A server for `gs://`, with the environment that lets this process use it."""
    set_environment(running_gcs_server, monkeypatch)
    return running_gcs_server


def set_environment(server: EmbeddedObjectStore | GcsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["local", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "root")
    if request.param == "gs":
        request.getfixturevalue("gcs_server")
        return f"gs://{BUCKET}/{tmp_path.name}"
    request.getfixturevalue("store")
    return f"s3://beats/{tmp_path.name}"
