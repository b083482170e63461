"""BEATs models in plain PyTorch: encoder, tokenizers, label predictor, classifier, and their files.

Nothing here imports Ray or DeepSpeed. The names below are imported on first use, so that `beats_ray.models.config` (and
with it the configuration of the whole package) costs no import of torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beats_ray.models.checkpoints import describe_model, load_model, save_model
    from beats_ray.models.config import ENCODER_PRESETS, EncoderConfig, encoder_config
    from beats_ray.models.encoder import BeatsEncoder, EncoderOutput, build_encoder
    from beats_ray.models.export import export_model
    from beats_ray.models.fbank import compute_fbank, normalise_fbank, num_frames, num_patches
    from beats_ray.models.heads import AudioClassifier, ClassifierConfig, ClassifierOutput
    from beats_ray.models.masking import PatchMask, sample_patch_mask
    from beats_ray.models.patches import patch_padding
    from beats_ray.models.predictor import MaskedPatchPredictor, PredictorConfig
    from beats_ray.models.quantizer import CosineQuantizer, QuantizerConfig, codebook_usage
    from beats_ray.models.released import load_released, save_released
    from beats_ray.models.tokenizers import (
        DistillationConfig,
        DistillationModel,
        DistillationOutput,
        RandomProjectionConfig,
        RandomProjectionTokenizer,
        SelfDistilledTokenizer,
        TokenizerConfig,
    )

__all__ = [
    "ENCODER_PRESETS",
    "AudioClassifier",
    "BeatsEncoder",
    "ClassifierConfig",
    "ClassifierOutput",
    "CosineQuantizer",
    "DistillationConfig",
    "DistillationModel",
    "DistillationOutput",
    "EncoderConfig",
    "EncoderOutput",
    "MaskedPatchPredictor",
    "PatchMask",
    "PredictorConfig",
    "QuantizerConfig",
    "RandomProjectionConfig",
    "RandomProjectionTokenizer",
    "SelfDistilledTokenizer",
    "TokenizerConfig",
    "build_encoder",
    "codebook_usage",
    "compute_fbank",
    "describe_model",
    "encoder_config",
    "export_model",
    "load_model",
    "load_released",
    "normalise_fbank",
    "num_frames",
    "num_patches",
    "patch_padding",
    "sample_patch_mask",
    "save_model",
    "save_released",
]

_HOMES = {
    "AudioClassifier": "heads",
    "BeatsEncoder": "encoder",
    "ClassifierConfig": "heads",
    "ClassifierOutput": "heads",
    "CosineQuantizer": "quantizer",
    "DistillationConfig": "tokenizers",
    "DistillationModel": "tokenizers",
    "DistillationOutput": "tokenizers",
    "ENCODER_PRESETS": "config",
    "EncoderConfig": "config",
    "EncoderOutput": "encoder",
    "MaskedPatchPredictor": "predictor",
    "PatchMask": "masking",
    "PredictorConfig": "predictor",
    "QuantizerConfig": "quantizer",
    "RandomProjectionConfig": "tokenizers",
    "RandomProjectionTokenizer": "tokenizers",
    "SelfDistilledTokenizer": "tokenizers",
    "TokenizerConfig": "tokenizers",
    "build_encoder": "encoder",
    "codebook_usage": "quantizer",
    "compute_fbank": "fbank",
    "describe_model": "checkpoints",
    "encoder_config": "config",
    "export_model": "export",
    "load_model": "checkpoints",
    "load_released": "released",
    "normalise_fbank": "fbank",
    "num_frames": "fbank",
    "num_patches": "fbank",
    "patch_padding": "patches",
    "sample_patch_mask": "masking",
    "save_model": "checkpoints",
    "save_released": "released",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
