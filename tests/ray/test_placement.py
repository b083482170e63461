"""Reading and decoding on their own nodes: a cluster of several raylets, and where the tasks of the stream ran."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from beats_ray.config import PrepareConfig, StreamSettings, TrainSettings, load_config
from beats_ray.data import stream
from beats_ray.data.manifest import read_manifest
from beats_ray.data.prepare import prepare
from beats_ray.data.sample import make_sample_set
from beats_ray.data.shards import WindowReader
from beats_ray.data.storage import Place, open_place
from beats_ray.launch import check_fits

pytestmark = pytest.mark.ray

NUM_CLIPS = 64
WAIT_SECONDS = 10.0


@pytest.fixture
def add_data_node(shared: Any) -> Iterator[Callable[[], str]]:
    """Adds a node with the label, for the time of the test; returns its id."""
    added = []

    def add() -> str:
        node = shared.nodes.add_node(num_cpus=2, labels=dict(stream.DATA_NODE_LABELS))
        added.append(node)
        return str(node.node_id)

    yield add
    for node in added:
        shared.nodes.remove_node(node)


@pytest.fixture(scope="module")
def dataset(shared: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("data")
    make_sample_set(folder / "raw", num_clips=NUM_CLIPS, clip_seconds=0.5)
    config = load_config(PrepareConfig, None, [], source=str(folder / "raw"), output=str(folder / "out"))
    prepare(config, lambda *_: None)
    return open_place(config.output)


class Trace:
    """Where the tasks of the stream run: each leaves a file that names the step and the node."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        open_reader, example_decoder = stream.open_reader, stream.example_decoder

        def open_traced(*arguments: Any) -> Any:
            reader = open_reader(*arguments)

            class TracedReader(WindowReader):  # local, so that it travels to the workers by value
                def read(self, *arguments: Any) -> Any:
                    return _traced(super().read, folder, "read")(*arguments)

            return TracedReader(**{field.name: getattr(reader, field.name) for field in fields(reader)})

        monkeypatch.setattr(stream, "open_reader", open_traced)
        monkeypatch.setattr(
            stream, "example_decoder", lambda *arguments: _traced(example_decoder(*arguments), folder, "decode")
        )

    def nodes_of(self, step: str) -> set[str]:
        return {path.suffix[1:] for path in self.folder.glob(f"{step}.*")}


def _traced(work: Callable[..., Any], folder: Path, step: str) -> Callable[..., Any]:
    def traced(*arguments: Any) -> Any:
        import ray

        (folder / f"{step}.{ray.get_runtime_context().get_node_id()}").touch()
        return work(*arguments)

    return traced


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    return Trace(tmp_path, monkeypatch)


def clips_seen(dataset: Place, placement: str) -> list[str]:
    settings = StreamSettings.model_validate({"clip_seconds": 0.5, "buffer_mib": 32, "placement": placement})
    manifest = read_manifest(dataset)
    batches = stream.read_alone(dataset, manifest, settings, batch_size=8, num_steps=NUM_CLIPS // 8)
    return sorted(clip_id for batch in batches for clip_id in batch.clip_ids)


@pytest.mark.parametrize("placement", ["auto", "anywhere"])
def test_without_data_nodes_any_node_reads(
    dataset: Place, trace: Trace, placement: str, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    assert len(set(clips_seen(dataset, placement))) == NUM_CLIPS
    (head,) = (node["NodeID"] for node in ray.nodes() if node["Alive"])
    assert trace.nodes_of("read") == trace.nodes_of("decode") == {head}
    assert "beats-ray/role" not in caplog.text


def test_auto_reads_and_decodes_on_the_data_nodes_alone(
    dataset: Place, trace: Trace, add_data_node: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    data_node = add_data_node()
    assert len(set(clips_seen(dataset, "auto"))) == NUM_CLIPS
    assert trace.nodes_of("read") == trace.nodes_of("decode") == {data_node}
    assert "beats-ray/role" not in caplog.text


@pytest.mark.slow
def test_data_nodes_that_are_missing_are_named_and_waited_for(
    dataset: Place, trace: Trace, add_data_node: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[list[str]] = []
    reader = threading.Thread(target=lambda: seen.append(clips_seen(dataset, "data-nodes")), daemon=True)
    reader.start()
    reader.join(WAIT_SECONDS)
    assert not seen
    assert not trace.nodes_of("read")
    assert "no node of the cluster has the label beats-ray/role=data; reading waits until one joins" in caplog.text
    data_node = add_data_node()
    reader.join(120)
    assert len(set(seen[0])) == NUM_CLIPS
    assert trace.nodes_of("read") == trace.nodes_of("decode") == {data_node}


def test_a_training_run_says_at_its_start_that_data_nodes_are_missing(
    shared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train = TrainSettings(num_workers=1, cpus_per_worker=1)
    check_fits(train, StreamSettings(placement="data-nodes"))
    assert "data.placement=data-nodes: no node of the cluster has the label" in caplog.text
    caplog.clear()
    check_fits(train, StreamSettings())
    assert not caplog.text
