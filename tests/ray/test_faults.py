"""Storage that fails: an epoch over a bad link holds every clip once, and a store that is gone ends it in time."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fault_proxy import FaultProxy, FaultRates

from beats_ray.config import PrepareConfig, StreamSettings, load_config
from beats_ray.data.manifest import read_manifest
from beats_ray.data.prepare import prepare
from beats_ray.data.sample import make_sample_set
from beats_ray.data.storage import open_place, with_retries
from beats_ray.data.stream import read_alone
from beats_ray.data.verify import verify
from beats_ray.inference import map_clips
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = pytest.mark.ray

NUM_CLIPS = 800
GLOBAL_BATCH = 16
OUTAGE_SECONDS = 15.0  # pyarrow alone gives up after some 10
SETTINGS = StreamSettings(clip_seconds=0.5, shuffle_window_clips=32, retry_seconds=60.0)


@pytest.fixture(scope="module")
def proxy(shared: Any) -> Iterator[FaultProxy]:
    """The proxy, which makes no mistakes any more after the module."""
    yield shared.proxy
    shared.proxy.rates = FaultRates()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("raw")
    make_sample_set(folder, num_clips=NUM_CLIPS, clip_seconds=0.5)
    return folder


@pytest.fixture(scope="module")
def dataset(proxy: FaultProxy, raw: Path) -> str:
    """Prepared over a link that fails already."""
    settings = ["data.row_group_clips=8", "data.shard_mib=0.5"]
    proxy.rates = FaultRates(errors=0.1)
    prepare(load_config(PrepareConfig, None, settings, source=str(raw), output="s3://faults/data"), lambda *_: None)
    proxy.rates = FaultRates()
    return "s3://faults/data"


@pytest.fixture(autouse=True)
def sound_again(proxy: FaultProxy) -> Iterator[None]:
    """A test that fails leaves no faults to the next."""
    yield
    proxy.rates = FaultRates()


@pytest.mark.slow
def test_prepare_outlives_faults_and_an_outage_with_the_same_bytes(proxy: FaultProxy, raw: Path) -> None:
    open_place("s3://faults/raw").upload(raw)
    settings = ["data.row_group_clips=8", "data.shard_mib=0.5", "data.retry_seconds=60"]
    faulty = FaultRates(errors=0.10, cuts=0.05)

    def fail_for_a_while() -> None:
        while proxy.counts["requests"] < 300:  # of some 2,000: clips are being read, and shards written
            time.sleep(0.05)
        proxy.rates = FaultRates(errors=1.0)
        time.sleep(OUTAGE_SECONDS)
        proxy.rates = faulty

    outage = threading.Thread(target=fail_for_a_while, daemon=True)
    for name in ("sound", "faulty"):
        proxy.counts.clear()
        if name == "faulty":
            proxy.rates = faulty
            outage.start()
        config = load_config(PrepareConfig, None, settings, source="s3://faults/raw", output=f"s3://faults/{name}")
        assert prepare(config, lambda *_: None).clips == NUM_CLIPS
    outage.join()
    proxy.rates = FaultRates()
    print(f"faults of one prepare: {dict(proxy.counts)}")
    assert proxy.counts["errors"] >= 100
    assert proxy.counts["cuts"] >= 20
    sound, faulty_output = open_place("s3://faults/sound"), open_place("s3://faults/faulty")
    names = sound.sizes(recursive=True)
    assert faulty_output.sizes(recursive=True) == names
    assert len(names) >= 2 * 16 + 3
    for name in names:
        assert (faulty_output / name).read_bytes() == (sound / name).read_bytes(), name


def clips_of_one_epoch(dataset: str) -> Counter[str]:
    """How often each clip comes in the first epoch, as a training worker reads it."""
    place = open_place(dataset)
    steps = NUM_CLIPS // GLOBAL_BATCH
    batches = read_alone(place, read_manifest(place), SETTINGS, batch_size=GLOBAL_BATCH, num_steps=steps, seed=1)
    return Counter(clip_id for batch in batches for clip_id in batch.clip_ids)


def test_errors_cut_connections_and_stalls_lose_and_repeat_nothing(dataset: str, proxy: FaultProxy) -> None:
    proxy.counts.clear()
    proxy.rates = FaultRates(errors=0.10, cuts=0.05, stalls=0.03)
    seen = clips_of_one_epoch(dataset)
    proxy.rates = FaultRates()
    assert len(seen) == NUM_CLIPS
    assert set(seen.values()) == {1}
    print(f"faults of one epoch: {dict(proxy.counts)}")
    assert proxy.counts["errors"] >= 5
    assert proxy.counts["cuts"] >= 3
    assert proxy.counts["stalls"] >= 1


def test_verify_asks_again_whatever_it_reads(dataset: str, proxy: FaultProxy) -> None:
    status = 501  # so that asking again is not pyarrow's doing

    def answer_most() -> None:
        while proxy.counts["errors"] < 3:  # all of them for dataset.json
            time.sleep(0.01)
        proxy.rates = FaultRates(errors=0.1, statuses=(status,))

    proxy.counts.clear()
    proxy.rates = FaultRates(errors=1.0, statuses=(status,))
    threading.Thread(target=answer_most, daemon=True).start()
    accounts = verify(dataset, lambda *_: None, retry_seconds=60.0)
    proxy.rates = FaultRates()
    assert (accounts.clips, accounts.source_files) == (NUM_CLIPS, NUM_CLIPS)
    assert proxy.counts["errors"] >= 20


def test_batch_inference_asks_again_and_sees_every_clip_once(dataset: str, proxy: FaultProxy) -> None:
    class Lengths:  # here, so that the actors, which do not know this module, get it by value
        def __init__(self, model: None) -> None:
            del model

        def __call__(self, wave_BS: Any, num_samples_B: Any) -> dict[str, Any]:
            return {"length": num_samples_B.numpy()}

    place = open_place(dataset)
    proxy.counts.clear()
    proxy.rates = FaultRates(errors=0.1, statuses=(501,))  # so that asking again is not pyarrow's doing
    clips = Counter(
        clip_id
        for table in map_clips(place, with_retries(lambda: read_manifest(place), 60.0), Lengths, num_workers=1)
        for clip_id in table["clip_id"].to_pylist()
    )
    proxy.rates = FaultRates()
    assert len(clips) == NUM_CLIPS
    assert set(clips.values()) == {1}
    assert proxy.counts["errors"] >= 5


def test_a_server_that_is_restarted_in_mid_epoch_costs_nothing_but_time(
    dataset: str, proxy: FaultProxy, store: EmbeddedObjectStore
) -> None:
    proxy.counts.clear()
    proxy.rates = FaultRates(stalls=0.1)  # so that the epoch lasts until the restart
    found: list[Counter[str]] = []
    reader = threading.Thread(target=lambda: found.append(clips_of_one_epoch(dataset)), daemon=True)
    reader.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and proxy.counts["requests"] < 120:
        time.sleep(0.05)
    before = proxy.counts["requests"]
    store.stop()  # in the main thread: the server ends with the thread that starts it
    time.sleep(5.0)
    store.start()
    proxy.rates = FaultRates()
    reader.join(120)
    assert not reader.is_alive()
    assert proxy.counts["unreachable"] >= 1, f"nobody asked while the server was away ({before} requests before)"
    assert len(found[0]) == NUM_CLIPS
    assert set(found[0].values()) == {1}


def test_a_server_that_is_gone_for_good_ends_the_stream_with_one_clear_line(
    dataset: str, proxy: FaultProxy, store: EmbeddedObjectStore
) -> None:
    from beats_ray.cli import find_user_error

    place = open_place(dataset)
    manifest = read_manifest(place)
    settings = StreamSettings(clip_seconds=0.5, retry_seconds=5.0)
    batches = read_alone(place, manifest, settings, batch_size=GLOBAL_BATCH, num_steps=10 * NUM_CLIPS // GLOBAL_BATCH)
    next(batches)
    store.stop()
    try:
        started = time.monotonic()
        with pytest.raises(Exception, match="cannot be reached") as caught:
            list(batches)
        assert time.monotonic() - started < 120
        mistake = find_user_error(caught.value)
        assert mistake is not None
        assert str(mistake).startswith("s3://faults/data/shards/")
        assert "check AWS_ENDPOINT_URL and that the store runs" in str(mistake)
    finally:
        store.start()
