"""Exported models: one program from waveform to result, with dynamic batch and length.

    export_model(classifier, "birds.onnx")      # for onnxruntime and other engines
    export_model(encoder, "beats.pt2")          # torch.export; load it with torch.export.load

Inputs: `wave` (clips, samples), float32 in [-1, 1] at 16 kHz, zeros after a clip's end, and `num_samples` (clips,),
int64, the samples of each clip. Outputs of an encoder: `features` (clips, patches, width) and `is_pad` (clips,
patches), True at padding, where features are zeros. Output of a classifier: `probabilities` (clips, classes).
The filterbank is part of the program, so nothing has to be computed outside. An ONNX file's metadata have
`sample_rate_hz` and, of a classifier, `class_names` as JSON.
"""

import copy
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beats_ray.models.config import SAMPLE_RATE_HZ
from beats_ray.models.encoder import BeatsEncoder
from beats_ray.models.fbank import FRAME_SAMPLES, SHIFT_SAMPLES
from beats_ray.models.heads import AudioClassifier

EXPORTED_SUFFIXES = (".onnx", ".pt2")
LONGEST_SECONDS = 3600
EXAMPLE_SAMPLES = (2 * SAMPLE_RATE_HZ, SAMPLE_RATE_HZ)  # two clips of unequal length to trace with


class EncoderFromWaveform(nn.Module):
    """An encoder as it is exported: (wave, num_samples) -> (features, is_pad)."""

    output_names = ("features", "is_pad")

    def __init__(self, encoder: BeatsEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, wave_BS: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features_BND (zeros at padding) and is_pad_BN."""
        output = self.encoder.features_from_waveform(wave_BS, num_samples_B)
        return output.features_BND, output.is_pad_BN


class ClassifierFromWaveform(nn.Module):
    """A classifier as it is exported: (wave, num_samples) -> probabilities."""

    output_names = ("probabilities",)

    def __init__(self, classifier: AudioClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, wave_BS: Tensor, num_samples_B: Tensor) -> Tensor:
        """Returns probabilities_BC."""
        fbank_BTF, num_frames_B = self.classifier.encoder.normalised_fbank(wave_BS, num_samples_B)
        return self.classifier.probabilities(self.classifier(fbank_BTF, num_frames_B))


def from_waveform(module: nn.Module) -> EncoderFromWaveform | ClassifierFromWaveform:
    """A copy on the CPU, in eval mode, of what is exported; to compare an exported program with.

    ValueError for another kind.
    """
    if isinstance(module, BeatsEncoder):
        return EncoderFromWaveform(copy.deepcopy(module)).cpu().eval()
    if isinstance(module, AudioClassifier):
        return ClassifierFromWaveform(copy.deepcopy(module)).cpu().eval()
    raise ValueError(f"a {type(module).__name__} cannot be exported; encoders and classifiers can")


def shortest_samples(module: nn.Module) -> int:
    """Samples of the shortest batch that an exported program takes: two time steps of patches (335 ms).

    A dimension of 1 would be traced as a constant. Shorter clips go in padded, with their length in `num_samples`.
    """
    encoder = module.encoder if isinstance(module, AudioClassifier) else module
    assert isinstance(encoder, BeatsEncoder)
    return FRAME_SAMPLES + (2 * encoder.config.patch_size - 1) * SHIFT_SAMPLES


def export_model(module: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Writes an encoder or a classifier as an ONNX graph (`.onnx`) or as a `torch.export` program (`.pt2`).

    A batch may have any number of clips of up to an hour; it must be padded to at least `shortest_samples`.
    Raises ValueError for another kind of module or ending, and ImportError where ONNX's packages are missing.
    """
    file = Path(path)
    if file.suffix not in EXPORTED_SUFFIXES:
        raise ValueError(f"{file} must end with one of {', '.join(EXPORTED_SUFFIXES)}")
    whole = from_waveform(module)
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as staging,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # advice to PyTorch's own developers
        program = _trace(whole, shortest_samples(module))
        written = Path(staging) / file.name
        if file.suffix == ".pt2":
            torch.export.save(program, written)
        else:
            _save_onnx(program, whole, written)
        written.replace(file)
    return file


def _trace(whole: nn.Module, shortest: int) -> torch.export.ExportedProgram:
    wave_BS = torch.zeros(len(EXAMPLE_SAMPLES), max(EXAMPLE_SAMPLES))
    example = (wave_BS, torch.tensor(EXAMPLE_SAMPLES))
    whole(*example)  # fills the tables of the filterbank, which become constants of the program
    batch = torch.export.Dim("batch", min=1)
    samples = torch.export.Dim("samples", min=shortest, max=LONGEST_SECONDS * SAMPLE_RATE_HZ)
    shapes: Any = {"wave_BS": {0: batch, 1: samples}, "num_samples_B": {0: batch}}
    # Deferred: that 16 * (frames // 16) <= frames holds for every length is beyond the solver.
    return torch.export.export(
        whole, example, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
    )


def _save_onnx(
    program: torch.export.ExportedProgram, whole: EncoderFromWaveform | ClassifierFromWaveform, file: Path
) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(
            "export to ONNX needs the packages onnx and onnxscript: pip install onnx onnxscript"
        ) from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    exported = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["wave", "num_samples"], output_names=list(whole.output_names)
    )
    assert exported is not None
    names = whole.classifier.class_names if isinstance(whole, ClassifierFromWaveform) else None
    facts = {"sample_rate_hz": str(SAMPLE_RATE_HZ)} | ({"class_names": json.dumps(names)} if names else {})
    exported.model.metadata_props.update(facts)
    exported.save(file)
