"""A data set that comes from and goes to `gs://`, and Ray's own files there, against a real server process."""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.gcs_server import BUCKET

from beats_ray.config import PrepareConfig, StreamSettings, load_config
from beats_ray.data.manifest import read_manifest
from beats_ray.data.prepare import prepare
from beats_ray.data.sample import make_sample_set
from beats_ray.data.storage import open_place
from beats_ray.data.stream import read_alone
from beats_ray.data.verify import verify

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.skipif(
        importlib.util.find_spec("gcp_storage_emulator") is None,
        reason="gcp-storage-emulator is not installed: nothing to test gs:// against",
    ),
]

NUM_CLIPS = 48


def test_clips_in_a_bucket_become_a_data_set_in_a_bucket_that_streams(tmp_path: Path) -> None:
    make_sample_set(tmp_path, num_clips=NUM_CLIPS, clip_seconds=0.5)
    open_place(f"gs://{BUCKET}/raw").upload(tmp_path)
    output = open_place(f"gs://{BUCKET}/data")
    settings = ["data.row_group_clips=8", "data.shard_mib=0.2"]
    for place in (output, open_place(str(tmp_path / "same"))):
        config = load_config(PrepareConfig, None, settings, source=f"gs://{BUCKET}/raw", output=place.uri)
        prepare(config, lambda *_: None)
    assert (output / "dataset.json").read_json() == (open_place(str(tmp_path / "same")) / "dataset.json").read_json()
    assert verify(output.uri, lambda *_: None).clips == NUM_CLIPS
    batches = read_alone(
        output, read_manifest(output), StreamSettings(clip_seconds=0.5), batch_size=8, num_steps=NUM_CLIPS // 8
    )
    seen = [clip_id for batch in batches for clip_id in batch.clip_ids]
    assert len(set(seen)) == len(seen) == NUM_CLIPS


@pytest.mark.slow
def test_a_sweep_keeps_its_trials_there_and_is_restored_from_there() -> None:
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "weights").write_text(str(config["x"]))
            tune.report({"loss": config["x"]}, checkpoint=tune.Checkpoint.from_directory(folder))

    folder = open_place(f"gs://{BUCKET}/tune")
    run = tune.RunConfig(name="trials", storage_path=folder.path, storage_filesystem=folder.keyless_filesystem)
    tune.Tuner(trial, param_space={"x": tune.grid_search([1, 2])}, run_config=run).fit()
    path = f"{folder.path}/trials"
    assert tune.Tuner.can_restore(path, storage_filesystem=folder.keyless_filesystem)
    restored = tune.Tuner.restore(path, trial, storage_filesystem=folder.keyless_filesystem).get_results()
    best = restored.get_best_result("loss", "min")
    checkpoint = open_place(f"gs://{best.checkpoint.path}")
    assert (checkpoint / "weights").read_bytes() == b"1"
    folder.delete()
    assert not folder.exists()
