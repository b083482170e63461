"""Exported programs, run by other engines, give what the module gives, for any batch and length."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from beats_ray.models import (
    AudioClassifier,
    BeatsEncoder,
    ClassifierConfig,
    RandomProjectionTokenizer,
    encoder_config,
    export_model,
)
from beats_ray.models.export import from_waveform, shortest_samples

pytestmark = pytest.mark.unit

TINY = encoder_config("tiny", num_layers=2)
PRE_NORM = encoder_config("tiny", num_layers=1, pre_norm=True, deep_norm=False, gated_relative_bias=False)


def encoder() -> nn.Module:
    return BeatsEncoder(TINY)


def pre_norm_encoder() -> nn.Module:
    return BeatsEncoder(PRE_NORM)


def multi_label() -> nn.Module:
    return AudioClassifier(BeatsEncoder(PRE_NORM), ClassifierConfig(num_classes=5, multi_label=True))


def attentive() -> nn.Module:
    return AudioClassifier(BeatsEncoder(PRE_NORM), ClassifierConfig(num_classes=5, pooling="attention"))


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Batches other than the one that is traced: a single clip, the shortest, unequal ones, a minute."""
    made = []
    for clips, samples, shortest in ((1, 40_000, 40_000), (1, 5360, 5360), (3, 33_333, 401), (2, 960_000, 700_000)):
        wave = torch.randn(clips, samples) * 0.1
        lengths = torch.full((clips,), samples)
        lengths[-1] = shortest
        wave[-1, shortest:] = 0.0
        made.append((wave, lengths))
    return made


def run_onnx(path: Path) -> Callable[[Tensor, Tensor], list[Tensor]]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path))

    def run(wave: Tensor, lengths: Tensor) -> list[Tensor]:
        found = session.run(None, {"wave": wave.numpy(), "num_samples": lengths.numpy()})
        return [torch.from_numpy(np.asarray(one)) for one in found]

    return run


def run_program(path: Path) -> Callable[[Tensor, Tensor], list[Tensor]]:
    program: Any = torch.export.load(path).module()

    def run(wave: Tensor, lengths: Tensor) -> list[Tensor]:
        found = program(wave, lengths)
        return [found] if isinstance(found, Tensor) else list(found)

    return run


CASES = [
    (encoder, ".onnx"),
    (encoder, ".pt2"),
    (multi_label, ".pt2"),
    (attentive, ".onnx"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "suffix"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_an_exported_model_gives_what_the_module_gives(
    make: Callable[[], nn.Module], suffix: str, tmp_path: Path
) -> None:
    module = randomised(make())
    path = export_model(module, tmp_path / f"model{suffix}")
    run = run_onnx(path) if suffix == ".onnx" else run_program(path)
    whole = from_waveform(module)
    assert shortest_samples(module) == 5360
    for wave, lengths in batches():
        with torch.no_grad():
            expected = whole(wave, lengths)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        found = run(wave, lengths)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            if theirs.dtype == torch.bool:
                assert torch.equal(ours, theirs)
            else:
                assert (ours - theirs).abs().max() < 1e-3, (wave.shape, float((ours - theirs).abs().max()))
        if isinstance(module, BeatsEncoder):
            assert float(found[0].abs().max()) > 0.1


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_says_its_sample_rate_and_class_names(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    module = AudioClassifier(BeatsEncoder(PRE_NORM), ClassifierConfig(num_classes=2), ["dog", "Tür"]).train()
    session = onnxruntime.InferenceSession(str(export_model(module, tmp_path / "model.onnx")))
    found = session.get_modelmeta().custom_metadata_map
    assert found["sample_rate_hz"] == "16000"
    assert json.loads(found["class_names"]) == ["dog", "Tür"]
    assert module.training  # the caller's model stays as it was


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (encoder, "model.tflite", "must end with one of .onnx, .pt2"),
        (RandomProjectionTokenizer, "model.onnx", "a RandomProjectionTokenizer cannot be exported"),
    ],
)
def test_what_cannot_be_exported_is_named(
    make: Callable[[], nn.Module], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(make(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_onnx_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_onnxscript(name: str, *rest: Any, **options: Any) -> Any:
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_onnxscript)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export_model(pre_norm_encoder().eval(), tmp_path / "model.onnx")
