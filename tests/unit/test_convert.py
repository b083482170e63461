"""`import` and `export`, there and back, and models on object storage."""

import time
from pathlib import Path

import pytest
import torch

import beats_ray
from beats_ray import cli
from beats_ray.data.storage import open_place
from beats_ray.models import AudioClassifier, BeatsEncoder, ClassifierConfig, encoder_config, save_model, save_released
from beats_ray.objectstore import EmbeddedObjectStore

pytestmark = pytest.mark.unit

TINY = encoder_config("tiny", num_layers=1)


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_goes_out_as_a_released_file_and_comes_back_as_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = AudioClassifier(BeatsEncoder(TINY), ClassifierConfig(num_classes=2, multi_label=False), ["dog", "rain"])
    folder = save_model(module, tmp_path / "model")
    assert cli.main(["export", str(folder), str(tmp_path / "mine.pt")]) == 0
    assert cli.main(["import", str(tmp_path / "mine.pt"), str(tmp_path / "back")]) == 0
    assert "classifier, " in capsys.readouterr().out
    back = beats_ray.load(tmp_path / "back")
    assert isinstance(back, AudioClassifier)
    assert equal(back, module)
    assert (back.class_names, back.config) == (["dog", "rain"], module.config)
    assert cli.main(["export", str(folder), str(tmp_path / "mine.pt")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "mine.pt"), str(tmp_path / "back")]) == 2


def test_what_is_no_checkpoint_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"RIFF")
    assert cli.main(["import", str(tmp_path / "bad.pt"), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "is no PyTorch checkpoint" in err
    assert not (tmp_path / "out").exists()


def test_models_load_from_object_storage_and_a_changed_one_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedObjectStore(tmp_path / "store") as store:
        store.make_bucket("models")
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the cache of fetched models
        for seed in (0, 1):
            time.sleep(1.1 * seed)  # object stores tell times in seconds
            torch.manual_seed(seed)
            encoder = BeatsEncoder(TINY)
            open_place("s3://models/a.pt").write_bytes(save_released(encoder, tmp_path / "a.pt").read_bytes())
            open_place("s3://models/folder").upload(save_model(encoder, tmp_path / "folder"))
            assert equal(beats_ray.load("s3://models/a.pt"), encoder)
            assert equal(beats_ray.load("s3://models/folder"), encoder)
        with pytest.raises(ValueError, match=r"model=s3://models/none\.pt"):
            beats_ray.load("s3://models/none.pt")
